"""What every training reads and writes: images, where it is shown, and a file to resume from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfcompile.compile.models import KeepRatio
from gfcompile.compile.progress import Progress
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform

if TYPE_CHECKING:
    from gfcompile.compile.training_progress import ConsoleTraining
    from gfcompile.quantize.data import Images
    from gfcompile.quantize.distributed import Group

__all__ = ["TrainingJob"]


@dataclass(frozen=True, kw_only=True)
class TrainingJob(ABC):
    """What a training reads and writes.

    Attributes:
        model: a name of the zoo, or, for a module of one's own, any name.
        train_data: a folder with a folder of images for each class, or a CSV of paths and labels.
        val_data: the same, to report top-1 on.
        output: the checkpoint that is written; None for one named after the model.
        image_size, num_classes: None for those of the checkpoint.
        keep_ratio: share of the patches that a pruning model keeps, see `ModelSpec.pruned`; None
            as published.
        device: "cpu", "cuda", or "auto".
        max_corrupt: how many unreadable images are passed over before it is an error.
        threads: how many read images.
        tensorboard: a folder for a log.
    """

    model: str
    train_data: Path
    val_data: Path | None = None
    output: Path | None = None
    image_size: int | None = None
    num_classes: int | None = None
    keep_ratio: KeepRatio | None = None
    device: str = "auto"
    max_corrupt: int = 10
    threads: int = 4
    tensorboard: Path | None = None

    @property
    @abstractmethod
    def path(self) -> Path:
        """Where the checkpoint goes."""

    @property
    def state_path(self) -> Path:
        """Where the training is resumed from, until it is over."""
        return self.path.with_name(f"{self.path.name}.training")

    def check_output(self, start: Path | None) -> None:
        """Says early what would be met when the training is over.

        Args:
            start: the weights that it starts from.

        Raises:
            UserError: the checkpoint would replace these, or a folder.
        """
        if start is not None and self.path.resolve() == start.resolve():
            raise UserError(f"{start}: is what the training starts from; give another --output")
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a folder; give a file to write as --output")

    def read_data(
        self, transform: Transform, classes: int, progress: Progress
    ) -> "tuple[Images, Images | None]":
        """The images to train on, and those to validate with.

        Args:
            classes: how many the model's head has.
            progress: told of unreadable images.

        Raises:
            UserError: see `read_images`.
        """
        from gfcompile.quantize.data import Images, LabelledImages, read_images

        def images(files: LabelledImages) -> Images:
            return Images(
                files=files,
                transform=transform,
                max_corrupt=self.max_corrupt,
                on_corrupt=progress.note,
                threads=self.threads,
            )

        files = read_images(self.train_data, classes=classes)
        if self.val_data is None:
            return images(files), None
        others = read_images(self.val_data, classes=classes, names=files.classes)
        return images(files), images(others)

    def listeners(self, console: "ConsoleTraining | None", group: "Group") -> Any:
        """Who is told how the training goes: of several processes, the first one's alone."""
        from gfcompile.compile.training_progress import Several, TensorBoardLog

        listeners: list[Any] = []
        if group.is_first:
            listeners += [] if console is None else [console]
            listeners += [] if self.tensorboard is None else [TensorBoardLog(self.tensorboard)]
        return Several(listeners)
