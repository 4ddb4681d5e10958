"""The models that gfcompile knows by name, and how to load one.

Importing this imports no torch: `load_model` does.
"""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from gfcompile.compile.models import convnext_specs, dynamicvit_specs, gfnet_specs, swin_specs
from gfcompile.compile.models.spec import ModelSpec, Paper
from gfcompile.quantize import is_quantized
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "KeepRatio",
    "LoadedModel",
    "ModelSpec",
    "Paper",
    "load_model",
    "load_student",
    "model_names",
    "model_spec",
]

KeepRatio = float | Sequence[float]

_SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for family in (gfnet_specs, dynamicvit_specs, convnext_specs, swin_specs)
    for spec in family.SPECS
}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with weights, ready to be traced.

    Attributes:
        spec: at the image size and number of classes that it was loaded for.
        module: in evaluation mode; (B, 3, image_size, image_size) to (B, num_classes).
        weights: where they come from, for people: "random (seed 0)", or a checkpoint's name
            and SHA-256.
        is_random: whether nobody trained them.
    """

    spec: ModelSpec
    module: "nn.Module"
    weights: str
    is_random: bool

    @property
    def image_size(self) -> int:
        return self.spec.image_size

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def transform(self) -> Transform:
        return self.spec.transform


def model_names() -> tuple[str, ...]:
    """The names that --model takes, families together, small to large."""
    return tuple(_SPECS)


def model_spec(name: str, keep_ratio: KeepRatio | None = None) -> ModelSpec:
    """The model called `name`.

    Args:
        keep_ratio: how many patches are kept, see `ModelSpec.pruned`; as published when None.

    Raises:
        UserError: there is none of that name, or it cannot keep as many.
    """
    spec = _find(name)
    if keep_ratio is None:
        return spec
    pruning = [other.name for other in _SPECS.values() if other.parent == name]
    if pruning:
        raise UserError(f"{name} keeps all its patches; {pruning[0]} takes a keep ratio")
    return spec.pruned(keep_ratio)


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    keep_ratio: KeepRatio | None = None,
    seed: int = 0,
) -> LoadedModel:
    """The model called `name`, with weights from `checkpoint`, or random ones drawn from `seed`.

    Without `image_size` the model is as large as its checkpoint, or as published; weights of
    another size are interpolated. The number of classes is the checkpoint's.

    Args:
        checkpoint: if it is quantized, the module is frozen as it was for that.
        keep_ratio: see `model_spec`.

    Raises:
        UserError: unknown name, impossible size or keep ratio, or a checkpoint that cannot be
            used.
    """
    spec = model_spec(name, keep_ratio)
    # The size asked for is checked first: reading a checkpoint can take seconds.
    asked = spec.resized(image_size=image_size, num_classes=num_classes)
    if checkpoint is None:
        return _untrained(asked, seed)
    if checkpoint.is_file() and is_quantized(checkpoint):
        return _quantized(
            name,
            checkpoint,
            image_size=image_size,
            num_classes=num_classes,
            keep_ratio=keep_ratio,
        )
    return _trained(spec, checkpoint, image_size=image_size, num_classes=num_classes)


def load_student(
    name: str, teacher: LoadedModel, *, keep_ratio: KeepRatio | None = None, seed: int = 0
) -> LoadedModel:
    """The pruning model called `name` as its fine-tuning starts: its parent, untrained predictors.

    Raises:
        UserError: `teacher` is not the model's parent, or the keep ratio is impossible.
    """
    from gfcompile.compile.models.weights import start_weights

    spec = model_spec(name, keep_ratio)
    if spec.parent != teacher.spec.name:
        wanted = f"learns from {spec.parent}" if spec.parent else "prunes nothing, so has no parent"
        raise UserError(f"{name} {wanted}, not from {teacher.spec.name}")
    spec = spec.resized(image_size=teacher.image_size, num_classes=teacher.num_classes)
    inherited = {key: value.clone() for key, value in teacher.module.state_dict().items()}
    drawn = start_weights(spec, seed)
    state = {key: inherited.get(key, value) for key, value in drawn.items()}
    return LoadedModel(
        spec=spec,
        module=_family(spec).build(spec, state),
        weights=f"{teacher.weights}, with untrained predictors (seed {seed})",
        is_random=teacher.is_random,
    )


class _Family(Protocol):
    """What each module that builds a family's networks has."""

    def build(self, spec: ModelSpec, state: "Mapping[str, Tensor]") -> "nn.Module": ...

    def random_weights(self, spec: ModelSpec, seed: int) -> "Mapping[str, Tensor]": ...

    def resize_weights(
        self, state: "Mapping[str, Tensor]", spec: ModelSpec
    ) -> "Mapping[str, Tensor]": ...


def _family(spec: ModelSpec) -> _Family:
    return cast(_Family, importlib.import_module(f"{__name__}.{spec.family}"))


def _untrained(spec: ModelSpec, seed: int) -> LoadedModel:
    family = _family(spec)
    module = family.build(spec, family.random_weights(spec, seed))
    return LoadedModel(spec=spec, module=module, weights=f"random (seed {seed})", is_random=True)


def _trained(
    spec: ModelSpec, checkpoint: Path, *, image_size: int | None, num_classes: int | None
) -> LoadedModel:
    from gfcompile.compile.models.checkpoint import check_fits, read_state_dict, sha256

    state: Mapping[str, Tensor] = read_state_dict(checkpoint)
    trained = spec.trained_as({key: tuple(value.shape) for key, value in state.items()})
    check_fits(state, trained, path=checkpoint, others=_SPECS.values())
    if num_classes not in (None, trained.num_classes):
        raise UserError(
            f"{checkpoint}: has {trained.num_classes} classes, not the {num_classes} asked for"
        )
    wanted = trained.resized(image_size=image_size)
    weights = f"checkpoint {checkpoint.name} sha256:{sha256(checkpoint)}"
    if wanted.image_size != trained.image_size:
        state = _family(spec).resize_weights(state, wanted)
        weights += f", interpolated from {trained.image_size} to {wanted.image_size} pixels"
    module = _family(spec).build(wanted, state)
    return LoadedModel(spec=wanted, module=module, weights=weights, is_random=False)


def _quantized(
    name: str,
    checkpoint: Path,
    *,
    image_size: int | None,
    num_classes: int | None,
    keep_ratio: KeepRatio | None,
) -> LoadedModel:
    """The module whose layers a quantized checkpoint has the scales of."""
    import torch

    from gfcompile.compile.models.checkpoint import sha256
    from gfcompile.compile.prune import freeze
    from gfcompile.quantize import read_quantized

    stored = read_quantized(checkpoint)
    ratios = tuple(stored.training.get("keep_ratios") or ())
    spec = _find(name)
    if ratios and spec.prune_before:
        spec = spec.pruned(ratios)
        if keep_ratio is not None and model_spec(name, keep_ratio).keep_ratios != ratios:
            shown = ", ".join(f"{ratio:.4g}" for ratio in ratios)
            raise UserError(
                f"{checkpoint}: was quantized for keep ratios {shown}; leave out --keep-ratio, or "
                "quantize the float weights again"
            )
    spec = spec.trained_as({key: tuple(value.shape) for key, value in stored.state.items()})
    for what, asked, found in (
        ("pixels", image_size, spec.image_size),
        ("classes", num_classes, spec.num_classes),
    ):
        if asked not in (None, found):
            raise UserError(f"{checkpoint}: was quantized for {found} {what}, not {asked}")
    blank = {key: torch.zeros(shape) for key, shape in spec.shapes().items()}
    module = freeze(_family(spec).build(spec, blank))
    try:
        module.load_state_dict(dict(stored.state))
    except RuntimeError as error:  # torch's own, with one line per name that differs
        raise UserError(f"{checkpoint}: is quantized, of another model than {name}") from error
    weights = f"checkpoint {checkpoint.name} sha256:{sha256(checkpoint)}"
    return LoadedModel(spec=spec, module=module, weights=weights, is_random=False)


def _find(name: str) -> ModelSpec:
    if name in _SPECS:
        return _SPECS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), _SPECS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown model {name!r}{hint} (known: {', '.join(_SPECS)})")
