"""Computes what does not depend on the input, once, here."""

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer import fold_constants as fold

# int8 weights behind their scale are what quantization is for: they stay folded.
_KEPT = frozenset(("QuantizeLinear", "DequantizeLinear"))
_NO_LIMIT = 2**31


def fold_constants(model: ir.Model) -> bool:
    """Folds every node of `model` whose inputs are constants; whether there were any.

    Q/DQ of constants stays. All constants end as initializers.
    """
    result = fold(
        model,
        input_size_limit=_NO_LIMIT,
        output_size_limit=_NO_LIMIT,
        should_fold=lambda node: False if node.op_type in _KEPT else None,
    )
    lifted = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return bool(result.modified or lifted.modified)
