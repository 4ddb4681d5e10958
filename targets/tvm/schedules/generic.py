"""Schedules for TIR functions that Relax lowered: whatever has no kernel class of its own.

They are right on any function and decent on element-wise work; what takes time in a model deserves
a class of its own.
"""

import math

import tvm
from tvm import s_tir
from tvm.s_tir import dlight

from gfcompile.targets.target import Cpu, Gpu
from gfcompile.targets.tvm.kernel import Generic, Scheduled, Step


def schedule_generic_cpu(kernel: Generic, cpu: Cpu) -> Scheduled:
    """Element-wise blocks inlined, outer loops parallel, the innermost spatial one vectorized."""
    schedule = s_tir.Schedule(kernel.func)
    for info in _inlined(schedule):
        loops = schedule.get_loops(info.block_rv)
        spatial = 0
        while spatial < len(loops) and info.iters[spatial].kind == "S":
            spatial += 1
        if spatial == 0:
            continue
        *outer, last = loops[:spatial]
        sums = loops[spatial:]
        extent = int(schedule.get(last).extent)
        # Vectors, as many as divide the innermost extent: their sums stay in registers.
        lanes = math.gcd(extent, 4 * cpu.float_lanes)
        first, inner = schedule.split(last, [None, lanes])
        if sums:
            schedule.reorder(first, *sums, inner)
        schedule.vectorize(inner)
        schedule.parallel(schedule.fuse(*outer, first))
        if sums:
            schedule.decompose_reduction(info.block_rv, sums[0])
    return Scheduled(steps=(_step(schedule.mod["main"]),))


def schedule_generic_gpu(kernel: Generic, gpu: Gpu) -> Scheduled:
    """TVM's own default rules for reductions and for the rest."""
    target = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": gpu.arch,
            "max_shared_memory_per_block": 49152,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
        }
    )
    module = tvm.IRModule({"main": kernel.func})
    rules = (dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
    with target:
        module = dlight.ApplyDefaultSchedule(*rules)(module)
    return Scheduled(steps=(_step(module["main"]),))


def _inlined(schedule: s_tir.Schedule) -> list[dlight.SBlockInfo]:
    blocks = dlight.normalize_prim_func(schedule)
    if blocks is None:  # a form that dlight does not know: left as Relax wrote it
        return []
    return list(dlight.try_inline(schedule, blocks))


def _step(func: tvm.tirx.PrimFunc) -> Step:
    return Step(func=func, args=tuple(str(param.name) for param in func.params))
