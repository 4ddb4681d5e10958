"""How training is shown while it runs: on the terminal, and in TensorBoard."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from gfcompile.runtime.errors import UserError

if TYPE_CHECKING:
    from gfcompile.quantize.loop import EpochRecord, StepRecord, TrainProgress


class ConsoleTraining:
    """A line per epoch and, on a terminal, a bar with loss, top-1 and the time that is left."""

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self._epochs = epochs
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  top-1 {task.fields[top1]:.1%}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = TaskID(0)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar is on the terminal."""
        with self._bar:
            yield

    def begin(self, *, steps: int, done: int) -> None:
        if done:
            self._console.print(f"  goes on after step {done} of {steps}", markup=False)
        self._task = self._bar.add_task("train", total=steps, completed=done, loss=0.0, top1=0.0)

    def step(self, record: "StepRecord") -> None:
        self._bar.update(
            self._task,
            completed=record.step,
            description=f"epoch {record.epoch}/{self._epochs}",
            loss=record.loss,
            top1=record.top1,
        )

    def epoch(self, record: "EpochRecord") -> None:
        val = "" if record.val_top1 is None else f", validation top-1 {record.val_top1:.2%}"
        self._console.print(
            f"  epoch {record.epoch}/{self._epochs}: loss {record.loss:.4f}, "
            f"training top-1 {record.train_top1:.2%}{val}",
            markup=False,
        )


class TensorBoardLog:
    """Loss, top-1 and learning rate as TensorBoard shows them.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs TensorBoard: pip install tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder))

    def begin(self, *, steps: int, done: int) -> None:
        pass

    def step(self, record: "StepRecord") -> None:
        for name, value in (("loss", record.loss), ("top1", record.top1), ("lr", record.lr)):
            self._writer.add_scalar(f"train/{name}", value, record.step)

    def epoch(self, record: "EpochRecord") -> None:
        if record.val_top1 is not None:
            self._writer.add_scalar("val/top1", record.val_top1, record.epoch)
        self._writer.flush()


class Several:
    """Tells each of several listeners."""

    def __init__(self, listeners: "Sequence[TrainProgress]") -> None:
        self._listeners = listeners

    def begin(self, *, steps: int, done: int) -> None:
        for listener in self._listeners:
            listener.begin(steps=steps, done=done)

    def step(self, record: "StepRecord") -> None:
        for listener in self._listeners:
            listener.step(record)

    def epoch(self, record: "EpochRecord") -> None:
        for listener in self._listeners:
            listener.epoch(record)
