"""What a compilation tells while it runs: stages as they pass, and notes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from rich.console import Console

from gfcompile.compile import interruption


class Progress(Protocol):
    """Who is told; a compilation calls nothing else, and prints nothing.

    A stage that ends raises KeyboardInterrupt if a signal came meanwhile, see `interruption`.
    """

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A context that lasts as long as the stage; stages may nest."""

    def note(self, text: str) -> None:
        """Something that is not as the user might think, in one line."""


class SilentProgress:
    """Tells nobody, and keeps no notes."""

    notes: Sequence[str] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:  # noqa: ARG002 - the protocol's
        yield
        interruption.check()

    def note(self, text: str) -> None:
        pass


class ConsoleProgress:
    """A line per finished stage with its time and, on a terminal, the running one with a clock.

    Notes are kept for the end, where they are not scrolled away: see `notes`.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._running: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._running.append(name)
        started = time.perf_counter()
        try:
            with self._clock():
                yield
            interruption.check()
        finally:
            depth = len(self._running)
            self._running.pop()
        took = time.perf_counter() - started
        self._console.print(f"{'  ' * depth}{name:<{44 - 2 * depth}} {took:6.1f} s", markup=False)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _clock(self) -> AbstractContextManager[object]:
        # rich draws one live display at a time; the outermost stage's is enough.
        if not self._console.is_terminal or len(self._running) > 1:
            return nullcontext()
        from rich.progress import Progress as Bar
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            # Compiler threads and tools write to the real streams; leave those alone.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        bar.add_task(self._running[-1], total=None)
        return bar
