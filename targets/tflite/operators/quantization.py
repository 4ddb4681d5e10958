"""QuantizeLinear, DequantizeLinear, Cast."""

import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from gfcompile.targets.onnx_values import dtype_of, input_of, scalar_quantization, shape_of
from gfcompile.targets.tflite.emitter import Emitter, channels_last, lowers
from gfcompile.targets.tflite.model_file import Quantization


@lowers("QuantizeLinear")
def lower_quantize(emit: Emitter, node: ir.Node) -> None:
    """To integers, unless the operator before has written them already (`Emitter.result`)."""
    x, y = input_of(node, 0), node.outputs[0]
    wanted = Quantization.per_tensor(*scalar_quantization(node))
    as_image = emit.is_image(x)
    source = emit.image(x) if as_image else emit.stored(x)
    if source.dtype == dtype_of(y) and wanted.equals(source.quantization):
        emit.hold(y, source, as_image=as_image)
        return
    if source.quantization is not None and not emit.integer_only:
        # From one scale to another: by way of real values, as the graph has it. TFLite's own
        # operator rounds a fixed-point product instead.
        source = emit.dequantized(source)
    shape = channels_last(shape_of(y)) if as_image else shape_of(y)
    result = emit.file.tensor(str(y.name), dtype_of(y), shape, wanted)
    emit.operator("QUANTIZE", [source], [result], schema.QuantizeOptionsT())
    emit.hold(y, result, as_image=as_image)


@lowers("DequantizeLinear")
def lower_dequantize(emit: Emitter, node: ir.Node) -> None:
    """Nothing yet: who needs the real values asks for them."""
    x, y = input_of(node, 0), node.outputs[0]
    if emit.is_image(x):
        emit.hold(y, emit.image(x), as_image=True)
    else:
        emit.hold(y, emit.stored(x))


@lowers("Cast")
def lower_cast(emit: Emitter, node: ir.Node) -> None:
    source = emit.real(node.inputs[0])
    if source.dtype == {"int64": "int32"}.get(dtype_of(node.outputs[0]), dtype_of(node.outputs[0])):
        emit.hold(node.outputs[0], source)
        return
    result = emit.result(node)
    options = schema.CastOptionsT()
    options.inDataType = getattr(schema.TensorType, source.dtype.upper())
    options.outDataType = getattr(schema.TensorType, result.dtype.upper())
    emit.operator("CAST", [source], [result], options)
