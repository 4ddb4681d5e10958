"""How each ONNX operator is written in TFLite's: one function each, registered by `lowers`."""

from gfcompile.targets.tflite.operators import (  # noqa: F401 - they register
    activations,
    arithmetic,
    filters,
    indexing,
    layout,
    normalization,
    products,
    quantization,
    reductions,
)
