"""The report as text: well-formed, the same every time, and unmoved by hostile bundles."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report_cases as cases
from html_reader import Reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gfcompile.runtime.bundle import FileEntry
from gfcompile.runtime.report import render_report, write_report
from gfcompile.runtime.report.charts import ticks
from gfcompile.runtime.report.html import duration, el, percent, significant, size
from gfcompile.runtime.report.kernels import kernels_of
from gfcompile.runtime.results import Latencies, Verdict

HOSTILE = "<script>alert(1)</script>\" onload='x' \x00\u202e&amp;" + "y" * 5000


def read(*args: Any, **kwargs: Any) -> Reader:
    return Reader(render_report(*args, **kwargs))


def test_the_verdict_comes_first_and_the_headline_numbers_after_it() -> None:
    text = read(cases.manifest(), cases.result(), picture=cases.picture()).text
    order = ["gfnet_xs, int8, on Raspberry Pi 4", "Passed", "Latency, p90", "Distribution"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    times = Latencies.of(cases.samples())
    for us in (times.min_us, times.median_us, times.p90_us, times.p99_us, times.max_us):
        assert duration(us) in text


def test_what_the_issue_wants_is_there() -> None:
    text = read(cases.manifest(), cases.result(), picture=cases.picture()).text
    for part in (
        "Over time", "Where the time goes", "Spearman", "Exactness", "Layers in int8",
        "near-ties flip tokens", "separable real DFT", "tabby cat", "stage 2: 3 of 16",
        "under-voltage", "ondemand", "sudo cpupower", "gfcompile validate gfnet_xs", "2.13.0+cpu",
        "17.2\N{NO-BREAK SPACE}MB", "43.6\N{NO-BREAK SPACE}dB",
    ):  # fmt: skip
        assert part in text, part


def test_without_a_measurement_nothing_is_called_one() -> None:
    text = read(cases.manifest()).text
    assert "Not measured" in text
    assert "Estimate, not measured" in text
    assert "Where the time would go" in text
    for part in ("Passed", "Failed", "Distribution", "Median", "The board"):
        assert part not in text, part


def test_no_latency_says_why() -> None:
    emulated = cases.result(
        latencies=None, protocol=None, kernels=(), no_latency="QEMU shows what", instructions=10**9
    )
    text = read(cases.manifest(), emulated).text
    assert "QEMU shows what" in text
    assert "1,000\N{NO-BREAK SPACE}M" in text
    assert "Distribution" not in text


def test_a_failed_validation_says_so_in_words() -> None:
    failed = cases.result(verdict=Verdict(passed=False, reasons=("MISSED: p90 15 ms",)))
    text = read(cases.manifest(), failed).text
    assert "Failed" in text
    assert "MISSED: p90 15 ms" in text


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, cases.manifest(), cases.result(), picture=cases.picture())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs() -> None:
    text = render_report(cases.manifest(), cases.result(), picture=cases.picture())
    reader = Reader(text)
    assert not reader.names() & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for name, attributes in reader.elements:
        for key, value in attributes.items():
            assert not key.startswith("on"), (name, key)
            if key in ("src", "href", "xlink:href"):
                assert str(value).startswith(("data:image/jpeg;base64,", "#")), value
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_each_chart_says_what_it_shows() -> None:
    reader = read(cases.manifest(), cases.result(), picture=cases.picture())
    drawings = [attributes for name, attributes in reader.elements if name == "svg"]
    assert len(drawings) > 20
    for attributes in drawings:
        assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")


def test_texts_of_a_bundle_are_text() -> None:
    hostile = cases.manifest(
        model=HOSTILE, weights=HOSTILE, notes=(HOSTILE,), versions={HOSTILE: HOSTILE},
        ledger=({"stage": HOSTILE, "against": HOSTILE, "how": HOSTILE},),
        filters=({"name": HOSTILE, "form": HOSTILE, "h": HOSTILE},),
        kernels=({"name": HOSTILE, "calls": 2, "flops": 5, "bytes": 5},),
    )  # fmt: skip
    device = replace(cases.result().device, name=HOSTILE, versions={HOSTILE: HOSTILE})
    reader = read(hostile, cases.result(device=device, commands=(HOSTILE,)))
    assert "script" not in reader.names()
    assert not any(key.startswith("on") for _, attrs in reader.elements for key in attrs)
    assert "<script>alert(1)</script>" in reader.text  # to be read, not to be run
    assert "\x00" not in reader.text
    assert "\u202e" not in reader.text
    assert "y" * 3000 not in reader.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "name",
                    "calls",
                    "flops",
                    "bytes",
                    "issue_us",
                    "stage",
                    "max_abs_error",
                    "int8",
                    "equal",
                    "values",
                    "tokens_kept",
                    "h",
                    "form",
                    "activation_sqnr_db",
                    "reason",
                    "float32_gflops",
                    "bandwidth_gb_s",
                    "cores",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
lists = st.lists(json_values, max_size=3)
extras = st.dictionaries(
    st.sampled_from(["peaks", "layers", "kept_float", "arena_bytes", "pruning"]), json_values
)
core = st.dictionaries(
    st.sampled_from(["model", "target", "weights", "created_by", "versions", "device", "arch"]),
    json_values,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lists, lists, lists, lists, extras, core, json_values)
def test_a_manifest_of_anything_makes_a_page(
    ledger: list[Any],
    filters: list[Any],
    kernels: list[Any],
    notes: list[Any],
    extra: Any,
    core: Any,
    size: Any,
) -> None:
    made = cases.manifest(
        files={"weights.bin": FileEntry(sha256="", size_bytes=size)},
        ledger=tuple(ledger),
        filters=tuple(filters),
        kernels=tuple(kernels),
        notes=tuple(notes),
        extra=extra,
        **core,
    )
    read(made)
    read(made, cases.result())


def test_absurd_figures_are_drawn_as_nothing() -> None:
    times = Latencies.of([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e100])
    assert "make no sense" in read(cases.manifest(), cases.result(latencies=times)).text
    broken = replace(cases.result().latencies or times, median_us=float("inf"))
    assert "make no sense" in read(cases.manifest(), cases.result(latencies=broken)).text
    same = Latencies.of([0.0] * 20)
    read(cases.manifest(), cases.result(latencies=same))
    few = Latencies.of([3.0, 1e9])
    read(cases.manifest(), cases.result(latencies=few))
    vast = {"name": "dense", "calls": 10**400, "flops": 10**400, "bytes": 10**400}
    read(cases.manifest(kernels=(vast, {**vast, "calls": 1})))
    peaks = {**cases.manifest().extra["peaks"], "int8_gops": 0.0}
    assert kernels_of(cases.manifest(extra={"peaks": peaks}), None).estimate_us is None


def test_estimates_come_from_the_manifest_and_scale_with_threads() -> None:
    one = kernels_of(cases.manifest(), None)
    assert one.estimate_us is not None
    dense = next(k for k in one.all if k.name.startswith("dense"))
    assert dense.estimate is not None
    # 231 MOP at 28.8 GOP/s are longer than the instructions' 467 us.
    assert dense.estimate.us == pytest.approx(231_211_008 / 28.8e3, rel=1e-6)
    protocol = cases.result().protocol
    assert protocol is not None
    four = kernels_of(cases.manifest(), cases.result(protocol=replace(protocol, threads=4)))
    again = next(k for k in four.all if k.name == dense.name)
    assert again.estimate is not None
    assert again.estimate.us == pytest.approx(dense.estimate.us / 4)
    assert four.rank_correlation == pytest.approx(1.0, abs=0.3)


def test_a_result_from_json_makes_the_same_page() -> None:
    original = cases.result()
    again = type(original).from_dict(json.loads(json.dumps(original.to_dict())))
    assert render_report(cases.manifest(), again) == render_report(cases.manifest(), original)


def test_figures_for_people() -> None:
    space = "\N{NO-BREAK SPACE}"
    assert [significant(x) for x in (0, 9.714, 97.14, 1234.5, 0.00123)] == [
        "0", "9.71", "97.1", "1,234", "0.00123",
    ]  # fmt: skip
    assert duration(1234) == f"1.23{space}ms"
    assert duration(12.34) == f"12.3{space}µs"
    assert size(17_700_000) == f"17.7{space}MB"
    assert percent(0.9999) == "99.9%"
    assert percent(0.0001) == "<1%"
    assert percent(1.0) == "100%"


def test_an_element_escapes_its_text_and_attributes() -> None:
    assert el("p", "a < b & c", class_='"x"') == '<p class="&quot;x&quot;">a &lt; b &amp; c</p>'


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert len(found) <= 6
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in found)
