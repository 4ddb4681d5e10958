"""From trained weights and labelled images to a bundle, by the commands that a user gives."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

import gfcompile.runtime
from gfcompile.compile import models
from gfcompile.compile.cli import main
from gfcompile.compile.models import gfnet
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import Paper
from gfcompile.quantize import read_quantized

SPEC = GFNetSpec(
    name="gfnet_mini",
    family="gfnet",
    paper=Paper(title="none", arxiv="0"),
    image_size=32,
    num_classes=3,
    patch_size=8,
    dims=(16,),
    depths=(2,),
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with `weights.safetensors` and `data/CLASS/*.png` of three classes."""
    monkeypatch.setitem(models._SPECS, SPEC.name, SPEC)
    monkeypatch.chdir(tmp_path)
    state = gfnet.random_weights(SPEC, seed=0)
    safetensors.torch.save_file(dict(state), "weights.safetensors")
    rng = np.random.default_rng(0)
    for label in ("a", "b", "c"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    return tmp_path


def command(*more: str) -> list[str]:
    return ["--model", SPEC.name, "--checkpoint", "weights.safetensors", *more]


TRAINING = ("--train-data", "data", "--epochs", "2", "--batch-size", "8", "--device", "cpu")
FOR_HOST = (*TRAINING, "--target", "host", "--int8")


@pytest.mark.usefixtures("workplace")
def test_a_quantized_checkpoint_is_trained_and_then_compiled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["quantize", *command(*TRAINING, "--val-data", "data")]) == 0
    said = capsys.readouterr()
    assert "epoch 2/2: loss" in said.err
    assert "top-1: float" in said.out
    path = Path("gfnet_mini-int8.safetensors")
    assert len(read_quantized(path).training["history"]) == 2
    assert not path.with_name(f"{path.name}.training").exists()
    arguments = ["--model", SPEC.name, "--checkpoint", str(path), "--target", "host"]
    assert main([*arguments, "--int8", "--quiet"]) == 0
    bundle = Path(capsys.readouterr().out.strip())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["extra"]["training"]["epochs"] == 2
    assert manifest["extra"]["calibration_images"] == 18
    note = "from a quantized checkpoint: epochs of training 2, images 18"
    assert note in manifest["notes"]
    assert main(arguments) == 2
    assert "is a quantized checkpoint: add --int8" in capsys.readouterr().err
    assert main([*arguments, "--int8", "--weight-bits", "4"]) == 2
    assert "which has its scales" in capsys.readouterr().err


@pytest.mark.usefixtures("workplace")
def test_one_command_trains_and_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--target", "host", "--int8", "--keep-float", "auto:1", "--weight-bits", "4")
    assert main(command(*TRAINING, *more, "--quiet")) == 0
    bundle = Path(capsys.readouterr().out.strip())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["extra"]["scheme"]["weight"]["high"] == 7
    (kept,) = manifest["extra"]["kept_float"]
    assert "quantized alone" in kept["reason"]
    assert Path("gfnet_mini-int4.safetensors").exists()
    with gfcompile.runtime.load(bundle) as session:
        top = session.classify(Path("data/a/0.png"), top=1)
    assert top[0][0] in range(3)


@pytest.mark.usefixtures("workplace")
def test_the_analysis_is_a_table_and_a_plot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", *command("--train-data", "data", "--analyze")]) == 0
    said = capsys.readouterr().out
    for name in ("patch_embed.proj", "blocks.1.mlp.fc2", "blocks.0.filter", "head"):
        assert name in said
    assert "on int8 spectra" in said
    assert Path("gfnet_mini-sensitivity.svg").read_text().startswith("<svg")
    assert not Path("gfnet_mini-int8.safetensors").exists()


@pytest.mark.usefixtures("workplace")
def test_layers_are_kept_in_float_where_int8_is_only_calibrated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ("--target", "host", "--int8", "--keep-float", "head", "--keep-float", "auto:1")
    assert main(command(*more, "--quiet")) == 0
    manifest = json.loads((Path(capsys.readouterr().out.strip()) / "manifest.json").read_text())
    kept = {layer["name"]: layer["reason"] for layer in manifest["extra"]["kept_float"]}
    assert kept.pop("head") == "the scheme names it"
    assert len(kept) == 1


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["quantize", "--model", SPEC.name, *TRAINING], 2, "give --checkpoint"),
        (["quantize", *command("--train-data", "nowhere")], 2, "no such folder or CSV"),
        (["quantize", *command(*TRAINING, "--lr", "-1")], 2, "--lr -1.0 is not in"),
        (["quantize", *command(*TRAINING, "--lr", "1e12", "--epochs", "9")], 1, "lower --lr"),
        (["quantize", *command(*TRAINING, "--temperature", "0")], 2, "--temperature 0.0 is not in"),
        (["quantize", *command(*TRAINING, "--data-threads", "0")], 2, "0 is not at least 1"),
        (["quantize", *command(*TRAINING, "--seed", "-1")], 2, "-1 is not at least 0"),
        (["quantize", *command(*TRAINING, "--weight-bits", "5")], 2, "choose 4 or 8"),
        (["quantize", *command(*TRAINING, "--keep-float", "haed")], 2, "no layer is called"),
        (["quantize", *command("--train-data", "x", "--keep-float", "auto:x")], 2, "with a number"),
        (command("--target", "host", "--int8", "--keep-float", "auto:x"), 2, "with a number"),
        (["quantize", *command(*TRAINING, "--output", "weights.safetensors")], 2, "starts from"),
        (["quantize", *command(*TRAINING, "--output", "data")], 2, "data: is a folder"),
        (command(*TRAINING, "--target", "host"), 2, "--train-data trains for --int8"),
        (command(*FOR_HOST, "--labels", "none.txt"), 2, "no such file of labels"),
        (command(*FOR_HOST, "--output", "data"), 2, "not of a gfcompile bundle"),
        (command(*FOR_HOST, "--calibration-data", "data"), 2, "leave out --calibration-data"),
        (command("--target", "host", "--weight-bits", "4"), 2, "are for --int8"),
        (command("--target", "host", "--int8", "--lr", "1"), 2, "--lr is for --train-data"),
    ],
)
def test_mistakes_are_said_in_one_line(
    arguments: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert code == 1 or not list(Path().glob("*.training"))  # which was not even begun
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("gfcompile: error: ")
    assert complaint in line


@pytest.mark.usefixtures("workplace")
def test_tensorboard_is_asked_for_by_name_if_it_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["quantize", *command(*TRAINING, "--tensorboard", "log")]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


@pytest.mark.usefixtures("workplace")
def test_tensorboard_is_told_of_steps_and_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        seen: ClassVar[list[tuple[str, int]]] = []

        def __init__(self, folder: str) -> None:
            assert folder == "log"

        def add_scalar(self, name: str, _value: float, step: int) -> None:
            self.seen.append((name, step))

        def flush(self) -> None:
            pass

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    more = ("--val-data", "data", "--tensorboard", "log", "--quiet")
    assert main(["quantize", *command(*TRAINING, *more)]) == 0
    assert [step for name, step in Writer.seen if name == "train/loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for name, step in Writer.seen if name == "val/top1"] == [1, 2]


_MAIN = """
import sys
from gfcompile.compile import models
from gfcompile.compile.cli import main
from test_quantization import SPEC
models._SPECS[SPEC.name] = SPEC
sys.exit(main())
"""


@pytest.mark.slow
def test_under_torchrun_one_process_writes_and_speaks(workplace: Path) -> None:
    script = workplace / "main.py"
    script.write_text(_MAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", str(script), "quantize", *command(*TRAINING)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _paths()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("next: gfcompile") == 1
    assert done.stderr.count("epoch 2/2: loss") == 1
    assert read_quantized(Path("gfnet_mini-int8.safetensors")).training["processes"] == 2


def _paths() -> str:
    return os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])


@pytest.mark.slow
def test_an_interrupted_training_goes_on_by_the_same_command(workplace: Path) -> None:
    script = workplace / "main.py"
    script.write_text(_MAIN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _paths()}
    arguments = [sys.executable, str(script), "quantize", *command(*TRAINING)]
    arguments += ["--epochs", "500"]
    running = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if "epoch 2/500" in line:
            break
    running.send_signal(signal.SIGINT)
    last = running.stderr.read().splitlines()[-1]
    assert running.wait() == 130
    state = "gfnet_mini-int8.safetensors.training"
    assert last == f"gfcompile: interrupted; the same command goes on from {state}"
    again = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    for line in again.stderr:
        if "epoch" in line:
            pytest.fail("it began anew")
        if "goes on after step" in line:
            break
    again.kill()
    again.wait()
