"""Cycles of a library's hot loops by llvm-mca's model of a core, beside what it must at least take.

A hot loop is an innermost one that multiplies a register tile, and so uses what it loads several
times. Its bound is what llvm-mca says of its multiplying instructions alone: no arrangement of
loads around them is faster there. Left out are loops that wait for memory (products of one row),
and those of the global filter, which add and move more than they multiply.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("llvm-objdump", "llvm-mca")
_ITERATIONS = 100
# Products of a register tile in each round, and how many for each register that is loaded.
_LEAST_PRODUCTS = 32
_LEAST_REUSE = 3
_MULTIPLIES = re.compile(r"fmla|sdot|smmla|smlal2?|smull2?|sadalp")
_LOAD = re.compile(r"ld[rp1-4]\b.*(?=\[(?!sp\b))")  # what was spilled excuses nothing
_REGISTER = re.compile(r"\b[qv]\d+")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*([^<\n]*)")
_BRANCH = re.compile(r"b\.\w+|cbn?z|tbn?z")


class NoModelError(Exception):
    """llvm-mca cannot say anything."""


@dataclass(frozen=True, kw_only=True)
class HotLoop:
    """A loop and what llvm-mca says of it.

    Attributes:
        products, instructions: of one round, those that multiply and all.
        cycles: of one round.
        bound: cycles of its multiplying instructions alone, each as soon as a unit is free.
    """

    products: int
    instructions: int
    cycles: float
    bound: float

    @property
    def share(self) -> float:
        """How much of the modelled peak it reaches."""
        return self.bound / self.cycles


def hot_loops(library: Path, cpu: str) -> list[HotLoop]:
    """Those of an arm64 library on `cpu`, as LLVM calls it, the largest first.

    Raises:
        NoModelError: a tool of LLVM's is missing, or fails.
    """
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise NoModelError(f"{tool} is not installed (apt-get install llvm)")
    found = []
    for body in dict.fromkeys(_innermost_loops(_disassembly(library))):
        products = [line for line in body if _MULTIPLIES.match(line)]
        loads = filter(None, map(_LOAD.match, body))
        loaded = sum(len(_REGISTER.findall(load[0])) for load in loads)
        if len(products) >= max(_LEAST_PRODUCTS, _LEAST_REUSE * loaded):
            loop = HotLoop(
                products=len(products),
                instructions=len(body),
                cycles=_modelled(body, cpu, r"^Total Cycles:\s+(\d+)") / _ITERATIONS,
                bound=_modelled(products, cpu, r"^Block RThroughput:\s+([\d.]+)"),
            )
            found.append(loop)
    return sorted(found, key=lambda loop: loop.products, reverse=True)


def _disassembly(library: Path) -> list[tuple[int, str, str]]:
    """The library's instructions: address, mnemonic, operands."""
    options = ("-d", "--no-show-raw-insn", "--mattr=+dotprod,+fullfp16,+i8mm")
    text = _output(("llvm-objdump", *options, str(library)))
    found = (_INSTRUCTION.match(line) for line in text.splitlines())
    return [(int(m[1], 16), m[2], m[3].strip()) for m in found if m]


def _innermost_loops(code: Sequence[tuple[int, str, str]]) -> list[tuple[str, ...]]:
    """Bodies of the loops in which nothing else branches back."""
    index = {address: i for i, (address, _, _) in enumerate(code)}
    loops = []
    innermost_after = -1  # the last branch back that was seen
    for i, (address, mnemonic, operands) in enumerate(code):
        if not _BRANCH.fullmatch(mnemonic):
            continue
        *tested, target = operands.split(",")
        start = index.get(int(target.strip(), 16))
        if start is None or int(target.strip(), 16) >= address:
            continue
        if start > innermost_after:
            last = ",".join([*tested, " again"])
            lines = [f"{m} {o}" for _, m, o in code[start:i]]
            loops.append((*lines, f"{mnemonic} {last}"))
        innermost_after = i
    return loops


def _modelled(lines: Sequence[str], cpu: str, figure: str) -> float:
    """A figure of llvm-mca's on these instructions, round after round."""
    options = ("-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+dotprod,+fullfp16,+i8mm")
    command = ("llvm-mca", *options, f"-iterations={_ITERATIONS}")
    text = _output(command, "\n".join(("again:", *lines)))
    found = re.search(figure, text, re.M)
    if found is None:
        raise NoModelError(f"llvm-mca printed {text[:100]!r}")
    return float(found[1])


def _output(command: Sequence[str], given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoModelError(f"{command[0]}: {done.stderr.strip()[-200:]}")
    return done.stdout
