"""The models that gfcompile knows by name, and how to load one.

Importing this imports no torch: `load_model` does.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gfcompile.compile.models.gfnet_specs import SPECS, GFNetSpec
from gfcompile.compile.models.spec import ModelSpec, Paper
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LoadedModel", "ModelSpec", "Paper", "load_model", "model_names", "model_spec"]

_SPECS: dict[str, GFNetSpec] = {spec.name: spec for spec in SPECS}


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


def model_spec(name: str) -> ModelSpec:
    """The model called `name`.

    Raises:
        UserError: there is none of that name.
    """
    return _find(name)


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> LoadedModel:
    """The model called `name`, with weights from `checkpoint`, or random ones drawn from `seed`.

    Without `image_size` the model is as large as its checkpoint, or as published; weights of
    another size are interpolated. The number of classes is the checkpoint's.

    Raises:
        UserError: unknown name, impossible size, or a checkpoint that cannot be used.
    """
    spec = _find(name)
    if checkpoint is None:
        return _untrained(spec.resized(image_size=image_size, num_classes=num_classes), seed)
    # The size asked for is checked first: reading a checkpoint can take seconds.
    spec.resized(image_size=image_size, num_classes=num_classes)
    return _trained(spec, checkpoint, image_size=image_size, num_classes=num_classes)


def _untrained(spec: GFNetSpec, seed: int) -> LoadedModel:
    from gfcompile.compile.models import gfnet

    module = gfnet.build(spec, gfnet.random_weights(spec, seed))
    return LoadedModel(spec=spec, module=module, weights=f"random (seed {seed})", is_random=True)


def _trained(
    spec: GFNetSpec, checkpoint: Path, *, image_size: int | None, num_classes: int | None
) -> LoadedModel:
    from gfcompile.compile.models import gfnet
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
        state = gfnet.resize_weights(state, wanted)
        weights += f", interpolated from {trained.image_size} to {wanted.image_size} pixels"
    module = gfnet.build(wanted, state)
    return LoadedModel(spec=wanted, module=module, weights=weights, is_random=False)


def _find(name: str) -> GFNetSpec:
    if name in _SPECS:
        return _SPECS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), _SPECS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown model {name!r}{hint} (known: {', '.join(_SPECS)})")
