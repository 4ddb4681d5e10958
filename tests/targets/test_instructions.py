"""Instructions counted in scheduled kernels, against counts made by hand."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from gfcompile.runtime.roofline import KernelCost, estimate
from gfcompile.targets.arm64 import ARM64
from gfcompile.targets.jetson import JETSON_TX2, JETSON_XAVIER
from gfcompile.targets.raspberry_pi import RASPBERRY_PI_3, RASPBERRY_PI_4
from gfcompile.targets.target import Target, all_targets, peaks
from gfcompile.targets.tvm.instructions import Instructions, count_instructions, issue_us
from gfcompile.targets.tvm.kernel import (
    Attention,
    Dense,
    DftFilter,
    Kernel,
    LayerNorm,
    SelectTokens,
)
from gfcompile.targets.tvm.schedule import act_storage, schedule
from gfcompile.targets.tvm.schedules import cpu_amx_float
from gfcompile.targets.x86 import X86_64, X86_64_V4

PRODUCT = Dense(m=196, n=384, k=96)
MACS = 196 * 384 * 96
I8MM = replace(ARM64, name="i8mm", cpu=ARM64.levels[-1], levels=())


def counted(kernel: Kernel, target: Target) -> Instructions:
    """Of the kernel's last function, which is the one that computes."""
    device = target.gpu or target.cpu
    return count_instructions(schedule(kernel, device, act_storage(device)).steps[-1].func, target)


@pytest.mark.parametrize("target", [RASPBERRY_PI_4, X86_64_V4], ids=lambda t: t.name)
def test_a_float_product_is_one_fma_per_register_of_macs(target: Target) -> None:
    counts = counted(PRODUCT, target).counts
    fmas = MACS / target.cpu.float_lanes
    epilogue = 196 * 384 / target.cpu.float_lanes
    assert fmas <= counts["arithmetic"] <= fmas + 2 * epilogue
    assert counts["store"] == epilogue


@pytest.mark.parametrize("target", [RASPBERRY_PI_4, X86_64_V4, I8MM], ids=lambda t: t.name)
def test_integer_products_are_counted_as_operations(target: Target) -> None:
    kernel = Dense(m=196, n=384, k=96, x="int8", out="int8")
    # Rows of the last tile that the matrix does not have are computed as well.
    assert 2 * MACS <= counted(kernel, target).counts["product"] < 1.05 * 2 * MACS


@pytest.mark.parametrize("kernel", [Dense(m=195, n=384, k=384, x="int8"), PRODUCT], ids=str)
def test_products_of_tiles_are_counted_though_threads_share_them(kernel: Dense) -> None:
    amx = replace(X86_64_V4, cpu=X86_64.levels[-1])
    fixed = replace(kernel, k=384, fixed_point=True)
    products = 1 if kernel.x == "int8" else cpu_amx_float.PRODUCTS
    tiles = 14 if kernel.x == "int8" else 13  # of 14 and 16 rows, which count as full ones
    expected = 2 * tiles * 16 * 384 * 384 * products
    assert counted(fixed, amx).counts["product"] == expected


def test_loops_that_are_assembly_count_as_well() -> None:
    floats = Dense(m=18, n=32, k=64)
    counts = counted(floats, RASPBERRY_PI_3).counts
    assert counts["arithmetic"] == 18 * 32 * 64 / 4
    assert counts["load"] == 8 * 17 * 64 / 4, "for each k of a tile, 9 numbers of x and 8 of w"
    integers = Dense(m=8, n=32, k=256, x="int8")
    assert counted(integers, RASPBERRY_PI_3).counts["product"] == 2 * 8 * 32 * 256


def test_a_gpu_issues_one_instruction_per_mac_and_thread() -> None:
    counts = counted(PRODUCT, JETSON_TX2).counts
    # Tiles that stick out of the matrix compute for nothing.
    assert MACS <= counts["arithmetic"] < 1.6 * MACS


def test_dp4a_is_a_quarter_of_the_instructions() -> None:
    kernel = Dense(m=196, n=384, k=96, x="int8")
    many, few = (counted(kernel, t).counts["arithmetic"] for t in (JETSON_TX2, JETSON_XAVIER))
    assert few < 0.4 * many


def test_a_polynomial_takes_time_that_products_do_not_tell() -> None:
    plain, gelu = (
        issue_us(counted(Dense(m=196, n=384, k=96, gelu=gelu), X86_64_V4), X86_64_V4)
        for gelu in (False, True)
    )
    # 13 steps of Horner's scheme and a handful around them per element, of 96 + 1.
    assert 1.1 < gelu / plain < 1.3


def test_blocks_that_do_not_fill_the_gpu_evenly_take_longer() -> None:
    counts: Mapping[str, float] = {"arithmetic": 1e6}
    even = issue_us(Instructions(counts=counts, blocks=2), JETSON_TX2)
    assert issue_us(Instructions(counts=counts, blocks=3), JETSON_TX2) == pytest.approx(
        even * 4 / 3
    )


@pytest.mark.parametrize("target", all_targets(), ids=lambda t: t.name)
def test_every_kernel_has_an_estimate_on_every_target(target: Target) -> None:
    if not isinstance(target, Target):
        pytest.skip("a model format has no kernels of ours")
    kernels: list[Kernel] = [
        PRODUCT,
        LayerNorm(rows=196, n=96, eps=1e-6),
        DftFilter(batch=1, h=14, w=14, c=32),
        Attention(batch=1, tokens=50, heads=2, dim=32),
        SelectTokens(batch=1, tokens=50, kept=30),
    ]
    for kernel in kernels:
        assert 0 < issue_us(counted(kernel, target), target) < 1e5


def test_an_estimate_is_the_roofline_or_the_instructions_whichever_takes_longer() -> None:
    roof = peaks(RASPBERRY_PI_4)
    cost = KernelCost(flops=1_440_000, bytes=100, issue_us=50.0)  # 100 us at 14.4 GFLOP/s
    found = estimate(roof, cost)
    assert found is not None
    assert (found.us, found.bound) == (pytest.approx(100), "compute")
    found = estimate(roof, KernelCost(flops=1_440_000, bytes=100, issue_us=400.0), threads=2)
    assert found is not None
    assert (found.us, found.bound) == (pytest.approx(200), "compute")
    found = estimate(roof, KernelCost(flops=1, bytes=12_800_000, issue_us=1.0), threads=4)
    assert found is not None
    assert found.bound == "memory"
    assert estimate(roof, KernelCost()) is None
    on_gpu = estimate(peaks(JETSON_TX2), KernelCost(flops=1, bytes=1))
    assert on_gpu is not None
    assert on_gpu.us > 1  # a launch costs more than that much work
