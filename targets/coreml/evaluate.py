"""What a saved .mlpackage computes, off a Mac: its operations one by one, in torch.

It proves the graph, its constants and its scales, not Apple's kernels: those may sum in another
order, or keep more digits between operations than the types say.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor

from gfcompile.runtime.errors import BundleError
from gfcompile.targets.coreml.program import MilProgram, Operation, TensorType, read_program

Array = npt.NDArray[Any]
Arguments = Mapping[str, Any]

_DTYPES = {
    "float16": torch.float32,  # computed in float32, rounded after each operation
    "float32": torch.float32,
    "int8": torch.int8,
    "int32": torch.int32,
    "bool": torch.bool,
}


class Evaluator:
    """Runs an .mlpackage.

    Args:
        program: the package, or what `read_program` made of it.
        round_half: whether each result of type float16 is rounded to it, as a device that stores
            it must; without, float32 throughout shows what the rounding costs.
    """

    def __init__(self, program: MilProgram | Path, *, round_half: bool = True) -> None:
        self.program = read_program(program) if isinstance(program, Path) else program
        self._round_half = round_half
        unknown = {op.kind for op in self.program.operations} - OPERATIONS.keys()
        if unknown:
            raise BundleError(f"operations that cannot be evaluated: {', '.join(sorted(unknown))}")
        self._constants = {name: _tensor(value) for name, value in self.program.constants.items()}
        # What does not depend on the input is computed once: weights from their integers.
        for op in self.program.operations:
            if op.kind.startswith("constexpr_"):
                self._execute(op, self._constants)

    def run(
        self,
        inputs: Mapping[str, Array],
        observe: Callable[[Operation, Sequence[Any]], None] | None = None,
    ) -> dict[str, Any]:
        """The program's outputs by name: arrays, a label, a dictionary of probabilities.

        Args:
            inputs: by name; pixels (0 to 255) in the shape (1, 3, H, W) for an image.
            observe: given each operation with its results.

        Raises:
            BundleError: an input is missing or has another shape.
        """
        environment: dict[str, Any] = dict(self._constants)
        for name, kind in self.program.inputs:
            array = inputs.get(name)
            if array is None or array.shape != kind.shape:
                got = "nothing" if array is None else str(array.shape)
                raise BundleError(f"input {name} has the shape {kind.shape}, got {got}")
            environment[name] = torch.from_numpy(array.astype(np.float32))
        with torch.no_grad():
            for op in self.program.operations:
                if not op.kind.startswith("constexpr_"):
                    results = self._execute(op, environment)
                    if observe is not None:
                        observe(op, results)
        missing = set(self.program.outputs) - environment.keys()
        if missing:
            raise BundleError(f"the program computes no {', '.join(sorted(missing))}")
        return {name: _plain(environment[name]) for name in self.program.outputs}

    def _execute(self, op: Operation, environment: dict[str, Any]) -> Sequence[Any]:
        try:
            arguments: dict[str, Any] = {key: _tensor(v) for key, v in op.literals.items()}
            for key, names in op.inputs.items():
                values = [environment[name] for name in names]
                arguments[key] = values if key == "values" else values[0]
            results = OPERATIONS[op.kind](arguments)
            if not isinstance(results, (tuple, list)):
                results = [results]
            stored = [
                self._stored(result, kind)
                for result, (_, kind) in zip(results, op.outputs, strict=True)
            ]
        except Exception as error:  # arguments that do not fit raise whatever they stumble over
            raise BundleError(f"{op.kind} cannot be evaluated: {error!r}") from error
        environment |= {name: v for (name, _), v in zip(op.outputs, stored, strict=True)}
        return stored

    def _stored(self, result: Any, kind: TensorType) -> Any:
        """A result as the program's type for it holds it."""
        if not isinstance(result, Tensor):
            return result
        assert tuple(result.shape) == kind.shape, (tuple(result.shape), kind.shape)
        if kind.dtype == "float16" and self._round_half:
            return result.half().float()
        return result.to(_DTYPES[kind.dtype])


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    array = value.astype(np.float32) if value.dtype == np.float16 else value.copy()
    return torch.from_numpy(np.asarray(array))


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _ints(value: Tensor | None) -> list[int]:
    return [] if value is None else [int(number) for number in value.reshape(-1)]


def _int(value: Tensor) -> int:
    return int(value.reshape(()))


def _flag(value: Tensor | None) -> bool:
    return value is not None and bool(value.reshape(()))


# Products


def _conv(a: Arguments) -> Tensor:
    x, bias = a["x"], a.get("bias")
    if a["pad_type"] == "custom":
        top, bottom, left, right = _ints(a["pad"])
        x = functional.pad(x, (left, right, top, bottom))
    elif a["pad_type"] != "valid":
        raise BundleError(f"conv with pad_type {a['pad_type']}")
    return functional.conv2d(
        x,
        a["weight"],
        bias,
        stride=_ints(a.get("strides")) or [1, 1],
        dilation=_ints(a.get("dilations")) or [1, 1],
        groups=_int(a["groups"]) if "groups" in a else 1,
    )


def _linear(a: Arguments) -> Tensor:
    return functional.linear(a["x"], a["weight"], a.get("bias"))


def _matmul(a: Arguments) -> Tensor:
    x: Tensor = a["x"].mT if _flag(a.get("transpose_x")) else a["x"]
    y: Tensor = a["y"].mT if _flag(a.get("transpose_y")) else a["y"]
    return torch.matmul(x, y)


# Integers and what they stand for


def _along(vector: Tensor, rank: int, axis: int) -> Tensor:
    return vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _scale_and_zero(a: Arguments, rank: int) -> tuple[Tensor, Tensor]:
    scale, zero = a["scale"], a.get("zero_point")
    zero = torch.zeros(()) if zero is None else zero.float()
    if scale.ndim == 0:
        return scale, zero
    axis = _int(a["axis"])
    return _along(scale, rank, axis), _along(zero, rank, axis) if zero.ndim else zero


def _quantize(a: Arguments) -> Tensor:
    x: Tensor = a["input"]
    scale, zero = _scale_and_zero(a, x.ndim)
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[a["output_dtype"]]
    return (torch.round(x / scale) + zero).clamp(low, high)


def _dequantize(a: Arguments) -> Tensor:
    x: Tensor = a["input"].float()
    scale, zero = _scale_and_zero(a, x.ndim)
    return (x - zero) * scale


def _affine_dequantize(a: Arguments) -> Tensor:
    return _dequantize({**a, "input": a["quantized_data"]})


def _blockwise_dequantize(a: Arguments) -> Tensor:
    data: Tensor = a["data"].float()
    scale, offset = a["scale"], a.get("offset")
    if offset is not None:
        data = data - _spread(offset.float(), data.shape)
    return data * _spread(scale, data.shape)


def _spread(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, size in enumerate(shape):
        blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks


# Normalization and reduction


def _layer_norm(a: Arguments) -> Tensor:
    x: Tensor = a["x"]
    (axis,) = (axis % x.ndim for axis in _ints(a["axes"]))
    mean = x.mean(axis, keepdim=True)
    variance = ((x - mean) ** 2).mean(axis, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + a["epsilon"])
    if "gamma" in a:
        y = y * _along(a["gamma"], x.ndim, axis)
    if "beta" in a:
        y = y + _along(a["beta"], x.ndim, axis)
    return y


def _reduction(reduce: Callable[..., Tensor]) -> Callable[[Arguments], Tensor]:
    def run(a: Arguments) -> Tensor:
        x: Tensor = a["x"]
        axes = [axis % x.ndim for axis in _ints(a.get("axes"))] or list(range(x.ndim))
        return reduce(x, dim=axes, keepdim=_flag(a.get("keep_dims")))

    return run


def _softmax(a: Arguments) -> Tensor:
    return torch.softmax(a["x"], _int(a["axis"]))


def _top_k(a: Arguments) -> tuple[Tensor, Tensor]:
    largest = not _flag(a.get("ascending"))
    order = torch.sort(a["x"], dim=_int(a["axis"]), descending=largest, stable=True)
    count = _int(a["k"])
    axis = _int(a["axis"])
    return order.values.narrow(axis, 0, count), order.indices.narrow(axis, 0, count)


# Moving


def _slice(a: Arguments) -> Tensor:
    x: Tensor = a["x"]
    strides = _ints(a.get("stride")) or [1] * x.ndim
    begin_mask = [_flag(flag) for flag in a.get("begin_mask", torch.zeros(x.ndim))]
    end_mask = [_flag(flag) for flag in a.get("end_mask", torch.zeros(x.ndim))]
    assert min(strides) > 0
    ranges = zip(_ints(a["begin"]), _ints(a["end"]), strides, begin_mask, end_mask, strict=True)
    return x[
        tuple(
            slice(None if from_start else begin, None if to_end else end, stride)
            for begin, end, stride, from_start, to_end in ranges
        )
    ]


def _split(a: Arguments) -> list[Tensor]:
    axis = _int(a["axis"])
    sizes: list[int] | int = _ints(a.get("split_sizes"))
    if not sizes:
        sizes = a["x"].shape[axis] // _int(a["num_splits"])
    return list(torch.split(a["x"], sizes, axis))


def _gather(a: Arguments) -> Tensor:
    x: Tensor = a["x"]
    indices, axis = a["indices"].long(), _int(a["axis"])
    picked = x.index_select(axis, indices.reshape(-1) % x.shape[axis])
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gelu(a: Arguments) -> Tensor:
    approximation = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[a["mode"]]
    return functional.gelu(a["x"], approximate=approximation)


def _cast(a: Arguments) -> Tensor:
    x: Tensor = a["x"]
    if a["dtype"] == "fp16":
        return x.half().float()
    return x.to({"fp32": torch.float32, "int32": torch.int32}[a["dtype"]])


def _classify(a: Arguments) -> tuple[str, dict[str, float]]:
    probabilities = a["probabilities"].reshape(-1)
    named = dict(zip(a["classes"], probabilities.tolist(), strict=True))
    return a["classes"][int(probabilities.argmax())], named


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda a: function(a["x"])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda a: function(a["x"], a["y"])


# All that the emitter can write.
OPERATIONS: Mapping[str, Callable[[Arguments], Any]] = {
    "abs": _unary(torch.abs),
    "add": _binary(torch.add),
    "cast": _cast,
    "classify": _classify,
    "concat": lambda a: torch.cat(a["values"], _int(a["axis"])),
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_dequantize,
    "conv": _conv,
    "dequantize": _dequantize,
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "gather": _gather,
    "gelu": _gelu,
    "identity": _unary(lambda x: x),
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "mul": _binary(torch.mul),
    "quantize": _quantize,
    "real_div": _binary(torch.div),
    "reduce_max": _reduction(torch.amax),
    "reduce_mean": _reduction(torch.mean),
    "reduce_sum": _reduction(torch.sum),
    "relu": _unary(torch.relu),
    "reshape": lambda a: a["x"].reshape(_ints(a["shape"])),
    "sigmoid": _unary(torch.sigmoid),
    "slice_by_index": _slice,
    "softmax": _softmax,
    "split": _split,
    "sqrt": _unary(torch.sqrt),
    "sub": _binary(torch.sub),
    "tanh": _unary(torch.tanh),
    "tile": lambda a: a["x"].repeat(_ints(a["reps"])),
    "topk": _top_k,
    "transpose": lambda a: a["x"].permute(_ints(a["perm"])),
}
