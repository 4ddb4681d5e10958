"""What is quantized and how: the one place where int8 is decided.

A value v is stored as the integer q = rint(v / scale) + zero_point, saturated to [low, high], and
stands for (q - zero_point) * scale. Zero is always one of the represented values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from gfcompile.runtime.errors import UserError

__all__ = [
    "AUTO",
    "FILTER_KERNEL",
    "MAX_FACTOR",
    "OpKind",
    "QuantScheme",
    "TensorScheme",
    "automatic_layers",
]

OpKind = Literal["linear", "patch_conv2d", "attention", "global_filter"]
RangeRule = Literal["mse", "minmax"]

# Before a number, in place of a layer's name: as many layers, those that int8 hurts most.
AUTO = "auto:"

# Of a group of 4-bit weights (VS-Quant, arXiv:2102.04503): 7 * 18 fits a weight of [-127, 127].
# With factors that are integers, a weight is an integer times the scale of its channel, whatever
# its group: products add up in integers as those of int8 weights do, exactly and as fast.
MAX_FACTOR = 18


@dataclass(frozen=True, kw_only=True)
class TensorScheme:
    """The integers of one kind of tensor.

    Attributes:
        low, high: the smallest and largest integer.
        symmetric: zero_point is 0; otherwise it is chosen within [low, high].
        per_channel: one scale per output channel; otherwise one for the whole tensor.
        group_size: of a weight: as many neighbouring weights of a channel share a factor that their
            scale is multiplied by; None for none. See `MAX_FACTOR`.
    """

    low: int
    high: int
    symmetric: bool
    per_channel: bool
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not self.low <= 0 < self.high:
            raise UserError(f"integer range [{self.low}, {self.high}] does not span zero")
        if self.symmetric and self.low != -self.high:
            raise UserError(f"[{self.low}, {self.high}] is not symmetric")
        if self.group_size is not None and (self.group_size < 1 or self.group_size % 16 != 0):
            # So that no product in integers, which take up to 16 at a time, spans two groups.
            raise UserError(
                f"--group-size {self.group_size} is no multiple of 16; 32 and 64 are usual"
            )

    @property
    def stored_high(self) -> int:
        """The largest of the integers that products are computed with, factors included."""
        return self.high if self.group_size is None else self.high * MAX_FACTOR


# Of a circular filter: one scale per channel, as any weight has.
FILTER_KERNEL = TensorScheme(low=-127, high=127, symmetric=True, per_channel=True)


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """Which layers are quantized, and how.

    A quantized layer is y = dq(q(x)) @ dq(weight) + dq(bias): its input, weight and bias are
    integers, its output is not. Everything else (normalization, GELU, softmax, spectra, means,
    residual additions, concatenations) stays in float. A tensor that several layers read has one
    scale. So no emitter has a scale to change.

    Equal scales at concatenations and residual additions are no part of it, as no target wants them
    of what it quantizes: these are float in kernels of ours, in Core ML and in TFLite. A target of
    integer operators alone gets further scales, for what is float here, from calibration after this
    scheme's are settled (compile/emitters/tflite_graph.py). There an addition takes operands of any
    scales, and a concatenation's take that of its result. These scales are not trained.

    Attributes:
        ops: the kinds of layer to quantize. "linear" is a Linear with a constant weight;
            "patch_conv2d" a Conv2d whose kernel tiles the image (stride = kernel, no padding),
            which is a Linear over patches; "attention" the two products of softmax(q @ k.T) @ v,
            whose operands are integers, scaling and softmax between them in float.
        keep_float: names of layers that stay in float, as the module has them
            ("blocks.0.mlp.fc1"), with shell wildcards ("blocks.*.fc2"). An attention has the name
            of the module that it is computed in ("blocks.0.attn"); what it calls its own layers
            ("blocks.0.attn.qkv") is quantized or not for itself.
        int8_filters: names of global filters that are computed in int8, in the same way: as
            circular convolutions of an int8 grid with an int8 kernel. All others stay in float, and
            none is ever computed on int8 spectra: there the mean of the image, which is one bin,
            sets the scale of all others, and costs 24 dB.
        weight: [-127, 127], not -128: two products of int8 pairs then fit int16, which the fast
            path of ARM cores without a dot product relies on.
        weight_range: how the scale of a weight channel is chosen: "minmax" makes its largest
            magnitude the largest integer, "mse" clips where that minimizes the squared error.
        activation: one scale and zero point per tensor.
        activation_range: "mse" clips where that minimizes the expected squared error, "minmax"
            never clips what calibration saw.
        bias_limit: largest magnitude of an int32 bias, whose scale is that of the input times
            that of the weight. It leaves half the accumulator to the products; a weight channel
            that is tiny beside its bias gets a coarser scale instead of a saturated bias.
        softmax_scale, softmax_zero_point: of what an attention's softmax returns. No image has a
            say in them: it lies in [0, 1], and TFLite knows no other scale for it.
    """

    ops: frozenset[OpKind] = frozenset({"linear", "patch_conv2d", "attention"})
    keep_float: tuple[str, ...] = ()
    int8_filters: tuple[str, ...] = ()
    weight: TensorScheme = TensorScheme(low=-127, high=127, symmetric=True, per_channel=True)
    weight_range: RangeRule = "minmax"
    activation: TensorScheme = TensorScheme(low=-128, high=127, symmetric=False, per_channel=False)
    activation_range: RangeRule = "mse"
    bias_limit: int = 2**30
    softmax_scale: float = 1 / 256
    softmax_zero_point: int = -128

    @classmethod
    def with_weight_bits(
        cls,
        bits: int,
        *,
        group_size: int | None = None,
        keep_float: tuple[str, ...] = (),
        int8_filters: tuple[str, ...] = (),
    ) -> Self:
        """The scheme for weights of 8 or 4 bits; activations have 8 either way.

        Args:
            group_size: of 4 bits, how many weights share a factor of their channel's scale; None
                for the whole channel.

        Raises:
            UserError: another number of bits, groups that cannot be, or see `automatic_layers`.
        """
        automatic_layers(keep_float)
        if group_size is not None and bits != 4:
            raise UserError("--group-size is for --weight-bits 4; add that")
        if bits == 8:
            return cls(keep_float=keep_float, int8_filters=int8_filters)
        if bits == 4:
            # With 15 values for a channel, room for its rare large weights is dear.
            weight = TensorScheme(
                low=-7, high=7, symmetric=True, per_channel=True, group_size=group_size
            )
            return cls(
                keep_float=keep_float,
                int8_filters=int8_filters,
                weight=weight,
                weight_range="mse",
            )
        raise UserError(f"weights of {bits} bits; choose 4 or 8")

    @property
    def weight_bits(self) -> int:
        """What a weight is stored in: 4 or 8 bits."""
        return 4 if self.weight.high <= 7 else 8

    def keeps_float(self, name: str) -> bool:
        """Whether the layer is named by `keep_float`."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep_float)

    def takes_int8(self, filter_name: str) -> bool:
        """Whether the filter is named by `int8_filters`."""
        return any(fnmatchcase(filter_name, pattern) for pattern in self.int8_filters)

    def to_dict(self) -> Mapping[str, Any]:
        """The scheme as plain JSON values, in a fixed order."""
        return asdict(self) | {
            "ops": sorted(self.ops),
            "keep_float": list(self.keep_float),
            "int8_filters": list(self.int8_filters),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **values,
                "ops": frozenset(values["ops"]),
                "keep_float": tuple(values["keep_float"]),
                "int8_filters": tuple(values.get("int8_filters", ())),
                "weight": TensorScheme(**values["weight"]),
                "activation": TensorScheme(**values["activation"]),
            }
        )


def automatic_layers(keep_float: Iterable[str]) -> int | None:
    """The K of "auto:K" among the names of layers; None without it.

    Raises:
        UserError: a K that is no number, or more than one.
    """
    wanted = [name.removeprefix(AUTO) for name in keep_float if name.startswith(AUTO)]
    if not wanted:
        return None
    if len(wanted) > 1 or not wanted[0].isdecimal():
        raise UserError(f"--keep-float {AUTO}{wanted[-1]}: give it once, with a number, as auto:2")
    return int(wanted[0])
