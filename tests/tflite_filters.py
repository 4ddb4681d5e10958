"""Graphs of one global filter."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_models import model_of

from gfcompile.compile.passes.filter_functions import filter_function


def filter_model(form: str, shape: tuple[int, ...], *weights: npt.NDArray[np.generic]) -> ir.Model:
    """x (B, h*w, C) -> its filtered grid, as tokens."""
    batch, h, w, c = shape
    names = ["k_re", "k_im"] if form == "dft" else ["kernel"]
    halves = weights[0].dtype == np.float16
    casts = "  ".join(f"{n} = Cast<to=1>({n}_half)" for n in names) if halves else ""
    function = filter_function(form, h, w, 20)  # type: ignore[arg-type]
    text = (
        f"g (float[{batch},{h * w},{c}] x) => (float[{batch},{h * w},{c}] y) {{ {casts} "
        f" i = Reshape(x, grid)  f = Identity(i)  y = Reshape(f, tokens) }}"
    )
    stored = {f"{n}_half" if halves else n: array for n, array in zip(names, weights, strict=True)}
    model = model_of(
        text,
        grid=np.array(shape),
        tokens=np.array([batch, h * w, c]),
        **(stored if halves else {}),
    )
    (identity,) = (node for node in model.graph if node.op_type == "Identity")
    values = [identity.inputs[0]]
    for name in names:
        found = [v for node in model.graph for v in node.outputs if v.name == name]
        if not found:
            value = ir.val(name, const_value=ir.tensor(stored[name], name=name))
            model.graph.register_initializer(value)
            found = [value]
        values += found
    model.functions[function.identifier()] = function
    model.graph.opset_imports[function.domain] = 1
    call = ir.node(
        function.name,
        values,
        {"channels": c} if form == "circular" else {},
        domain=function.domain,
        outputs=[ir.val("filtered")],
        name="filter",
    )
    call.outputs[0].shape, call.outputs[0].dtype = identity.outputs[0].shape, ir.DataType.FLOAT
    model.graph.insert_before(identity, call)
    identity.replace_input_with(0, call.outputs[0])
    return model
