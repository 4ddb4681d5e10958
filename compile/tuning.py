"""`gfcompile tune`: a model's kernels, tuned for a target on a device."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gfcompile.compile.cache import open_cache
from gfcompile.compile.pipeline import CompileConfig, check_config, lowered_graph
from gfcompile.compile.progress import Progress, SilentProgress
from gfcompile.compile.tuning_config import DEFAULT_TRIALS, TuneConfig
from gfcompile.runtime.errors import UserError
from gfcompile.targets.target import ModelFormat, find_target

if TYPE_CHECKING:
    from gfcompile.targets.tvm.tuning.tuner import Budget, Finding
    from gfcompile.targets.tvm.tuning.tuner import Progress as TrialProgress

# Calls in a bundle that is measured: with fewer, weights would stay in a cache nearer than the
# one that they come from in a model.
_MEASURED_CALLS = 8


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a search found.

    Attributes:
        how, device: as in the database.
        findings: of each kernel that has a choice, the one that takes longest first.
        ratio: cost of all of them together, over what the schedules' own rules make.
    """

    path: Path
    how: str
    device: str
    findings: "Sequence[Finding]"
    ratio: float


def tune_model(
    config: TuneConfig,
    progress: Progress | None = None,
    trials: "TrialProgress | None" = None,
) -> Tuned:
    """Searches for better choices for the kernels of a model, and adds them to a database.

    Whatever ends it, the database holds what was found until then, and the same call goes on.

    Raises:
        UserError: something in `config` that cannot be.
        DeviceError: the device cannot be used.
    """
    progress = progress or SilentProgress()
    target = find_target(config.target)
    if isinstance(target, ModelFormat):
        raise UserError(f"{target.name} is a model format: its runtime chooses its own kernels")
    compilation = CompileConfig(
        model=config.model,
        target=config.target,
        precision=config.precision,
        image_size=config.image_size,
        num_classes=config.num_classes,
        keep_ratio=config.keep_ratio,
        batch=config.batch,
        seed=config.seed,
    )
    check_config(compilation)
    # Heavy, and a mistake in the arguments should be answered before.
    from gfcompile.compile.emitters.tvm import program_of
    from gfcompile.targets.tvm.tuning.builders import Builders
    from gfcompile.targets.tvm.tuning.database import Database, load
    from gfcompile.targets.tvm.tuning.devices import one_level, open_runner
    from gfcompile.targets.tvm.tuning.tasks import tasks
    from gfcompile.targets.tvm.tuning.tuner import SilentTrials, Tuner

    database = load(config.path) if config.path.exists() else Database()
    level = one_level(target, float16=config.precision == "float16")
    with (
        open_runner(config.device, level) as runner,
        Builders(len(os.sched_getaffinity(0))) as builders,
    ):
        with open_cache(note=progress.note) as cache:
            graph = lowered_graph(compilation, cache, progress)
        calls = _MEASURED_CALLS if runner.how == "measured" else 1
        found = tasks(program_of(graph, config.precision, target), level, calls=calls)
        if not found:
            raise UserError(f"{config.model} on {target.name} has no kernel that leaves a choice")
        tuner = Tuner(
            found,
            runner,
            path=config.path,
            database=database,
            builders=builders,
            progress=trials or SilentTrials(),
            seed=config.seed,
        )
        findings = tuner.run(_budget(config))
    database.save(config.path)
    total = sum(f.uses * f.default_cost for f in findings)
    return Tuned(
        path=config.path,
        how=runner.how,
        device=runner.device,
        findings=findings,
        ratio=sum(f.uses * f.default_cost * f.ratio for f in findings) / total,
    )


def _budget(config: TuneConfig) -> "Budget":
    from gfcompile.targets.tvm.tuning.tuner import Budget

    if config.trials is None and config.minutes is None:
        return Budget(trials=DEFAULT_TRIALS)
    seconds = None if config.minutes is None else 60 * config.minutes
    return Budget(trials=config.trials, seconds=seconds)
