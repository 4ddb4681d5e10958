"""Real bundles of every kind validated on this machine, and .tflite ones on a scripted Android."""

import os
from pathlib import Path

import pytest
from boards import Board, adb_board
from small_models import SPEC, build

from gfcompile.compile import cli
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.runtime import load
from gfcompile.runtime.errors import NoVerdictError, UserError
from gfcompile.runtime.litert_benchmark import BenchmarkOutput
from gfcompile.runtime.results import Budget, ValidationResult, history, read_result
from gfcompile.runtime.validate import ValidateConfig, validate

# As benchmark_model of LiteRT prints it; older ones end the lines at `std`.
BENCHMARK = """\
INFO: Loaded model model.tflite
INFO: Initialized session in 5.579ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds
INFO: count=4 first=20300 curr=20100 min=20050 max=20300 avg=20150 std=90 p5=20050 median=20120 \
p95=20300

INFO: count=50 first=20010 curr=20140 min=19900 max=21900 avg=2.01e+04 std=201 p5=19910 \
median=20050 p95=20700

INFO: Inference timings in us: Init: 5579, First inference: 20300, Warmup (avg): 20150, \
Inference (avg): 20100
INFO: Memory footprint delta from the start of the tool (MB): init=6.36328 overall=19.832
"""


def compiled(folder: Path, target: str, precision: str) -> Bundle:
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        image_size=SPEC.image_size,
        output=folder / f"{target}-{precision}",
        cache=False,
    )
    return compile_model(config, module=build(SPEC))


@pytest.fixture(scope="module")
def tflite(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(tmp_path_factory.mktemp("tflite"), "tflite", "int8")


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return adb_board(tmp_path / "board", monkeypatch)


def quickly(bundle: Bundle, device: str = "local", **budget: object) -> ValidationResult:
    demands = Budget(**budget)  # type: ignore[arg-type]
    return validate(
        ValidateConfig(bundle=bundle.path, device=device, budget=demands, runs=3, warmup=1)
    )


def check_whole(result: ValidationResult) -> None:
    assert result.verdict.passed, result.verdict
    assert result.numbers is not None
    assert result.numbers.inferences == 8
    assert result.numbers.tolerance is not None
    assert result.numbers.within
    assert result.latencies is not None
    assert len(result.latencies.samples_us) == 3
    assert ValidationResult.from_dict(result.to_dict()) == result


def test_a_compiled_model_holds_its_golden_numbers_and_its_kernels_are_known(
    tmp_path: Path,
) -> None:
    result = quickly(compiled(tmp_path, "host", "int8"))
    check_whole(result)
    assert result.kernels
    assert all(kernel.bytes for kernel in result.kernels)
    assert all(kernel.flops is not None for kernel in result.kernels)
    products = [k for k in result.kernels if k.kernel.startswith("dense")]
    assert {k.arithmetic for k in products} >= {"int8"}


def test_a_tflite_bundle_is_measured_in_the_interpreter_that_is_here(
    tflite: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    result = quickly(tflite)
    check_whole(result)
    assert result.protocol is not None
    assert "litert" in result.protocol.tool
    command = ["validate", str(tflite.path), "--runs", "3", "--warmup", "1"]
    assert cli.main([*command, "--max-latency-ms", "0.000001"]) == 1
    assert "MISSED: p90" in capsys.readouterr().out
    for device in ("ssh://board", "qemu:cortex-a72"):
        with pytest.raises(UserError, match="validated with --device local"):
            quickly(tflite, device)


def test_a_model_file_is_not_for_qemu(tflite: Bundle) -> None:
    with pytest.raises(UserError, match="kind 'tflite' run with --device local alone"):
        load(tflite.path, device="qemu")


def test_a_coreml_bundle_off_a_mac_is_evaluated_and_claims_no_latency(tmp_path: Path) -> None:
    if os.uname().sysname == "Darwin":
        pytest.skip("a Mac has Core ML itself")
    bundle = compiled(tmp_path, "coreml", "float32")
    result = quickly(bundle)
    assert result.verdict.passed, result.verdict
    assert result.latencies is None
    assert result.device.kind == "evaluator"
    assert "not Apple's runtime" in result.no_latency
    assert result.numbers is not None
    with pytest.raises(UserError, match="--max-latency-ms"):
        quickly(bundle, max_latency_ms=5.0)
    with pytest.raises(UserError, match=r"--against: this bundle is evaluated"):
        validate(ValidateConfig(bundle=bundle.path, against="last", runs=3))


def test_a_tflite_bundle_is_measured_on_android_by_litert_itself(
    adb: Board, tflite: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = adb.temporary / "benchmark_model"
    monkeypatch.setattr("gfcompile.runtime.litert_benchmark.PROGRAM", str(program))
    with pytest.raises(NoVerdictError, match="adb push it to"):
        quickly(tflite, adb.url)
    (adb.home / "printed").write_text(BENCHMARK)
    program.write_text(f'#!/bin/sh\n[ -f "${{1#--graph=}}" ] && cat {adb.home}/printed\n')
    program.chmod(0o755)
    assert (
        cli.main(["validate", str(tflite.path), "--device", adb.url, "--max-latency-ms", "20"]) == 1
    )
    out = capsys.readouterr().out
    assert "MISSED: p90 20.700 ms, 20 ms is the budget" in out
    assert "numbers are unchecked" in out
    result = read_result(history(tflite.path)[-1])
    assert result.latencies is not None
    assert (result.latencies.median_us, result.latencies.p99_us) == (20050, 21900)
    assert (result.load_ms, result.first_inference_ms) == (5.579, 20.3)
    assert adb.left(0) == ["benchmark_model"]
    with pytest.raises(UserError, match="returns no outputs"):
        quickly(tflite, adb.url, min_agreement=0.9)
    (adb.home / "printed").write_text("nothing")
    with pytest.raises(NoVerdictError, match="no timings"):
        quickly(tflite, adb.url)


def test_the_output_of_older_benchmarks_is_read_too() -> None:
    output = BenchmarkOutput.read(
        "count=15 first=49060 curr=33682 min=32825 max=49060 avg=34825.1 std=3930\n"
        "count=50 first=32891 curr=33978 min=32641 max=34005 avg=33209.4 std=450\n"
        "Inference timings in us: Init: 855, First inference: 49060, Warmup (avg): 34825.1\n"
        "Peak memory footprint (MB): init=0 overall=12.8672\n"
    )
    assert (output.runs, output.warmup_runs, output.memory_mb) == (50, 15, 12.8672)
    # Without percentiles the maximum stands for the high ones.
    assert (output.latencies.median_us, output.latencies.p90_us) == (33209.4, 34005)
    assert output.latencies.at(95) == 34005
