"""A GPU kernel's time, estimated from its instruction mix and what ptxas says of its occupancy.

    cycles = blocks of a multiprocessor * warps * max(issue / 4, shared memory) / hidden

Instructions are counted in the PTX, each as often as the loops around it go round, and weighted by
how many cycles the pipeline that takes it is busy. It is an estimate for comparing ways to compute
the same kernel on the same GPU: it knows neither DRAM nor the order of instructions.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.cuda import WARP

_SCHEDULERS = 4  # of a multiprocessor, each issues one warp a cycle
_HIDING_WARPS = 8  # that it takes to hide latencies
_LABEL = re.compile(r"^(\$\w+):")
_BRANCH = re.compile(r"^(?:@(!?)(%p\d+) )?bra(?:\.uni)?\s+(\$\w+);")
_COMPARE = re.compile(r"^setp\.(ne|lt)\.[su]32\s+(%p\d+), (%r\d+), (\d+);")
_NOTHING = ("mov", "cvta", "ld.param", "ret", "bra", "setp")  # folded into others, or once a loop


def estimate_cycles(ptx: str, kernel: Mapping[str, Any], gpu: Gpu) -> float:
    """Cycles of one launch.

    Args:
        ptx: of the module.
        kernel: the kernel's record in the manifest: symbol, grid, block, occupancy.

    Raises:
        ValueError: a loop whose count cannot be told from the PTX.
    """
    issue, shared = 0.0, 0.0
    for instruction, times in counted(_body(ptx, str(kernel["symbol"]))):
        issue += times * _issue_cycles(instruction, gpu)
        shared += times * _shared_cycles(instruction)
    grid, block = kernel["grid"], kernel["block"]
    warps = -(-block[0] * block[1] * block[2] // WARP)
    blocks = -(-grid[0] * grid[1] * grid[2] // gpu.sms)
    resident = min(blocks * warps, kernel["occupancy"] * gpu.threads_per_sm / WARP)
    hidden = min(1.0, resident / _HIDING_WARPS)
    return float(blocks * warps * max(issue / _SCHEDULERS, shared) / hidden)


def counted(lines: Sequence[str]) -> list[tuple[str, int]]:
    """Each instruction, and how often a thread executes it; forward branches are not taken.

    Raises:
        ValueError: a loop whose count cannot be told.
    """
    times = [1] * len(lines)
    labels: dict[str, int] = {}
    for end, line in enumerate(lines):
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = end
        branch = _BRANCH.match(line)
        if branch is not None and branch[3] in labels:
            begin = labels[branch[3]]
            rounds = _rounds(lines, begin, end, negated=bool(branch[1]), predicate=branch[2])
            for i in range(begin, end + 1):
                times[i] *= rounds
    return [(line, n) for line, n in zip(lines, times, strict=True) if not _LABEL.match(line)]


def _rounds(
    lines: Sequence[str], begin: int, end: int, *, negated: bool, predicate: str | None
) -> int:
    """How often the loop between two lines goes round: its counter goes from 0 up by a constant."""
    body = lines[begin:end]
    compares = [m for m in map(_COMPARE.match, body) if m is not None and m[2] == predicate]
    if len(compares) == 1 and not negated:
        kind, _, counter, bound = compares[0].groups()
        added = re.compile(rf"^add\.s32\s+{re.escape(counter)}, (%r\d+), (\d+);")
        steps = [m.groups() for m in map(added.match, body) if m is not None]
        if len(steps) == 1:
            before, step = steps[0][0], int(steps[0][1])
            zero = re.compile(rf"^mov\.[ub]32\s+{re.escape(before)}, 0;")
            starts = any(zero.match(line) for line in lines[:begin])
            if starts and step and (kind == "lt" or int(bound) % step == 0):
                return -(-int(bound) // step)
    raise ValueError(f"no count of the loop at {lines[begin]}")


def _body(ptx: str, symbol: str) -> list[str]:
    """The instructions and labels of one kernel."""
    found = re.search(rf"\.entry {re.escape(symbol)}\(.*?\n\{{\n(.*?)\n\}}", ptx, re.DOTALL)
    if found is None:
        raise ValueError(f"the PTX has no kernel {symbol}")
    return [line for line in found[1].splitlines() if line and not line.startswith((".", "{", "}"))]


def _issue_cycles(instruction: str, gpu: Gpu) -> float:
    """Cycles for which one warp's instruction keeps a scheduler busy.

    From the throughput table of NVIDIA's CUDA C++ Programming Guide, results per cycle and
    multiprocessor by compute capability: a pipeline of 128 lanes takes a warp of each scheduler
    every cycle, one of 32 every fourth.
    """
    name = re.sub(r"^@!?%p\d+ ", "", instruction)
    if name.startswith(_NOTHING):
        return 0.0
    pascal = gpu.compute_capability[0] < 7
    if name.startswith(("cvt", "ex2", "rcp", "sqrt", "rsqrt", "lg2", "sin", "cos")):
        return 4.0 if pascal else 8.0
    if ".f32" in name or ".f16" in name:
        lanes = round(gpu.fp32_tflops * 1e3 / (2 * gpu.clock_ghz * gpu.sms))
        return max(1.0, 128 / lanes)
    if name.startswith(("mad.lo", "mul.lo", "mul.wide", "mul.hi")):
        return 3.0 if pascal else 2.0  # Maxwell and Pascal make it of XMADs
    if name.startswith("div") or name.startswith("rem"):
        return 20.0
    return 1.0 if pascal else 2.0


def _shared_cycles(instruction: str) -> float:
    """Cycles for which it keeps the shared memory of a multiprocessor busy.

    128 bytes pass in a cycle; lanes that share an operand of a product share its bytes, too, so
    that a warp's vectors of 16 bytes take two cycles, not four.
    """
    found = re.search(r"\b(ld|st)\.shared(?:\.(v[24]))?", instruction)
    if found is None:
        return 0.0
    full = {None: 1.0, "v2": 2.0, "v4": 4.0}[found[2]]
    return max(1.0, full / 2) if found[1] == "ld" else full
