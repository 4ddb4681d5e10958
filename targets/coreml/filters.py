"""Global filters as few MIL operations: y = irfft2(rfft2(x) * K) over an h x w grid.

The product with K takes three real ones per frequency (Gauss): for x^ = a + ib and K = c + id,

    k1 = c (a + b)    k2 = a (d - c)    k3 = b (c + d)
    Re = k1 - k3      Im = k1 + k2

The sums on the left are linear in x and those below linear in k, so both go into the matrices of
the transforms, and what is left of the complex product is one elementwise `mul`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.targets.coreml.emitter import Emitter, refuse
from gfcompile.targets.coreml.values import Array, Value
from gfcompile.targets.onnx_values import constant, operator_of

Matrix = npt.NDArray[np.float64]

# Up to this many points the whole 2-D transform is one matrix, which the filters of a model share:
# three operations instead of seven, one good product instead of many small ones. It takes four
# times the multiplications at 14x14, and with the points they grow.
DENSE_POINTS = 256


def emit_filter(emitter: Emitter, node: ir.Node) -> None:
    """A `gfcompile` filter function."""
    form = operator_of(node)
    if form == "GlobalFilterDft":
        _emit_dft(emitter, node)
    elif form == "GlobalFilterCircular":
        _emit_circular(emitter, node)
    else:
        raise refuse(node, "this function is not known")


def _constants(node: ir.Node) -> list[Matrix]:
    arrays = [constant(operand) for operand in node.inputs[1:]]
    if any(array is None for array in arrays):
        raise refuse(node, "its kernel is computed while the model runs")
    return [np.asarray(array, np.float64) for array in arrays]


def _emit_dft(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.value(node.inputs[0])
    k_re, k_im = _constants(node)
    if x.dims[1] * x.dims[2] <= DENSE_POINTS:
        emit = _emit_compact if emitter.is_compact else _emit_dense
        emit(emitter, node, x, k_re, k_im)
    else:
        _emit_separable(emitter, node, x, k_re, k_im)


def _emit_dense(emitter: Emitter, node: ir.Node, x: Value, k_re: Matrix, k_im: Matrix) -> None:
    """matmul, mul, matmul over all points at once."""
    batch, h, w, channels = x.dims
    name = str(node.outputs[0].name)
    forward, inverse = dense_matrices(h, w)
    gains = dense_gains(k_re, k_im, w)  # (rows, channels)
    matmul, shared = _matmul(emitter, name), _shared(emitter, h, w)
    if emitter.is_channels_first:
        tokens = emitter.arranger.lay_out_flat(x, *_filled(x, (0, 3, 1, 2), batch, channels, 1))
        spectrum = matmul("spectrum", tokens, shared("forward", forward.T))
        product = emitter.op("mul", f"{name}_product", x=spectrum, y=gains.T[None, :, None, :])
        var = matmul("", product, shared("inverse", inverse.T))
        emitter.define(node.outputs[0], var, (0, 3, 1, 2))
        return
    tokens = emitter.arranger.lay_out_flat(x, *_filled(x, (0, 1, 2, 3), batch, h * w))
    spectrum = matmul("spectrum", shared("forward", forward), tokens)
    product = emitter.op("mul", f"{name}_product", x=spectrum, y=gains[None])
    var = matmul("", shared("inverse", inverse), product)
    emitter.define(node.outputs[0], var, (0, 1, 2, 3))


def _emit_compact(emitter: Emitter, node: ir.Node, x: Value, k_re: Matrix, k_im: Matrix) -> None:
    """matmul, mul, matmul over all points at once, with K stored as it is."""
    batch, h, w, channels = x.dims
    name = str(node.outputs[0].name)
    forward, inverse = compact_matrices(h, w)
    gains = compact_gains(k_re, k_im, w)  # (2, 1, frequencies, channels)
    count = gains.shape[2]
    matmul, shared = _matmul(emitter, name), _shared(emitter, h, w)
    batches = (batch,) if batch > 1 else ()  # tensors have five axes at most, and four are better

    def multiply(spectrum: Any, gain: Array, parts: tuple[int, ...], whole: tuple[int, ...]) -> Any:
        parts_of = emitter.op("reshape", f"{name}_as", x=spectrum, shape=[*batches, *parts])
        product = emitter.op("mul", f"{name}_product", x=parts_of, y=gain)
        return emitter.op("reshape", f"{name}_as", x=product, shape=[batch, *whole])

    if emitter.is_channels_first:
        tokens = emitter.arranger.lay_out_flat(x, *_filled(x, (0, 3, 1, 2), batch, channels, 1))
        spectrum = matmul("spectrum", tokens, shared("forward", forward.T))
        product = multiply(
            spectrum,
            gains.transpose(3, 0, 1, 2),
            (channels, 1, 2, count),
            (channels, 1, 4 * count),
        )
        var = matmul("", product, shared("inverse", inverse.T))
        emitter.define(node.outputs[0], var, (0, 3, 1, 2))
        return
    tokens = emitter.arranger.lay_out_flat(x, *_filled(x, (0, 1, 2, 3), batch, h * w))
    spectrum = matmul("spectrum", shared("forward", forward), tokens)
    product = multiply(spectrum, gains, (1, 2, count, channels), (4 * count, channels))
    var = matmul("", shared("inverse", inverse), product)
    emitter.define(node.outputs[0], var, (0, 1, 2, 3))


def _emit_separable(emitter: Emitter, node: ir.Node, x: Value, k_re: Matrix, k_im: Matrix) -> None:
    """Rows of the grid first, their sine and cosine parts interleaved: then a reshape sets the two
    side by side for the product along the other axis, and back.
    """
    batch, h, w, channels = x.dims
    name = str(node.outputs[0].name)
    rows, into, back = separable_matrices(h, w)
    gains = separable_gains(k_re, k_im)  # (h, 3 * (w // 2 + 1), channels)
    matmul, shared = _matmul(emitter, name), _shared(emitter, h, w)

    def reshape(var: Any, *shape: int) -> Any:
        return emitter.op("reshape", f"{name}_as", x=var, shape=list(shape))

    if emitter.is_channels_first:
        grid = emitter.lay_out(x, (0, 3, 1, 2))
        lines = matmul("lines", shared("rows", rows), grid)  # (batch, channels, 2 * h, w)
        lines = reshape(lines, batch, channels, h, 2 * w)
        spectrum = matmul("spectrum", lines, shared("into", into))
        gain = gains.transpose(2, 0, 1)[None]
        product = emitter.op("mul", f"{name}_product", x=spectrum, y=gain)
        lines = matmul("lines_back", product, shared("back", back))
        lines = reshape(lines, batch, channels, 2 * h, w)
        var = matmul("", shared("rows_back", rows.T), lines)
        emitter.define(node.outputs[0], var, (0, 3, 1, 2))
        return
    grid = emitter.arranger.lay_out_flat(x, *_filled(x, (0, 1, 2, 3), batch, h))
    lines = matmul("lines", shared("rows", rows), grid)  # (batch, 2 * h, w * channels)
    lines = reshape(lines, batch, h, 2 * w, channels)
    spectrum = matmul("spectrum", shared("into", into.T), lines)
    product = emitter.op("mul", f"{name}_product", x=spectrum, y=gains[None])
    lines = matmul("lines_back", shared("back", back.T), product)
    lines = reshape(lines, batch, 2 * h, w * channels)
    var = matmul("", shared("rows_back", rows.T), lines)
    emitter.define(node.outputs[0], var, (0, 1, 2, 3))


def _matmul(emitter: Emitter, name: str) -> Callable[[str, Any, Any], Any]:
    def matmul(part: str, x: Any, y: Any) -> Any:
        return emitter.op("matmul", f"{name}_{part}" if part else name, x=x, y=y)

    return matmul


def _shared(emitter: Emitter, h: int, w: int) -> Callable[[str, Matrix], Any]:
    def shared(part: str, matrix: Matrix) -> Any:
        return emitter.shared(
            ("filter", part, h, w, matrix.shape), lambda: matrix, f"dft_{h}x{w}_{part}"
        )

    return shared


def _filled(
    x: Value, axes: tuple[int, ...], *shape: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Order and shape for `Arranger.lay_out_flat`, whose last axis takes what is left."""
    order = tuple(axis for axis in axes if x.dims[axis] > 1)
    return order, (*shape, int(np.prod(x.dims)) // int(np.prod(shape)))


def _emit_circular(emitter: Emitter, node: ir.Node) -> None:
    """The grid continued by its own rows and columns, then a depthwise convolution."""
    x = emitter.value(node.inputs[0])
    (kernel,) = _constants(node)
    _, h, w, channels = x.dims
    name = str(node.outputs[0].name)
    grid = emitter.lay_out(x, (0, 3, 1, 2))
    for axis, size in ((2, h), (3, w)):
        if size > 1:
            begin, end = [0] * 4, list(grid.shape)
            begin[axis] = 1
            tail = emitter.op("slice_by_index", f"{name}_tail", x=grid, begin=begin, end=end)
            grid = emitter.op("concat", f"{name}_wrapped", values=[tail, grid], axis=axis)
    weight = kernel[::-1, ::-1].transpose(2, 0, 1)[:, None]  # a convolution correlates
    var = emitter.op(
        "conv",
        name,
        x=grid,
        weight=np.ascontiguousarray(weight),
        pad_type="valid",
        groups=channels,
    )
    emitter.define(node.outputs[0], var, (0, 3, 1, 2))


# Matrices, in float64


def _frequencies(h: int, w: int) -> list[tuple[int, int, bool]]:
    """The frequencies (u, v) of a real h x w grid that are not mirror images of others, and
    whether each is its own mirror image, so that its value is real.
    """
    found = []
    for v in range(w // 2 + 1):
        own_column = 2 * v % w == 0
        for u in range(h // 2 + 1 if own_column else h):
            found.append((u, v, own_column and 2 * u % h == 0))
    return found


def dense_matrices(h: int, w: int) -> tuple[Matrix, Matrix]:
    """`forward` and `inverse` with ``y = inverse @ (dense_gains(K) * (forward @ x))``.

    x and y are (h * w, channels). Three rows of `forward` for each frequency, one for those whose
    value is real.

    Returns:
        forward (rows, h * w), inverse (h * w, rows).
    """
    forward, inverse = [], []
    i, j = np.divmod(np.arange(h * w), w)
    for u, v, is_real in _frequencies(h, w):
        # Reduced while still exact integers: cosines of large angles lose digits.
        angle = 2 * np.pi * ((i * u * w + j * v * h) % (h * w)) / (h * w)
        cosine, sine = np.cos(angle) / np.sqrt(h * w), np.sin(angle) / np.sqrt(h * w)
        if is_real:
            forward.append(cosine)
            inverse.append(cosine)
        else:
            forward += [cosine - sine, cosine, -sine]
            inverse += [2 * (cosine - sine), -2 * sine, -2 * cosine]
    return np.stack(forward), np.stack(inverse, axis=1)


def dense_gains(k_re: Matrix, k_im: Matrix, w: int) -> Matrix:
    """What the rows of `dense_matrices` are multiplied by: (rows, channels)."""
    rows = []
    for u, v, is_real in _frequencies(len(k_re), w):
        c, d = k_re[u, v], k_im[u, v]
        rows += [c] if is_real else [c, d - c, c + d]
    return np.stack(rows)


def compact_matrices(h: int, w: int) -> tuple[Matrix, Matrix]:
    """`forward` and `inverse` with ``y = inverse @ products`` for the products of each of
    `compact_gains(K)`, c first, with each half of ``forward @ x``, the real parts first.

    Returns:
        forward (2 * frequencies, h * w), inverse (h * w, 4 * frequencies).
    """
    forward, inverse = dense_matrices(h, w)
    real, imaginary, columns = [], [], []
    row = 0
    for _, _, is_real in _frequencies(h, w):
        if is_real:
            nothing = np.zeros(h * w)
            real.append(forward[row])
            imaginary.append(nothing)
            columns.append([inverse[:, row], nothing, nothing, nothing])
        else:
            real.append(forward[row + 1])
            imaginary.append(forward[row + 2])
            # Re = c a - d b and Im = c b + d a
            from_re, from_im = -inverse[:, row + 2], inverse[:, row + 1]
            columns.append([from_re, from_im, from_im, -from_re])
        row += 1 if is_real else 3
    parts = [np.stack(part, axis=1) for part in zip(*columns, strict=True)]
    return np.stack([*real, *imaginary]), np.concatenate(parts, axis=1)


def compact_gains(k_re: Matrix, k_im: Matrix, w: int) -> Matrix:
    """c and d of every frequency: (2, 1, frequencies, channels)."""
    places = [(u, v) for u, v, _ in _frequencies(len(k_re), w)]
    return np.stack([[k[place] for place in places] for k in (k_re, k_im)])[:, None]


def separable_matrices(h: int, w: int) -> tuple[Matrix, Matrix, Matrix]:
    """`rows`, `into` and `back` for one axis after the other.

    For one channel x (h, w), with `lines = (rows @ x).reshape(h, 2 * w)` and
    `spectrum = separable_gains(K) * (lines @ into)`, the result is
    ``y = rows.T @ (spectrum @ back).reshape(2 * h, w)``.

    Returns:
        rows (2 * h, h): cosine and sine of each frequency, one after the other.
        into (2 * w, 3 * (w // 2 + 1)), back (3 * (w // 2 + 1), 2 * w).
    """
    along_h = 2 * np.pi * (np.outer(np.arange(h), np.arange(h)) % h) / h
    rows = np.stack([np.cos(along_h), np.sin(along_h)], axis=1).reshape(2 * h, h) / np.sqrt(h)
    half = w // 2 + 1
    along_w = 2 * np.pi * (np.outer(np.arange(w), np.arange(half)) % w) / w
    cosine, sine = np.cos(along_w) / np.sqrt(w), np.sin(along_w) / np.sqrt(w)
    # (U_c - i U_s)(cosine - i sine), for the cosine and sine parts U along h.
    re, im = np.concatenate([cosine, -sine]), np.concatenate([-sine, -cosine])
    into = np.concatenate([re + im, re, im], axis=1)
    # Frequencies other than 0 and w / 2 stand for their mirror images too.
    count = np.where(2 * np.arange(half) % w == 0, 1, 2)[:, None]
    a, b = count * cosine.T, -count * sine.T
    from_re, from_im = np.concatenate([a, b], axis=1), np.concatenate([b, -a], axis=1)
    back = np.concatenate([from_re + from_im, from_im, -from_re])
    return rows, into, back


def separable_gains(k_re: Matrix, k_im: Matrix) -> Matrix:
    """What the columns of `into` are multiplied by: (h, 3 * (w // 2 + 1), channels)."""
    return np.concatenate([k_re, k_im - k_re, k_re + k_im], axis=1)
