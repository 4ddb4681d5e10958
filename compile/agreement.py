"""What a graph makes of the values that an artifact computed, and what the two have in common."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.compile.emission import Pruning
from gfcompile.compile.ledger import LedgerEntry
from gfcompile.compile.trace import INPUT, OUTPUT, session
from gfcompile.runtime.kept_patches import overlap, places_in_grid
from gfcompile.targets.onnx_values import dtype_of, shape_of

Array = npt.NDArray[Any]


def recompute(
    model: ir.Model, traces: Sequence[Mapping[str, Array]], images: Sequence[Array]
) -> list[dict[str, Array]]:
    """The int8 activations that the graph computes, each from what the artifact had before it.

    The graph is cut at every value that the artifact wrote: what follows reads the artifact's.
    The arrays come in the shapes of `traces`.
    """
    outputs = {value.name for value in model.graph.outputs}
    cut, given = _cut(model, [name for name in traces[0] if name not in outputs])
    computed_here = [value for value in given.values() if dtype_of(value) == "int8"]
    cut.graph.outputs.extend(computed_here)
    names = [str(value.name) for value in computed_here]
    runner = session(cut)
    results = []
    for trace, image in zip(traces, images, strict=True):
        computed = runner.run(names, _feeds(given, trace, image))
        results.append(
            {
                name: np.asarray(array).reshape(trace[name].shape)
                for name, array in zip(names, computed, strict=True)
            }
        )
    return results


def run_given(
    model: ir.Model,
    given: Sequence[Mapping[str, Array]],
    images: Sequence[Array],
    *,
    optimize: bool = False,
) -> list[Array]:
    """The logits that the graph gives to each image if these of its values were as given."""
    cut, replaced = _cut(model, given[0])
    runner = session(cut, optimize=optimize)
    results = []
    for values, image in zip(given, images, strict=True):
        results.append(np.asarray(runner.run([OUTPUT], _feeds(replaced, values, image))[0]))
    return results


def _cut(model: ir.Model, names: Iterable[str]) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A copy in which what follows these values reads inputs in their place; and the values."""
    wanted, cut = set(names), model.clone()
    given = {}
    for value in [output for node in cut.graph for output in node.outputs]:
        if value.name in wanted:
            source = ir.Value(name=f"{value.name}/given", shape=value.shape, type=value.type)
            value.replace_all_uses_with(source)
            cut.graph.inputs.append(source)
            given[str(value.name)] = value
    return cut, given


def _feeds(
    given: Mapping[str, ir.Value], values: Mapping[str, Array], image: Array
) -> dict[str, Array]:
    """The inputs of a graph that was cut at `given`, of which `values` may have another shape."""
    feeds = {f"{name}/given": values[name].reshape(shape_of(v)) for name, v in given.items()}
    return {INPUT: image, **feeds}


def run_with_ties_of(
    model: ir.Model,
    wanted: Sequence[Mapping[str, Array]],
    got: Sequence[Mapping[str, Array]],
    images: Sequence[Array],
) -> list[Array]:
    """The graph's logits where its activations are an artifact's, as far as those were unequal.

    Args:
        wanted: what `recompute` made of the artifact's values.
        got: those values.
    """
    unequal = [
        name
        for name in wanted[0]
        if any(not np.array_equal(a[name], b[name]) for a, b in zip(wanted, got, strict=True))
    ]
    return run_given(model, [{name: values[name] for name in unequal} for values in got], images)


def patches_in_common(
    model: ir.Model,
    names: Sequence[str],
    chosen: Sequence[Sequence[Array]],
    images: Sequence[Array],
    pruning: Pruning,
) -> tuple[float, ...]:
    """The share of the patches that `model` keeps which an artifact has chosen too, per stage.

    Args:
        names: the values of the graph that say which patches stay.
        chosen: for each image, what the artifact has for these values.
    """
    watched = model.clone()
    for value in [output for node in watched.graph for output in node.outputs]:
        if value.name in names:
            watched.graph.outputs.append(value)
    runner = session(watched)
    shares = []
    for got, image in zip(chosen, images, strict=True):
        wanted = [np.asarray(array) for array in runner.run(list(names), {INPUT: image})]
        places = (
            places_in_grid(places, pruning.kept, chosen_anew=pruning.chosen_anew)
            for places in (wanted, got)
        )
        shares.append([overlap(a, b) for a, b in zip(*places, strict=True)])
    return tuple(float(share) for share in np.mean(shares, axis=0))


def notes_on(entry: LedgerEntry) -> list[str]:
    """What is to be told of an artifact: that it keeps other patches, that its graph is fragile."""
    notes = []
    if any(share < 1.0 for share in entry.tokens_kept):
        shares = ", ".join(f"{share:.1%}" for share in entry.tokens_kept)
        notes.append(f"of the patches that its graph keeps, the artifact keeps {shares} per stage")
    if entry.int8 is not None and entry.int8.own_max_steps > entry.int8.logits_limit:
        notes.append(
            "rounding ties alone move the logits of this int8 graph by up to "
            f"{entry.int8.own_max_steps:.1f} steps; training for int8 (--train-data) or "
            "--keep-float auto:K would make it steadier"
        )
    return notes
