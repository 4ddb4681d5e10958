"""What is to be tuned: the kernels of a program that leave something open, each as a task."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gfcompile.targets.target import Cpu, Gpu, Target
from gfcompile.targets.tvm.choices import Choice, choices, kernel_key, space_of
from gfcompile.targets.tvm.emit import Artifact, emit
from gfcompile.targets.tvm.kernel import Generic, Kernel
from gfcompile.targets.tvm.kernel_names import kernel_name
from gfcompile.targets.tvm.levels import Tuned
from gfcompile.targets.tvm.program import Call, Program, Tensor

_LIBRARY = "libkernel.so"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kernel that may be computed one way or another.

    Attributes:
        uses: how often the program calls it.
        program: the same kernel a few times, with constants of the program; its inputs are read
            by every call, and its outputs are written by the last one.
    """

    kernel: Kernel
    target: Target
    uses: int
    program: Program

    @property
    def device(self) -> Cpu | Gpu:
        return self.target.gpu or self.target.cpu

    @property
    def name(self) -> str:
        return kernel_name(self.kernel)

    @property
    def key(self) -> str:
        return kernel_key(self.kernel)

    @property
    def schedule(self) -> str:
        space = space_of(self.kernel, self.device)
        assert space is not None
        return space.schedule

    @property
    def calls(self) -> int:
        """Calls of the kernel in one inference of `program`."""
        return len(self.program.calls)

    def build(self, choice: Choice | None, folder: Path) -> Artifact:
        """Writes what gfbench runs: a bundle of this kernel alone.

        Args:
            choice: None for the schedule's own rule.
            folder: exists and is empty.

        Raises:
            CompileError: the kernel cannot be compiled that way.
        """
        tuned = {} if choice is None else {self.kernel: Tuned(choice=choice, how="measured")}
        return emit(
            self.program,
            self.target,
            folder,
            library=_LIBRARY,
            mean=None,
            std=None,
            tuning=lambda _kernels, _device: tuned,
            describe=self.target.gpu is not None,  # CPUs tell by running
        )

    def inputs(self, seed: int = 0) -> bytes:
        """Values for all inputs of the program, one after the other, as they are stored."""
        rng = np.random.default_rng(seed)
        data = b""
        for name in self.program.inputs:
            tensor = self.program.tensors[name]
            if tensor.dtype in ("float32", "float16"):
                values = rng.standard_normal(tensor.shape).astype(tensor.dtype)
            else:  # any bytes are int8 activations, however they are stored; indices stay small
                high = 256 if tensor.dtype in ("int8", "uint8") else 2
                values = rng.integers(0, high, tensor.shape).astype(
                    np.uint8 if high == 256 else tensor.dtype
                )
            data += values.tobytes()
        return data

    def outputs(self) -> Sequence[Tensor]:
        return [self.program.tensors[name] for name in self.program.outputs]


def tasks(program: Program, target: Target, *, calls: int) -> list[Task]:
    """The kernels of `program` that have more than one way to be computed on `target`.

    Args:
        target: of one level.
        calls: of a kernel in the bundle that stands for it, each with the constants of another
            layer. With several, they come from memory as far away as in the model; what only
            counts instructions has no use for more than one.
    """
    assert not target.levels, "each level has kernels of its own"
    device = target.gpu or target.cpu
    by_kernel: dict[Kernel, list[Call]] = {}
    for call in program.calls:
        by_kernel.setdefault(call.kernel, []).append(call)
    return [
        Task(kernel=kernel, target=target, uses=len(used), program=_alone(used[:calls], program))
        for kernel, used in by_kernel.items()
        if len(choices(kernel, device)) > 1 or _is_generated(kernel, device)
    ]


def _is_generated(kernel: Kernel, device: Cpu | Gpu) -> bool:
    """Whether MetaSchedule is to make the space: of reductions, that is; the rest is bandwidth."""
    if not isinstance(kernel, Generic) or space_of(kernel, device) is None:
        return False
    from gfcompile.targets.tvm.tuning.generated import reduces

    return reduces(kernel.func)


def _alone(calls: Sequence[Call], program: Program) -> Program:
    """A program of `calls`, all of the same kernel, on the same inputs."""
    tensors: dict[str, Tensor] = {}

    def renamed(names: Mapping[str, str], prefix: str) -> dict[str, str]:
        mapped = {argument: f"{prefix}.{argument}" for argument in names}
        for argument, name in names.items():
            tensor = program.tensors[name]
            tensors[mapped[argument]] = dataclasses.replace(tensor, name=mapped[argument])
        return mapped

    def made() -> Iterator[Call]:
        for i, call in enumerate(calls):
            yield dataclasses.replace(
                call,
                label=f"call{i}",
                reads=renamed(call.reads, "in"),
                writes=renamed(call.writes, f"out{i}"),
            )

    alone = tuple(made())
    return Program(
        inputs=tuple(alone[0].reads.values()),
        outputs=tuple(alone[-1].writes.values()),
        tensors=tensors,
        calls=alone,
    )
