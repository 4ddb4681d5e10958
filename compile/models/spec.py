"""What is known of a model without building it. Imports no torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
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
        top1_percent: ImageNet accuracy as published; None at any other size or class count.
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

    @property
    @abstractmethod
    def stride(self) -> int:
        """What the image size must be a multiple of."""

    @abstractmethod
    def shapes(self) -> Shapes:
        """Name and shape of every entry of the model's state dict, in its order."""

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
        return sum(math.prod(shape) for shape in self.shapes().values())

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
        return replace(self, image_size=size, num_classes=classes, top1_percent=top1_percent)
