"""The search: it survives bad candidates, goes on where it stopped, and keeps what is right."""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from boards import adb_board, ssh_board
from tuning_cases import DENSE, HALF_DENSE, RefusingTask, TrickyTask, dense_task, program
from tvm import te

from gfcompile.runtime.devices import open_device
from gfcompile.runtime.errors import CompileError, DeviceError, UserError
from gfcompile.targets.target import Target, find_target
from gfcompile.targets.tvm.choices import Choice, choices, parse_choice, to_json
from gfcompile.targets.tvm.kernel import Dense, Generic
from gfcompile.targets.tvm.program import Call, Program, Tensor
from gfcompile.targets.tvm.tuning.builders import Builders, Built, CandidateError, Job
from gfcompile.targets.tvm.tuning.database import Database, load
from gfcompile.targets.tvm.tuning.devices import one_level, open_runner
from gfcompile.targets.tvm.tuning.generated import GeneratedProposer
from gfcompile.targets.tvm.tuning.proposals import ListedProposer
from gfcompile.targets.tvm.tuning.runners import (
    InstructionRunner,
    MeasuringRunner,
    Outcome,
    Runner,
)
from gfcompile.targets.tvm.tuning.tasks import Task, tasks
from gfcompile.targets.tvm.tuning.tuner import Budget, Finding, SilentTrials, Tuner, check_outputs
from tools import need, need_arm64_sysroot


def target(name: str) -> Target:
    found = find_target(name)
    assert isinstance(found, Target)
    return found


@pytest.fixture(scope="module")
def builders() -> Iterator[Builders]:
    with Builders(1) as made:
        yield made


class NamedBuilders:
    """Builds nothing: a folder's name tells the runner which candidate it is."""

    def __init__(self) -> None:
        self.choices: dict[Path, Choice | None] = {}
        self.limits: list[float] = []

    def build(self, jobs: Sequence[Job], *, limit_s: float = 0.0) -> list[Built | CandidateError]:
        self.limits.append(limit_s)
        self.choices |= {job.folder: job.choice for job in jobs}
        return [Built(folder=job.folder, kernels=()) for job in jobs]


class ModelRunner(Runner):
    """A device on which 6 rows by 2 vectors, unrolled, would be best."""

    how = "static"
    unit = "cycles"

    def __init__(self, builders: NamedBuilders) -> None:
        super().__init__("a model")
        self._builders = builders
        self.tried: list[Choice] = []
        self.wrong: set[int] = set()  # rows of tiles that compute something else

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:  # noqa: ARG002
        choice: Any = self._builders.choices[built.folder]
        if choice is None:
            return Outcome(cost=100.0, outputs=b"\0" * 12 * 64 * 4)
        self.tried.append(choice)
        cost = 50.0 + abs(choice.rows - 6) + 5 * abs(choice.vectors - 2) + 2 * (2 - choice.unroll)
        right = np.full(12 * 64, float(choice.rows in self.wrong), np.float32)
        return Outcome(cost=cost, outputs=right.tobytes())


def search(path: Path, runner: ModelRunner, builders: NamedBuilders, trials: int) -> list[Finding]:
    database = load(path) if path.exists() else Database()
    tuner = Tuner(
        [dense_task(target("raspberry-pi-5"))],
        runner,
        path=path,
        database=database,
        builders=builders,  # type: ignore[arg-type]
        progress=SilentTrials(),
    )
    return tuner.run(Budget(trials=trials))


def test_the_search_finds_the_best_without_trying_all(tmp_path: Path) -> None:
    builders = NamedBuilders()
    runner = ModelRunner(builders)
    space = choices(DENSE, target("raspberry-pi-5").cpu)
    (finding,) = search(tmp_path / "db.json", runner, builders, trials=len(space) // 2)
    assert finding.ratio <= 0.52
    (entry,) = load(tmp_path / "db.json").entries
    assert (entry.how, entry.unit, entry.device) == ("static", "cycles", "a model")
    assert entry.cost == pytest.approx(100 * finding.ratio)
    own, *others = builders.limits
    assert own > max(others)  # a busy machine is no reason to give up the default


def test_an_interrupted_search_goes_on_and_tries_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "db.json"
    builders = NamedBuilders()
    runner = ModelRunner(builders)

    class Interrupted(SilentTrials):
        def trial(self, kernel: str, done: int, best: float, model: float) -> None:  # noqa: ARG002
            if done == 16:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tuner(
            [dense_task(target("raspberry-pi-5"))],
            runner,
            path=path,
            database=Database(),
            builders=builders,  # type: ignore[arg-type]
            progress=Interrupted(),
        ).run(Budget(trials=100))
    before = list(runner.tried)
    assert len(load(path).entries) == 1
    log = path.with_name("db.json.trials")
    log.write_text(log.read_text() + '{"kernel": "torn li')
    (finding,) = search(path, runner, builders, trials=8)
    assert len(set(runner.tried)) == len(runner.tried) == len(before) + 8
    assert finding.trials == 24
    assert finding.ratio <= load(path).entries[0].cost / 100


def test_a_candidate_with_other_numbers_is_never_kept(tmp_path: Path) -> None:
    builders = NamedBuilders()
    runner = ModelRunner(builders)
    runner.wrong = {6}
    space = choices(DENSE, target("raspberry-pi-5").cpu)
    (finding,) = search(tmp_path / "db.json", runner, builders, trials=len(space))
    assert finding.failed == sum(getattr(choice, "rows", 0) == 6 for choice in space)
    assert load(tmp_path / "db.json").entries[0].choice["rows"] != 6
    assert "computes something else" in (tmp_path / "db.json.trials").read_text()


class NoisyRunner(ModelRunner):
    """Measures that all candidates are twice as fast as the default, but for every n-th time."""

    how = "measured"
    unit = "ms"

    def __init__(self, builders: NamedBuilders, slow_every: int) -> None:
        super().__init__(builders)
        self._slow_every = slow_every
        self._count = 0

    def run(self, built: Built, inputs: bytes, *, runs: int, limit_s: float) -> Outcome:
        outcome = super().run(built, inputs, runs=runs, limit_s=limit_s)
        if self._builders.choices[built.folder] is None:
            return outcome
        self._count += 1
        cost = 110.0 if self._count % self._slow_every == 0 else 50.0
        return dataclasses.replace(outcome, cost=cost)


@pytest.mark.parametrize(("slow_every", "kept"), [(3, False), (100, True)])
def test_what_is_slower_now_and_then_is_never_kept(
    tmp_path: Path, slow_every: int, kept: bool
) -> None:
    builders = NamedBuilders()
    runner = NoisyRunner(builders, slow_every)
    (finding,) = search(tmp_path / "db.json", runner, builders, trials=1)
    assert (tmp_path / "db.json").exists() == kept
    assert finding.ratio == (0.5 if kept else 1.0)


def test_outputs_may_differ_by_rounding_alone() -> None:
    task = dense_task(target("raspberry-pi-5"))
    expected = np.linspace(-1, 1, 12 * 64, dtype=np.float32)
    check_outputs(task, (expected * (1 + 1e-6)).tobytes(), expected.tobytes())
    for wrong in (expected + 1e-2, np.where(expected == 1, np.nan, expected), expected[:5]):
        with pytest.raises(CandidateError):
            check_outputs(task, wrong.astype(np.float32).tobytes(), expected.tobytes())


def test_float16_outputs_may_differ_by_half_a_unit_more() -> None:
    task = dense_task(target("raspberry-pi-5"), HALF_DENSE)
    values = np.linspace(-1, 1, 12 * 64).astype(np.float16)
    expected = values.tobytes()
    check_outputs(task, np.nextafter(values, np.float16(2)).tobytes(), expected)
    for wrong in (values + 1e-2, np.where(values == 1, np.nan, values), values.astype(np.float32)):
        with pytest.raises(CandidateError):
            check_outputs(task, wrong.astype(np.result_type(wrong, np.float16)).tobytes(), expected)


def test_float16_is_tuned_for_cpus_that_compute_in_it() -> None:
    for name, mcpu in (
        ("raspberry-pi-5", "cortex-a76"),
        ("jetson-orin-cpu", "cortex-a78ae"),
        ("arm64", "cortex-a55"),
        ("android-arm64", "cortex-a55"),
        ("android-arm64-dotprod", "cortex-a55"),
    ):
        level = one_level(target(name), float16=True)
        assert (level.cpu.mcpu, level.cpu.float16, level.levels) == (mcpu, True, ())
        assert level.cpu in (target(name).for_float16().cpu, *target(name).for_float16().levels)


def test_float16_kernels_are_counted_under_qemu(tmp_path: Path, builders: Builders) -> None:
    need("qemu-aarch64")
    need_arm64_sysroot()
    on = one_level(target("raspberry-pi-5"), float16=True)
    kernel = dataclasses.replace(HALF_DENSE, m=48, n=128, k=128)
    task = dense_task(on, kernel)
    built = built_alone(task, None, tmp_path / "built", builders)
    with open_runner("qemu:cortex-a76", on) as runner:
        outcome = runner.run(built, task.inputs(), runs=1, limit_s=60)
    # A fused multiply-add for every eight products, and less than that again besides.
    products = kernel.m * kernel.n * kernel.k
    assert products / 8 < outcome.cost < products / 4
    x, y = (
        np.frombuffer(data, np.float16).astype(np.float64).reshape(kernel.m, -1)
        for data in (task.inputs(), outcome.outputs or b"")
    )
    constants = program(kernel).calls[0].constants
    exact = x @ constants["w"].astype(np.float64) + constants["bias"]
    # 64 sums of about 8 at most, each rounded by 2^-11 of itself, in two spans; then stored.
    assert np.abs(y - exact).max() < 0.25
    with (
        open_runner("qemu:cortex-a72", on) as runner,
        pytest.raises(CandidateError, match="failed"),
    ):
        runner.run(built, task.inputs(), runs=1, limit_s=60)


class CountingQemu:
    """Counts as if the kernel took `kernel` instructions, and says how often it was asked."""

    name, url = "a model", "qemu:model"

    def __init__(self, kernel: int) -> None:
        self.kernel = kernel
        self.sources: list[str] = []

    def send(self, files: Mapping[str, Path]) -> None:
        pass

    def fetch(self, name: str) -> bytes:
        return name.encode()

    def count_instructions(self, command: Sequence[str], *, timeout_s: float) -> int:  # noqa: ARG002
        self.sources.append(command[-1])
        return 310_000 + self.kernel * (2 if command[-1] == "twice" else 1)


@pytest.mark.parametrize(("kernel", "inferences"), [(10**6, 9), (10**7, 5)])
def test_of_a_long_kernel_one_inference_is_counted(
    kernel: int, inferences: int, tmp_path: Path
) -> None:
    qemu = CountingQemu(kernel)
    runner = InstructionRunner(qemu)  # type: ignore[arg-type]
    built = Built(folder=tmp_path, kernels=())
    costs = [runner.run(built, b"", runs=1, limit_s=1).cost for _ in range(3)]
    assert costs == [kernel] * 3
    assert sum(2 if source == "twice" else 1 for source in qemu.sources) == inferences


@pytest.mark.parametrize("how", ["static", "measured"])
def test_how_long_a_candidate_runs_is_told_where_one_run_is_all(tmp_path: Path, how: str) -> None:
    told: list[float | None] = []

    class Listening(SilentTrials):
        def started(self, kernels: int, budget: Budget, trial_s: float | None) -> None:  # noqa: ARG002
            told.append(trial_s)

    builders = NamedBuilders()
    Tuner(
        [dense_task(target("raspberry-pi-5"))],
        ModelRunner(builders) if how == "static" else NoisyRunner(builders, 100),
        path=tmp_path / "db.json",
        database=Database(),
        builders=builders,  # type: ignore[arg-type]
        progress=Listening(),
    ).run(Budget(trials=1))
    assert [seconds is None for seconds in told] == [how == "measured"]


def test_proposals_are_new_and_exhaust_the_space() -> None:
    space = choices(Dense(m=7, n=16, k=8), target("raspberry-pi-4").cpu)
    proposer = ListedProposer(space, random.Random(0))
    tried: dict[Choice, float | None] = {}
    while proposed := proposer.propose(5, tried):
        assert not set(proposed) & set(tried)
        tried |= dict.fromkeys(proposed, 1.5)
    assert set(tried) == set(space[1:])


def test_a_candidate_that_crashes_or_hangs_the_compiler_is_just_a_failure(
    tmp_path: Path, builders: Builders
) -> None:
    on = target("raspberry-pi-5")
    fields = {f.name: getattr(dense_task(on), f.name) for f in dataclasses.fields(Task)}
    task = TrickyTask(**fields)
    by_rows = {getattr(choice, "rows", 0): choice for choice in choices(DENSE, on.cpu)}
    jobs = []
    for choice in (by_rows[1], by_rows[4], by_rows[2], by_rows[6]):
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(Job(task=task, choice=choice, folder=folder))
    crashed, good = builders.build(jobs[:2])
    (hung,) = builders.build(jobs[2:3], limit_s=3)
    (other,) = builders.build(jobs[3:])
    assert isinstance(crashed, CandidateError)
    assert "crashed" in str(crashed)
    assert isinstance(hung, CandidateError)
    assert "within 3 s" in str(hung)
    assert isinstance(good, Built)
    assert isinstance(other, Built)
    assert (good.folder / "plan.bin").is_file()


def test_what_tvm_says_of_a_candidate_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(tvm, "compile", refuse)
    with pytest.raises(CompileError, match="cortex-a72: no such instruction"):
        dense_task(target("raspberry-pi-4")).build(None, tmp_path)


def test_a_task_is_never_taken_for_one_that_is_gone(tmp_path: Path, builders: Builders) -> None:
    # CPython gives the address, thus the id, of an object that is gone to the next of its size.
    for index in range(8):
        name = ("raspberry-pi-4", "host")[index % 2]
        task = RefusingTask(kernel=DENSE, target=target(name), uses=1, program=program())
        (refused,) = builders.build([Job(task=task, choice=None, folder=tmp_path)])
        del task
        assert str(refused).endswith(name)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("sleep 100", "did not end within"),
        ("kill -SEGV $$", "failed"),
        ("echo broken >&2; exit 1", "broken"),
        ("echo 'no json'", "gfbench printed"),
        ("echo '{\"median_ms\": 0}'", "measured 0"),
    ],
)
def test_a_candidate_that_fails_on_the_device_is_just_a_failure(
    tmp_path: Path, script: str, why: str
) -> None:
    (tmp_path / "gfbench").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "plan.bin").write_bytes(b"")
    with open_device("local") as device:
        runner = MeasuringRunner(device, "here")
        built = Built(folder=tmp_path, kernels=())
        with pytest.raises(CandidateError, match=why):
            runner.run(built, b"", runs=1, limit_s=1)
        runner.forget(built)


def test_kernels_are_measured_on_this_machine(tmp_path: Path, builders: Builders) -> None:
    on = one_level(target("host"))
    path = tmp_path / "db.json"
    with open_runner("local", on) as runner:
        tuner = Tuner(
            [dense_task(on)],
            runner,
            path=path,
            database=Database(),
            builders=builders,
            progress=SilentTrials(),
        )
        (finding,) = tuner.run(Budget(trials=3))
    assert (finding.trials, finding.failed, finding.unit) == (3, 0, "ms")
    assert finding.default_cost > 0
    assert (tmp_path / "db.json.trials").read_text().count('"ratio"') == 3


def built_alone(task: Task, choice: Choice | None, folder: Path, builders: Builders) -> Built:
    folder.mkdir()
    (built,) = builders.build([Job(task=task, choice=choice, folder=folder)])
    assert isinstance(built, Built), built
    return built


def test_instructions_are_counted_exactly_under_qemu(tmp_path: Path, builders: Builders) -> None:
    need("qemu-aarch64")
    need_arm64_sysroot()
    on = target("raspberry-pi-4")
    kernel = Dense(m=48, n=128, k=128)
    task = dense_task(on, kernel)
    built = built_alone(task, None, tmp_path / "built", builders)
    with open_runner(None, on) as runner:
        assert (runner.how, runner.unit) == ("static", "instructions")
        first, second = (runner.run(built, task.inputs(), runs=1, limit_s=60) for _ in range(2))
    # The C library's start takes some hundred instructions more or fewer, by where it is loaded.
    assert abs(first.cost - second.cost) < 5_000
    assert first.outputs == second.outputs
    # A fused multiply-add for every four products, and less than that again besides.
    products = kernel.m * kernel.n * kernel.k
    assert products / 4 < first.cost < products / 2
    call = program(kernel).calls[0]
    x = np.frombuffer(task.inputs(), np.float32).reshape(kernel.m, kernel.k)
    y = np.frombuffer(first.outputs or b"", np.float32).reshape(kernel.m, kernel.n)
    np.testing.assert_allclose(y, x @ call.constants["w"] + call.constants["bias"], atol=1e-4)


def test_cuda_kernels_are_estimated_and_checked_behind_the_stand_in(
    tmp_path: Path, builders: Builders
) -> None:
    on = target("jetson-tx2")
    task = dense_task(on, Dense(m=28, n=32, k=16))
    space = choices(task.kernel, task.device)
    with open_runner(None, on) as runner:
        assert (runner.how, runner.unit, runner.computes) == ("static", "cycles", False)
        costs = []
        for i, choice in enumerate((None, space[-1])):
            built = built_alone(task, choice, tmp_path / str(i), builders)
            costs.append(runner.run(built, task.inputs(), runs=1, limit_s=60).cost)
        assert 0 < costs[0] < costs[1]  # the list is ordered by another, coarser estimate
        tuner = Tuner(
            [task],
            runner,
            path=tmp_path / "db.json",
            database=Database(),
            builders=builders,
            progress=SilentTrials(),
        )
        (state,) = tuner._begin(tmp_path)
        assert tuner._computes_the_same(state, space[-1], {})


def test_devices_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="unknown device"), open_runner("ftp://x", target("host")):
        pass
    with (
        pytest.raises(DeviceError, match="lacks an aarch64 CPU"),
        open_runner("local", target("raspberry-pi-4")),
    ):
        pass


def test_functions_without_a_schedule_of_ours_are_searched_by_metaschedule(
    tmp_path: Path, builders: Builders
) -> None:
    on = one_level(target("host"))
    x, w = te.placeholder((16, 32), name="x"), te.placeholder((32, 16), name="w")
    at = te.reduce_axis((0, 32), name="at")
    y = te.compute((16, 16), lambda i, j: te.sum(x[i, at] * w[at, j], axis=at), name="y")
    kernel = Generic(name="product", key="0", func=te.create_prim_func([x, w, y]))
    weights = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    call = Call(
        kernel=kernel, label="", reads={"x": "x"}, writes={"y": "y"}, constants={"w": weights}
    )
    small = Program(
        inputs=("x",),
        outputs=("y",),
        tensors={
            "x": Tensor(name="x", dtype="float32", shape=(16, 32)),
            "y": Tensor(name="y", dtype="float32", shape=(16, 16)),
        },
        calls=(call,),
    )
    (task,) = tasks(small, on, calls=1)
    proposer = GeneratedProposer(task, seed=1)
    proposed = proposer.propose(2, {})
    assert 1 <= len(proposed) <= 2
    with open_runner("local", on) as runner:
        outputs = []
        for i, choice in enumerate((None, *proposed)):
            built = built_alone(task, choice, tmp_path / str(i), builders)
            outputs.append(runner.run(built, task.inputs(), runs=1, limit_s=60).outputs)
    values = np.frombuffer(task.inputs(), np.float32).reshape(16, 32) @ weights
    for output in outputs:
        got = np.frombuffer(output or b"", np.float32).reshape(16, 16)
        np.testing.assert_allclose(got, values, atol=1e-4)
    for choice in proposed:
        assert parse_choice(kernel, task.device, to_json(choice)) == choice
    proposer.learn(dict.fromkeys(proposed, 0.5))


@pytest.mark.parametrize("kind", ["ssh", "adb"])
def test_boards_measure_kernels_with_nothing_but_gfbench(
    kind: str, tmp_path: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "board"
    with ExitStack() as stack:
        if kind == "ssh":
            board = stack.enter_context(contextmanager(ssh_board)(home, monkeypatch))
        else:
            board = adb_board(home, monkeypatch)
        on = one_level(target("host"))
        task = dense_task(on)
        runner = stack.enter_context(open_runner(board.url, on))
        assert (runner.how, runner.unit) == ("measured", "ms")
        built = [built_alone(task, None, tmp_path / name, builders) for name in ("a", "b")]
        outputs = set()
        for candidate in (*built, *built):  # in turn, each copied once
            outcome = runner.run(candidate, task.inputs(), runs=2, limit_s=60)
            assert outcome.cost > 0
            outputs.add(outcome.outputs)
        assert len(outputs) == 1
        for candidate in built:
            runner.forget(candidate)
    assert board.left() == []
