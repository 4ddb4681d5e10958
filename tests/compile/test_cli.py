"""The command line: what it prints, and how it ends.

The compiler itself is stood in for here, by something that takes no time; what it does with real
models is tested in its own files.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from gfcompile.compile import cli, pipeline
from gfcompile.compile.bundle import Bundle, write_bundle
from gfcompile.compile.compile_command import _next_step
from gfcompile.compile.pipeline import CompileConfig
from gfcompile.compile.progress import Progress
from gfcompile.runtime import session
from gfcompile.runtime.bundle import Manifest, Precision, TensorSpec
from gfcompile.runtime.errors import BundleError, CompileError, UserError
from gfcompile.runtime.images import imagenet_transform, preprocess, stand_in_photos
from gfcompile.runtime.session import Latency
from gfcompile.targets.coreml.options import CoremlOptions
from gfcompile.targets.target import find_target
from gfcompile.targets.tflite.options import TfliteOptions

XS_FOR_HOST = ["--model", "gfnet_xs", "--target", "host"]

Run = tuple[int, str, str]

MANIFEST = Manifest(
    created_by="gfcompile 0.0.0",
    model="gfnet_xs",
    target="host",
    precision=Precision(requested="float32", storage="int8", compute="float32 FFMA"),
    arch="any",
    inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 2, 2)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 2)),),
    weights="random (seed 0)",
    notes=("weights are random", "calibrated on stand-in photos"),
    ledger=(
        {
            "stage": "traced",
            "against": "torch",
            "images": 4,
            "max_abs_error": 1.25e-6,
            "sqnr_db": None,
            "top1_agreement": 1.0,
            "how": "ONNX Runtime",
        },
        {
            "stage": "artifact",
            "against": "quantized",
            "images": 1,
            "max_abs_error": 0.01,
            "sqnr_db": 41.23,
            "top1_agreement": 1.0,
            "how": "native",
            "int8": {
                "tensors": 26,
                "values": 2_000_000,
                "equal": 0.9998,
                "max_steps": 1,
                "logits_max_steps": 0.51,
                "logits_mean_steps": 0.1,
            },
        },
    ),
)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Runs the command in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Run:
        try:
            code = cli.main(arguments)
        except SystemExit as done:  # --help and --version
            code = int(done.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def fake_compile(config: CompileConfig, progress: Progress | None = None) -> Bundle:
    """A compiler of no work, with something to say about everything."""
    assert progress is not None
    with progress.stage("trace"):
        pass
    progress.note("weights are random")
    manifest = replace(
        MANIFEST,
        model=config.model,
        target=config.target,
        precision=replace(MANIFEST.precision, requested=config.precision or "float32"),
    )

    def build(folder: Path) -> Manifest:
        (folder / "plan.bin").write_bytes(b"\0" * 1_000_000)
        return manifest

    return write_bundle(build, config.output or Path("out"))


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[CompileConfig]:
    """Stands in for the compiler; what it was asked for."""
    asked: list[CompileConfig] = []

    def compile_model(config: CompileConfig, progress: Progress | None = None) -> Bundle:
        asked.append(config)
        return fake_compile(config, progress)

    monkeypatch.setattr(pipeline, "compile_model", compile_model)
    return asked


def test_every_flag_reaches_the_compiler(
    run: Callable[..., Run], compiles: list[CompileConfig]
) -> None:
    flags = (
        "--model m --target jetson-tx2 --int8 --checkpoint c.pth --image-size 160 --num-classes 7 "
        "--fft dft --calibration-data photos --output o --dump d --seed 3 --labels l.txt --no-cache"
    )
    code, _, _ = run(*flags.split())
    assert code == 0
    assert compiles == [
        CompileConfig(
            model="m",
            target="jetson-tx2",
            precision="int8",
            checkpoint=Path("c.pth"),
            image_size=160,
            num_classes=7,
            fft="dft",
            calibration_data=Path("photos"),
            output=Path("o"),
            dump=Path("d"),
            seed=3,
            labels=Path("l.txt"),
            cache=False,
        )
    ]


def test_defaults_are_those_of_the_config(
    run: Callable[..., Run], compiles: list[CompileConfig]
) -> None:
    assert run(*XS_FOR_HOST)[0] == 0
    assert run("compile", *XS_FOR_HOST)[0] == 0
    assert compiles == [CompileConfig(model="gfnet_xs", target="host")] * 2


@pytest.mark.usefixtures("compiles")
def test_terminal_tells_all_that_the_manifest_does(run: Callable[..., Run]) -> None:
    code, out, err = run("--model", "gfnet_xs", "--target", "jetson-tx2", "--int8")
    assert code == 0
    assert "trace" in err
    assert " s\n" in err
    lines = out.splitlines()
    for said in (
        "gfnet_xs for jetson-tx2: Jetson TX2",
        "random (seed 0)",
        "requested int8, stored as int8",
        "computed as float32 FFMA",
        "calibrated on stand-in photos",
        "out: 1.0 MB in 2 files",
        "artifact: 400 of 2,000,000 int8 activations differ, by 1 step at most; "
        "logits by 0.51 steps at most",
    ):
        assert any(said in line for line in lines), (said, out)
    assert out.count("weights are random") == 1  # noted twice, printed once
    header, row = (next(line for line in lines if word in line) for word in ("SQNR", "1.25e-06"))
    assert row.index("torch") == header.index("against")
    assert row.split() == ["traced", "torch", "1.25e-06", "equal", "100%", "4", "ONNX", "Runtime"]
    assert lines[-1].startswith("next: ")


def test_the_next_command_can_be_pasted() -> None:
    bundle = Bundle(path=Path("my bundle"), manifest=MANIFEST)
    assert _next_step(bundle, find_target("tflite")) == "gfcompile run 'my bundle' PHOTO"


@pytest.mark.usefixtures("compiles")
def test_quiet_prints_the_path_alone(run: Callable[..., Run]) -> None:
    assert run(*XS_FOR_HOST, "--quiet") == (0, "out\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gfnet_sx", "--target", "host"], ["unknown model 'gfnet_sx'", "gfnet_s?"]),
        (["--model", "gfnet_xs", "--target", "jetson-tx3"], ["jetson-tx2?", "raspberry-pi-4"]),
        ([*XS_FOR_HOST, "--image-size", "225"], ["divisible by 16, not 225", "224 and 240"]),
        ([*XS_FOR_HOST, "--image-size", "big"], ["--image-size", "'big'"]),
        ([*XS_FOR_HOST, "--fft", "fast"], ["--fft", "'fast'", "circular"]),
        ([*XS_FOR_HOST, "--seed", "-1"], ["--seed", "-1 is not at least 0"]),
        ([*XS_FOR_HOST, "--seed", "4294967296"], ["--seed", "not below 4294967296"]),
        ([*XS_FOR_HOST, "--checkpoint", "none.pth"], ["none.pth"]),
        ([*XS_FOR_HOST, "--labels", "none.txt"], ["none.txt"]),
        ([*XS_FOR_HOST, "--int8", "--calibration-data", "none"], ["none"]),
        ([*XS_FOR_HOST, "--int8", "--calibration-data", "."], ["no calibration images"]),
        ([*XS_FOR_HOST, "--calibration-data", "."], ["--int8"]),
        ([*XS_FOR_HOST, "--colour"], ["--colour"]),
        (["--model", "gfnet_xs"], ["--target"]),
        (["rum", "bundle"], ["unknown command 'rum'", "run?"]),
        (["run", "bundle"], ["IMAGE"]),
        (["run", "bundle", "x.jpg", "--top", "0"], ["--top"]),
    ],
    ids=" ".join,
)
def test_wrong_arguments_take_one_line_and_exit_2(
    run: Callable[..., Run], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("gfcompile: error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_answered_before_torch_and_tvm_load() -> None:
    program = """
import sys
from gfcompile.compile.cli import main
assert main(["--model", "gfnet_xs", "--target", "jetson-tx3"]) == 2
assert main(["models"]) == main(["targets"]) == 0
print(sorted({"torch", "tvm", "onnx", "onnxruntime"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_foreign_output_is_left_alone(run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    code, _, err = run(*XS_FOR_HOST, "--output", "photos")
    assert code == 2
    assert "cat.jpg" in err
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_missing_bundle_is_one_line_and_exit_1(run: Callable[..., Run], tmp_path: Path) -> None:
    code, out, err = run("run", str(tmp_path), "x.jpg")
    assert (code, out) == (1, "")
    assert err.startswith("gfcompile: error: ")
    assert "manifest.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("bad name"), 2, "error: bad name"),
        (CompileError("stage failed"), 1, "error: stage failed"),
        (BundleError("flipped byte"), 1, "error: flipped byte"),
        (BundleError("kind \x1b[31mc\nd"), 1, "error: kind \N{REPLACEMENT CHARACTER}[31mc d"),
        (OSError(errno.ENOSPC, "No space left on device", "out/w.bin"), 1, "disk is full: out/w"),
        (OSError(errno.ENOSPC, "No space left", "cache", None, "out"), 1, "disk is full: out;"),
        (OSError(errno.EACCES, "Permission denied", "out"), 1, "Permission denied: out"),
        (MemoryError(), 1, "out of memory"),
        (KeyError("left\nright"), 1, "internal error: KeyError"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_failures_take_one_line(
    run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    words: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "compile_model", fail)
    got, out, err = run(*XS_FOR_HOST)
    assert (got, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1
    assert err.startswith("gfcompile: ")


def test_debug_shows_the_traceback(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CompileError("stage failed")

    monkeypatch.setattr(pipeline, "compile_model", fail)
    with pytest.raises(CompileError):
        run(*XS_FOR_HOST, "--debug")


INTERRUPTED = """
import sys, time
from pathlib import Path
from gfcompile.compile import cli, pipeline
from gfcompile.compile.bundle import write_bundle

def build(folder):
    (folder / "weights.bin").write_bytes(bytes(10))
    try:
        print("building", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(0.5)  # the second Ctrl-C comes here

def compile_model(config, progress):
    with progress.stage("compile"):
        return write_bundle(build, Path("out"))

pipeline.compile_model = compile_model
sys.exit(cli.main(["--model", "gfnet_xs", "--target", "host"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"building\n"
    process.send_signal(number)
    assert process.stdout.readline() == b"cleaning\n"
    process.send_signal(signal.SIGINT)  # an impatient user
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.decode().splitlines()[-1] == "gfcompile: interrupted; nothing was written"
    assert "Traceback" not in err.decode()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_compiler_leaves_nothing(tmp_path: Path) -> None:
    """The real one, in the middle of its work, with a cache of its own."""
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "gfcompile", "--model", "gfnet_ti", "--target", "host"],
        cwd=work,
        env={**os.environ, "GFCOMPILE_CACHE": str(cache)},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert b" s\n" in process.stderr.readline()  # a first stage has passed
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "gfcompile: interrupted; nothing was written"
    assert not list(work.iterdir())
    assert not list((cache / "v1" / "building").iterdir())


def test_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(0.2); "
         "from gfcompile.compile.cli import main; raise SystemExit(main(['targets']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 0
    process.stderr.close()


class FakeSession:
    """A bundle that sees the same two classes in every image."""

    manifest = replace(
        MANIFEST,
        transform=imagenet_transform(64).to_dict(),
    )
    stand_in = ""
    batch = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def classify_all(self, images: list[Path], top: int) -> list[list[tuple[int, str, float]]]:
        assert all(image.name.endswith(".jpg") for image in images)
        return [[(7, "cat", 0.75), (8, "dog\x1b[2J", 0.25)][:top] for _ in images]

    def encode(self, image: Path) -> np.ndarray:
        return preprocess(image, imagenet_transform(64))

    def benchmark(self, array: np.ndarray) -> Latency:
        assert array.shape == (1, 3, 64, 64)
        return Latency(median_ms=12.345, min_ms=12.0, p90_ms=13.0, runs=20)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Stands in for the runtime; what it was asked to load."""
    asked: list[tuple[object, ...]] = []

    def load(bundle: Path, *, device: str, threads: int, compute_units: str) -> FakeSession:
        assert compute_units == "all"
        asked.append((bundle, device, threads))
        return FakeSession()

    monkeypatch.setattr(session, "load", load)
    return asked


def test_run_prints_classes_and_time(
    run: Callable[..., Run], loaded: list[tuple[object, ...]]
) -> None:
    photos = [str(photo) for photo in stand_in_photos()[:2]]
    code, out, err = run("run", "bundle", *photos, "--threads", "2")
    assert code == 0
    assert loaded == [(Path("bundle"), "local", 2)]
    assert out.splitlines()[:3] == [
        f"{photos[0]}: 12.35 ms, median of 20 runs on 2 threads",
        "   75.0%     7  cat",
        "   25.0%     8  dog\N{REPLACEMENT CHARACTER}[2J",
    ]
    assert len(out.splitlines()) == 6
    assert "the classes mean nothing" in err  # the weights are random


def test_run_under_qemu_claims_no_time(
    run: Callable[..., Run], loaded: list[tuple[object, ...]]
) -> None:
    photo = str(stand_in_photos()[0])
    code, out, _ = run("run", "bundle", photo, "--device", "qemu", "--top", "1")
    assert code == 0
    assert loaded == [(Path("bundle"), "qemu", 1)]
    first, *classes = out.splitlines()
    assert "not how fast" in first
    assert " ms" not in first
    assert len(classes) == 1


@pytest.mark.usefixtures("loaded")
def test_run_says_what_stands_in_and_claims_no_time(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSession, "stand_in", "evaluated, not Apple's runtime")
    photo = str(stand_in_photos()[0])
    _, out, _ = run("run", "bundle", photo)
    assert out.splitlines()[0] == f"{photo}: evaluated, not Apple's runtime"
    (result,) = json.loads(run("run", "bundle", photo, "--json")[1])
    assert result["stand_in"] == "evaluated, not Apple's runtime"
    assert "median_ms" not in result


def test_flags_of_coreml_reach_the_compiler(
    run: Callable[..., Run], compiles: list[CompileConfig]
) -> None:
    common = ("--model", "gfnet_xs", "--target", "coreml")
    for flags in ("", "--input uint8-image", "--fp32 --ios 15 --layout plain --input tensor"):
        assert run(*common, *flags.split(), "--license", "MIT")[0] == 0
    first, same, other = compiles
    assert first == same
    assert first.precision is None
    assert first.coreml == CoremlOptions(license="MIT")
    assert first.tflite == TfliteOptions()
    assert other.precision == "float32"
    assert other.coreml == CoremlOptions(ios=15, layout="plain", input="tensor", license="MIT")


@pytest.mark.usefixtures("loaded")
def test_run_as_json_is_json(run: Callable[..., Run]) -> None:
    photo = str(stand_in_photos()[0])
    (result,) = json.loads(run("run", "bundle", photo, "--json")[1])
    assert result["image"] == photo
    assert result["weights"] == "random (seed 0)"
    assert result["median_ms"] == 12.345
    assert result["top"][0] == {"index": 7, "label": "cat", "probability": 0.75}


@pytest.mark.slow
def test_compiled_model_classifies_a_photo_and_is_compiled_once(
    run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, nothing stood in for: compile, compile again from the cache, classify."""
    compile_it = ["--model", "gfnet_ti", "--target", "host", "--int8", "--image-size", "64"]
    code, out, err = run(*compile_it, "--output", "first")
    assert code == 0, err
    assert "int8 activations differ" in out
    # The second has to come from the cache.
    monkeypatch.delattr(pipeline, "write_bundle")
    code, _, err = run(*compile_it, "--output", "second")
    assert code == 0, err
    first, second = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in files if p.is_file()}
        for name, files in ((n, (tmp_path / n).rglob("*")) for n in ("first", "second"))
    )
    assert first == second

    photo = str(stand_in_photos()[0])
    (result,) = json.loads(run("run", "first", photo, "--json")[1])
    assert len(result["top"]) == 5
    assert result["median_ms"] > 0
    assert 0 < sum(entry["probability"] for entry in result["top"]) <= 1
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    code, _, err = run("run", "first", "broken.jpg")
    assert (code, err.count("\n")) == (2, 2)  # the note on random weights, and the error
    assert "broken.jpg" in err


def test_models_are_listed(run: Callable[..., Run]) -> None:
    code, out, _ = run("models")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("gfnet_xs"))
    assert "15.99 M" in row
    assert "arXiv:2107.00645" in out
    rows = json.loads(run("models", "--json")[1])
    assert {"gfnet_ti", "gfnet_xs", "gfnet_h_b"} <= {row["name"] for row in rows}


def test_targets_are_listed_with_what_int8_means(run: Callable[..., Run]) -> None:
    code, out, _ = run("targets")
    assert code == 0
    assert out.startswith("host\n    this machine: ")
    block = out.split("\njetson-tx2\n")[1].split("\njetson-xavier\n")[0]
    for said in ("sm_62", "PTX 6.5", "fp32 0.67 TFLOP/s", "59.7 GB/s", "emulates dp4a"):
        assert said in block
    assert max(map(len, out.splitlines())) <= 100
    assert len(json.loads(run("targets", "--json")[1])) == out.count("--int8:")


@pytest.mark.parametrize(
    "arguments", [["--help"], [], *([name, "--help"] for name in cli._COMMANDS)]
)
def test_help_ends_with_0(run: Callable[..., Run], arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "usage: gfcompile" in out


def test_version_is_that_of_the_package(run: Callable[..., Run]) -> None:
    from gfcompile import __version__

    assert run("--version") == (0, f"gfcompile {__version__}\n", "")


def test_command_starts_without_the_heavy_libraries() -> None:
    """Each takes a second or more to import, and most commands need none of them."""
    source = (
        "import sys; from gfcompile.compile.cli import main; main(['targets']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "torchao", "tvm", "onnx", "onnxruntime", "coremltools"}
