"""MetaSchedule's space for functions that Relax lowered, searched by MetaSchedule as well.

Its evolutionary search is asked for candidates and told what they cost; who builds and measures
them, it need not know. The cost model learns from measurements where xgboost is installed (the
package `xgboost-cpu`: plain `xgboost` drags in CUDA libraries), and guesses where it is not.
"""

import importlib.util
import json
from typing import Any

import tvm
from tvm import s_tir
from tvm.s_tir import dlight
from tvm.s_tir import meta_schedule as ms

from gfcompile.targets.tvm.choices import Choice
from gfcompile.targets.tvm.emit import llvm_target
from gfcompile.targets.tvm.kernel import Generic
from gfcompile.targets.tvm.schedules.generic import GeneratedSchedule
from gfcompile.targets.tvm.tuning.proposals import Tried
from gfcompile.targets.tvm.tuning.tasks import Task

_MOST_TRIALS = 1000
_PER_ROUND = 8
# Smaller than TVM's own, which take a minute of a small machine before the first candidate.
_POPULATION, _GENERATIONS, _FRESH = 128, 3, 24


def reduces(func: Any) -> bool:
    """Whether a TIR function sums something up: the others only move data."""
    blocks = dlight.normalize_prim_func(s_tir.Schedule(func))
    return any(it.kind == "R" for block in blocks or () for it in block.iters)


class GeneratedProposer:
    """Asks MetaSchedule.

    Args:
        seed: of its random numbers, positive.
    """

    def __init__(self, task: Task, seed: int) -> None:
        assert isinstance(task.kernel, Generic)
        self._target = llvm_target(task.target.cpu)
        self._context = ms.TuneContext(
            mod=task.kernel.func,
            target=self._target,
            space_generator="post-order-apply",
            search_strategy=ms.search_strategy.EvolutionarySearch(
                population_size=_POPULATION,
                init_min_unmeasured=_FRESH,
                genetic_num_iters=_GENERATIONS,
            ),
            num_threads=1,
            rand_state=seed,
        )
        self._database = ms.Database.create("memory")
        self._workload = self._database.commit_workload(self._context.mod)
        self._model = _cost_model()
        self._asked: dict[Choice, ms.MeasureCandidate] = {}
        self._context.pre_tuning(
            _MOST_TRIALS,
            _PER_ROUND,
            design_spaces=self._context.generate_design_space(),
            database=self._database,
            cost_model=self._model,
        )

    def propose(self, count: int, tried: Tried) -> list[Choice]:
        candidates = self._context.generate_measure_candidates()
        # What an earlier search tried is told at once, as everything has to be that was asked for.
        made: dict[Choice, ms.MeasureCandidate] = {
            _choice(candidate): candidate for candidate in candidates or ()
        }
        self._asked = made
        known = {choice: tried[choice] for choice in made if choice in tried}
        new = [choice for choice in made if choice not in tried]
        if known and not new:
            self.learn(known)
            return self.propose(count, tried)
        return new[: max(count, 1)]

    def learn(self, results: Tried) -> None:
        candidates = list(self._asked.values())
        if not candidates:
            return
        told = []
        for choice, candidate in self._asked.items():
            cost = results.get(choice)
            if cost is None:
                told.append(ms.runner.RunnerResult(None, "failed"))
                continue
            seconds = [cost]  # it wants times: the default takes 1 s
            told.append(ms.runner.RunnerResult(seconds, None))
            record = ms.database.TuningRecord(
                candidate.sch.trace, self._workload, seconds, self._target, candidate.args_info
            )
            self._database.commit_tuning_record(record)
        self._model.update(self._context, candidates, told)
        self._context.notify_runner_results(candidates, told)
        self._asked = {}


def _choice(candidate: Any) -> GeneratedSchedule:
    trace = candidate.sch.trace.as_json()
    return GeneratedSchedule(trace=json.dumps(trace, default=_plain, separators=(",", ":")))


def _plain(value: Any) -> object:
    """TVM's own numbers and arrays as JSON has them."""
    if isinstance(value, tvm.tirx.IntImm):
        return int(value.value)
    if isinstance(value, tvm.tirx.FloatImm):
        return float(value.value)
    return list(value)


def _cost_model() -> Any:
    if importlib.util.find_spec("xgboost") is None:
        return ms.CostModel.create("random")
    return ms.CostModel.create("xgb", num_tuning_cores=1, tree_method="auto")
