"""Convolutions on CPUs against torch in float64, for every instruction set that runs here."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference_kernels import convolution
from run_kernel import CPUS, host_cpu, poison, run_kernel

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import ActStorage, Array, Conv
from gfcompile.targets.tvm.schedules.cpu_conv import schedule_conv

EPS = float(np.finfo(np.float32).eps) / 2  # what one float32 operation rounds by, relatively


def check(kernel: Conv, cpu: Cpu, *, threads: int = 1) -> Array:
    """Runs the kernel, holds the result against the reference and returns it."""
    rng = np.random.default_rng(kernel.h * 101 + kernel.c)
    shape = (kernel.batch, kernel.c, kernel.h, kernel.w)
    if kernel.layout == "nhwc":
        shape = (kernel.batch, kernel.h, kernel.w, kernel.c)
    taps = kernel.kernel_h * kernel.kernel_w * (1 if kernel.depthwise else kernel.c)
    args = {
        "x": rng.standard_normal(shape, np.float32),
        "w": rng.standard_normal((taps, kernel.n), np.float32) / np.float32(np.sqrt(taps)),
        "bias": rng.standard_normal(kernel.n, np.float32),
    }
    expected = convolution(kernel, args, torch.float64)
    # A sum of `taps` products and the bias, in any order (Higham's gamma).
    magnitudes = convolution(kernel, {name: np.abs(a) for name, a in args.items()}, torch.float64)
    out = (kernel.batch, kernel.out_h, kernel.out_w, kernel.n)
    scheduled = schedule_conv(kernel, cpu, ActStorage())
    y = run_kernel(scheduled, {**args, "y": poison(out, "float32")}, cpu, threads=threads)["y"]
    y = y.reshape(out)
    assert (np.abs(y - expected) <= (taps + 1) * EPS * magnitudes).all()
    return y


def kernels() -> list[Conv]:
    """Stems and depthwise layers of the zoo in small; sizes that divide by nothing; strides."""
    square = {"batch": 1, "kernel_h": 3, "kernel_w": 3, "pad_h": 1, "pad_w": 1}
    return [
        Conv(**square, h=6, w=20, c=16, n=24, relu=True),
        Conv(
            batch=2,
            h=14,
            w=18,
            c=3,
            n=40,
            kernel_h=7,
            kernel_w=7,
            stride_h=2,
            stride_w=2,
            pad_h=3,
            pad_w=3,
            relu=True,
            layout="nchw",
        ),
        Conv(batch=2, h=5, w=9, c=5, n=7, kernel_h=2, kernel_w=3, stride_w=3),
        Conv(batch=1, h=5, w=9, c=8, n=33, kernel_h=1, kernel_w=1),
        Conv(**square, h=9, w=30, c=40, n=40, depthwise=True),
        Conv(
            batch=2,
            h=7,
            w=7,
            c=13,
            n=13,
            kernel_h=7,
            kernel_w=7,
            pad_h=3,
            pad_w=3,
            depthwise=True,
            relu=True,
        ),
        Conv(batch=1, h=6, w=31, c=3, n=3, kernel_h=2, kernel_w=5, stride_w=2, depthwise=True),
    ]


@pytest.mark.parametrize("kernel", kernels(), ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_every_instruction_set_computes_the_reference(cpu: str, kernel: Conv) -> None:
    check(kernel, CPUS[cpu], threads=2)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    channels=st.integers(1, 37),
    filters=st.integers(1, 70),
    patch=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    depthwise=st.booleans(),
    layout=st.sampled_from(["nhwc", "nchw"]),
)
def test_every_size(
    size: tuple[int, int],
    channels: int,
    filters: int,
    patch: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int],
    depthwise: bool,
    layout: str,
) -> None:
    assume(all(s + 2 * p >= k for s, p, k in zip(size, pads, patch, strict=True)))
    kernel = Conv(
        batch=2,
        h=size[0],
        w=size[1],
        c=channels,
        n=channels if depthwise else filters,
        kernel_h=patch[0],
        kernel_w=patch[1],
        stride_h=strides[0],
        stride_w=strides[1],
        pad_h=pads[0],
        pad_w=pads[1],
        depthwise=depthwise,
        layout="nhwc" if depthwise else layout,  # type: ignore[arg-type]
    )
    check(kernel, host_cpu())


@pytest.mark.parametrize("kernel", [kernels()[0], kernels()[4]], ids=str)
def test_results_do_not_depend_on_threads(kernel: Conv) -> None:
    results = [check(kernel, host_cpu(), threads=threads) for threads in (1, 3, 16)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
