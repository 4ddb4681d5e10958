"""Operations and bytes of kernels against counts by other means."""

from dataclasses import replace

import numpy as np
import pytest

from gfcompile.runtime.roofline import KernelCost, roofline
from gfcompile.targets.jetson import JETSON_TX2
from gfcompile.targets.raspberry_pi import RASPBERRY_PI_4
from gfcompile.targets.target import Target, peaks
from gfcompile.targets.tvm.cost import costs
from gfcompile.targets.tvm.kernel import (
    Attention,
    Conv,
    Dense,
    DftFilter,
    Kernel,
    LayerNorm,
    Softmax,
)
from gfcompile.targets.tvm.schedule import act_storage, schedule
from gfcompile.targets.x86 import X86_64, X86_64_V4


def costs_of(kernel: Kernel, target: Target = RASPBERRY_PI_4):
    device = target.gpu or target.cpu
    return costs(kernel, schedule(kernel, device, act_storage(device)), target)


def test_a_product_is_two_operations_per_weight_and_row_and_moves_its_operands_once() -> None:
    (cost,) = costs_of(Dense(m=196, n=64, k=32), X86_64_V4)
    assert cost.flops == 2 * 196 * 64 * 32
    # x, w, bias, y
    assert cost.bytes == 4 * (196 * 32 + 32 * 64 + 64 + 196 * 64)
    assert cost.arithmetic == "float32"


def test_an_int8_product_is_bound_by_the_peak_of_int8() -> None:
    last = costs_of(Dense(m=28, n=32, k=32, x="int8", out="int8"))[-1]
    assert (last.flops, last.arithmetic) == (2 * 28 * 32 * 32, "int8")


def test_a_float_product_in_digits_is_eight_of_int8() -> None:
    kernel = Dense(m=28, n=32, k=64, fixed_point=True)
    amx = replace(X86_64_V4, cpu=X86_64.levels[-1])
    digits, product = costs_of(kernel, amx)
    assert (digits.flops, product.flops) == (0, 8 * 2 * 28 * 32 * 64)
    assert product.arithmetic == "int8"
    (without,) = costs_of(kernel, X86_64_V4)
    assert (without.flops, without.arithmetic) == (2 * 28 * 32 * 64, "float32")


@pytest.mark.parametrize("target", [RASPBERRY_PI_4, JETSON_TX2], ids=lambda t: t.name)
def test_scratch_of_a_single_function_is_not_moved(target: Target) -> None:
    kernel = DftFilter(batch=1, h=14, w=14, c=32)
    every = costs_of(kernel, target)
    grid, half = 4 * 14 * 14 * 32, 4 * 2 * 14 * 8 * 32
    assert sum(cost.bytes for cost in every) >= 2 * grid + half
    if target.gpu is None:
        (cost,) = every
        matrices = cost.bytes - 2 * grid - half
        assert 0 < matrices < grid
    else:
        assert len(every) == 3
        dense = 2 * 32 * 2 * (14 * 14 * 2 * 8 + 8 * 4 * 14 * 14)  # 2 MACs, there and back
        assert sum(cost.flops or 0 for cost in every) == pytest.approx(dense, rel=0.05)


def test_a_convolution_is_two_operations_per_tap_and_output() -> None:
    conv = Conv(batch=1, h=9, w=8, c=8, n=16, kernel_h=3, kernel_w=3, pad_h=1, pad_w=1)
    padding, product = costs_of(conv)
    assert (padding.flops, product.flops) == (0, 2 * 9 * 8 * 16 * 3 * 3 * 8)


def test_attention_is_two_products_and_a_softmax() -> None:
    cost = costs_of(Attention(batch=1, tokens=50, heads=2, dim=16))[-1]
    products = 2 * 2 * 2 * 50 * 50 * 16
    assert products < (cost.flops or 0) < 1.2 * products


def test_a_row_wise_kernel_is_bound_by_memory_on_every_target() -> None:
    for kernel in (LayerNorm(rows=196, n=384, eps=1e-6), Softmax(rows=4, n=100)):
        (cost,) = costs_of(kernel)
        assert cost.flops is not None
        _, bound = peaks(RASPBERRY_PI_4).least_us(cost.flops, cost.bytes, cost.arithmetic, 4)
        assert bound == "memory"


def test_the_roofline_is_the_larger_of_two_times() -> None:
    roof = peaks(RASPBERRY_PI_4)
    us, bound = roof.least_us(2_880_000, 100, "int8", threads=1)  # 28.8 GOPS
    assert (us, bound) == (pytest.approx(100), "compute")
    assert roof.least_us(2_880_000, 100, "int8", threads=64)[0] == pytest.approx(25)
    assert roof.least_us(2_880_000, 100, "int8", threads=0)[0] == pytest.approx(25)
    us, bound = roof.least_us(1000, 1_280_000, "float32")
    assert (us, bound) == (pytest.approx(100), "memory")
    assert peaks(JETSON_TX2).cores == 1
    assert np.isclose(peaks(JETSON_TX2).rate("float32", 4), 670)


def test_a_kernel_for_a_better_cpu_has_that_cpus_roof() -> None:
    roof = peaks(RASPBERRY_PI_4)
    cost = KernelCost(flops=28_800_000, bytes=100, arithmetic="int8")
    least, better = (roofline(roof, c) for c in (cost, replace(cost, peak_gops=288.0)))
    assert least is not None
    assert better is not None
    assert (least.us, better.us) == (pytest.approx(1000), pytest.approx(100))
    assert roofline(roof, KernelCost(flops=1)) is None
