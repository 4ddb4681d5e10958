"""The ledger accepts rounding and nothing more."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gfcompile.compile.agreement import notes_on
from gfcompile.compile.ledger import LedgerEntry, compare, compare_int8, demand
from gfcompile.runtime.errors import CompileError

Array = npt.NDArray[Any]
LOGITS = [np.array([[0.0, 1.0, 2.55]], np.float32)]
STEP = 0.01


def entry(actual: list[Array], **more: Any) -> LedgerEntry:
    return compare("compiled", "graph", LOGITS, actual, how="here", **more)


def moved(*by: float) -> list[Array]:
    return [LOGITS[0] + np.array(by, np.float32)]


def int8_entry(acts: list[int], other: list[int], logits: list[Array]) -> LedgerEntry:
    a, b = ({"q": np.array(x, np.int8)} for x in (acts, other))
    return entry(logits, int8=compare_int8([a], [b], LOGITS, logits, logits_step=STEP))


def test_float_artifacts_may_differ_by_their_tolerance() -> None:
    for by in (0.5e-5, -1e-5):
        demand(entry(moved(0, 0, by), tolerance=1.1e-5), LOGITS, moved(0, 0, by))
    with pytest.raises(CompileError, match="rounding explains"):
        demand(entry(moved(0, 0, 2e-5), tolerance=1e-5), LOGITS, moved(0, 0, 2e-5))


def test_nan_is_never_close_enough() -> None:
    with pytest.raises(CompileError):
        demand(entry(moved(0, 0, np.nan), tolerance=1e-5), LOGITS, moved(0, 0, np.nan))


def test_one_activation_in_a_hundred_may_be_one_step_off() -> None:
    acts = list(range(-50, 50))
    near = [*acts[:-1], acts[-1] + 1]
    demand(int8_entry(acts, near, LOGITS), LOGITS, LOGITS)
    for off in ([*acts[:-1], acts[-1] + 2], [acts[0] + 1, *near[1:]]):
        with pytest.raises(CompileError, match="int8 activations"):
            demand(int8_entry(acts, off, LOGITS), LOGITS, LOGITS)


def test_logits_may_be_two_steps_off_and_half_a_step_on_average() -> None:
    fine = moved(0, 0, -1.4 * STEP)
    demand(int8_entry([0], [0], fine), LOGITS, fine)
    for off in (moved(0, 0, -2.1 * STEP), moved(STEP, STEP, STEP)):
        with pytest.raises(CompileError, match="at the logits"):
            demand(int8_entry([0], [0], off), LOGITS, off)


def test_int8_differences_do_not_wrap_around() -> None:
    result = compare_int8(
        [{"q": np.array([-128], np.int8)}],
        [{"q": np.array([127], np.int8)}],
        LOGITS,
        LOGITS,
        logits_step=1.0,
    )
    assert result.max_steps == 255


def test_entries_are_json_even_when_nothing_differs() -> None:
    values = json.loads(json.dumps(entry(LOGITS).to_dict(), allow_nan=False))
    assert values["sqnr_db"] is None
    assert values["top1_agreement"] == 1.0


def test_logits_may_spread_as_two_evaluations_of_the_graph_do() -> None:
    far = moved(0, 0, -3 * STEP)
    strict = compare_int8(
        [{"q": np.zeros(1, np.int8)}], [{"q": np.zeros(1, np.int8)}], LOGITS, far, logits_step=STEP
    )
    assert not strict.logits_agree
    assert not strict.with_own_spread(LOGITS, [moved(0, 0, STEP)]).logits_agree
    assert strict.with_own_spread(LOGITS, [LOGITS, moved(STEP, STEP, 2 * STEP)]).logits_agree


def test_a_graph_whose_ties_move_logits_far_is_said_to_be_fragile() -> None:
    steady = int8_entry([0], [0], LOGITS)
    assert notes_on(steady) == []
    assert steady.int8 is not None
    fragile = steady.int8.with_own_spread(LOGITS, [moved(0, 0, 7 * STEP)])
    (note,) = notes_on(replace(steady, int8=fragile))
    assert "up to 7.0 steps" in note
