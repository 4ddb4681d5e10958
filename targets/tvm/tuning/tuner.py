"""The search: candidates are built, checked, compared with the schedules' own rules, and kept."""

import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gfcompile.runtime.errors import DeviceError
from gfcompile.runtime.records import parse_json
from gfcompile.targets.tvm.choices import Choice, choices, device_key, parse_choice, to_json
from gfcompile.targets.tvm.kernel import Generic
from gfcompile.targets.tvm.tuning.builders import Builders, Built, CandidateError, Job
from gfcompile.targets.tvm.tuning.database import Database, Entry
from gfcompile.targets.tvm.tuning.proposals import ListedProposer, Proposer
from gfcompile.targets.tvm.tuning.runners import Runner, run_behind_stand_in
from gfcompile.targets.tvm.tuning.tasks import Task

_BATCH = 8  # candidates that are built together, then measured in turn
_ROUNDS = 3  # of turns
# What takes so many times as long as the best, or as the default, gets no further turn.
_OUT_OF_THE_RUNNING = 1.25
_CONFIRMING_ROUNDS = 9
# Of those, one at most may be slower than the default's: 98% sure that their median is not.
_MOST_SLOWER = 1
# What a finding has to gain: less is noise, or not worth an entry.
_GAIN = {"measured": 0.98, "static": 0.99}
_SLICE_MS = 40.0  # of running one candidate before it is the next one's turn
_LEAST_LIMIT_S = 10.0
_STAND_IN_LIMIT_S = 300.0
# To build what the rules make. Nothing is wrong with it: it is the machine that is busy.
_DEFAULT_BUILD_LIMIT_S = 900.0
_SLOWEST = 20  # times the rule's own time: slower is as good as hanging


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a search ends, at the latest; it ends earlier when its spaces are exhausted.

    Attributes:
        trials: candidates of all kernels together.
        seconds: for the search, not for what comes before it.
    """

    trials: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one kernel.

    Attributes:
        ratio: cost of the best choice over that of the schedule's own; 1 if that is the best.
    """

    name: str
    uses: int
    unit: str
    default_cost: float
    ratio: float
    trials: int
    failed: int


class Progress(Protocol):
    """Who is told how a search goes."""

    def started(self, kernels: int, budget: Budget, trial_s: float | None) -> None:
        """The kernels' own costs are known, the search begins.

        Args:
            trial_s: what a candidate takes, about, in seconds; None if that is not known.
        """

    def trial(self, kernel: str, done: int, best: float, model: float) -> None:
        """After each candidate.

        Args:
            done: candidates so far, of all kernels.
            best: of this kernel, relative to its default.
            model: of all that is tuned, weighted by its share of the time.
        """


class SilentTrials:
    """Tells nobody."""

    def started(self, kernels: int, budget: Budget, trial_s: float | None) -> None:
        pass

    def trial(self, kernel: str, done: int, best: float, model: float) -> None:
        pass


@dataclass
class _State:
    """A task as the search goes on."""

    task: Task
    proposer: Proposer
    default: Built
    outputs: bytes | None
    default_cost: float
    took_s: float
    runs: int
    tried: dict[Choice, float | None] = field(default_factory=dict)
    best: float = 1.0
    exhausted: bool = False

    @property
    def weight(self) -> float:
        """Its share of the model's time, up to a constant."""
        return self.task.uses * self.default_cost

    @property
    def limit_s(self) -> float:
        """How long a candidate may take to run."""
        return max(_LEAST_LIMIT_S, _SLOWEST * self.took_s)


class TrialLog:
    """What was tried, one JSON line a trial, so that a search that was interrupted goes on.

    Args:
        path: the file; appended to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, task: Task, device: str) -> dict[Choice, float | None]:
        """The trials of `task` on `device` so far; what cannot be read is not there."""
        tried: dict[Choice, float | None] = {}
        wanted = _identity(task, device)
        for record in self._records():
            if {key: record.get(key) for key in wanted} == wanted:
                ratio, values = record.get("ratio"), record.get("choice")
                try:
                    choice = parse_choice(task.kernel, task.device, values)  # type: ignore[arg-type]
                except (ValueError, AttributeError, TypeError):
                    continue
                valid = isinstance(ratio, int | float) and not isinstance(ratio, bool) and ratio > 0
                tried[choice] = float(ratio) if valid else None  # type: ignore[arg-type]
        return tried

    def add(self, task: Task, device: str, choice: Choice, ratio: float | None, why: str) -> None:
        record = {
            **_identity(task, device),
            "choice": to_json(choice),
            "ratio": ratio,
            **({"failed": why} if why else {}),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")

    def _records(self) -> Iterator[Mapping[str, Any]]:
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                record = parse_json(line)
            except ValueError:
                continue  # the last line of a search that was killed
            if isinstance(record, dict):
                yield record


def _identity(task: Task, device: str) -> Mapping[str, str]:
    return {
        "kernel": task.key,
        "target": device_key(task.device),
        "schedule": task.schedule,
        "device": device,
    }


class Tuner:
    """Tunes `tasks` on one device and writes what it finds as it finds it.

    Args:
        path: of the database, which is read and added to.
        database: what is in it.
        progress: told of every trial.
        builders: where candidates are built.
        seed: of what is random.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        runner: Runner,
        *,
        path: Path,
        database: Database,
        builders: Builders,
        progress: Progress,
        seed: int = 0,
    ) -> None:
        self._tasks = tasks
        self._runner = runner
        self._path = path
        self._database = database
        self._builders = builders
        self._progress = progress
        self._log = TrialLog(path.with_name(path.name + ".trials"))
        self._rng = random.Random(seed)
        self._states: list[_State] = []
        self._done = 0

    def run(self, budget: Budget) -> list[Finding]:
        """Searches until the budget is spent; returns what became of each task, longest first.

        Raises:
            DeviceError: the device fails, or does not even run what the schedules' rules make.
        """
        with tempfile.TemporaryDirectory(prefix="gfcompile-tune-") as made:
            folder = Path(made)
            self._states = self._begin(folder)
            self._progress.started(len(self._states), budget, self._trial_s())
            ends = float("inf") if budget.seconds is None else time.monotonic() + budget.seconds
            trials = float("inf") if budget.trials is None else budget.trials
            while self._done < trials and time.monotonic() < ends:
                open_states = [state for state in self._states if not state.exhausted]
                if not open_states:
                    break
                # Trials go where the time goes.
                state = min(open_states, key=lambda s: (len(s.tried) + 1) / s.weight)
                self._try(state, int(min(_BATCH, trials - self._done)), folder)
        return [
            Finding(
                name=state.task.name,
                uses=state.task.uses,
                unit=self._runner.unit,
                default_cost=state.default_cost,
                ratio=state.best,
                trials=len(state.tried),
                failed=sum(cost is None for cost in state.tried.values()),
            )
            for state in sorted(self._states, key=lambda state: -state.weight)
        ]

    def _begin(self, folder: Path) -> list[_State]:
        """Builds and runs what the rules make: the measure of everything else."""
        jobs = [Job(task=task, choice=None, folder=_new_folder(folder)) for task in self._tasks]
        states = []
        builds = self._builders.build(jobs, limit_s=_DEFAULT_BUILD_LIMIT_S)
        for task, built in zip(self._tasks, builds, strict=True):
            if isinstance(built, CandidateError):
                raise DeviceError(f"{task.name}: its own schedule {built}; please report this")
            try:
                started = time.monotonic()
                outcome = self._runner.run(built, task.inputs(), runs=3, limit_s=300)
            except CandidateError as error:
                raise DeviceError(f"{self._runner.device}: {task.name} {error}") from error
            took = time.monotonic() - started
            measured = self._runner.how == "measured"
            state = _State(
                task=task,
                proposer=self._proposer(task),
                default=built,
                outputs=outcome.outputs,
                default_cost=outcome.cost / task.calls,
                took_s=took,
                runs=min(50, max(3, round(_SLICE_MS / outcome.cost))) if measured else 1,
                tried=self._log.read(task, self._runner.device),
            )
            self._recall(state)
            states.append(state)
        return states

    def _trial_s(self) -> float | None:
        """What it takes to run a candidate once, as trials are spread over the kernels."""
        if self._runner.how == "measured":
            return None  # it takes its turns as often as it deserves
        total = sum(state.weight for state in self._states)
        return sum(state.weight * state.took_s for state in self._states) / total

    def _proposer(self, task: Task) -> Proposer:
        if isinstance(task.kernel, Generic):
            from gfcompile.targets.tvm.tuning.generated import GeneratedProposer

            return GeneratedProposer(task, seed=self._rng.randrange(1, 2**31))
        space = choices(task.kernel, task.device)
        seen = [choice for choice in space if not self._hides(choice, space[0])]
        return ListedProposer(seen, self._rng)

    def _hides(self, choice: Choice, default: Choice) -> bool:
        """Whether it differs from the default in something that the runner cannot see."""
        fields = self._runner.blind_to & set(to_json(choice))
        return any(getattr(choice, name) != getattr(default, name) for name in fields)

    def _recall(self, state: _State) -> None:
        """Goes on from the entry that an earlier search left."""
        self._database.drop_left_out(state.task.kernel, state.task.device)
        entry = self._database.find(state.task.kernel, state.task.device)
        if entry is not None and entry.device == self._runner.device and entry.default_cost:
            state.best = min(1.0, entry.cost / entry.default_cost)

    def _try(self, state: _State, count: int, folder: Path) -> None:
        """Tries up to `count` more candidates of one task."""
        proposed = state.proposer.propose(count, state.tried)
        if not proposed:
            state.exhausted = True
            return
        task = state.task
        jobs = [Job(task=task, choice=choice, folder=_new_folder(folder)) for choice in proposed]
        results = dict(zip(proposed, self._builders.build(jobs), strict=True))
        built = {c: b for c, b in results.items() if isinstance(b, Built)}
        failures = {c: b for c, b in results.items() if isinstance(b, CandidateError)}
        turns = self._compare(state, built, _ROUNDS, failures)
        ratios = {choice: statistics.median(found) for choice, found in turns.items()}
        if ratios:
            best = min(ratios, key=lambda choice: ratios[choice])
            if ratios[best] < min(state.best, _GAIN[self._runner.how]):
                self._confirm(state, best, built[best], ratios, failures)
        outcome: dict[Choice, float | None] = {c: ratios.get(c) for c in proposed}
        state.tried |= outcome
        state.proposer.learn(outcome)
        for choice, ratio in outcome.items():
            self._done += 1
            why = str(failures[choice]) if choice in failures else ""
            self._log.add(task, self._runner.device, choice, ratio, why)
            self._progress.trial(task.name, self._done, state.best, self._model_ratio())
        for candidate in built.values():
            self._runner.forget(candidate)
        for job in jobs:  # weights take space
            shutil.rmtree(job.folder, ignore_errors=True)

    def _confirm(
        self,
        state: _State,
        choice: Choice,
        built: Built,
        ratios: dict[Choice, float],
        failures: dict[Choice, CandidateError],
    ) -> None:
        """Keeps `choice` if it is as good on a closer look: the best of many is often lucky."""
        if self._runner.how == "measured":
            again = self._compare(state, {choice: built}, _CONFIRMING_ROUNDS, failures)
            if choice not in again:
                del ratios[choice]
                return
            ratios[choice] = statistics.median(again[choice])
            if sum(ratio >= 1 for ratio in again[choice]) > _MOST_SLOWER:
                return
        if not self._runner.computes and not self._computes_the_same(state, choice, failures):
            del ratios[choice]
            return
        if ratios[choice] < min(state.best, _GAIN[self._runner.how]):
            state.best = ratios[choice]
            self._keep(state, choice)

    def _computes_the_same(
        self, state: _State, choice: Choice, failures: dict[Choice, CandidateError]
    ) -> bool:
        """Whether a GPU's kernel gives what the default's gives, on this machine's CPU."""
        task, inputs = state.task, state.task.inputs()
        with tempfile.TemporaryDirectory(prefix="gfcompile-tune-") as made:
            jobs = [
                Job(task=task, choice=c, folder=_new_folder(Path(made)), stand_in=True)
                for c in ((choice,) if state.outputs else (choice, None))
            ]
            try:
                outputs = []
                for built in self._builders.build(jobs):
                    if isinstance(built, CandidateError):
                        raise built
                    outputs.append(run_behind_stand_in(built, inputs, _STAND_IN_LIMIT_S))
                state.outputs = state.outputs or outputs[1]
                check_outputs(task, outputs[0], state.outputs)
            except CandidateError as error:
                failures[choice] = error
                return False
        return True

    def _compare(
        self,
        state: _State,
        built: Mapping[Choice, Built],
        rounds: int,
        failures: dict[Choice, CandidateError],
    ) -> dict[Choice, list[float]]:
        """Relative costs, by turn, of those that run and are right; `failures` gets the others.

        They take turns with the default, so that a device that slows down slows all of them.
        """
        measured = self._runner.how == "measured"
        inputs = state.task.inputs()
        ratios: dict[Choice, list[float]] = {choice: [] for choice in built}
        running = list(built)
        for _ in range(rounds if measured else 1):
            default = state.default_cost * state.task.calls
            if measured:
                default = self._run(state, state.default, inputs)
            for choice in running:
                try:
                    ratios[choice].append(self._run(state, built[choice], inputs) / default)
                except CandidateError as error:
                    failures[choice] = error
            medians = {c: statistics.median(ratios[c]) for c in running if c not in failures}
            most = _OUT_OF_THE_RUNNING * min([1.0, *medians.values()])
            running = [choice for choice, median in medians.items() if median <= most]
        return {c: r for c, r in ratios.items() if c not in failures}

    def _run(self, state: _State, built: Built, inputs: bytes) -> float:
        outcome = self._runner.run(built, inputs, runs=state.runs, limit_s=state.limit_s)
        if outcome.outputs is not None and state.outputs is not None:
            check_outputs(state.task, outcome.outputs, state.outputs)
        return outcome.cost

    def _keep(self, state: _State, choice: Choice) -> None:
        task = state.task
        self._database.add(
            Entry(
                kernel=task.key,
                target=device_key(task.device),
                schedule=task.schedule,
                choice=to_json(choice),
                how=self._runner.how,
                unit=self._runner.unit,
                cost=_digits(state.default_cost * state.best),
                default_cost=_digits(state.default_cost),
                trials=len(state.tried) + 1,
                device=self._runner.device,
            )
        )
        self._database.save(self._path)

    def _model_ratio(self) -> float:
        total = sum(state.weight for state in self._states)
        return sum(state.weight * state.best for state in self._states) / total


def check_outputs(task: Task, actual: bytes, expected: bytes) -> None:
    """Raises CandidateError if a candidate's outputs are not the default's, but for rounding.

    float32: sums of up to some thousand terms in another order differ by far less than 1e-4 of the
    largest value; float16, which is how such sums are stored: by half a unit of the last place more
    on either side; int8: ties may round to either side, in few places and by one step.
    """
    if len(actual) != len(expected):
        raise CandidateError(f"wrote {len(actual)} bytes instead of {len(expected)}")
    for tensor in task.outputs():
        size = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        got, wanted = (
            np.frombuffer(data[:size], tensor.dtype).astype(np.float64)
            for data in (actual, expected)
        )
        actual, expected = actual[size:], expected[size:]
        error = np.abs(got - wanted)
        if tensor.dtype in ("float32", "float16"):
            stored = 0.0 if tensor.dtype == "float32" else 2.0**-10 * np.abs(wanted)
            right = bool((error <= 1e-4 * np.abs(wanted).max() + stored).all())
        else:  # stored as uint8, 127 and -128 are neighbours
            steps = np.minimum(error, 256 - error)
            right = bool(steps.max() <= 1 and (steps > 0).mean() <= 0.01)
        if not right:  # NaN is not right either
            raise CandidateError(f"computes something else (by {error.max():.3g})")


def _new_folder(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
