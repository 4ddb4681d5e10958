"""What tuning gains on this machine: over what gfcompile ships, and over TVM's own default space.

    python benchmarks/tune.py [--models gfnet_xs ...] [--trials 200] [--quick] [--json FILE]

For each model, float32: `gfcompile tune` with that many trials, from nothing. The bundle with what
it found then runs beside the bundle with what gfcompile ships, in turn. And the dense kernels,
nearly all of the time, are given to MetaSchedule as plain functions, to search in the space that it
generates, by the same builder and runner and for as long as our search took; what either found runs
in turn with the other. MetaSchedule's functions have our GELU, for its own is a scalar call.

A ratio is the median of those of the single turns, with the bounds that hold the true median with
95% confidence, whatever the noise is like.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cpu import describe_machine, versions
from tvm import te

import gfcompile
from gfcompile.compile import command_line
from gfcompile.compile.cache import open_cache
from gfcompile.compile.pipeline import CompileConfig, lowered_graph
from gfcompile.compile.progress import SilentProgress
from gfcompile.compile.tuning_progress import ConsoleTrials
from gfcompile.runtime import load
from gfcompile.targets.target import Target, find_target
from gfcompile.targets.tvm.kernel import Dense, Generic
from gfcompile.targets.tvm.partition import partition
from gfcompile.targets.tvm.program import Program
from gfcompile.targets.tvm.schedules.math import gelu
from gfcompile.targets.tvm.tuning.builders import Builders, Built, CandidateError, Job
from gfcompile.targets.tvm.tuning.database import Database
from gfcompile.targets.tvm.tuning.database import load as load_database
from gfcompile.targets.tvm.tuning.database import shipped as shipped_database
from gfcompile.targets.tvm.tuning.devices import one_level, open_runner
from gfcompile.targets.tvm.tuning.runners import Runner
from gfcompile.targets.tvm.tuning.tasks import Task, tasks
from gfcompile.targets.tvm.tuning.tuner import Budget, Tuner

CALLS = 8
LEARNER = "xgboost-cpu"
PACKAGES = ("gfcompile", "apache-tvm", "numpy", LEARNER)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median of a cost over another one, and the 95% bounds of that."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.most:.3f})"


@dataclass(frozen=True, kw_only=True)
class KernelResult:
    """One dense kernel, in ms of one call: as shipped, tuned, and as MetaSchedule makes it.

    Attributes:
        over_shipped, over_metaschedule: what tuning found, over the others.
    """

    kernel: str
    calls: int
    shipped_ms: float
    tuned_ms: float
    metaschedule_ms: float
    metaschedule_trials: int
    over_shipped: Ratio
    over_metaschedule: Ratio


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One model: the whole bundle, in ms of an inference, and its heaviest kernels.

    Attributes:
        ruled_ms: by the schedules' rules alone.
    """

    model: str
    trials: int
    seconds: float
    ruled_ms: float
    shipped_ms: float
    tuned_ms: float
    over_ruled: Ratio
    over_shipped: Ratio
    kernels: Sequence[KernelResult]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    trials = 16 if options.quick and options.trials is None else options.trials or 200
    rounds = 7 if options.quick else 25
    machine = describe_machine()  # its load before we add ours
    results = [compare(model, trials, rounds) for model in options.models]
    print(f"{machine['cpu']}; float32, one thread, load before: {machine['load']:.1f}")
    for result in results:
        print(
            f"\n{result.model}: {result.trials} trials in {result.seconds:.0f} s; an inference "
            f"takes {result.ruled_ms:.2f} ms by the rules alone, {result.shipped_ms:.2f} ms as "
            f"shipped, {result.tuned_ms:.2f} ms tuned, which is {result.over_shipped} of what is "
            f"shipped and {result.over_ruled} of the rules"
        )
        print_kernels(result.kernels)
    print("\nratio: ours tuned, over what is to the left of it; below 1 tuning is the faster one")
    found = versions(PACKAGES)
    if LEARNER not in found:
        print(f"without {LEARNER} TVM's search learns nothing: pip install -e '.[tune]' for it")
    if options.json:
        report = {
            "benchmark": "tune",
            "machine": machine,
            "versions": found,
            "rounds": rounds,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def print_kernels(kernels: Sequence[KernelResult]) -> None:
    left = ("ms of a call", "calls", "shipped", "tuned", "ratio")
    header = (*left, "TVM's space", "ratio", "its trials")
    rows = [
        (
            kernel.kernel,
            str(kernel.calls),
            f"{kernel.shipped_ms:.3f}",
            f"{kernel.tuned_ms:.3f}",
            str(kernel.over_shipped),
            f"{kernel.metaschedule_ms:.3f}",
            str(kernel.over_metaschedule),
            str(kernel.metaschedule_trials),
        )
        for kernel in kernels
    ]
    command_line.print_table(header, rows, right=set(range(1, len(header))))


def compare(model: str, trials: int, rounds: int) -> ModelResult:
    """Tunes `model` for this machine and measures what that gains."""
    host = find_target("host")
    assert isinstance(host, Target)
    target = one_level(host)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runner = stack.enter_context(open_runner("local", target))
        builders = stack.enter_context(Builders(len(os.sched_getaffinity(0))))
        with open_cache() as cache:
            config = CompileConfig(model=model, target="host")
            program = partition(lowered_graph(config, cache, SilentProgress()).model)
        found = tasks(program, target, calls=CALLS)
        path = folder / "tuned.json"
        started = time.monotonic()
        _tune(found, runner, builders, path, Budget(trials=trials))
        seconds = time.monotonic() - started
        dense = [task for task in found if isinstance(task.kernel, Dense) and task.kernel.m > 1]
        work = sum(task.uses * _macs(task) for task in dense)
        kernels = [
            _against_metaschedule(
                task,
                runner,
                builders,
                path,
                seconds=seconds * task.uses * _macs(task) / work,
                rounds=rounds,
                folder=folder,
            )
            for task in dense
        ]
        ruled, shipped, tuned = _inferences_ms(model, path, rounds, folder)
        return ModelResult(
            model=model,
            trials=trials,
            seconds=seconds,
            ruled_ms=statistics.median(ruled),
            shipped_ms=statistics.median(shipped),
            tuned_ms=statistics.median(tuned),
            over_ruled=ratio(tuned, ruled),
            over_shipped=ratio(tuned, shipped),
            kernels=kernels,
        )


def _tune(
    found: Sequence[Task], runner: Runner, builders: Builders, path: Path, budget: Budget
) -> int:
    """Tunes, and returns how many trials that were."""
    with ConsoleTrials() as progress:
        tuner = Tuner(
            found,
            runner,
            path=path,
            database=load_database(path) if path.exists() else Database(),
            builders=builders,
            progress=progress,
        )
        findings = tuner.run(budget)
    if not path.exists():
        Database().save(path)
    return sum(finding.trials for finding in findings)


def _against_metaschedule(
    task: Task,
    runner: Runner,
    builders: Builders,
    path: Path,
    *,
    seconds: float,
    rounds: int,
    folder: Path,
) -> KernelResult:
    """The kernel as shipped, as tuned, and as MetaSchedule makes it in that time, in turn."""
    plain = _as_function(task)
    # Its evolution takes its time before the first candidate; a few are needed to compare at all.
    other = folder / f"{task.name}.json"
    tried = _tune([plain], runner, builders, other, Budget(seconds=seconds))
    databases = (shipped_database(), load_database(path), load_database(other))
    built = []
    for owner, database in zip((task, task, plain), databases, strict=True):
        known = database.tuned([owner.kernel], owner.device)
        choice = known[owner.kernel].choice if owner.kernel in known else None
        place = Path(tempfile.mkdtemp(dir=folder))
        (made,) = builders.build([Job(task=owner, choice=choice, folder=place)])
        assert isinstance(made, Built), made
        built.append(made)
    times = _in_turn(runner, built, task.inputs(), rounds)
    shipped, tuned, metaschedule = (statistics.median(found) / task.calls for found in times)
    return KernelResult(
        kernel=task.name,
        calls=task.uses,
        shipped_ms=shipped,
        tuned_ms=tuned,
        metaschedule_ms=metaschedule,
        metaschedule_trials=tried,
        over_shipped=ratio(times[1], times[0]),
        over_metaschedule=ratio(times[1], times[2]),
    )


def ratio(costs: Sequence[float], others: Sequence[float]) -> Ratio:
    """Of costs over those of the same turns.

    Of n turns, the number below the true median is binomial; the bounds are order statistics.
    """
    ratios = sorted(cost / other for cost, other in zip(costs, others, strict=True))
    n = len(ratios)
    below, outside = 0, 0.5**n
    while outside <= 0.025:
        below += 1
        outside += math.comb(n, below) * 0.5**n
    least = max(below - 1, 0)
    return Ratio(median=statistics.median(ratios), least=ratios[least], most=ratios[n - 1 - least])


def _in_turn(
    runner: Runner, built: Sequence[Built], inputs: bytes, rounds: int
) -> list[list[float]]:
    """The costs of each, turn by turn."""
    costs: list[list[float]] = [[] for _ in built]
    for _ in range(rounds):
        for found, candidate in zip(costs, built, strict=True):
            try:
                found.append(runner.run(candidate, inputs, runs=5, limit_s=60).cost)
            except CandidateError as error:
                raise SystemExit(f"a kernel that ran before fails: {error}") from error
    return costs


def _as_function(task: Task) -> Task:
    """The dense kernel as a plain function, for MetaSchedule to transform, on the same operands."""
    kernel = task.kernel
    assert isinstance(kernel, Dense)
    m, n, k = kernel.m, kernel.n, kernel.k
    x, w = te.placeholder((m, k), name="x"), te.placeholder((k, n), name="w")
    bias = te.placeholder((n,), name="bias")
    residual = te.placeholder((kernel.residual_rows or 1, n), name="residual")
    at = te.reduce_axis((0, k), name="at")
    product = te.compute((m, n), lambda i, j: te.sum(x[i, at] * w[at, j], axis=at), name="product")

    def finish(i: Any, j: Any) -> Any:
        value = product[i, j] + bias[j]
        value = gelu(value) if kernel.gelu else value
        return value + residual[i % kernel.residual_rows, j] if kernel.residual_rows else value

    y = te.compute((m, n), finish, name="y")
    arguments = [x, w, bias, *([residual] if kernel.residual_rows else []), y]
    generic = Generic(name=task.name, key="plain", func=te.create_prim_func(arguments))
    calls = tuple(dataclasses.replace(call, kernel=generic) for call in task.program.calls)
    program: Program = dataclasses.replace(task.program, calls=calls)
    (plain,) = tasks(program, task.target, calls=len(calls))
    return plain


def _macs(task: Task) -> int:
    assert isinstance(task.kernel, Dense)
    return task.kernel.m * task.kernel.n * task.kernel.k


def _inferences_ms(
    model: str, path: Path, rounds: int, folder: Path
) -> tuple[list[float], list[float], list[float]]:
    """Times of the bundle by rules, with what gfcompile ships, and tuned, turn by turn."""
    databases: tuple[Path | Literal["shipped", "none"], ...] = ("none", "shipped", path)
    bundles = [
        gfcompile.compile_model(
            CompileConfig(
                model=model, target="host", tuning_db=tuning_db, output=folder / f"bundle{i}"
            )
        )
        for i, tuning_db in enumerate(databases)
    ]
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    with ExitStack() as stack:
        sessions = [stack.enter_context(load(bundle.path)) for bundle in bundles]
        for _ in range(rounds):
            for found, session in zip(times, sessions, strict=True):
                found.append(session.benchmark(runs=5, warmup=1).median_ms)
    return times


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["gfnet_xs"], metavar="NAME")
    parser.add_argument("--trials", type=int, metavar="N", help="default: 200, with --quick 16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="fewer trials and runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
