"""What is known of a model without building it. Imports no torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform, imagenet_transform

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a model comes from."""

    title: str
    arxiv: str

    def __str__(self) -> str:
        return f"{self.title} (arXiv:{self.arxiv})"


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ABC):
    """A model that gfcompile can build, at one image size and number of classes.

    Attributes:
        name: as given to --model.
        family: the file under compile/models that builds it.
        paper: where it was published.
        image_size, num_classes: of the published weights, unless `resized`.
        patch_size: side of the image patch behind one token of the first stage.
        dims, depths: channels and blocks of each stage; one entry where there are no stages.
        top1_percent: ImageNet accuracy as published; None at any other size, class count or
            keep ratio.
        prune_before: blocks before which patches are dropped (or sent to a cheaper path, where
            the family says so); of the third stage where there are several.
        keep_ratios: share of all patches that is kept from each of these blocks on.
        parent: the model that prunes nothing, but is the same otherwise.
    """

    name: str
    family: str
    paper: Paper
    image_size: int = 224
    num_classes: int = 1000
    patch_size: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    top1_percent: float | None = None
    prune_before: tuple[int, ...] = ()
    keep_ratios: tuple[float, ...] = ()
    parent: str | None = None

    def __post_init__(self) -> None:
        assert len(self.prune_before) == len(self.keep_ratios)

    @property
    @abstractmethod
    def stride(self) -> int:
        """What the image size must be a multiple of."""

    @abstractmethod
    def shapes(self) -> Shapes:
        """Name and shape of every entry of the model's state dict, in its order.

        Counters of training steps are left out, which some checkpoints have and none needs.
        """

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates of one image, additions and normalizations not counted."""

    @property
    def filters(self) -> tuple[tuple[int, int, int], ...]:
        """Rows, columns and channels of each kind of global filter in the model."""
        return ()

    @abstractmethod
    def trained_as(self, shapes: Shapes) -> Self:
        """This model at the size and class count of a state dict of these shapes.

        Where the shapes do not tell, this model as it is.
        """

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(
            math.prod(shape) for name, shape in self.shapes().items() if ".running_" not in name
        )

    @property
    def prunable_patches(self) -> int:
        """How many patches there are before the first is dropped."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def kept_patches(self) -> tuple[int, ...]:
        """How many patches are kept from each block in `prune_before` on."""
        return kept_patches(self.prunable_patches, self.keep_ratios)

    @property
    def dropping(self) -> tuple[int, ...]:
        """How many patches are kept by each stage that drops any, of those that it is given."""
        found, given = [], self.prunable_patches
        for kept in self.kept_patches:
            if kept < given:
                found.append(kept)
                given = given if self.chooses_anew else kept
        return tuple(found)

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Layers, as shell patterns, that int8 leaves in float.

        Score predictors: rounding their near-ties would keep other patches.
        """
        return ("*score_predictor.*",) if self.dropping else ()

    @property
    def transform(self) -> Transform:
        """What turns an image into the model's input."""
        return imagenet_transform(self.image_size)

    def resized(self, *, image_size: int | None = None, num_classes: int | None = None) -> Self:
        """The same model for another image size or number of classes; None keeps what is.

        Raises:
            UserError: the model cannot take that.
        """
        size = self.image_size if image_size is None else image_size
        classes = self.num_classes if num_classes is None else num_classes
        if size < self.stride or size % self.stride:
            below = max(size // self.stride, 1) * self.stride
            raise UserError(
                f"{self.name} takes image sizes divisible by {self.stride}, not {size}; "
                f"the nearest are {below} and {below + self.stride}"
            )
        if classes < 1:
            raise UserError(f"{classes} classes; {self.name} needs at least one")
        published = (size, classes) == (self.image_size, self.num_classes)
        top1_percent = self.top1_percent if published else None
        spec = replace(self, image_size=size, num_classes=classes, top1_percent=top1_percent)
        spec._check_patches_are_left()
        return spec

    def pruned(self, keep_ratio: float | Sequence[float]) -> Self:
        """The same model, keeping another share of its patches.

        Args:
            keep_ratio: one number, from which each stage's share follows as in the paper, or
                for each block in `prune_before` the share of all patches that is kept from there
                on.

        Raises:
            UserError: the model drops no patches, or not in this way.
        """
        if not self.prune_before:
            raise UserError(f"{self.name} takes no keep ratio: {self.unprunable_because}")
        if isinstance(keep_ratio, float | int):
            ratios = self._stage_ratios(keep_ratio)
        else:
            ratios = tuple(keep_ratio)
        if len(ratios) != len(self.prune_before):
            raise UserError(
                f"{len(ratios)} keep ratios; {self.name} takes one, or "
                f"{len(self.prune_before)}, one per pruning stage"
            )
        if not all(0 < ratio <= 1 for ratio in ratios):
            raise UserError(
                f"keep ratio {_show(keep_ratio)} keeps {_show(ratios)} of the patches; "
                "each must be above 0 and at most 1"
            )
        if not self.chooses_anew and list(ratios) != sorted(ratios, reverse=True):
            raise UserError(
                f"keep ratios {_show(ratios)} grow; each is the share of all patches, and "
                f"{self.name} cannot bring back what it has dropped"
            )
        top1_percent = self.top1_percent if ratios == self.keep_ratios else None
        spec = replace(self, keep_ratios=ratios, top1_percent=top1_percent)
        spec._check_patches_are_left()
        return spec

    @property
    def chooses_anew(self) -> bool:
        """Whether each pruning stage chooses among all patches, not those kept before."""
        return False

    @property
    def unprunable_because(self) -> str:
        """Why the model drops no patches; of no meaning where it does."""
        return "it drops no patches"

    def _stage_ratios(self, keep_ratio: float) -> tuple[float, ...]:
        """The share of all patches kept from each stage on, as the paper derives it from one."""
        return tuple(keep_ratio ** (stage + 1) for stage in range(len(self.prune_before)))

    def _check_patches_are_left(self) -> None:
        if 0 in self.kept_patches:
            raise UserError(
                f"{self.name} has {self.prunable_patches} patches at {self.image_size} pixels, "
                f"of which keep ratios {_show(self.keep_ratios)} leave none"
            )


def kept_patches(num_patches: int, keep_ratios: Sequence[float]) -> tuple[int, ...]:
    """How many patches are alive after each pruning stage, the class token not counted.

    The reference truncates and we must match it token for token, so this is `int`, not `round`.

    >>> kept_patches(196, (0.7, 0.7**2, 0.7**3))
    (137, 96, 67)
    """
    return tuple(int(num_patches * ratio) for ratio in keep_ratios)


def _show(ratios: float | Sequence[float]) -> str:
    values = [ratios] if isinstance(ratios, float | int) else ratios
    return ", ".join(f"{value:.4g}" for value in values)
