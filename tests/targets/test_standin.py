"""The stand-in driver finds what a GPU would not forgive, and refuses what a driver refuses."""

import re
import struct

import numpy as np
import pytest
from run_gpu_kernel import (
    GPUS,
    STORAGE,
    TX2,
    Case,
    LaunchFailed,
    run_cases,
)
from tvm.script import tirx as T

from gfcompile.targets.tvm.kernel import LayerNorm, Scheduled, Step, TokenMean
from gfcompile.targets.tvm.schedules.gpu_norm import schedule_layer_norm
from gfcompile.targets.tvm.schedules.gpu_tokens import schedule_token_mean


def mean_case(tokens: int = 16, n: int = 96) -> Case:
    x = np.random.default_rng(0).standard_normal((1, tokens, n), np.float32)
    kernel = TokenMean(batch=1, tokens=tokens, n=n)
    return schedule_token_mean(kernel, TX2, STORAGE), {"x": x}, x.mean(axis=1, dtype=np.float64)


def norm_case() -> Case:
    rng = np.random.default_rng(0)
    args = {
        "x": rng.standard_normal((8, 64), np.float32),
        "gamma": np.ones(64, np.float32),
        "beta": np.zeros(64, np.float32),
    }
    kernel = LayerNorm(rows=8, n=64, eps=1e-6)
    x = args["x"].astype(np.float64)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return schedule_layer_norm(kernel, TX2, STORAGE), args, expected


def reach_case(size: int) -> Case:
    """A thread per value of y, each reading x, which has 64 values."""

    @T.prim_func(s_tir=True)
    def reach(x: T.Buffer((size,), "float32"), y: T.Buffer((size,), "float32")):
        T.func_attr({"tirx.noalias": True})
        thread = T.launch_thread("threadIdx.x", 64)
        y[thread] = x[thread + size - 64]

    x = np.arange(64, dtype=np.float32)
    scheduled = Scheduled(steps=(Step(func=reach, args=("x", "y")),))
    return scheduled, {"x": x}, x


def wrong(case: Case, **options: object) -> bool:
    """Whether the results are off by more than rounding."""
    (y,) = run_cases([case], TX2, **options)
    return not np.allclose(y, case[2], rtol=0, atol=1e-5)


def test_a_missing_barrier_is_found_by_one_of_the_thread_orders() -> None:
    case = mean_case()

    def without_barrier(source: str) -> str:
        assert "__syncthreads();" in source
        return source.replace("__syncthreads();", "")

    assert not any(wrong(case, order=order) for order in ("forward", "reverse"))
    assert any(wrong(case, order=order, edit=without_barrier) for order in ("forward", "reverse"))


def test_a_barrier_that_some_threads_miss_is_an_error() -> None:
    def only_some(source: str) -> str:
        return source.replace("__syncthreads();", "if (threadIdx.y < 3) __syncthreads();")

    with pytest.raises(LaunchFailed, match=r"96 of 256 threads wait at a block"):
        run_cases([mean_case()], TX2, edit=only_some)


def test_a_shuffle_that_a_lane_misses_is_an_error() -> None:
    def but_one(source: str) -> str:
        shuffled = re.search(r"^.*__shfl_xor_sync.*$", source, re.MULTILINE)
        assert shuffled
        return source.replace(shuffled[0], f"if (threadIdx.x != 5) {shuffled[0].strip()}", 1)

    with pytest.raises(LaunchFailed, match=r"32 of 32 threads wait at different barriers"):
        run_cases([norm_case()], TX2, edit=but_one)


def test_an_access_behind_the_end_of_a_tensor_is_an_error() -> None:
    assert not wrong(reach_case(64))
    # The program lives on to report it.
    with pytest.raises(LaunchFailed, match=r"exit 3(.|\n)*ILLEGAL_ADDRESS") as failed:
        run_cases([reach_case(128)], TX2)
    assert re.search(r"thread \(0, 0, 0\): access to .*, outside of any", str(failed.value))


def test_launch_dimensions_are_checked() -> None:
    with pytest.raises(LaunchFailed, match="not to be launched so"):
        run_cases([mean_case()], TX2, resize=lambda grid: (grid[0], 70_000, 1))
    with pytest.raises(LaunchFailed, match="CUDA_ERROR_INVALID_VALUE"):
        run_cases([mean_case()], TX2, resize=lambda grid: (0, *grid[1:]))


def test_memory_that_nobody_wrote_is_no_number() -> None:
    def forget(source: str) -> str:
        return re.sub(r"^.*partial_ptr\[[^=]*\] = total_ptr\[0\];$", "", source, flags=re.MULTILINE)

    (y,) = run_cases([mean_case()], TX2, edit=forget)
    assert np.isnan(y).all()


def test_ptx_runs_where_cubin_does() -> None:
    assert not wrong(mean_case(), image=lambda module: module.ptx)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (lambda _: b"\x7fELF" + bytes(100), "INVALID_IMAGE"),
        (lambda _: b"nothing known", "INVALID_PTX"),
        (lambda module: module.ptx.replace(b".version 6.5", b".version 7.0"), "UNSUPPORTED_PTX"),
        (lambda module: module.ptx.replace(b"sm_62", b"sm_72"), "NO_BINARY_FOR_GPU"),
        # Byte 48 of a cubin holds its architecture.
        (
            lambda module: module.cubin[:48] + struct.pack("B", 53) + module.cubin[49:],
            "NO_BINARY_FOR_GPU",
        ),
        (lambda module: module.ptx.replace(b"case0_step0_kernel", b"another"), "NOT_FOUND"),
    ],
)
def test_images_that_a_driver_refuses_are_refused(image: object, error: str) -> None:
    with pytest.raises(LaunchFailed, match=error):
        run_cases([mean_case()], TX2, image=image)


def test_an_old_driver_can_be_played_that_takes_only_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFCOMPILE_STANDIN_REFUSE_CUBIN", "1")
    with pytest.raises(LaunchFailed, match="NO_BINARY_FOR_GPU"):
        run_cases([mean_case()], TX2)
    assert not wrong(mean_case(), image=lambda module: module.ptx)


def test_the_arm64_library_does_the_same_under_qemu() -> None:
    cases = [mean_case(), norm_case()]
    for case, y in zip(cases, run_cases(cases, TX2, arch="aarch64"), strict=True):
        np.testing.assert_allclose(y, case[2], rtol=0, atol=1e-5)
    with pytest.raises(LaunchFailed, match="outside of any allocation"):
        run_cases([reach_case(128)], TX2, arch="aarch64")


def test_every_jetson_has_a_stand_in() -> None:
    for gpu in GPUS.values():
        scheduled, args, expected = mean_case()
        (y,) = run_cases([(scheduled, args, expected)], gpu)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
