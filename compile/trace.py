"""A torch module as an ONNX model, checked against torch on the spot."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import NAME_SCOPES

if TYPE_CHECKING:
    import onnxruntime as ort
    import torch

OPSET = 20  # the first with GELU and DFT (axis as input) as single ops
INPUT = "image"
OUTPUT = "logits"

# Rounding to nearest in float32: a result is off by at most this, relative to itself.
_ROUNDING = 2.0**-24
# A rounding tie that falls to the other side moves an int8 activation by one step. Such flips are
# rarer than one in a hundred, so what they add up to stays below the noise of quantization itself
# (30 to 40 dB); a wrong scale, zero point or axis leaves nothing near 20 dB.
_MIN_QUANTIZED_SQNR_DB = 20.0
# A deep graph may carry ties further. Then what it differs from torch by has at most so many times
# the energy of what it differs from itself by, when every pixel is off by a hundredth of a step of
# eight bits, so that one in a hundred falls to the other side.
_OF_OWN_NOISE = 4.0
_NUDGE = 2.0**-14  # of the largest pixel
_NUDGES = 4


def trace(module: "torch.nn.Module", example: "torch.Tensor") -> ir.Model:
    """The ONNX graph of `module` for inputs of `example`'s shape: `image` -> `logits`.

    Float modules give float graphs; modules converted by PT2E quantization give QDQ graphs. FFTs
    come out as DFT nodes. The graph has been run on `example` in ONNX Runtime and agrees with
    torch to float rounding (QDQ graphs: to within the noise of quantization).

    Raises:
        CompileError: the module cannot be exported, or the exported graph computes something
            else than the module.
    """
    import torch

    kind = type(module).__name__
    with _quiet(), torch.no_grad():
        try:
            expected = module(example)
            # Exporting to aten first keeps torch.onnx from trying one strategy after another.
            program = torch.export.export(module, (example,), strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                optimize=True,
                verify=False,  # done below, on the model that is returned
                verbose=False,
            )
        except Exception as error:  # torch raises anything here, bare Exception included
            raise CompileError(f"cannot trace {kind}: {_first_line(error)}") from error
    assert exported is not None
    model: ir.Model = exported.model
    if not isinstance(expected, torch.Tensor) or len(model.graph.outputs) != 1:
        raise CompileError(f"cannot trace {kind}: it must return one tensor (the logits)")
    _strip_origins(model)
    _check(model, example.detach().numpy(), expected.detach().numpy(), kind)
    return model


def session(
    model: ir.Model, *, optimize: bool = False, threads: int | None = None
) -> "ort.InferenceSession":
    """An ONNX Runtime session of `model` on the CPU.

    Args:
        optimize: let ONNX Runtime rewrite the graph (it then fuses QDQ into integer kernels);
            otherwise every node runs as it is written.
        threads: how many; ONNX Runtime's choice when None.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = 4  # fatal only: what matters comes as an exception
    if threads is not None:
        options.intra_op_num_threads = threads
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def save(model: ir.Model, path: Path) -> None:
    """Writes `model` to `path` as one .onnx file, weights included."""
    ir.save(model, path)


def rounding_tolerance(model: ir.Model) -> float:
    """How far two float32 evaluations of `model` may differ, relative to the largest output.

    A sum of n rounded terms is off by sqrt(n) roundings (their errors are independent), a DFT
    evaluated term by term with rounded angles by n. Errors of successive nodes add up at worst.
    Four standard deviations of that.
    """
    return 4 * _ROUNDING * sum(_rounding_errors(node) for node in model.graph)


def _rounding_errors(node: ir.Node) -> float:
    """Roundings that an output of `node` has gone through, their standard deviation."""
    first = node.inputs[0] if node.inputs else None
    second = node.inputs[1] if len(node.inputs) > 1 else None
    match node.op_type:
        case "DFT":
            return float(_dft_length(node))
        case "MatMul" | "Gemm":
            return math.sqrt(max(_dims(first)[-1:], default=1))
        case "Conv":
            return math.sqrt(math.prod(_dims(second)[1:]))
        case "LayerNormalization":
            return math.sqrt(max(_dims(first)[-1:], default=1))
        case op if op.startswith("Reduce"):
            return math.sqrt(math.prod(_dims(first)))
        case "Softmax":
            return math.sqrt(max(_dims(first), default=1))
        case _:
            return 1.0


def _dft_length(node: ir.Node) -> int:
    dims = _dims(node.inputs[0])
    axis = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if axis is None else ir.convenience.get_const_tensor(axis)
    return dims[-2 if tensor is None else int(tensor.numpy())]


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        return ()
    return tuple(dim for dim in value.shape if isinstance(dim, int))


def _check(model: ir.Model, image: npt.NDArray[Any], expected: npt.NDArray[Any], kind: str) -> None:
    try:
        runner = session(model)
        (actual,) = runner.run([OUTPUT], {INPUT: image})
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        message = f"the graph traced from {kind} does not run: {_first_line(error)}"
        raise CompileError(message) from error
    if actual.shape != expected.shape:
        raise CompileError(
            f"the graph traced from {kind} returns {actual.shape}, torch {expected.shape}"
        )
    error_max = float(np.abs(actual - expected).max(initial=0))
    largest = float(np.abs(expected).max(initial=0))
    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        noise = float(np.square(actual - expected, dtype=np.float64).sum())
        signal = float(np.square(expected, dtype=np.float64).sum())
        agrees = noise * 10 ** (_MIN_QUANTIZED_SQNR_DB / 10) <= signal
        if not agrees and math.isfinite(noise):
            agrees = noise <= _OF_OWN_NOISE * _own_noise(runner, image, actual)
    else:
        agrees = error_max <= rounding_tolerance(model) * largest
    if not agrees:  # NaN included
        raise CompileError(
            f"the graph traced from {kind} differs from torch by {error_max:.2g} "
            f"where the largest output is {largest:.2g}; this is a fault of the exporter"
        )


def _own_noise(
    runner: "ort.InferenceSession", image: npt.NDArray[Any], logits: npt.NDArray[Any]
) -> float:
    """The largest energy by which logits move when ties of the graph fall to the other side."""
    energies = []
    nudge = _NUDGE * np.abs(image).max(initial=0)
    for seed in range(_NUDGES):
        sign = np.random.default_rng(seed).choice((-1, 1), image.shape)
        nudged = (image + nudge * sign).astype(image.dtype)
        (moved,) = runner.run([OUTPUT], {INPUT: nudged})
        energies.append(float(np.square(moved - logits, dtype=np.float64).sum()))
    return max(energies)


def _strip_origins(model: ir.Model) -> None:
    """Drops the source lines of this machine, so that equal modules give equal files.

    What stays is the path of the torch module that a node came from.
    """
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        kept = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        if kept is not None:
            node.metadata_props[NAME_SCOPES] = kept
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _first_line(error: BaseException) -> str:
    """The first line of the innermost cause: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's warnings, log lines and graph listings from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
