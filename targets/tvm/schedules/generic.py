"""Schedules for TIR functions that Relax lowered: whatever has no kernel class of its own.

They are right on any function and decent on element-wise work; what takes time in a model deserves
a class of its own.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from gfcompile.targets.target import Cpu, Gpu
from gfcompile.targets.tvm.kernel import Generic, Scheduled, Step

# What the traces of MetaSchedule's CPU rules are made of. Others could bring code of their own in.
_INSTRUCTIONS = frozenset(
    {
        *("Annotate", "CacheRead", "CacheWrite", "ComputeAt", "ComputeInline"),
        *("DecomposeReduction", "EnterPostproc", "Fuse", "GetSBlock", "GetChildBlocks"),
        *("GetConsumers", "GetLoops", "GetOutputBlocks", "GetProducers", "Parallel", "RFactor"),
        *("Reorder", "ReverseComputeAt", "ReverseComputeInline", "SampleCategorical"),
        *("SampleComputeLocation", "SamplePerfectTile", "Split", "Unannotate", "Unroll"),
        *("Vectorize", "AddUnitLoop"),
    }
)
_AUTO_UNROLL = "pragma_auto_unroll_max_step"
_ANNOTATIONS = ("meta_schedule.", _AUTO_UNROLL, "pragma_unroll_explicit")
_LONGEST_TRACE = 200_000
# Of a statement, by unrolling and vectorizing: MetaSchedule's rules make 512, or vectors of 64, and
# LLVM takes minutes for some thousands.
_MOST_COPIES = 1024
_COPYING = (tirx.ForKind.UNROLLED, tirx.ForKind.VECTORIZED)


@dataclass(frozen=True, kw_only=True)
class GeneratedSchedule:
    """A schedule that MetaSchedule found: the trace of its transformations, as JSON text."""

    trace: str

    @classmethod
    def parse(cls, values: Mapping[str, object]) -> "GeneratedSchedule":
        """The schedule of {"trace": text}.

        Raises:
            ValueError: it is no such thing, or transforms by other means than loops.
        """
        text = values.get("trace")
        if set(values) != {"trace"} or not isinstance(text, str) or len(text) > _LONGEST_TRACE:
            raise ValueError("a generated schedule is one text called trace")
        try:
            instructions, decisions = json.loads(text)
            for number, decision in decisions:  # others crash TVM
                chosen = decision if isinstance(decision, list) else [decision]
                if number not in range(len(instructions)) or {*map(type, chosen)} - {int}:
                    raise ValueError(f"its trace may not decide on {decision!r}")
            for name, *operands in instructions:
                _inputs, attributes, outputs = operands
                lists = {*map(type, operands)} == {list}
                if not lists or None in attributes or {*map(type, outputs)} - {str}:
                    raise ValueError(f"its trace may not give {name!r} such operands")
                if name not in _INSTRUCTIONS:
                    raise ValueError(f"its trace may not contain {name!r}")
                key = attributes[0] if name in ("Annotate", "Unannotate") else "meta_schedule."
                if not str(key).strip('"').startswith(_ANNOTATIONS):
                    raise ValueError(f"its trace may not annotate {key!r}")
        except (TypeError, LookupError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"its trace is damaged: {error}") from None
        return cls(trace=text)

    def apply(self, func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
        """`func`, transformed.

        Raises:
            ValueError: the trace does not fit `func`, or makes too much code of it.
        """
        schedule = s_tir.Schedule(func)
        try:
            tvm.s_tir.schedule.Trace.apply_json_to_schedule(json.loads(self.trace), schedule)
            copies = _copies(schedule.mod["main"].body)
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1:]
            raise ValueError(f"the trace does not fit the function: {reason}") from error
        if copies > _MOST_COPIES:
            raise ValueError(f"the trace makes {copies} copies of a statement")
        return schedule.mod["main"]


def _copies(node: Any) -> int:
    """How many copies of one statement unrolled and vectorized loops make, at most."""
    if isinstance(node, tirx.SeqStmt):
        return max(map(_copies, node.seq))
    parts = ("block", "body", "then_case", "else_case")
    inner = [getattr(node, part) for part in parts if getattr(node, part, None) is not None]
    copies = max(map(_copies, inner), default=1)
    if isinstance(node, tirx.For) and node.kind in _COPYING:
        copies *= int(node.extent)
    annotations = getattr(node, "annotations", None) or {}
    return max(copies, int(annotations.get(_AUTO_UNROLL, 0)))


def schedule_generic_cpu(
    kernel: Generic, cpu: Cpu, choice: GeneratedSchedule | None = None
) -> Scheduled:
    """Element-wise blocks inlined, outer loops parallel, the innermost spatial one vectorized."""
    if choice is not None:
        return Scheduled(steps=(_step(choice.apply(kernel.func)),))
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
