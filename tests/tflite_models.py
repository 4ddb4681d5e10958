"""Graphs as .tflite files, run by LiteRT, beside ONNX Runtime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.compile.trace import rounding_tolerance, session
from gfcompile.runtime.tflite import TfliteInterpreter
from gfcompile.targets.tflite.emit import TfliteModel, emit

Array = npt.NDArray[Any]


def to_tflite_layout(array: Array) -> Array:
    """Images come channels last."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


def run_tflite(made: TfliteModel, *inputs: Array, delegate: bool = True) -> list[Array]:
    """The outputs of an emitted file, in the order of its signature."""
    interpreter = TfliteInterpreter(made.content, delegate=delegate)
    results = interpreter.run(*map(to_tflite_layout, inputs))
    return [results[tensor.name] for tensor in made.outputs.values()]


def check_tflite(model: ir.Model, *inputs: Array) -> TfliteModel:
    """The file for `model`, whose float outputs agree with ONNX Runtime's up to rounding."""
    made = emit(model)
    expected = _onnx_outputs(model, inputs)
    # What delegates make of exponentials and error functions is good to a few roundings more.
    tolerance = rounding_tolerance(model) + 4e-6
    for delegate in (True, False):
        actual = run_tflite(made, *inputs, delegate=delegate)
        for wanted, got in zip(expected, actual, strict=True):
            assert got.shape == wanted.shape
            if wanted.dtype.kind == "i":
                np.testing.assert_array_equal(got, wanted)
            else:
                largest = max(1.0, float(np.abs(wanted).max(initial=0)))
                np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * largest)
    return made


def _onnx_outputs(model: ir.Model, inputs: Sequence[Array]) -> list[Array]:
    # TFLite's indices have half the bits of ONNX's.
    wide = [array.astype(np.int64) if array.dtype == np.int32 else array for array in inputs]
    feeds = {str(v.name): array for v, array in zip(model.graph.inputs, wide, strict=True)}
    return [np.asarray(output) for output in session(model, threads=1).run(None, feeds)]
