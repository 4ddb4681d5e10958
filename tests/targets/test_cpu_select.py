"""Token selection on CPUs against numpy, on every instruction set at hand."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_kernel import CPUS, host_cpu, poison, run_kernel

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import (
    ActStorage,
    Array,
    GatherRows,
    InversePermutation,
    SelectTokens,
)
from gfcompile.targets.tvm.schedules.cpu_select import (
    schedule_gather_rows,
    schedule_inverse_permutation,
    schedule_select_tokens,
)


def select(kernel: SelectTokens, scores: Array, cpu: Cpu, threads: int = 1) -> Array:
    arguments = {
        "scores": scores,
        "y": poison((kernel.batch, kernel.leading + kernel.kept), kernel.index),
    }
    scheduled = schedule_select_tokens(kernel, cpu, ActStorage())
    return run_kernel(scheduled, arguments, cpu, threads=threads)["y"]


def expected(kernel: SelectTokens, scores: Array) -> Array:
    best = np.argsort(-scores, axis=1, kind="stable")[:, : kernel.kept] + kernel.offset
    leading = np.tile(np.arange(kernel.leading), (kernel.batch, 1))
    return np.concatenate([leading, best], axis=1)


@pytest.mark.parametrize("name", CPUS)
def test_the_best_tokens_come_first_and_equal_ones_in_order(name: str) -> None:
    kernel = SelectTokens(batch=2, tokens=196, kept=137, offset=1, leading=1)
    # 25 different scores for 196 tokens: ties everywhere, the last kept token included.
    scores = np.random.default_rng(0).integers(-12, 13, (2, 196)).astype(np.float32)
    np.testing.assert_array_equal(select(kernel, scores, CPUS[name]), expected(kernel, scores))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40))
    kernel = SelectTokens(
        batch=data.draw(st.integers(1, 3)),
        tokens=tokens,
        kept=data.draw(st.integers(1, tokens)),
        offset=data.draw(st.integers(0, 2)),
        leading=data.draw(st.integers(0, 2)),
    )
    count = kernel.batch * tokens
    values = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1e-40, -1e-40])
    drawn = data.draw(st.lists(values, min_size=count, max_size=count))
    scores = np.array(drawn, np.float32).reshape(kernel.batch, tokens)
    np.testing.assert_array_equal(select(kernel, scores, host_cpu(), 2), expected(kernel, scores))


def test_not_a_number_keeps_the_others_apart() -> None:
    kernel = SelectTokens(batch=1, tokens=20, kept=20)
    scores = np.arange(20, dtype=np.float32)[None]
    scores[0, ::3] = np.nan
    kept = select(kernel, scores, host_cpu())
    np.testing.assert_array_equal(np.sort(kept), np.arange(20)[None])
    others = kept[np.isin(kept, np.flatnonzero(~np.isnan(scores[0])))]
    assert list(others) == sorted(others, reverse=True)


@pytest.mark.parametrize("n", [1, 7, 100, 384])
@pytest.mark.parametrize("name", CPUS)
def test_rows_are_gathered_and_wild_indices_held_within(name: str, n: int) -> None:
    kernel = GatherRows(batch=2, tokens=9, kept=5, n=n)
    x = np.random.default_rng(n).standard_normal((2, 9, n)).astype(np.float32)
    indices = np.array([[0, 8, 3, 3, 9], [-1, 2**31 - 1, -(2**31), 4, 0]], np.int32)
    arguments = {"x": x, "indices": indices, "y": poison((2, 5, n), "float32")}
    scheduled = schedule_gather_rows(kernel, CPUS[name], ActStorage())
    y = run_kernel(scheduled, arguments, CPUS[name], threads=2)["y"]
    held = np.clip(indices, 0, 8)
    np.testing.assert_array_equal(y, np.take_along_axis(x, held[:, :, None], axis=1))


@pytest.mark.parametrize("name", ["avx2", "a72"])
def test_all_of_an_order_and_its_inverse(name: str) -> None:
    scores = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    kernel = SelectTokens(batch=2, tokens=40, kept=40, index="int64")
    order = select(kernel, scores, CPUS[name])
    np.testing.assert_array_equal(order, expected(kernel, scores))
    scheduled = schedule_inverse_permutation(
        InversePermutation(batch=2, n=40), CPUS[name], ActStorage()
    )
    arguments = {"x": order, "y": poison((2, 40), "int64")}
    inverse = run_kernel(scheduled, arguments, CPUS[name])["y"]
    np.testing.assert_array_equal(inverse, np.argsort(order, axis=1))
