"""What a kernel computes and moves: operations and bytes of each of its functions.

For a roofline. Operations are those of the algorithm that the schedule runs, a multiplication and
an addition counted as two. Bytes are the operands, each moved once; scratch that a single function
writes and reads stays in a cache and is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tvm
from tvm.s_tir.analysis import estimate_tir_flops

from gfcompile.targets.spectral import circular_macs, folded_dft_macs
from gfcompile.targets.target import Target
from gfcompile.targets.tvm.kernel import (
    Attention,
    CircularFilter,
    Conv,
    Dense,
    Dequantize,
    DftFilter,
    GatherRows,
    InversePermutation,
    Kernel,
    LayerNorm,
    Patchify,
    Quantize,
    Scheduled,
    SelectTokens,
    Softmax,
    Step,
    TokenMean,
)
from gfcompile.targets.tvm.schedules import cpu_amx_float

Arithmetic = Literal["float32", "float16", "int8"]

# Operations per element, an exponential or a square root counted as one.
_NORM_OPERATIONS = 8  # mean 1, variance 3, normalized 2, scaled and shifted 2
_SOFTMAX_OPERATIONS = 5  # maximum, difference, exponential, sum, quotient
_QUANTIZE_OPERATIONS = 4
_COMPLEX_PRODUCT = 6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call of a function takes.

    Attributes:
        flops: None where it is not known.
        arithmetic: whose peak bounds the bulk of them.
    """

    flops: int | None
    bytes: int
    arithmetic: Arithmetic = "float32"


def costs(kernel: Kernel, scheduled: Scheduled, target: Target) -> tuple[Cost, ...]:
    """The cost of each of the kernel's functions on `target`, in their order."""
    flops = _flops(kernel, scheduled, target)
    arithmetic: Arithmetic = "float32"
    int8 = isinstance(kernel, Dense | Attention) and kernel.x == "int8"
    if int8 or _in_digits(kernel, target):
        arithmetic = "int8"
    elif target.cpu.float16 and "float16" in (getattr(kernel, "w", ""), getattr(kernel, "x", "")):
        arithmetic = "float16"
    private = _private_scratch(scheduled)
    return tuple(
        Cost(flops=count, bytes=_bytes(step, private), arithmetic=arithmetic)
        for count, step in zip(flops, scheduled.steps, strict=True)
    )


def _flops(kernel: Kernel, scheduled: Scheduled, target: Target) -> Sequence[int | None]:
    if isinstance(kernel, DftFilter) and target.gpu is not None:
        return _dft_on_gpu(kernel)
    count = _operations(kernel)
    if count is not None and _in_digits(kernel, target):
        count *= cpu_amx_float.PRODUCTS
    if count is None:
        return [_counted(step) for step in scheduled.steps]
    # What comes before the last function only lays operands out.
    return [*[0] * (len(scheduled.steps) - 1), count]


def _in_digits(kernel: Kernel, target: Target) -> bool:
    """Whether it is a float32 product that is computed in int8 digits."""
    amx = target.gpu is None and target.cpu.amx
    return amx and isinstance(kernel, Dense) and cpu_amx_float.takes(kernel)


def _operations(kernel: Kernel) -> int | None:
    match kernel:
        case Dense():
            return 2 * kernel.m * kernel.n * kernel.k
        case Conv():
            taps = kernel.kernel_h * kernel.kernel_w * (1 if kernel.depthwise else kernel.c)
            return 2 * kernel.batch * kernel.out_h * kernel.out_w * kernel.n * taps
        case Attention():
            pairs = kernel.batch * kernel.heads * kernel.tokens**2
            return pairs * (4 * kernel.dim + _SOFTMAX_OPERATIONS)
        case DftFilter():
            product = _COMPLEX_PRODUCT * kernel.h * (kernel.w // 2 + 1)
            return kernel.batch * kernel.c * (2 * folded_dft_macs(kernel.h, kernel.w) + product)
        case CircularFilter():
            return 2 * kernel.batch * kernel.c * circular_macs(kernel.h, kernel.w)
        case LayerNorm():
            return _NORM_OPERATIONS * kernel.rows * kernel.n
        case Softmax():
            return _SOFTMAX_OPERATIONS * kernel.rows * kernel.n
        case TokenMean():
            return kernel.batch * kernel.tokens * kernel.n
        case Quantize() | Dequantize():
            return _QUANTIZE_OPERATIONS * kernel.size
        case Patchify():
            size = kernel.batch * kernel.grid_h * kernel.grid_w
            size *= kernel.channels * kernel.patch_h * kernel.patch_w
            return _QUANTIZE_OPERATIONS * size if kernel.out == "int8" else 0
        case SelectTokens():
            return kernel.batch * kernel.tokens**2  # each is compared with every other
        case InversePermutation() | GatherRows():
            return 0
    return None


def _dft_on_gpu(kernel: DftFilter) -> list[int]:
    """Rows, columns with the product, rows back: matrices on the half spectrum."""
    half, channels = kernel.w // 2 + 1, kernel.batch * kernel.c
    row = 2 * kernel.h * kernel.w * 2 * half
    column = 2 * (2 * half * 4 * kernel.h**2) + _COMPLEX_PRODUCT * kernel.h * half
    return [channels * row, channels * column, channels * row]


def _counted(step: Step) -> int | None:
    """TVM's own count, of a function that Relax lowered."""
    try:
        return int(estimate_tir_flops(tvm.IRModule({"main": step.func})))
    except (RuntimeError, ValueError):
        return None  # a loop whose length is not a constant


def _private_scratch(scheduled: Scheduled) -> set[str]:
    uses = [arg for step in scheduled.steps for arg in set(step.args)]
    return {name for name in scheduled.temps if uses.count(name) == 1}


def _bytes(step: Step, private: set[str]) -> int:
    return sum(
        _size(param)
        for param, arg in zip(step.func.params, step.args, strict=True)
        if arg not in private
    )


def _size(param: Any) -> int:
    shape = [int(extent) for extent in param.shape]
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(str(param.dtype)).itemsize
