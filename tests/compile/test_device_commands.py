"""`gfcompile validate` and `gfcompile profile`, and the results that they keep."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy_bundle import Toy, add_golden, build_toy, toy_object, with_gfbench, write_manifest

from gfcompile.compile import cli
from gfcompile.runtime.results import (
    Budget,
    Latencies,
    Numbers,
    history,
    read_result,
    write_result,
)
from gfcompile.runtime.verdict import judge

QUICK = ("--runs", "5", "--warmup", "1")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    return add_golden(build_toy(folder / "toy", toy_object("x86_64", folder), "x86_64"))


@pytest.fixture
def toy(pristine: Toy, tmp_path: Path) -> Toy:
    return pristine.copy(tmp_path / "toy")


def validate(toy: Toy, *options: str) -> int:
    return cli.main(["validate", str(toy.folder), *QUICK, *options])


def test_a_bundle_that_meets_its_budget_passes_and_its_result_is_kept(
    toy: Toy, capsys: Captured
) -> None:
    assert validate(toy, "--max-latency-ms", "1000", "--min-agreement", "0.99") == 0
    out = capsys.readouterr().out
    assert "met: p90 " in out
    assert "PASSED" in out.splitlines()
    (path,) = history(toy.folder)
    result = read_result(path)
    assert result.verdict.passed
    assert result.bundle.model == "toy"
    assert str(path) in out
    # The bundle itself is as it was: it can be validated again.
    assert validate(toy, "--quiet") == 0
    assert capsys.readouterr().out.splitlines()[-2] == "PASSED"
    assert len(history(toy.folder)) == 2


def test_a_budget_that_is_missed_fails_with_1(toy: Toy, capsys: Captured) -> None:
    assert validate(toy, "--max-latency-ms", "0.000001") == 1
    out = capsys.readouterr().out
    assert "MISSED: p90 " in out
    assert "FAILED" in out.splitlines()
    assert not read_result(history(toy.folder)[0]).verdict.passed


def test_wrong_numbers_fail_with_1(toy: Toy, capsys: Captured) -> None:
    golden = toy.folder / "golden" / "views.f32"
    golden.write_bytes(bytes(golden.stat().st_size))
    entry = {"stage": "artifact", "tolerance": 0.1, "int8": None}
    write_manifest(toy, ledger=[entry])
    assert validate(toy) == 1
    assert "MISSED: largest error of a logit" in capsys.readouterr().out


def test_too_little_agreement_fails_with_1(toy: Toy, capsys: Captured) -> None:
    golden = toy.folder / "golden" / "views.f32"
    golden.write_bytes(bytes(golden.stat().st_size))
    write_manifest(toy, ledger=[])  # without a tolerance
    assert validate(toy) == 0
    assert validate(toy, "--min-agreement", "1") == 1
    assert "MISSED: same class for " in capsys.readouterr().out


def test_a_device_that_is_not_the_target_ends_with_3(toy: Toy, capsys: Captured) -> None:
    write_manifest(toy, arch="riscv64")
    assert validate(toy) == 3
    assert "the bundle is for riscv64" in capsys.readouterr().err
    write_manifest(toy, cpu_features=["warp_drive"])
    assert validate(toy) == 3
    assert "its CPU lacks warp_drive" in capsys.readouterr().err
    assert history(toy.folder) == []


def test_what_was_asked_wrongly_ends_with_2(toy: Toy, capsys: Captured) -> None:
    for options, words in (
        (("--runs", "0"), "--runs 0"),
        (("--percentile", "101"), "--percentile 101"),
        (("--min-agreement", "99"), "--min-agreement 99: it takes 0 to 1"),
        (("--pin", "all"), "--pin all"),
        (("--threads", "-1"), "--threads -1"),
        (("--threads", "257"), "--threads 257: it takes 0 to 256"),
        (("--device", "boat"), "unknown device 'boat'"),
        (("--against", "nowhere.json"), "nowhere.json: No such file"),
        (("--max-regression", "3"), "--max-regression is for --against"),
        (("--against", "last", "--max-regression", "-1"), "--max-regression -1: it takes 0 to"),
        (("--against", "last", "--max-regression", "nan"), "--max-regression nan: it takes 0"),
    ):
        assert validate(toy, *options) == 2, options
        assert words in capsys.readouterr().err


def test_a_regression_against_the_last_result_fails(toy: Toy, capsys: Captured) -> None:
    # The first of all has nothing to be compared with.
    assert validate(toy, "--against", "last") == 0
    assert "note: the first result" in capsys.readouterr().err
    (path,) = history(toy.folder)
    result = read_result(path)
    assert result.latencies is not None
    fast = replace(result, latencies=Latencies.of([0.001] * 5))
    write_result(fast, path)
    assert validate(toy, "--against", "last") == 1
    told = capsys.readouterr()
    assert f"times that of {path.name}, 1.050 times is allowed" in told.out
    assert "first result" not in told.err
    slow = replace(result, latencies=Latencies.of([1e9] * 5))
    write_result(slow, path)
    assert validate(toy, "--against", str(path), "--max-regression", "1") == 0
    # Results of other devices and thread counts are other things.
    for name in history(toy.folder):
        name.unlink()
    write_result(replace(fast, device=replace(fast.device, url="ssh://board")), path)
    assert validate(toy, "--against", "last", "--threads", "2") == 0


def test_the_result_can_be_printed_as_json(toy: Toy, capsys: Captured) -> None:
    assert validate(toy, "--json") == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert values["schema"] == "gfcompile-result"
    assert len(values["latencies"]["samples_us"]) == 5


def test_a_bundle_without_golden_data_is_measured_and_says_so(
    pristine: Toy, tmp_path: Path, capsys: Captured
) -> None:
    toy = pristine.copy(tmp_path / "bare")
    for path in (toy.folder / "golden").iterdir():
        path.unlink()
    (toy.folder / "golden").rmdir()
    write_manifest(toy)
    assert validate(toy) == 0
    assert "the numbers were not checked" in capsys.readouterr().out
    assert validate(toy, "--min-agreement", "0.5") == 1


def test_threads_of_zero_are_told_for_what_they_are(toy: Toy, capsys: Captured) -> None:
    assert validate(toy, "--threads", "0") == 0
    assert "to warm up, a thread for each big CPU" in capsys.readouterr().out


def test_the_profile_shows_each_kernel_against_the_roofline(toy: Toy, capsys: Captured) -> None:
    kernels = [
        {"name": name, "flops": 6144, "bytes": 3000, "arithmetic": "float32"}
        for name in ("toy_scale", "toy_mix", "toy_encode")
    ]
    peaks = {
        "float32_gflops": 10.0,
        "float16_gflops": 10.0,
        "int8_gops": 10.0,
        "bandwidth_gb_s": 10.0,
    }
    write_manifest(toy, kernels=kernels, extra={"peaks": peaks})
    assert cli.main(["profile", str(toy.folder), *QUICK]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["layer", "kernel", "us", "share", "GFLOP/s", "GB/s", "roofline"]
    shown = {row.split()[1]: row for row in rows if row.startswith(("stem", "head"))}
    assert set(shown) == {"toy_scale", "toy_mix", "toy_encode", "toy_sum"}
    assert "% of compute" in shown["toy_mix"]
    assert shown["toy_sum"].split()[-3:] == ["-", "-", "-"]
    times = [float(row.split()[2]) for row in shown.values()]
    assert times == sorted(times, reverse=True)
    assert cli.main(["profile", str(toy.folder), *QUICK, "--json"]) == 0
    assert {k["kernel"] for k in json.loads(capsys.readouterr().out)} == set(shown)
    assert history(toy.folder) == []


def test_a_profile_of_a_cpu_that_qemu_imitates_is_refused_before_it_runs(
    toy: Toy, capsys: Captured
) -> None:
    assert cli.main(["profile", str(toy.folder), "--device", "qemu:cortex-a72"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no profile, as QEMU shows" in line


def test_a_program_that_lies_is_not_believed(toy: Toy, capsys: Captured) -> None:
    for output, words in (
        ("{}", "BenchReport has no 'device'"),
        ("[]", "should be an object"),
        ('{"device": 5}', "device should be a text"),
        ("hello", "printed no report"),
    ):
        with_gfbench(toy, f"echo '{output}'; head -c 512 /dev/zero >outputs.f32")
        assert validate(toy) == 3
        assert words in capsys.readouterr().err


def test_each_demand_has_a_line_of_its_own() -> None:
    numbers = Numbers(
        reference="r",
        inferences=8,
        top1_agreement=0.75,
        max_abs_error=None,
        sqnr_db=None,
        tolerance=None,
        within=False,
    )
    budget = Budget(max_latency_ms=1.0, percentile=50, min_agreement=0.5)
    verdict = judge(budget, numbers, Latencies.of([900.0, 950.0, 2000.0]))
    assert not verdict.passed
    assert verdict.latency_us == 950
    assert [reason.split(":")[0] for reason in verdict.reasons] == ["MISSED", "met", "met"]
    assert judge(Budget(), None, None).passed
