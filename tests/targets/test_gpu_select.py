"""Token selection for CUDA against NumPy's stable sort, behind the stand-in driver."""

import numpy as np
import pytest
from run_gpu_kernel import GPUS, STORAGE, TX2, Array, run_scheduled

from gfcompile.targets.tvm.cuda import compile_cuda
from gfcompile.targets.tvm.kernel import GatherRows, InversePermutation, SelectTokens
from gfcompile.targets.tvm.schedules.gpu_select import (
    schedule_gather_rows,
    schedule_inverse_permutation,
    schedule_select_tokens,
)

SELECTIONS = [
    SelectTokens(batch=2, tokens=196, kept=137, offset=1, leading=1),
    SelectTokens(batch=3, tokens=45, kept=45),
    SelectTokens(batch=1, tokens=1, kept=1, offset=7, leading=300),
    SelectTokens(batch=1, tokens=1500, kept=700, offset=2, leading=2),  # two pieces of scores
]
GATHERS = [
    GatherRows(batch=2, tokens=197, kept=138, n=64),
    GatherRows(batch=3, tokens=5, kept=7, n=45),
]


def selected(kernel: SelectTokens, scores: Array) -> Array:
    order = np.argsort(-scores, axis=1, kind="stable")[:, : kernel.kept] + kernel.offset
    leading = np.tile(np.arange(kernel.leading), (kernel.batch, 1))
    return np.concatenate([leading, order], axis=1)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_the_best_tokens_come_first_and_equal_ones_in_their_order(order: str) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for kernel in SELECTIONS:
        # Few distinct values, so that many are equal; both zeros among them.
        scores = rng.integers(-20, 20, (kernel.batch, kernel.tokens)).astype(np.float32) / 4
        scores[scores == 0] *= rng.choice([-1, 1], (scores == 0).sum())
        y = np.full((kernel.batch, kernel.leading + kernel.kept), -1, np.int32)
        cases.append((schedule_select_tokens(kernel, TX2, STORAGE), {"scores": scores, "y": y}))
    results = run_scheduled(cases, TX2, order=order)
    for kernel, (_, args), result in zip(SELECTIONS, cases, results, strict=True):
        np.testing.assert_array_equal(result["y"], selected(kernel, args["scores"]))


def test_scores_that_are_no_numbers_still_give_every_token_a_place() -> None:
    kernel = SelectTokens(batch=1, tokens=40, kept=40)
    scores = np.linspace(-1, 1, 40, dtype=np.float32)[None]
    scores[0, [3, 9, 20]] = np.nan, -np.nan, np.inf
    args = {"scores": scores, "y": np.zeros((1, 40), np.int32)}
    (result,) = run_scheduled([(schedule_select_tokens(kernel, TX2, STORAGE), args)], TX2)
    assert sorted(result["y"][0]) == list(range(40))


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_rows_are_gathered_and_indices_outside_are_clamped(order: str) -> None:
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for kernel in GATHERS:
        x = rng.standard_normal((kernel.batch, kernel.tokens, kernel.n), np.float32)
        indices = rng.integers(0, kernel.tokens, (kernel.batch, kernel.kept), np.int32)
        indices[:, :3] = -(2**31), kernel.tokens, 2**31 - 1
        y = np.zeros((kernel.batch, kernel.kept, kernel.n), np.float32)
        args = {"x": x, "indices": indices, "y": y}
        cases.append((schedule_gather_rows(kernel, TX2, STORAGE), args))
        clamped = np.clip(indices, 0, kernel.tokens - 1)
        expected.append(np.take_along_axis(x, clamped[..., None], axis=1))
    for result, wanted in zip(run_scheduled(cases, TX2, order=order), expected, strict=True):
        np.testing.assert_array_equal(result["y"], wanted)


@pytest.mark.parametrize("arch", GPUS)
def test_selection_assembles_for_every_gpu(arch: str) -> None:
    gpu = GPUS[arch]
    funcs = {
        f"select{i}": schedule_select_tokens(kernel, gpu, STORAGE).steps[0].func
        for i, kernel in enumerate(SELECTIONS)
    } | {
        f"gather{i}": schedule_gather_rows(kernel, gpu, STORAGE).steps[0].func
        for i, kernel in enumerate(GATHERS)
    }
    for kernel in compile_cuda(funcs, gpu).kernels.values():
        assert kernel.occupancy >= 0.5


def test_all_of_an_order_and_its_inverse() -> None:
    scores = np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
    order = np.argsort(-scores, axis=1)
    select = SelectTokens(batch=2, tokens=300, kept=300, index="int64")
    invert = InversePermutation(batch=2, n=300)
    blank = np.zeros((2, 300), np.int64)
    cases = [
        (schedule_select_tokens(select, TX2, STORAGE), {"scores": scores, "y": blank.copy()}),
        (schedule_inverse_permutation(invert, TX2, STORAGE), {"x": order, "y": blank.copy()}),
    ]
    selected_all, inverse = run_scheduled(cases, TX2)
    np.testing.assert_array_equal(selected_all["y"], order)
    np.testing.assert_array_equal(inverse["y"], np.argsort(order, axis=1))
