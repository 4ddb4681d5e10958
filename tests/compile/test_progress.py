"""What a compilation tells while it runs."""

import io
import re

import pytest
from rich.console import Console

from gfcompile.compile.progress import ConsoleProgress


@pytest.mark.parametrize("terminal", [False, True])
def test_each_finished_stage_is_one_line_with_its_time(terminal: bool) -> None:
    text = io.StringIO()
    progress = ConsoleProgress(Console(file=text, force_terminal=terminal, width=100))
    with progress.stage("outer"), progress.stage("inner [not markup]"):
        pass
    # Without what draws and removes the clock.
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|.*\r", "", text.getvalue()).splitlines()
    finished = [line for line in lines if line.endswith(" s")]
    assert [re.sub(r" +\d+\.\d s$", "", line) for line in finished] == [
        "    inner [not markup]",
        "  outer",
    ]
    assert len({len(line) for line in finished}) == 1  # the times stand in one column


def test_stage_that_fails_is_not_reported_as_done() -> None:
    text = io.StringIO()
    progress = ConsoleProgress(Console(file=text))
    with pytest.raises(RuntimeError), progress.stage("trace"):
        raise RuntimeError
    assert text.getvalue() == ""
    with progress.stage("trace"):
        pass
    assert text.getvalue().startswith("  trace ")


def test_a_note_is_kept_once() -> None:
    progress = ConsoleProgress(Console(file=io.StringIO()))
    for _ in range(2):
        progress.note("weights are random")
    assert progress.notes == ["weights are random"]
