"""What each kernel class means, in NumPy: the definition that partitions are held against."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gfcompile.targets.tvm.kernel import (
    CircularFilter,
    Dense,
    Dequantize,
    DftFilter,
    Kernel,
    LayerNorm,
    Patchify,
    Quantize,
    TokenMean,
)
from gfcompile.targets.tvm.partition import Program

Array = npt.NDArray[Any]


def run_program(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor of the program, by name."""
    tensors = dict(inputs)
    for call in program.calls:
        arguments = {name: tensors[tensor] for name, tensor in call.reads.items()}
        result = _KERNELS[type(call.kernel)](call.kernel, {**arguments, **call.constants})
        (name,) = call.writes.values()
        tensor = program.tensors[name]
        assert result.dtype == tensor.dtype, (name, result.dtype)
        tensors[name] = result.reshape(tensor.shape)
    return tensors


def _finish(value: Array, out: str, a: Mapping[str, Array]) -> Array:
    value = value.astype(np.float32)
    if out == "float32":
        return value
    inverse, low, high, zero = a["quant"]
    return (np.rint(np.clip(value * inverse, low, high)) + zero).astype(np.int8)


def _dense(kernel: Dense, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.m, kernel.k)
    if kernel.x == "int8":
        total = x.astype(np.int64) @ a["w"].astype(np.int64) + a["bias"]
        y = total.astype(np.float32) * a["scale"]
    else:
        y = x @ a["w"] + a["bias"]
    if kernel.gelu:
        y = torch.nn.functional.gelu(torch.from_numpy(y)).numpy()
    if kernel.residual_rows:
        residual = _weights(a["residual"]).reshape(kernel.residual_rows, kernel.n)
        y = y + np.tile(residual, (kernel.m // kernel.residual_rows, 1))
    return _finish(y, kernel.out, a)


def _layer_norm(kernel: LayerNorm, a: Mapping[str, Array]) -> Array:
    x = torch.from_numpy(a["x"].reshape(kernel.rows, kernel.n))
    gamma, beta = torch.from_numpy(a["gamma"]), torch.from_numpy(a["beta"])
    y = torch.nn.functional.layer_norm(x, (kernel.n,), gamma, beta, kernel.eps)
    return _finish(y.numpy(), kernel.out, a)


def _weights(array: Array) -> Array:
    return array.view(np.float16).astype(np.float32) if array.dtype == np.uint16 else array


def _dft_filter(kernel: DftFilter, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.batch, kernel.h, kernel.w, kernel.c)
    k = _weights(a["k_re"]) + 1j * _weights(a["k_im"])
    spectrum = np.fft.rfft2(x, axes=(1, 2), norm="ortho") * k
    y = np.fft.irfft2(spectrum, s=(kernel.h, kernel.w), axes=(1, 2), norm="ortho")
    return y.astype(np.float32)


def _circular_filter(kernel: CircularFilter, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.batch, kernel.h, kernel.w, kernel.c)
    weights = _weights(a["kernel"])
    y = np.zeros_like(x)
    for p in range(kernel.h):
        for q in range(kernel.w):
            y += np.roll(x, (p, q), axis=(1, 2)) * weights[p, q]
    return y


def _patchify(kernel: Patchify, a: Mapping[str, Array]) -> Array:
    grid, patch = (kernel.grid_h, kernel.grid_w), (kernel.patch_h, kernel.patch_w)
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    x = a["x"]
    if kernel.layout == "nhwc":
        x = x.reshape(kernel.batch, height, width, kernel.channels).transpose(0, 3, 1, 2)
    x = x.reshape(kernel.batch, kernel.channels, grid[0], patch[0], grid[1], patch[1])
    return _finish(x.transpose(0, 2, 4, 1, 3, 5), kernel.out, a)


def _token_mean(kernel: TokenMean, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.batch, kernel.tokens, kernel.n)
    return _finish(x.mean(axis=1), kernel.out, a)


def _quantize(_kernel: Quantize, a: Mapping[str, Array]) -> Array:
    return _finish(a["x"], "int8", a)


def _dequantize(_kernel: Dequantize, a: Mapping[str, Array]) -> Array:
    scale, zero_point = a["dequant"]
    return ((a["x"].astype(np.float32) - zero_point) * scale).astype(np.float32)


_KERNELS: dict[type[Kernel], Callable[[Any, Mapping[str, Array]], Array]] = {
    Dense: _dense,
    LayerNorm: _layer_norm,
    DftFilter: _dft_filter,
    CircularFilter: _circular_filter,
    Patchify: _patchify,
    TokenMean: _token_mean,
    Quantize: _quantize,
    Dequantize: _dequantize,
}
