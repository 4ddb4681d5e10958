"""gfbench, the program in each bundle, on its own."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import MEAN, RUNTIME, STD, Toy, toy_images, toy_reference

from gfcompile.runtime.device.gfrt import TensorInfo
from gfcompile.runtime.errors import DeviceError
from gfcompile.runtime.results import Latencies
from gfcompile.runtime.trace import read_trace
from tools import need


def bench(toy: Toy, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [toy.folder / "gfbench", toy.folder, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_it_times_a_bundle_without_being_told_more(toy: Toy) -> None:
    result = bench(toy)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "cpu: 1 inference"
    assert lines[1].startswith("loaded in ")
    assert lines[2].startswith("median ")
    assert "(10 runs after " in lines[2]


def test_it_reports_json(toy: Toy) -> None:
    result = bench(toy, "--json", "--runs", 9, "--threads", 2, "--profile", "--verify")
    report = json.loads(result.stdout)
    assert report["device"] == "cpu"
    assert (report["runs"], report["threads"], report["inferences"]) == (9, 2, 1)
    assert [step["calls"] for step in report["profile"]] == [9] * 4
    assert [step["label"] for step in report["profile"]] == [s.label for s in toy.plan.steps]
    assert all(step["median_us"] >= 0 for step in report["profile"])
    assert min(report["load_ms"], report["first_ms"], report["peak_memory_mb"]) > 0
    assert (report["rule"], report["timer"], report["pinned"]) == ("runs", "whole", [])
    samples = report["samples_us"]
    assert len(samples) == 9
    statistics = Latencies.of(samples)
    for key, value in (
        ("min_ms", statistics.min_us),
        ("median_ms", statistics.median_us),
        ("mean_ms", statistics.mean_us),
        ("p90_ms", statistics.p90_us),
        ("p99_ms", statistics.p99_us),
        ("max_ms", statistics.max_us),
    ):
        assert 1e3 * report[key] == pytest.approx(value, abs=0.01), key
    assert report["cv"] == pytest.approx(statistics.cv, abs=1e-3)


def test_it_runs_for_as_long_as_it_is_told(toy: Toy) -> None:
    report = json.loads(bench(toy, "--json", "--runs", 3, "--seconds", 1, "--warmup", 5).stdout)
    assert report["duration_s"] >= 1
    assert report["runs"] == len(report["samples_us"]) > 3
    assert (report["warmup_runs"], report["stable"]) == (5, False)


def test_the_kernels_can_be_timed_without_copies(toy: Toy) -> None:
    report = json.loads(bench(toy, "--json", "--runs", 5, "--kernels-only").stdout)
    assert (report["timer"], len(report["samples_us"])) == ("kernels", 5)
    assert "without copies" in bench(toy, "--runs", 1, "--kernels-only").stdout


def test_threads_stay_on_the_cpus_they_are_pinned_to(toy: Toy) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    first = allowed[0]
    report = json.loads(bench(toy, "--json", "--runs", 1, "--pin", f"{first}").stdout)
    assert report["pinned"] == [first]
    big = json.loads(bench(toy, "--json", "--runs", 1, "--pin", "big").stdout)
    assert set(big["pinned"]) <= set(allowed)
    for wrong in ("middle", "3-1", "0,", "99999", "0-", "-1"):
        result = bench(toy, "--pin", wrong)
        assert (result.returncode, "--pin takes big" in result.stderr) == (2, True), wrong
    assert "may not run on these CPUs" in bench(toy, "--pin", "1000").stderr


def test_every_way_to_run_it_is_clean_under_sanitizers(toy: Toy, tmp_path: Path) -> None:
    program = tmp_path / "gfbench"
    options = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    options += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [*sorted(RUNTIME.glob("gfbench*.c")), RUNTIME / "gfrt_cores.c"]
    command = [need("gcc"), *options, *sources, "-lm", "-ldl", "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    (tmp_path / "in").write_bytes(toy_images(3).tobytes())
    for arguments in (
        ("--json", "--profile", "--runs", 5, "--seconds", 1, "--pin", "big"),
        ("--profile", "--warmup", 0, "--runs", 1, "--threads", 2),
        ("--input", tmp_path / "in", "--output", tmp_path / "out", "--trace", tmp_path / "t"),
        ("--kernels-only", "--single-stream", "--runs", "x"),
    ):
        result = subprocess.run(
            list(map(str, [program, toy.folder, *arguments])),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == (2 if "x" in arguments else 0), result.stderr
        assert "Sanitizer" not in result.stderr


def test_a_bundle_for_another_machine_has_an_exit_code_of_its_own(
    toy: Toy, arm_toy: Toy, tmp_path: Path
) -> None:
    toy = toy.copy(tmp_path / "toy")
    shutil.copy(arm_toy.library, toy.folder)
    result = bench(toy)
    assert result.returncode == 3
    assert result.stderr.startswith("gfbench: ")


def test_pixels_are_normalized_in_c_as_in_numpy(toy: Toy, tmp_path: Path) -> None:
    """(x / 255 - mean) / std in float32, in that order: the same bits, so the same logits."""
    pixels = np.random.default_rng(3).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    values = pixels.astype(np.float32) / np.float32(255)
    values = (values - np.float32(MEAN)) / np.float32(STD)
    values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    (tmp_path / "pixels").write_bytes(pixels.tobytes())
    (tmp_path / "values").write_bytes(values.tobytes())
    for option, name in (("--image-u8", "pixels"), ("--input", "values")):
        result = bench(
            toy,
            *(option, tmp_path / name, "--output", tmp_path / "out"),
            *("--trace", tmp_path / f"{name}.trace"),
        )
        assert result.returncode == 0, result.stderr
    traces = [
        {(i, r.tensor.name): r.data for i, r in read_trace(tmp_path / f"{name}.trace")}
        for name in ("pixels", "values")
    ]
    assert traces[0] == traces[1]
    logits = np.fromfile(tmp_path / "out", np.float32).reshape(2, 16)
    for i in range(2):
        # A code next to a rounding tie may be one step off in each of 24 rows.
        np.testing.assert_allclose(
            logits[i], toy_reference(values[i])["logits"][0], atol=2 / 16, rtol=0
        )


def test_a_trace_has_what_a_step_wrote(toy: Toy, tmp_path: Path) -> None:
    assert bench(toy, "--trace", tmp_path / "trace").returncode == 0
    records = [record for _, record in read_trace(tmp_path / "trace")]
    assert [r.tensor.name for r in records] == ["scaled", "mixed", "coded", "logits"]
    assert records[2].tensor == TensorInfo("coded", "uint8", (24, 16), 384, 1 / 16, 0, 128)
    data = (tmp_path / "trace").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-1])
    with pytest.raises(DeviceError, match="truncated"):
        list(read_trace(tmp_path / "cut"))
    (tmp_path / "none").write_bytes(b"GIF89a")
    with pytest.raises(DeviceError, match="is not a trace"):
        list(read_trace(tmp_path / "none"))


def test_wrong_arguments_are_named(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(100))
    (tmp_path / "empty").write_bytes(b"")
    cases = [
        (("--fast",), 2, "unknown argument --fast"),
        (("--runs",), 2, "--runs needs a value"),
        (("--runs", "many"), 2, "--runs takes a number"),
        (("--input", "a", "--image-u8", "b"), 2, "usage:"),
        (("--input", tmp_path / "none"), 1, "cannot be read"),
        (("--input", tmp_path / "short"), 1, "100 bytes at the end, input 0 takes 768"),
        (("--input", tmp_path / "empty"), 1, "is empty"),
        (("--output", tmp_path / "no" / "where"), 1, "cannot be written"),
        (("--threads", "100000"), 1, "too many"),
    ]
    for arguments, code, message in cases:
        result = bench(toy, *arguments)
        assert result.returncode == code, (arguments, result)
        assert message in result.stderr


def test_a_full_disk_is_said(toy: Toy) -> None:
    result = bench(toy, "--output", "/dev/full")
    assert result.returncode == 1
    assert "is the disk full?" in result.stderr


def test_a_changed_weight_is_found_when_asked(toy: Toy, tmp_path: Path) -> None:
    toy = toy.copy(tmp_path / "toy")
    weights = bytearray((toy.folder / "weights.bin").read_bytes())
    weights[100] ^= 1
    (toy.folder / "weights.bin").write_bytes(weights)
    assert bench(toy).returncode == 0
    result = bench(toy, "--verify")
    assert result.returncode == 1
    assert "weights.bin was changed" in result.stderr
    (toy.folder / "weights.bin").write_bytes(weights[:-1])
    assert "1279 bytes instead of 1280" in bench(toy).stderr
    (toy.folder / "weights.bin").unlink()
    assert "weights.bin: No such file" in bench(toy).stderr


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("plan.bin", "plan.bin is damaged"),
        ("plan-1.bin", None),  # there are no better kernels, then
        ("weights.bin", "weights.bin: Illegal seek"),
    ],
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(
    toy: Toy, tmp_path: Path, name: str, complaint: str | None
) -> None:
    copy = toy.copy(tmp_path / "toy")
    (copy.folder / name).unlink(missing_ok=True)
    os.mkfifo(copy.folder / name)
    command = [copy.folder / "gfbench", copy.folder, "--warmup", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == (0 if complaint is None else 1)
    assert result.stderr == ("" if complaint is None else f"gfbench: {copy.folder}/{complaint}\n")


def test_inputs_come_one_after_the_other(toy: Toy, tmp_path: Path) -> None:
    images = toy_images(3)
    (tmp_path / "in").write_bytes(images.tobytes())
    assert bench(toy, "--input", tmp_path / "in", "--output", tmp_path / "out").returncode == 0
    assert (tmp_path / "out").stat().st_size == 3 * 64
