"""How far each stage's numbers are from the stage before, and whether that is close enough."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.errors import CompileError
from gfcompile.runtime.exactness import max_abs_error, sqnr_db, top1_agreement

Array = npt.NDArray[Any]

# What an int8 artifact may differ by from its QDQ graph. ONNX Runtime sums float products where
# the artifact sums integers, so a value that lies on a rounding tie may fall to either side.
MIN_EQUAL_ACTIVATIONS = 0.99
MAX_ACTIVATION_STEPS = 1
MAX_LOGIT_STEPS = 2.0
MEAN_LOGIT_STEPS = 0.5
# A deep graph carries a tie that fell to the other side further than that. How far is told by other
# evaluations in ONNX Runtime, see `spread`: the artifact is one more, and two of them may lie on
# opposite sides of the graph as it is written.
SPREAD = 2.0


@dataclass(frozen=True, kw_only=True)
class Int8Agreement:
    """An int8 artifact against its QDQ graph.

    Activations are compared kernel by kernel: the graph computes each from the artifact's own
    inputs of that kernel. End to end, a rounding tie that falls to the other side moves an
    activation by a whole step, which moves others after it: ONNX Runtime with and without its
    optimizations agrees on 78% of gfnet_xs's activations, so that figure says nothing.

    Attributes:
        tensors, values: how many int8 activations were compared.
        equal: the fraction of them that are equal.
        max_steps: the largest difference of two activations, in steps of their scale.
        logits_max_steps, logits_mean_steps: difference of logits, end to end, in steps of
            `logits_step`, the scale of the activation that the last product reads.
        own_max_steps, own_mean_steps: the same between evaluations of the graph itself, the
            furthest of them; 0 where it was not needed.
        logits_limit: what logits may differ by, in steps, where that does not tell it.
    """

    tensors: int
    values: int
    equal: float
    max_steps: int
    logits_step: float
    logits_max_steps: float
    logits_mean_steps: float
    own_max_steps: float = 0.0
    own_mean_steps: float = 0.0
    logits_limit: float = MAX_LOGIT_STEPS

    @property
    def logits_agree(self) -> bool:
        """Whether the logits are as close as rounding ties leave them."""
        mean_limit = MEAN_LOGIT_STEPS / MAX_LOGIT_STEPS * self.logits_limit
        return self.logits_max_steps <= self.logits_margin and self.logits_mean_steps <= max(
            mean_limit, SPREAD * self.own_mean_steps
        )

    @property
    def logits_margin(self) -> float:
        """How many steps a logit may have moved."""
        return max(self.logits_limit, SPREAD * self.own_max_steps)

    def with_own_spread(
        self, reference: Sequence[Array], others: Iterable[Sequence[Array]]
    ) -> "Int8Agreement":
        """This, knowing the logits of other evaluations of the graph itself."""
        logits = np.concatenate(reference)
        steps = [np.abs(np.concatenate(other) - logits) / self.logits_step for other in others]
        return replace(
            self,
            own_max_steps=max(float(values.max()) for values in steps),
            own_mean_steps=max(float(values.mean()) for values in steps),
        )


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One stage against the stage before, over the golden inputs.

    Attributes:
        stage, against: their names.
        images: how many were compared.
        how: where the stage's numbers were computed.
        tolerance: what `max_abs_error` may be, where a bound applies.
        tokens_kept: of a pruning model, the share of kept patches in common, per pruning stage.
            A score on the edge may fall to either side, and another patch is kept.
    """

    stage: str
    against: str
    images: int
    max_abs_error: float
    sqnr_db: float
    top1_agreement: float
    how: str
    tolerance: float | None = None
    int8: Int8Agreement | None = None
    tokens_kept: tuple[float, ...] = ()

    def to_dict(self) -> Mapping[str, Any]:
        """JSON values; equal arrays have an SQNR without bound, written as null."""
        values = asdict(self)
        if not math.isfinite(self.sqnr_db):
            values["sqnr_db"] = None
        return values


def compare(
    stage: str,
    against: str,
    reference: Sequence[Array],
    actual: Sequence[Array],
    *,
    how: str,
    tolerance: float | None = None,
    int8: Int8Agreement | None = None,
    tokens_kept: tuple[float, ...] = (),
) -> LedgerEntry:
    """The entry for the logits of each image, `reference` being those of the stage before."""
    wanted, got = np.concatenate(reference), np.concatenate(actual)
    return LedgerEntry(
        stage=stage,
        against=against,
        images=len(wanted),
        max_abs_error=max_abs_error(wanted, got),
        sqnr_db=sqnr_db(wanted, got),
        top1_agreement=top1_agreement(wanted, got),
        how=how,
        tolerance=tolerance,
        int8=int8,
        tokens_kept=tokens_kept,
    )


def compare_int8(
    reference: Sequence[Mapping[str, Array]],
    actual: Sequence[Mapping[str, Array]],
    reference_logits: Sequence[Array],
    actual_logits: Sequence[Array],
    *,
    logits_step: float,
    logits_limit: float = MAX_LOGIT_STEPS,
) -> Int8Agreement:
    """Agreement of an artifact with its QDQ graph over the images of both sequences.

    Args:
        reference, actual: per image, int8 activations by name: what the graph makes of the
            artifact's inputs, and what the artifact made of them.
        reference_logits, actual_logits: per image, end to end.
        logits_step, logits_limit: see `Int8Agreement`.
    """
    values = unequal = max_steps = 0
    names: set[str] = set()
    for wanted, got in zip(reference, actual, strict=True):
        assert wanted.keys() == got.keys()
        for name in wanted:
            difference = np.abs(wanted[name].astype(np.int16) - got[name].astype(np.int16))
            values += difference.size
            unequal += int(np.count_nonzero(difference))
            max_steps = max(max_steps, int(difference.max()))
            names.add(name)
    logits, other = np.concatenate(reference_logits), np.concatenate(actual_logits)
    steps = np.abs(logits - other) / logits_step
    return Int8Agreement(
        tensors=len(names),
        values=values,
        equal=1.0 - unequal / values if values else 1.0,
        max_steps=max_steps,
        logits_step=logits_step,
        logits_max_steps=float(steps.max()),
        logits_mean_steps=float(steps.mean()),
        logits_limit=logits_limit,
    )


def demand(
    entry: LedgerEntry,
    reference: Sequence[Array],
    actual: Sequence[Array],
    *,
    min_equal: float = MIN_EQUAL_ACTIVATIONS,
) -> None:
    """Checks that an artifact computes what its graph says.

    Where another patch was kept, logits are those of other patches, and only what each kernel
    computed is held against the graph.

    Args:
        min_equal: the share of int8 activations that must be equal.

    Raises:
        CompileError: it is further from it than rounding explains.
    """
    same_tokens = all(share == 1.0 for share in entry.tokens_kept)
    what = f"the compiled artifact ({entry.how}) differs from its graph"
    if entry.int8 is None:
        assert entry.tolerance is not None
        if same_tokens and not entry.max_abs_error <= entry.tolerance:
            raise CompileError(
                f"{what} by {entry.max_abs_error:.3g}, float rounding explains "
                f"{entry.tolerance:.3g}; please report this"
            )
        margin = entry.tolerance
    else:
        int8 = entry.int8
        if int8.equal < min_equal or int8.max_steps > MAX_ACTIVATION_STEPS:
            raise CompileError(
                f"{what}: {int8.equal:.2%} of {int8.values} int8 activations are equal and the "
                f"worst is {int8.max_steps} steps off; please report this"
            )
        if same_tokens and not int8.logits_agree:
            raise CompileError(
                f"{what} by {int8.logits_max_steps:.2f} int8 steps at the logits "
                f"({int8.logits_mean_steps:.2f} on average); please report this"
            )
        margin = int8.logits_step * int8.logits_margin
    if not same_tokens:
        return
    for wanted, got in zip(np.concatenate(reference), np.concatenate(actual), strict=True):
        best, second = np.sort(wanted)[-1:-3:-1] if wanted.size > 1 else (wanted[0], -np.inf)
        # Each of the two may have moved by the margin.
        if best - second > 2 * margin and wanted.argmax() != got.argmax():
            raise CompileError(f"{what}: another class wins; please report this")
