"""What functions of every device share that have optional parameters."""

from typing import Any

from tvm import tirx


def keep_params(func: Any, names: tuple[str, ...]) -> Any:
    """`func` with only the parameters called `names`; its body must not mention the others."""
    params = [param for param in func.params if param.name in names]
    return tirx.PrimFunc(params, func.body, func.ret_type, func.attrs)
