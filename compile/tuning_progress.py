"""What a tuning tells while it runs: one line with the best so far."""

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from gfcompile.targets.tvm.tuning.tuner import Budget

_EVERY_S = 20.0  # a line, where there is no terminal to keep one up to date


class ConsoleTrials:
    """A bar on a terminal; elsewhere a line now and then, and for every improvement of the model.

    Args:
        quiet: tell nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._bar: Bar | None = None
        self._told = (0.0, 1.0)  # when, and the model's ratio then

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def started(self, kernels: int, budget: "Budget", trial_s: float | None) -> None:
        """See `tuner.Progress`."""
        if self._quiet:
            return
        each = "" if trial_s is None else f", {trial_s:.1f} s to run a candidate"
        self._console.print(f"  searching for {kernels} kernels{each}", markup=False)
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("  trials"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task("", total=budget.trials)
            self._bar.start()

    def trial(self, kernel: str, done: int, best: float, model: float) -> None:
        """See `tuner.Progress`."""
        if self._quiet:
            return
        text = f"{kernel} {best:.3f}; all kernels {model:.3f} of the default"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
            return
        now, (before, known) = time.monotonic(), self._told
        if model < known or now - before > _EVERY_S:
            self._told = (now, model)
            self._console.print(f"  trial {done}: {text}", markup=False)
