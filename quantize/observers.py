"""What calibration remembers of the tensors it sees, and the scales it derives from that."""

import numpy as np
import numpy.typing as npt
import torch

from gfcompile.quantize._pt2e import ObserverBase
from gfcompile.quantize.qparams import (
    SMALLEST_SCALE,
    Factors,
    Float32Array,
    Float64Array,
    QParams,
    dequantize,
    from_range,
    group_scales,
    integers_of,
    minimize_squared_error,
    mse_scales,
    steps_of,
    symmetric_scales,
)
from gfcompile.quantize.scheme import RangeRule, TensorScheme
from gfcompile.runtime.errors import CompileError

__all__ = ["ActivationObserver", "FixedObserver", "WeightObserver"]

# A bin is the floats that share sign, exponent and the first 9 bits of the mantissa: at the top of
# an int8 range it is a quarter of a step wide, and finer below.
_DROPPED_BITS = 23 - 9
_BINS = 1 << (32 - _DROPPED_BITS)


class ActivationObserver(ObserverBase):  # type: ignore[misc]  # torchao is untyped
    """A histogram of every value seen, and the scale and zero point that suit it.

    The bins are those of the float format itself, so they need no range: nothing is rebinned when
    a later batch brings larger values, an outlier costs the bulk no resolution, and as counts are
    integers the order of batches does not matter.
    """

    counts: torch.Tensor

    def __init__(self, scheme: TensorScheme, rule: RangeRule, **_spec: object) -> None:
        # PT2E passes the fields of its own spec as well; the scheme has said it all.
        super().__init__(dtype=torch.int8)
        self.scheme = scheme
        self.rule = rule
        # Read by convert_pt2e.
        self.qscheme = torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine
        self.quant_min, self.quant_max = scheme.low, scheme.high
        self.low, self.high = np.inf, -np.inf
        self.register_buffer("counts", torch.zeros(_BINS, dtype=torch.int64), persistent=False)
        self._settled: QParams | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x itself, counted."""
        values = x.detach().to(torch.float32).flatten()
        low, high = torch.aminmax(values)
        # NaN must stick; Python's min and max would drop it.
        self.low = float(np.minimum(self.low, low.item()))
        self.high = float(np.maximum(self.high, high.item()))
        bins = (values.view(torch.int32) >> _DROPPED_BITS) & (_BINS - 1)
        self.counts += torch.bincount(bins, minlength=_BINS)
        self._settled = None
        return x

    def histogram(self) -> tuple[Float64Array, Float64Array]:
        """The centres of the bins that are not empty, ascending, and how many values each has."""
        counts = self.counts.cpu().numpy()
        occupied = np.flatnonzero(counts)
        centres = _bin_centres(occupied)
        order = np.argsort(centres, kind="stable")
        # The outermost centres may lie beyond what was seen.
        values = np.clip(centres[order], self.low, self.high)
        return values, counts[occupied][order].astype(np.float64)

    def settle(self, layer: str) -> QParams:
        """The scale and zero point for what was seen.

        Args:
            layer: named in errors.

        Raises:
            CompileError: nothing was seen, or only zeros, or a NaN or an infinity.
        """
        if self._settled is not None:
            return self._settled
        if self.low > self.high:
            raise CompileError(
                f"calibration never reached the input of {layer}; keep that layer in float"
            )
        if not (np.isfinite(self.low) and np.isfinite(self.high)):
            raise CompileError(
                f"calibration met NaN or infinity at the input of {layer}; "
                "check the checkpoint and the calibration images"
            )
        if max(-self.low, self.high) < SMALLEST_SCALE:
            raise CompileError(
                f"calibration saw only zeros at the input of {layer}, so it has no scale; "
                "check the checkpoint and the calibration images, or keep that layer in float"
            )
        if self.rule == "minmax":
            self._settled = from_range(self.low, self.high, self.scheme)
        else:
            self._settled = minimize_squared_error(*self.histogram(), self.scheme)
        return self._settled

    def settle_as(self, params: QParams) -> None:
        """Takes these parameters, whatever was seen."""
        self._settled = params

    def forget(self) -> None:
        """Starts to watch anew."""
        self.low, self.high = np.inf, -np.inf
        self.counts.zero_()
        self._settled = None

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point as tensors of one element, for PT2E."""
        assert self._settled is not None, "settle() comes before convert_pt2e()"
        return (
            torch.tensor([self._settled.scale], dtype=torch.float32),
            torch.tensor([self._settled.zero_point], dtype=torch.int64),
        )

    def clipped_fraction(self) -> float:
        """The fraction of values seen that lie more than half a step outside the range."""
        assert self._settled is not None, "settle() comes first"
        values, counts = self.histogram()
        steps = values / self._settled.scale + self._settled.zero_point
        clipped = (steps < self.scheme.low - 0.5) | (steps > self.scheme.high + 0.5)
        return float(counts[clipped].sum() / counts.sum())

    def sqnr_db(self) -> float:
        """Signal to quantization noise over the values seen."""
        assert self._settled is not None, "settle() comes first"
        values, counts = self.histogram()
        zero_point, scale = self._settled.zero_point, self._settled.scale
        steps = np.clip(
            np.rint(values / scale), self.scheme.low - zero_point, self.scheme.high - zero_point
        )
        noise = float((counts * (values - steps * scale) ** 2).sum())
        if noise == 0.0:
            return float("inf")
        return float(10 * np.log10(float((counts * values**2).sum()) / noise))


class FixedObserver(ObserverBase):  # type: ignore[misc]  # torchao is untyped
    """A scale and zero point that follow from what a tensor is, not from its values."""

    def __init__(
        self, scheme: TensorScheme, scale: float, zero_point: int, **_spec: object
    ) -> None:
        super().__init__(dtype=torch.int8)
        self.scheme = scheme
        self.params = QParams(scale, zero_point)
        # Read by convert_pt2e.
        self.qscheme = torch.per_tensor_affine
        self.quant_min, self.quant_max = scheme.low, scheme.high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point as tensors of one element, for PT2E."""
        return (
            torch.tensor([self.params.scale], dtype=torch.float32),
            torch.tensor([self.params.zero_point], dtype=torch.int64),
        )


class WeightObserver(ObserverBase):  # type: ignore[misc]  # torchao is untyped
    """Symmetric scales of a constant weight, one per output channel, and factors of its groups."""

    def __init__(
        self,
        scheme: TensorScheme,
        rule: RangeRule = "minmax",
        channel_axis: int = 0,
        **_spec: object,
    ) -> None:
        super().__init__(dtype=torch.int8)
        assert scheme.symmetric, scheme
        assert scheme.per_channel, scheme
        self.scheme = scheme
        self.rule = rule
        # Read by convert_pt2e.
        self.qscheme = torch.per_channel_symmetric
        self.quant_min, self.quant_max = -scheme.stored_high, scheme.stored_high
        self.ch_axis = channel_axis
        self.scales: Float32Array | None = None
        self.chosen_factors: Factors | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight itself; a constant, so its scales are taken the first time only."""
        if self.scales is None:
            values = weight.detach().cpu().numpy()
            if self.scheme.group_size is not None:
                self.scales, self.chosen_factors = group_scales(values, self.scheme, self.rule)
            else:
                choose = mse_scales if self.rule == "mse" else symmetric_scales
                self.scales = choose(values, self.ch_axis, self.scheme)
        return weight

    def settle_as(self, scales: Float32Array, factors: Factors | None = None) -> None:
        """Takes these scales and factors, whatever the weight is."""
        self.scales, self.chosen_factors = scales, factors

    def forget(self) -> None:
        """Takes the scales anew the next time."""
        self.scales = self.chosen_factors = None

    def rounded(self, weight: Float32Array) -> Float32Array:
        """The values that the weight is rounded to."""
        assert self.scales is not None, "the weight was never observed"
        integers = integers_of(weight, self.scales, self.chosen_factors, self.scheme)
        return dequantize(integers, steps_of(self.scales, None, weight.shape, self.scheme), 0)

    def make_room_for_bias(
        self, bias: npt.NDArray[np.float32], input_scale: float, limit: int
    ) -> None:
        """Raises scales until |bias| <= limit * input_scale * scale, channel by channel."""
        assert self.scales is not None, "the weight was never observed"
        floor = np.abs(bias).astype(np.float64) / (limit * input_scale)
        self.scales = np.maximum(self.scales, floor.astype(np.float32))

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points, for PT2E."""
        assert self.scales is not None, "the weight was never observed"
        scales = torch.from_numpy(self.scales.copy())
        return scales, torch.zeros(len(scales), dtype=torch.int64)


def _bin_centres(bins: npt.NDArray[np.int64]) -> Float64Array:
    first = (bins << _DROPPED_BITS).astype(np.uint32)  # the bits of each bin's first float
    middle = first + np.uint32(1 << (_DROPPED_BITS - 1))
    return middle.view(np.float32).astype(np.float64)
