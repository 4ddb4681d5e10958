"""What a kernel computes: the contract between the partitioner and the schedules.

A kernel is named by what it computes and its sizes, never by the layer it serves: constants,
scales included, are arguments, so that equal layers share one compiled kernel.

Layouts are row-major. int8 activations are logical int8 here; a schedule may store them with an
offset (`ActStorage`), the same one for every kernel of a target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Act = Literal["float32", "float16", "int8"]
Half = Literal["float32", "float16"]  # of a constant: how it is stored


@dataclass(frozen=True, kw_only=True)
class Dense:
    """y = epilogue(x @ w): (m, k) x (k, n) -> (m, n).

    The epilogue, in this order: plus `bias`, times `scale` (int8 only), GELU (exact, erf form),
    plus `residual` (row r % residual_rows of it; with `residual_first` before the GELU), quantized
    when `out` is int8, rounded when it is float16.

    With float16 w, a CPU that has float16 arithmetic rounds x to it, and adds up a few products at
    a time in it; these sums, and the epilogue, are float32. Any other CPU widens w.

    Arguments: x (m, k); w, raw layout (k, n), `w` or int8; with int8 x: scale (n,) float32,
    and bias (n,) int32, which already holds minus zero point times column sums; with float x:
    bias (n,) float32; with residual_rows: residual (residual_rows, n), `residual_dtype` as
    for DftFilter's k; with int8 out: quant (4,) float32, see `quant_args`, or
    (out_groups, 4) for that many equal groups of neighbouring columns; y (m, n).

    With `fixed_point`, of float x, a schedule may round each row of x and each column of w to 24
    bits of its largest number, rather than each number to 24 bits of its own.
    """

    m: int
    n: int
    k: int
    x: Act = "float32"
    w: Half = "float32"
    gelu: bool = False
    residual_rows: int = 0
    residual_dtype: Half = "float32"
    residual_first: bool = False
    out: Act = "float32"
    out_groups: int = 1
    fixed_point: bool = False


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution of images with channels last: (batch, h, w, c) -> (batch, out_h, out_w, n).

    With `depthwise` n is c, and each channel is convolved with a filter of its own. The image is
    surrounded by `pad_h` rows and `pad_w` columns of zeros on either side. The epilogue: plus
    `bias`, ReLU.

    Arguments: x, (batch, c, h, w) where `layout` says so; w (kernel_h * kernel_w * c, n), its rows
    (dy, dx, channel), or, depthwise, (kernel_h * kernel_w, n); bias (n,); y; all float32.
    """

    batch: int
    h: int
    w: int
    c: int
    n: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    depthwise: bool = False
    relu: bool = False
    layout: Literal["nhwc", "nchw"] = "nhwc"

    @property
    def out_h(self) -> int:
        return (self.h + 2 * self.pad_h - self.kernel_h) // self.stride_h + 1

    @property
    def out_w(self) -> int:
        return (self.w + 2 * self.pad_w - self.kernel_w) // self.stride_w + 1


CHANNEL_BLOCK = 16  # float32 of a line of cache


def channel_blocks(rows: int, channels: int) -> tuple[int, int, int]:
    """The shape of (rows, channels) in blocks of channels: (blocks, rows, channels of a block)."""
    return channels // CHANNEL_BLOCK, rows, CHANNEL_BLOCK


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Layer normalization over the last axis of (rows, n).

    With `leading` l, x has l rows more before those of each of `images` images; they are skipped.
    x or y may lie in blocks of channels: see `channel_blocks`.

    Arguments: x (rows + images * leading, n) float32, gamma (n,), beta (n,), quant (4,) if `out` is
    int8, y (rows, n).
    """

    rows: int
    n: int
    eps: float
    out: Act = "float32"
    images: int = 1
    leading: int = 0
    x_in_blocks: bool = False
    y_in_blocks: bool = False

    @property
    def x_rows(self) -> int:
        return self.rows + self.images * self.leading

    def x_row(self, row: Any) -> Any:
        """The row of x that becomes `row` of y, either of them an index of TIR."""
        if self.leading == 0 or self.images == 1:
            return row + self.leading
        return row + (row // (self.rows // self.images) + 1) * self.leading


@dataclass(frozen=True, kw_only=True)
class DftFilter:
    """irfft2(rfft2(x) * K), both orthonormal, per channel: (batch, h, w, c).

    With float16 x, a CPU that has float16 arithmetic computes in it. x and y may lie in blocks of
    channels: see `channel_blocks`.

    Arguments: x; k_re, k_im (h, w // 2 + 1, c), `k_dtype` float32 or float16 (the bits of a
    float16 travel as uint16); y as x, but float32. The half spectrum stands for its Hermitian
    completion; k's first and, for even w, last column are already Hermitian along h.
    """

    batch: int
    h: int
    w: int
    c: int
    x: Half = "float32"
    k_dtype: Half = "float32"
    in_blocks: bool = False


@dataclass(frozen=True, kw_only=True)
class CircularFilter:
    """Depthwise circular convolution over the grid: (batch, h, w, c), float32 or of int8 values.

    y[i, j] = sum over p, q of kernel[p, q] * x[(i - p) % h, (j - q) % w].
    Arguments: x; kernel (h, w, c), `k_dtype` as for DftFilter; y as x, but float32.
    With int8 x: kernel int8; scale (c,) float32 and zero_point (1,) float32, of which the second is
    taken from x and the first multiplies the sums. These are exact: see `exact_in_float`.
    """

    batch: int
    h: int
    w: int
    c: int
    x: Act = "float32"
    k_dtype: Half = "float32"

    @staticmethod
    def exact_in_float(h: int, w: int) -> bool:
        """Whether float32 holds the integer sums: x is at most 255 from its zero point."""
        return h * w * 255 * 127 < 2**24


@dataclass(frozen=True, kw_only=True)
class Patchify:
    """Non-overlapping patches as rows: (batch * grid_h * grid_w, channels * patch_h * patch_w).

    A column is (channel, dy, dx), the order of a convolution's weight. An image whose channels come
    last is one of a single channel, whose patches are as many times wider.

    Arguments: x (batch, channels, H, W) float32, quant (4,) if `out` is int8, y.
    """

    batch: int
    channels: int
    grid_h: int
    grid_w: int
    patch_h: int
    patch_w: int
    out: Act = "float32"


@dataclass(frozen=True, kw_only=True)
class TokenMean:
    """Mean over tokens: (batch, tokens, n) -> (batch, n).

    Arguments: x float32, quant (4,) if `out` is int8, y.
    """

    batch: int
    tokens: int
    n: int
    out: Act = "float32"


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head self-attention over the rows of one qkv product.

    Of x (batch * tokens, 3 * heads * dim), columns (part, head, channel), parts q, k, v:
    y[head] = softmax(scale * q @ k.T) @ v, heads side by side again.

    float16 x is multiplied as by a `Dense` with float16 w; the softmax is float32.

    With int8 x, exactly as the QDQ graph: s = (q - q_zero) . (k - k_zero) in integers, times
    `s_scale` in float (which holds both scales and the attention's own); softmax in float;
    p = rint(softmax * 256) - 128, at most 127; then (p + 128) . (v - v_zero) in integers, times
    `o_scale`, quantized when `out` is int8.

    Arguments: x (batch * tokens, 3 * heads * dim); params (5,) float32: s_scale,
    q_zero, k_zero, v_zero, o_scale (with float x only s_scale is used); quant (4,) if `out` is
    int8; y (batch * tokens, heads * dim).
    """

    batch: int
    tokens: int
    heads: int
    dim: int
    x: Act = "float32"
    out: Act = "float32"


@dataclass(frozen=True, kw_only=True)
class SelectTokens:
    """The `kept` best of `tokens` scores, per image: their indices, best first.

    Equal scores keep the order of their indices. `offset` is added to every index; with `leading`
    l, the indices 0 ... l - 1 come first (class tokens, which are always kept).

    Arguments: scores (batch, tokens) float32; y (batch, leading + kept) of `index`.
    """

    batch: int
    tokens: int
    kept: int
    offset: int = 0
    leading: int = 0
    index: Literal["int32", "int64"] = "int32"


@dataclass(frozen=True, kw_only=True)
class InversePermutation:
    """y[b, x[b, i]] = i: where each of n things went.

    Arguments: x (batch, n) int64, a permutation of 0 ... n - 1 per row (anything else is clamped:
    no access out of bounds); y (batch, n) int64.
    """

    batch: int
    n: int


@dataclass(frozen=True, kw_only=True)
class GatherRows:
    """y[b, i] = x[b, indices[b, i]]: rows of n float32 values.

    Arguments: x (batch, tokens, n) float32; indices (batch, kept) int32, each within the tokens
    (anything else is clamped: no access out of bounds); y (batch, kept, n).
    """

    batch: int
    tokens: int
    kept: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Softmax over the last axis of (rows, n) float32. Arguments: x, y."""

    rows: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """float32 -> int8, element by element. Arguments: x (size,), quant (4,), y (size,)."""

    size: int


@dataclass(frozen=True, kw_only=True)
class Dequantize:
    """int8 -> float32. Arguments: x (size,), dequant (2,): scale, zero_point; y (size,)."""

    size: int


@dataclass(frozen=True, kw_only=True)
class Generic:
    """Whatever has no schedule class of its own: a TIR function that Relax lowered.

    `key` is a hash of the function, so that equal ones are one kernel; `func` is a
    tvm.tirx.PrimFunc whose buffers are named as the call's arguments.
    """

    name: str
    key: str
    func: Any = field(compare=False)


Kernel = (
    Dense
    | Conv
    | LayerNorm
    | DftFilter
    | CircularFilter
    | Patchify
    | TokenMean
    | Attention
    | SelectTokens
    | InversePermutation
    | GatherRows
    | Softmax
    | Quantize
    | Dequantize
    | Generic
)


@dataclass(frozen=True, kw_only=True)
class ActStorage:
    """How a target stores int8 activations: stored = logical + offset.

    Attributes:
        saturates: whether its vectors are converted and narrowed with saturation, as NEON's are.
    """

    dtype: Literal["int8", "uint8"] = "int8"
    offset: int = 0
    saturates: bool = False

    def dtype_of(self, act: Act) -> str:
        """The dtype that activations are stored in."""
        return self.dtype if act == "int8" else act


@dataclass(frozen=True, kw_only=True)
class Step:
    """One function of a scheduled kernel: its name within the kernel and its arguments."""

    func: Any  # tvm.tirx.PrimFunc; for a GPU its loops are bound to blocks and threads
    args: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """A kernel, scheduled for a device.

    Attributes:
        steps: the functions to call in order; an argument is one of the kernel's, a key of
            `temps`, or a key of `consts`.
        pack: for each constant argument that wants another layout or dtype than the raw one, how
            to get there from the kernel's raw constants, all of them by name (an int8 bias, say,
            absorbs the storage offset times the weight's column sums).
        temps: scratch tensors that live for this kernel alone: dtype and shape.
        consts: tensors that the schedule itself brings along, such as DFT matrices.
        in_place: for a result that may lie where an argument does, if nobody else needs that: the
            argument. Its elements are read before those of the result are written there.
    """

    steps: tuple[Step, ...]
    pack: Mapping[str, Callable[[Mapping[str, Array]], Array]] = field(default_factory=dict)
    temps: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    consts: Mapping[str, Array] = field(default_factory=dict)
    in_place: Mapping[str, str] = field(default_factory=dict)


def quant_args(scale: float, zero_point: int) -> Array:
    """The `quant` argument: (1 / scale, lowest, highest, zero_point) as float32.

    q = rint(clip(v * (1 / scale), lowest, highest)) + zero_point, rounding half to even, which is
    ONNX QuantizeLinear for int8; lowest = -128 - zero_point, highest = 127 - zero_point.
    """
    inverse = np.float32(1) / np.float32(scale)
    return np.array([inverse, -128 - zero_point, 127 - zero_point, zero_point], np.float32)
