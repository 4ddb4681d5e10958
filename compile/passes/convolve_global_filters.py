"""Writes each circular global filter as what it is: a depthwise convolution of a periodic image.

In integers that is the form to have: its kernel has a scale for each channel, and its values span
no more than the image's, while a spectrum's span is that of its largest frequency.
"""

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.filter_functions import parse_function_name
from gfcompile.compile.passes.graph import Builder, input_of, replace, shape_of
from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import constant


def convolve_global_filters(model: ir.Model) -> bool:
    """Rewrites all filters of `model`; whether there was any.

    Raises:
        CompileError: one is in another form than circular.
    """
    found = False
    for node in list(model.graph):
        parsed = parse_function_name(node.op_type) if node.domain == "gfcompile" else None
        if parsed is not None:
            form, h, w = parsed
            if form != "circular":
                raise CompileError(
                    f"{node.op_type} (node {node.name}) has no integer form: a spectrum is in "
                    "floating point; compile with --fft circular, or for tflite-xnnpack"
                )
            _rewrite(node, h, w)
            found = True
    return found


def _rewrite(node: ir.Node, h: int, w: int) -> None:
    x, y = input_of(node, 0), node.outputs[0]
    kernel = constant(input_of(node, 1))  # (h, w, C)
    if kernel is None:
        raise CompileError(f"{node.name}: the filter's weights must be constants")
    batch, _, _, channels = shape_of(x)
    stem = str(y.name)
    build = Builder(node)
    image = build.transpose(x, (0, 3, 1, 2), stem=f"{stem}_image")
    for axis, size in ((2, h), (3, w)):
        if size == 1:
            continue
        shape = list(shape_of(image))
        shape[axis] = size - 1
        ends = [
            build.constant(f"{stem}_{name}", np.array([value], np.int64))
            for name, value in (("from", 1), ("to", size), ("axis", axis))
        ]
        before = build.node("Slice", [image, *ends], tuple(shape), stem=f"{stem}_before")
        shape[axis] = 2 * size - 1
        image = build.node(
            "Concat", [before, image], tuple(shape), stem=f"{stem}_periodic", axis=axis
        )
    # Convolutions of networks are correlations: the kernel is turned round.
    turned = np.asarray(kernel, np.float32)[::-1, ::-1].transpose(2, 0, 1)[:, np.newaxis]
    weight = build.constant(f"{stem}_turned", turned)
    filtered = build.node(
        "Conv",
        [image, weight],
        (batch, channels, h, w),
        stem=f"{stem}_filtered",
        group=channels,
        kernel_shape=[h, w],
    )
    replace(y, build.transpose(filtered, (0, 2, 3, 1), stem=f"{stem}_grid"))
