"""Whether a validation met what was demanded of it."""

from dataclasses import replace
from pathlib import Path

from gfcompile.runtime.errors import UserError
from gfcompile.runtime.results import (
    Budget,
    Latencies,
    Numbers,
    ValidationResult,
    Verdict,
    history,
    read_result,
)


def judge(budget: Budget, numbers: Numbers | None, latencies: Latencies | None) -> Verdict:
    """The verdict, with a line for each demand."""
    checks = [*_judge_numbers(budget, numbers), *_judge_latency(budget, latencies)]
    return Verdict(
        passed=all(met for met, _ in checks),
        reasons=tuple(f"{'met' if met else 'MISSED'}: {text}" for met, text in checks),
        latency_us=None if latencies is None else latencies.at(budget.percentile),
    )


def _judge_numbers(budget: Budget, numbers: Numbers | None) -> list[tuple[bool, str]]:
    if numbers is None:
        return [(budget.min_agreement is None, "the numbers were not checked")]
    checks = []
    if numbers.tolerance is not None or numbers.max_abs_error is None:
        error = "not finite" if numbers.max_abs_error is None else f"{numbers.max_abs_error:.3g}"
        bound = "" if numbers.tolerance is None else f", {numbers.tolerance:.3g} is allowed"
        checks.append((numbers.within, f"largest error of a logit {error}{bound}"))
    if budget.min_agreement is not None:
        agreement = numbers.top1_agreement or 0.0
        checks.append(
            (
                agreement >= budget.min_agreement,
                f"same class for {agreement:.1%} of {numbers.inferences} images, "
                f"{budget.min_agreement:.1%} is wanted",
            )
        )
    return checks


def _judge_latency(budget: Budget, latencies: Latencies | None) -> list[tuple[bool, str]]:
    if latencies is None:
        return []
    checks = []
    latency_us = latencies.at(budget.percentile)
    shown = f"p{budget.percentile:g} {latency_us / 1e3:.3f} ms"
    if budget.max_latency_ms is not None:
        checks.append(
            (
                latency_us <= 1e3 * budget.max_latency_ms,
                f"{shown}, {budget.max_latency_ms:g} ms is the budget",
            )
        )
    if budget.against_us is not None and budget.max_regression is not None:
        ratio = latency_us / budget.against_us
        checks.append(
            (
                ratio <= 1 + budget.max_regression,
                f"{shown}, {ratio:.3f} times that of {budget.against}, "
                f"{1 + budget.max_regression:.3f} times is allowed",
            )
        )
    return checks


def compared_with(
    budget: Budget, against: str, bundle: Path, *, device: str, threads: int, batch: int
) -> Budget:
    """The budget, with the latency of an earlier result to compare with.

    Args:
        against: a result file, or "last" for the newest of this bundle on this device with as many
            threads and images; the budget is unchanged if there is none yet.

    Raises:
        UserError: the file is no result, or has no latency.
    """
    if against != "last":
        path = Path(against)
        earlier = read_result(path)
        if earlier.bundle.batch != batch:
            raise UserError(
                f"{path} has times of {earlier.bundle.batch} images at once, this bundle takes "
                f"{batch}"
            )
        return _with_reference(budget, earlier, path)
    for path in reversed(history(bundle)):
        earlier = read_result(path)
        same = earlier.protocol is not None and earlier.protocol.threads == threads
        if same and earlier.device.url == device and earlier.bundle.batch == batch:
            return _with_reference(budget, earlier, path)
    return budget


def _with_reference(budget: Budget, earlier: ValidationResult, path: Path) -> Budget:
    if earlier.latencies is None:
        raise UserError(f"{path} has no latency to compare with")
    reference = earlier.latencies.at(budget.percentile)
    return replace(budget, against=path.name, against_us=reference)
