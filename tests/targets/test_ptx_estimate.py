"""The static estimate of a CUDA kernel: instructions, counted as often as they run."""

import dataclasses

import pytest

from gfcompile.targets.target import Gpu, Target, find_target
from gfcompile.targets.tvm.cuda import compile_cuda
from gfcompile.targets.tvm.kernel import ActStorage, Dense
from gfcompile.targets.tvm.schedules import gpu_dense
from gfcompile.targets.tvm.tuning.ptx import counted, estimate_cycles

LOOPS = """\
mov.u32 %r1, 0;
$L__BB0_1:
add.f32 %f1, %f1, %f1;
mov.u32 %r9, 0;
@%p9 bra $L__BB0_2;
mul.f32 %f2, %f1, %f1;
$L__BB0_2:
fma.rn.f32 %f2, %f1, %f1, %f2;
add.s32 %r2, %r9, 1;
setp.ne.s32 %p1, %r2, 4;
mov.u32 %r9, %r2;
@%p1 bra $L__BB0_2;
add.s32 %r1, %r1, 2;
setp.lt.u32 %p2, %r1, 5;
@%p2 bra $L__BB0_1;
ret;""".splitlines()


def gpu(name: str) -> Gpu:
    target = find_target(name)
    assert isinstance(target, Target)
    assert target.gpu is not None
    return target.gpu


def test_nested_loops_multiply() -> None:
    times = dict(counted(LOOPS))
    assert times["add.f32 %f1, %f1, %f1;"] == 3  # counters 0, 2, 4
    assert times["mul.f32 %f2, %f1, %f1;"] == 3
    assert times["fma.rn.f32 %f2, %f1, %f1, %f2;"] == 12
    assert times["ret;"] == 1


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("add.s32 %r1, %r1, 2;", "shl.b32 %r1, %r1, 2;"),
        ("mov.u32 %r1, 0;", "mov.u32 %r1, %tid.x;"),
        ("setp.lt.u32 %p2, %r1, 5;", "setp.lt.u32 %p2, %r1, %r7;"),
        ("@%p2 bra $L__BB0_1;", "bra $L__BB0_1;"),
        ("@%p2 bra $L__BB0_1;", "@!%p2 bra $L__BB0_1;"),
    ],
)
def test_a_loop_that_cannot_be_counted_is_no_estimate(line: str, other: str) -> None:
    with pytest.raises(ValueError, match="no count of the loop"):
        counted([other if text == line else text for text in LOOPS])


@pytest.mark.parametrize("name", ["jetson-nano", "jetson-tx2", "jetson-xavier", "jetson-orin"])
@pytest.mark.parametrize("x", ["float32", "int8"])
def test_the_estimate_is_between_the_products_alone_and_a_few_times_that(x: str, name: str) -> None:
    kernel = Dense(m=196, n=128, k=64, x=x, gelu=True)  # type: ignore[arg-type]
    device = gpu(name)
    scheduled = gpu_dense.schedule_dense(kernel, device, ActStorage())
    module = compile_cuda({"dense": scheduled.steps[0].func}, device)
    record = dataclasses.asdict(module.kernels["dense"])
    cycles = estimate_cycles(module.ptx.decode(), record, device)
    lanes = device.fp32_tflops * 1e3 / 2 / device.clock_ghz
    per_instruction = 4 if x == "int8" and device.int8_dot else 1
    least = kernel.m * kernel.n * kernel.k / per_instruction / lanes
    # Tiles beyond the edges, copies, GELU, and warps too few to hide latencies: all of it counts.
    assert least < cycles < 30 * least
