"""Builds candidates in processes of their own, so that none can crash or stop the search."""

import multiprocessing
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Self, cast

from gfcompile.targets.tvm.choices import Choice
from gfcompile.targets.tvm.tuning.tasks import Task

_LIMIT_S = 120.0


class CandidateError(Exception):
    """A candidate that cannot be built, does not run, or computes something else."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A candidate's bundle.

    Attributes:
        kernels: what the compiler said of each of its kernels.
        driver: with a stand-in for the driver of its GPU, the folder that holds it, beside the
            bundle that runs with it.
    """

    folder: Path
    kernels: Sequence[Mapping[str, Any]]
    driver: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be built.

    Attributes:
        choice: None for the schedule's own rule.
        folder: exists and is empty.
        stand_in: whether a GPU's kernels are to run on this machine's CPU, see `standin`.
    """

    task: Task
    choice: Choice | None
    folder: Path
    stand_in: bool = False


class Builders:
    """Up to `count` processes that build; one that dies or takes too long is replaced."""

    def __init__(self, count: int) -> None:
        self._workers = [_Worker() for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for worker in self._workers:
            worker.stop()

    def build(
        self, jobs: Sequence[Job], *, limit_s: float = _LIMIT_S
    ) -> list[Built | CandidateError]:
        """What became of each of `jobs`.

        Args:
            limit_s: how long one may take.
        """
        results: dict[int, Built | CandidateError] = {}
        waiting = list(enumerate(jobs))
        busy: dict[Connection, tuple[int, _Worker, float]] = {}
        idle = list(self._workers)
        while waiting or busy:
            while waiting and idle:
                index, job = waiting.pop(0)
                worker = idle.pop()
                busy[worker.begin(job)] = (index, worker, time.monotonic() + limit_s)
            ready = wait(
                list(busy), timeout=min(end for _, _, end in busy.values()) - time.monotonic()
            )
            for connection in list(busy):
                index, worker, ends = busy[connection]
                if connection in ready:
                    results[index] = worker.result()
                elif time.monotonic() >= ends:
                    worker.stop()
                    results[index] = CandidateError(f"was not built within {limit_s:.0f} s")
                else:
                    continue
                del busy[connection]
                idle.append(worker)
        return [results[index] for index in range(len(jobs))]


@dataclass
class _Worker:
    """A process that builds, started when it is first needed.

    Attributes:
        known: the tasks it was sent, by identity; kept, so that no later one gets the same.
    """

    process: SpawnProcess | None = None
    connection: Connection | None = None
    known: dict[int, Task] = field(default_factory=dict)

    def begin(self, job: Job) -> Connection:
        """Sends the job, and returns where its result arrives."""
        if self.connection is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        identity = id(job.task)
        # A task brings weights along: it is sent once.
        task = None if identity in self.known else job.task
        with suppress(OSError):  # it died while idle: `result` finds out
            self.connection.send((identity, task, job.choice, job.folder, job.stand_in))
        self.known[identity] = job.task
        return self.connection

    def result(self) -> Built | CandidateError:
        """The result that has arrived."""
        assert self.connection is not None
        try:
            built, reason = self.connection.recv()
        except (EOFError, OSError):
            process = self.process
            self.stop()
            code = process.exitcode if process is not None else None
            return CandidateError(f"crashed the compiler (exit status {code})")
        return CandidateError(reason) if built is None else cast(Built, built)

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        if self.connection is not None:
            self.connection.close()
        self.process = self.connection = None
        self.known.clear()


def _serve(connection: Connection) -> None:
    """The process: builds what it is sent, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    tasks: dict[int, Task] = {}
    with suppress(EOFError, OSError):
        while True:
            identity, task, choice, folder, stand_in = connection.recv()
            if task is not None:
                tasks[identity] = task
            try:
                connection.send((_build(tasks[identity], choice, folder, stand_in), ""))
            except Exception as error:  # whatever TVM raises, the candidate is no good
                lines = str(error).strip().splitlines() or [type(error).__name__]
                connection.send((None, f"cannot be built: {lines[-1][:300]}"))


def _build(task: Task, choice: Choice | None, folder: Path, stand_in: bool) -> Built:
    artifact = task.build(choice, folder)
    gpu = task.target.gpu
    if not stand_in or gpu is None:
        return Built(folder=folder, kernels=artifact.kernels)
    from gfcompile.targets.tvm.standin.twin import make_twin

    twin = folder / "twin"
    twin.mkdir()
    return Built(
        folder=twin, kernels=artifact.kernels, driver=make_twin(artifact, gpu, folder, twin)
    )
