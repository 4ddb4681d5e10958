"""What each kernel class means, in NumPy: the definition that partitions are held against."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

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
    SelectTokens,
    Softmax,
    TokenMean,
)
from gfcompile.targets.tvm.program import Program

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
    quant = a["quant"]
    if quant.ndim == 2:  # for each group of columns; (4, columns)
        quant = np.repeat(quant, value.shape[-1] // len(quant), axis=0).T
    inverse, low, high, zero = quant
    return (np.rint(np.clip(value * inverse, low, high)) + zero).astype(np.int8)


def _dense(kernel: Dense, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.m, kernel.k)
    if kernel.x == "int8":
        total = x.astype(np.int64) @ a["w"].astype(np.int64) + a["bias"]
        y = total.astype(np.float32) * a["scale"]
    else:
        y = x @ a["w"] + a["bias"]
    residual: Array = np.zeros((1, kernel.n), np.float32)
    if kernel.residual_rows:
        residual = _weights(a["residual"]).reshape(kernel.residual_rows, kernel.n)
    residual = np.tile(residual, (kernel.m // len(residual), 1))
    y = y + residual if kernel.residual_first else y
    if kernel.gelu:
        y = torch.nn.functional.gelu(torch.from_numpy(y)).numpy()
    y = y if kernel.residual_first else y + residual
    return _finish(y, kernel.out, a)


def convolution(kernel: Conv, a: Mapping[str, Array], dtype: torch.dtype = torch.float32) -> Array:
    """By torch, from the arguments as the kernel has them: (batch, out_h, out_w, n)."""
    x = torch.from_numpy(a["x"]).to(dtype)
    if kernel.layout == "nhwc":
        x = x.reshape(kernel.batch, kernel.h, kernel.w, kernel.c).permute(0, 3, 1, 2)
    depth = 1 if kernel.depthwise else kernel.c
    w = torch.from_numpy(a["w"]).to(dtype)
    w = w.reshape(kernel.kernel_h, kernel.kernel_w, depth, kernel.n).permute(3, 2, 0, 1)
    y = torch.nn.functional.conv2d(
        x,
        w,
        torch.from_numpy(a["bias"]).to(dtype),
        (kernel.stride_h, kernel.stride_w),
        (kernel.pad_h, kernel.pad_w),
        groups=kernel.c if kernel.depthwise else 1,
    )
    y = y.relu() if kernel.relu else y
    return np.ascontiguousarray(y.permute(0, 2, 3, 1).numpy())


def _layer_norm(kernel: LayerNorm, a: Mapping[str, Array]) -> Array:
    of_images = a["x"].reshape(kernel.images, -1, kernel.n)[:, kernel.leading :]
    x = torch.from_numpy(of_images.reshape(kernel.rows, kernel.n))
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
    x = a["x"].reshape(kernel.batch, kernel.h, kernel.w, kernel.c).astype(np.float32)
    weights, scale = _weights(a["kernel"]).astype(np.float32), np.float32(1)
    if kernel.x == "int8":
        x, scale = x - a["zero_point"], a["scale"]
    y = np.zeros_like(x)
    for p in range(kernel.h):
        for q in range(kernel.w):
            y += np.roll(x, (p, q), axis=(1, 2)) * weights[p, q]
    return y * scale


def _patchify(kernel: Patchify, a: Mapping[str, Array]) -> Array:
    grid, patch = (kernel.grid_h, kernel.grid_w), (kernel.patch_h, kernel.patch_w)
    x = a["x"].reshape(kernel.batch, kernel.channels, grid[0], patch[0], grid[1], patch[1])
    return _finish(x.transpose(0, 2, 4, 1, 3, 5), kernel.out, a)


def _token_mean(kernel: TokenMean, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.batch, kernel.tokens, kernel.n)
    return _finish(x.mean(axis=1), kernel.out, a)


def _attention(kernel: Attention, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.batch, kernel.tokens, 3, kernel.heads, kernel.dim)
    q, k, v = x.transpose(2, 0, 3, 1, 4).astype(np.float64)  # (batch, heads, tokens, dim)
    s_scale, q_zero, k_zero, v_zero, o_scale = a["params"].astype(np.float64)
    if kernel.x == "float32":
        y = _softmax_of(q @ k.swapaxes(2, 3) * s_scale) @ v
    else:
        # float64 has all these integers exactly.
        weights = _softmax_of((q - q_zero) @ (k - k_zero).swapaxes(2, 3) * s_scale)
        p = np.minimum(np.rint(weights * 256), 255)
        y = p @ (v - v_zero) * o_scale
    return _finish(y.transpose(0, 2, 1, 3).reshape(-1, kernel.heads * kernel.dim), kernel.out, a)


def _softmax_of(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _softmax(kernel: Softmax, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.rows, kernel.n)
    return _softmax_of(x.astype(np.float64)).astype(np.float32)


def _select_tokens(kernel: SelectTokens, a: Mapping[str, Array]) -> Array:
    scores = a["scores"].reshape(kernel.batch, kernel.tokens)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : kernel.kept] + kernel.offset
    leading = np.tile(np.arange(kernel.leading), (kernel.batch, 1))
    return np.concatenate([leading, best], axis=1).astype(kernel.index)


def _inverse_permutation(_kernel: InversePermutation, a: Mapping[str, Array]) -> Array:
    return np.argsort(a["x"], axis=1)


def _gather_rows(kernel: GatherRows, a: Mapping[str, Array]) -> Array:
    x = a["x"].reshape(kernel.batch, kernel.tokens, kernel.n)
    indices = a["indices"].reshape(kernel.batch, kernel.kept).clip(0, kernel.tokens - 1)
    return np.take_along_axis(x, indices[:, :, None], axis=1)


def _quantize(_kernel: Quantize, a: Mapping[str, Array]) -> Array:
    return _finish(a["x"], "int8", a)


def _dequantize(_kernel: Dequantize, a: Mapping[str, Array]) -> Array:
    scale, zero_point = a["dequant"]
    return ((a["x"].astype(np.float32) - zero_point) * scale).astype(np.float32)


_KERNELS: dict[type[Kernel], Callable[[Any, Mapping[str, Array]], Array]] = {
    Dense: _dense,
    Conv: convolution,
    LayerNorm: _layer_norm,
    DftFilter: _dft_filter,
    CircularFilter: _circular_filter,
    Patchify: _patchify,
    TokenMean: _token_mean,
    Attention: _attention,
    SelectTokens: _select_tokens,
    InversePermutation: _inverse_permutation,
    GatherRows: _gather_rows,
    Softmax: _softmax,
    Quantize: _quantize,
    Dequantize: _dequantize,
}
