"""Merges successive transposes, and successive reshapes, into one or none.

A filter that was written for NCHW brings its own transposes, which often meet those that the
model made to get there.
"""

import onnx_ir as ir
from onnxscript.rewriter import RewritePass, RewriteRuleSet
from onnxscript.rewriter.rules.common import (
    no_op_transpose_rule,
    reshape_reshape_rule,
    transpose_transpose_rule,
)


def merge_layout_changes(model: ir.Model) -> bool:
    """Merges what follows directly on one another in `model`; whether anything did."""
    rules = RewriteRuleSet([transpose_transpose_rule, no_op_transpose_rule, reshape_reshape_rule])
    return bool(RewritePass(rules)(model).modified)
