"""What dropping patches gains on a target over the parent that drops none: always an estimate.

It comes from what is known without building either model: operations at the target's peak, weights
at its bandwidth, and what a pruned model has besides, the float predictors and their kernels.
`benchmarks/pruning.py` measures.
"""

import math

from gfcompile.compile.models.predictor_specs import PRUNED_STAGE, predictor_macs, predictor_shapes
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.runtime.roofline import Peaks
from gfcompile.targets.target import AnyTarget, Target, peaks

WORTH_WHILE = 1.05  # less is lost in what an estimate does not know

_BLOCK_KERNELS = 7  # two norms, four products, attention
_STAGE_KERNELS = 12  # of a pruning stage: norm, products, mean and slices, selection, rows


def estimated_gain(spec: ModelSpec, parent: ModelSpec, at: Peaks, *, int8: bool) -> float:
    """How many times as fast as `parent` the pruned `spec` is, on one thread, as an estimate."""
    return _time_us(parent, at, int8=int8) / _time_us(spec, at, int8=int8)


def note_on_gain(spec: ModelSpec, parent: ModelSpec, target: AnyTarget, *, int8: bool) -> str:
    """What the terminal says of a pruned model: whether it pays on `target`."""
    share = f"{spec.macs / parent.macs:.0%} of {parent.name}'s multiply-accumulates"
    if not isinstance(target, Target):
        return f"dropping patches leaves {share}; what that gains is up to the runtime, no estimate"
    gain = estimated_gain(spec, parent, peaks(target), int8=int8)
    if gain < WORTH_WHILE:
        return (
            f"dropping patches does not pay on {target.name}: with {share}, an estimated "
            f"{gain:.2f} times {parent.name}'s speed; take that model, or a lower --keep-ratio"
        )
    return (
        f"dropping patches leaves {share}: an estimated {gain:.2f} times its speed, from the "
        "target's peaks, not measured"
    )


def _time_us(spec: ModelSpec, at: Peaks, *, int8: bool) -> float:
    stages = _predicted_patches(spec)
    dim = spec.dims[min(PRUNED_STAGE, len(spec.dims) - 1)]
    of_one = sum(math.prod(shape) for shape in predictor_shapes("", dim).values())
    float_macs = sum(predictor_macs(dim, patches) for patches in stages)
    float_parameters = of_one * len(stages)
    parameters = spec.parameters - of_one * len(spec.prune_before)
    main_us, _ = at.least_us(
        2 * (spec.macs - float_macs),
        parameters * (1 if int8 else 4),
        "int8" if int8 else "float32",
        threads=1,
    )
    predictors_us, _ = at.least_us(2 * float_macs, 4 * float_parameters, "float32", threads=1)
    kernels = _BLOCK_KERNELS * sum(spec.depths) + _STAGE_KERNELS * len(stages)
    return main_us + predictors_us + kernels * at.call_us


def _predicted_patches(spec: ModelSpec) -> list[int]:
    """How many patches each predictor judges that has any to drop."""
    patches, judged = spec.prunable_patches, []
    for kept in spec.kept_patches:
        if kept < patches:
            judged.append(patches)
            patches = patches if spec.chooses_anew else kept
    return judged
