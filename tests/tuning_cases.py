"""Small tasks to tune, and candidates that misbehave; in a module that other processes import."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Target
from gfcompile.targets.tvm.choices import Choice
from gfcompile.targets.tvm.emit import Artifact
from gfcompile.targets.tvm.kernel import Array, Dense, Kernel
from gfcompile.targets.tvm.program import Call, Program, Tensor
from gfcompile.targets.tvm.tuning.tasks import Task, tasks

DENSE = Dense(m=12, n=64, k=32)
HALF_DENSE = Dense(m=12, n=64, k=32, x="float16", w="float16", out="float16")


def program(kernel: Dense = DENSE, calls: int = 2) -> Program:
    """`calls` layers of `kernel`, one after the other on the same input."""
    rng = np.random.default_rng(0)

    def constants() -> dict[str, Array]:
        return {
            "w": rng.standard_normal((kernel.k, kernel.n)).astype(kernel.w),
            "bias": rng.standard_normal(kernel.n).astype(np.float32),
        }

    x = Tensor(name="x", dtype=kernel.x, shape=(kernel.m, kernel.k))
    ys = [Tensor(name=f"y{i}", dtype=kernel.out, shape=(kernel.m, kernel.n)) for i in range(calls)]
    return Program(
        inputs=("x",),
        outputs=(ys[-1].name,),
        tensors={tensor.name: tensor for tensor in (x, *ys)},
        calls=tuple(
            Call(
                kernel=kernel,
                label=f"layer{i}",
                reads={"x": "x"},
                writes={"y": y.name},
                constants=constants(),
            )
            for i, y in enumerate(ys)
        ),
    )


def dense_task(target: Target, kernel: Dense = DENSE) -> Task:
    (task,) = tasks(program(kernel), target, calls=1)
    return task


@dataclass(frozen=True, kw_only=True)
class TrickyTask(Task):
    """Crashes the compiler with tiles of one row, hangs it with tiles of two."""

    kernel: Kernel
    target: Target
    uses: int
    program: Program

    def build(self, choice: Choice | None, folder: Path) -> Artifact:
        rows: Any = getattr(choice, "rows", None)
        if rows == 1:
            os.abort()
        if rows == 2:
            time.sleep(600)
        return super().build(choice, folder)


@dataclass(frozen=True, kw_only=True)
class RefusingTask(Task):
    """Cannot be built, and says for which target."""

    kernel: Kernel
    target: Target
    uses: int
    program: Program

    def build(self, choice: Choice | None, folder: Path) -> Artifact:  # noqa: ARG002
        raise CompileError(self.target.name)
