"""The state of the device."""

from gfcompile.runtime.report.html import NONE, Content, Html, el, join, megabytes, size
from gfcompile.runtime.report.sections.blocks import pairs, section, table
from gfcompile.runtime.results import BoardState, ValidationResult


def board(result: ValidationResult | None) -> Html | None:
    """The state of the device, which is a part of any number taken on it."""
    if result is None:
        return None
    device = result.device
    rows: list[list[Content]] = [
        ["device", device.url],
        ["name", device.name],
        ["CPU", device.cpu_model or device.arch],
        ["runs on", device.processor or NONE],
        ["memory", megabytes(device.memory_mb)],
    ]
    rows += [[name, version] for name, version in sorted(device.versions.items())]
    states = (device.before, device.after)
    compared = _states(*states) if any(states) else None
    throttled = device.after is not None and bool(device.after.throttling)
    lead = f"{device.name}, {device.kind}"
    if throttled:
        lead += "; it says that it was slowed down"
    return section("The board", lead + ".", pairs(row for row in rows if row[1] != NONE), compared)


def _states(before: BoardState | None, after: BoardState | None) -> Html | None:
    names: dict[str, list[str]] = {}
    for i, state in enumerate((before, after)):
        for name, value in () if state is None else _state_rows(state):
            names.setdefault(name, [NONE, NONE])[i] = value
    if not names:
        return None
    rows = [[name, *values] for name, values in names.items()]
    return join(
        el("h3", "Its state, before and after the runs"),
        table(("what", "before", "after"), rows),
    )


def _state_rows(state: BoardState) -> list[tuple[str, str]]:
    rows = []
    clocks = [core.mhz for core in state.cores if core.mhz is not None]
    if clocks:
        low, high = min(clocks), max(clocks)
        shown = f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"
        rows.append(("CPU clock, MHz", shown))
    limits = [core.max_mhz for core in state.cores if core.max_mhz is not None]
    if limits:
        rows.append(("highest clock, MHz", f"{max(limits):,.0f}"))
    governors = sorted({core.governor for core in state.cores if core.governor})
    if governors:
        rows.append(("governor", ", ".join(governors)))
    rows += [(f"{name}, MHz", f"{mhz:,.0f}") for name, mhz in sorted(state.clocks_mhz.items())]
    if state.power_mode:
        rows.append(("power mode", state.power_mode))
    rows += [(f"{name}, °C", f"{c:.1f}") for name, c in sorted(state.temperatures_c.items())]
    rows.append(("throttling", "; ".join(state.throttling) or "none seen"))
    rows += [
        (f"events of {name}", f"{count:,}") for name, count in sorted(state.throttle_events.items())
    ]
    if state.load_1min is not None:
        rows.append(("load, 1 minute", f"{state.load_1min:.2f}"))
    if state.memory_free_mb is not None:
        rows.append(("memory free", size(1e6 * state.memory_free_mb)))
    if state.others:
        rows.append(("other programs", "; ".join(state.others[:5])))
    return rows
