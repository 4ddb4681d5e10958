"""From a torch module to the graph that emitters take, with its ledger."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.compile.ledger import compare
from gfcompile.compile.passes import Lowered, lower
from gfcompile.compile.progress import Progress
from gfcompile.compile.trace import INPUT, OUTPUT, rounding_tolerance, save, session, trace
from gfcompile.runtime.errors import CompileError

if TYPE_CHECKING:
    from torch import nn

    from gfcompile.quantize import Calibrated

Array = npt.NDArray[Any]
FftForm = Literal["native", "dft", "circular"]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A lowered graph, ready to be emitted, and what is to be told of how it came about.

    Attributes:
        model: float, or QDQ after calibration; canonical, see `passes.lower`.
        ledger: one entry per stage, JSON values.
        filters: the form that each global filter took.
        layers, kept_float: what quantization decided, JSON values; empty without int8.
        calibration_images: how many the ranges were calibrated on.
        training: how the weights were trained for int8, JSON values; empty if they were not.
    """

    model: ir.Model
    ledger: Sequence[Mapping[str, Any]]
    filters: Sequence[Mapping[str, Any]]
    layers: Sequence[Mapping[str, Any]] = ()
    kept_float: Sequence[Mapping[str, Any]] = ()
    scheme: Mapping[str, Any] = field(default_factory=dict)
    calibration_images: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_int4(self) -> bool:
        """Whether weights were quantized to 4 bits."""
        return bool(self.scheme) and self.scheme["weight"]["high"] <= 7

    @property
    def group_size(self) -> int | None:
        """How many weights of four bits share a factor; None where none do."""
        size: int | None = self.scheme["weight"]["group_size"] if self.scheme else None
        return size

    def write(self, folder: Path) -> None:
        """Writes the graph into an empty folder, for `read`."""
        save(self.model, folder / "graph.onnx")
        records = {
            "ledger": self.ledger,
            "filters": self.filters,
            "layers": self.layers,
            "kept_float": self.kept_float,
            "scheme": self.scheme,
            "calibration_images": self.calibration_images,
            "training": self.training,
        }
        (folder / "graph.json").write_text(json.dumps(records), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Graph":
        """What `write` left in `folder`."""
        records = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
        return cls(model=ir.load(folder / "graph.onnx"), **records)


def build_graph(
    module: "nn.Module",
    images: Sequence[Array],
    *,
    quantize: "Callable[[nn.Module], Calibrated] | None",
    fft: FftForm | Literal["auto"],
    choose_form: Callable[[int, int, int], FftForm],
    progress: Progress,
    on_stage: Callable[[str, ir.Model], None],
) -> Graph:
    """Traces and lowers `module`; with `quantize`, in the form that this gives it.

    Args:
        module: float, in eval mode.
        images: golden inputs (batch, 3, H, W), for the ledger; the first one is the traced example.
        quantize: the QDQ form of the float module, which comes frozen; None for a float graph.
        fft, choose_form: see `passes.lower`.
        on_stage: given a name and the graph after each stage.

    Raises:
        CompileError: a stage computes something else than the one before.
    """
    import torch

    from gfcompile.compile.prune import freeze

    example = torch.from_numpy(images[0])
    with torch.no_grad():
        expected = [module(torch.from_numpy(image)).numpy() for image in images]

    with progress.stage("trace"):
        # From here on the frozen module stands for the one given; what it computes is compared
        # with the given one's logits.
        module = freeze(module)
        traced = trace(module, example)
        on_stage("traced", traced)
        # `lower` may work in place, and the ledger wants both.
        traced_logits = run(traced, images)
        ledger = [
            compare(
                "traced",
                "torch",
                expected,
                traced_logits,
                how="ONNX Runtime",
                tolerance=rounding_tolerance(traced) * _largest(expected),
            )
        ]
    with progress.stage("lower"):
        lowered = lower(
            traced,
            fft=fft,
            choose_form=choose_form,
            half_constants=False,
            on_stage=on_stage,
        )
        lowered_logits = run(lowered.model, images)
        ledger.append(
            compare(
                "lowered",
                "traced",
                traced_logits,
                lowered_logits,
                how="ONNX Runtime",
                tolerance=rounding_tolerance(traced) * _largest(expected),
            )
        )
    for entry in ledger:
        if entry.tolerance is not None and not entry.max_abs_error <= entry.tolerance:
            raise CompileError(
                f"the {entry.stage} graph differs from the {entry.against} one by "
                f"{entry.max_abs_error:.3g}, rounding explains {entry.tolerance:.3g}; "
                "please report this"
            )
    if quantize is None:
        return Graph(
            model=lowered.model,
            ledger=[entry.to_dict() for entry in ledger],
            filters=_filter_records(lowered),
        )

    with progress.stage("quantize"):
        calibrated = quantize(module)
    with progress.stage("trace and lower the quantized model"):
        quantized = lower(
            trace(calibrated.module, example),
            fft=fft,
            choose_form=choose_form,
            half_constants=True,
            on_stage=lambda name, model: on_stage(f"quantized-{name}", model),
        )
        ledger.append(
            compare(
                "quantized",
                "lowered",
                lowered_logits,
                run(quantized.model, images),
                how="ONNX Runtime",
            )
        )
    return Graph(
        model=quantized.model,
        ledger=[entry.to_dict() for entry in ledger],
        filters=_filter_records(quantized),
        layers=[_json(layer) for layer in calibrated.layers],
        kept_float=[_json(layer) for layer in calibrated.kept_float],
        scheme=dict(calibrated.scheme.to_dict()),
        calibration_images=calibrated.images,
        training=calibrated.training,
    )


def run(model: ir.Model, images: Sequence[Array], *, optimize: bool = False) -> list[Array]:
    """The logits of each image in ONNX Runtime: node by node, or as it optimizes the graph."""
    runner = session(model, optimize=optimize)
    return [np.asarray(runner.run([OUTPUT], {INPUT: image})[0]) for image in images]


def _largest(logits: Sequence[Array]) -> float:
    return max(float(np.abs(values).max()) for values in logits)


def _filter_records(lowered: Lowered) -> list[Mapping[str, Any]]:
    return [_json(record) for record in lowered.filters]


def _json(record: Any) -> Mapping[str, Any]:
    from dataclasses import asdict

    values: Mapping[str, Any] = json.loads(json.dumps(asdict(record), allow_nan=True))
    return {k: None if v in (float("inf"), float("-inf")) else v for k, v in values.items()}
