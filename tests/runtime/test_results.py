"""Result files: whole through JSON, checked when read."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfcompile.runtime import results
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.records import from_json, to_json


def example_result() -> results.ValidationResult:
    state = results.BoardState(
        cores=(results.CoreState(index=0, mhz=1500.0, max_mhz=1800.0, governor="powersave"),),
        temperatures_c={"cpu-thermal": 54.5},
        throttling=("arm frequency capped",),
        power_mode="MODE_5W",
        load_1min=0.3,
    )
    return results.ValidationResult(
        date="2026-11-21T11:00:00+00:00",
        bundle=results.BundleIdentity(
            name="gfnet_xs-raspberry-pi-4-int8",
            model="gfnet_xs",
            target="raspberry-pi-4",
            kind="gfrt",
            requested="int8",
            storage="int8 products, float16 filters",
            compute="int8",
            weights="random (seed 0)",
            arch="aarch64",
            size_bytes=17_000_000,
            manifest_sha256="0" * 64,
        ),
        device=results.DeviceReport(
            url="ssh://pi@board",
            kind="ssh",
            name="board",
            arch="aarch64",
            versions={"kernel": "6.1"},
            before=state,
            after=replace(state, throttle_events={"cpu0": 3}),
        ),
        budget=results.Budget(max_latency_ms=20.0),
        verdict=results.Verdict(passed=False, reasons=("p90 21.00 ms is over 20 ms",)),
        numbers=results.Numbers(
            reference="golden",
            inferences=8,
            top1_agreement=1.0,
            max_abs_error=None,
            sqnr_db=None,
            tolerance=0.1,
            within=False,
        ),
        protocol=results.Protocol(
            tool="gfbench 1.0",
            rule="runs",
            timer=results.TIMER_WHOLE,
            threads=4,
            pinned_cpus=(0, 1),
            warmup="until stable",
            warmup_runs=12,
            stable=True,
            runs=3,
            duration_s=0.06,
        ),
        latencies=results.Latencies.of([20_000.0, 21_000.0, 19_500.0]),
        kernels=(results.KernelTime(label="stem", kernel="dense", median_us=12.5, flops=10),),
        cautions=(results.Caution(text="the governor is powersave", fix="cpupower ..."),),
        commands=("gfbench bundle --json",),
    )


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = example_result()
    results.write_result(result, tmp_path / "result.json")
    assert results.read_result(tmp_path / "result.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "something"}, "no result of gfcompile validate"),
        ({"schema_version": 99}, "schema version is 99"),
        ({"bundle": None}, "bundle should be an object"),
        ({"kernels": [{"label": "a", "kernel": "b", "median_us": "fast"}]}, "kernels[0].median_us"),
        ({"device": {"kind": "boat", "url": "", "name": "", "arch": ""}}, "one of local, ssh"),
        ({"commands": "gfbench"}, "commands should be a list"),
        ({"load_ms": True}, "load_ms should be a number, not True"),
    ],
)
def test_a_damaged_file_is_refused_and_the_place_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**example_result().to_dict(), **change}))
    with pytest.raises(UserError) as caught:
        results.read_result(path)
    assert message in str(caught.value)


def test_what_is_no_json_or_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "deep").write_text("[" * 100_000)
    cases = (("photo", "cannot be used"), ("deep", "cannot be used"), ("none", "No such file"))
    for name, message in cases:
        with pytest.raises(UserError, match=message):
            results.read_result(tmp_path / name)


def test_a_failed_write_leaves_the_older_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    results.write_result(example_result(), path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.write_result(replace(example_result(), date="later"), path)
    assert results.read_result(path) == example_result()
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=200), st.integers(1, 99))
def test_percentiles_are_measured_values(samples: list[float], percent: int) -> None:
    ordered = sorted(samples)
    if percent != 50:
        expected = np.percentile(ordered, percent, method="inverted_cdf")
        assert results.percentile(ordered, percent) == expected
    assert results.Latencies.of(samples).median_us == pytest.approx(np.median(samples))


def test_many_samples_are_thinned_but_all_are_counted() -> None:
    samples = np.random.default_rng(0).uniform(100, 200, 2 * results.MAX_SAMPLES + 1)
    latencies = results.Latencies.of(samples.tolist())
    assert latencies.sample_every == 3
    assert len(latencies.samples_us) <= results.MAX_SAMPLES
    assert latencies.max_us == samples.max()
    assert latencies.cv == pytest.approx(samples.std() / samples.mean())


@dataclass(frozen=True)
class _Record:
    words: tuple[str, ...]
    kind: Literal["a", "b"]
    part: "_Part | None" = None


@dataclass(frozen=True)
class _Part:
    size: float


def test_records_decode_what_they_encode_and_ignore_what_is_newer() -> None:
    record = _Record(words=("x",), kind="b", part=_Part(2.0))
    assert from_json(_Record, json.loads(json.dumps({**to_json(record), "newer": 1}))) == record
    assert from_json(_Record, {"words": [], "kind": "a", "part": {"size": 2}}).part == _Part(2.0)
    with pytest.raises(ValueError, match="_Record has no 'kind'"):
        from_json(_Record, {"words": []})
