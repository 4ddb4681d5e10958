"""Fine-tuning for pruning: its loss, its training, and the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from pruning_cases import CONVNEXT, DEIT, LVVIT, SWIN, build, images
from pruning_cases import whole as parent_of

from gfcompile.compile import models
from gfcompile.compile.cli import main
from gfcompile.compile.finetuning import (
    FinetuneConfig,
    PruningConfig,
    finetune_model,
    published_training,
)
from gfcompile.compile.models import load_model, model_names, model_spec
from gfcompile.compile.models.layers import StochasticDepth, set_stochastic_depth
from gfcompile.compile.models.predictor import Predictor, TrainingOutput
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.models.weights import draw_weights
from gfcompile.compile.pruning_task import Outputs, PruningTask, ratio_loss, token_loss
from gfcompile.quantize import read_quantized
from gfcompile.quantize.loop import SilentTraining, StepRecord
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import preprocess

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TRAINING = PruningConfig(epochs=2, batch_size=10, lr=1e-3, own_rate=0.5, own_since=0.5)
_EACH = pytest.mark.parametrize("spec", [DEIT, LVVIT, CONVNEXT, SWIN], ids=lambda spec: spec.name)


def student_of(spec: ModelSpec) -> ModelSpec:
    return replace(spec, parent=f"{spec.name}_whole")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with images of ten classes; the small models are known by name."""
    for spec in (DEIT, LVVIT, CONVNEXT, SWIN):
        parent = replace(parent_of(spec), name=f"{spec.name}_whole")
        monkeypatch.setitem(models._SPECS, spec.name, student_of(spec))
        monkeypatch.setitem(models._SPECS, parent.name, parent)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (56, 56, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / str(label) / f"{i}.png")
    return tmp_path


def write_teacher(spec: ModelSpec) -> Path:
    path = Path(f"{spec.name}_whole.safetensors")
    safetensors.torch.save_file(draw_weights(parent_of(spec), 0), path)
    return path


def finetuned(spec: ModelSpec, training: PruningConfig = TRAINING, **options: Any) -> Path:
    config = FinetuneConfig(
        model=spec.name,
        teacher=write_teacher(spec),
        train_data=Path("data"),
        training=training,
        device="cpu",
        threads=2,
        **options,
    )
    return finetune_model(config).path


def task_of(spec: ModelSpec, config: PruningConfig = TRAINING) -> PruningTask:
    return PruningTask(
        build(spec),
        build(parent_of(spec)),
        config=config,
        keep_ratios=spec.keep_ratios,
        device=CPU,
    )


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_loss_is_that_of_the_papers(kind: Any) -> None:
    rng = np.random.default_rng(0)
    logits, taught = rng.normal(size=(2, 3, 10))
    tokens, taught_tokens = rng.normal(size=(2, 3, 8, 10))
    decisions = [rng.integers(0, 2, (3, 8)).astype(float) for _ in range(3)]
    ratios = (0.7, 0.49, 0.343)
    kept = decisions[-1]
    config = replace(TRAINING, ratio_weight=2.0, distill=0.5, token_loss=kind)
    task = task_of(DEIT, config)
    task.keep_ratios = ratios
    student = TrainingOutput(
        torch.tensor(logits),
        torch.tensor(tokens),
        torch.tensor(kept),
        tuple(map(torch.tensor, decisions)),
    )
    outputs = Outputs(student, torch.tensor(taught), torch.tensor(taught_tokens))
    loss, returned = task.loss(outputs, lambda logits: 10 * logits.sum())
    ratio = np.mean([np.mean((d.mean(1) - r) ** 2) for d, r in zip(decisions, ratios, strict=True)])
    p, q = softmax(logits), softmax(taught)
    classes = (q * np.log(q / p)).sum() / 3
    chosen, wanted = tokens[kept > 0.5], taught_tokens[kept > 0.5]
    if kind == "mse":
        distance = np.mean((chosen - wanted) ** 2)
    else:
        p, q = softmax(chosen), softmax(wanted)
        distance = (q * np.log(q / p)).sum() / len(chosen)
    expected = 10 * logits.sum() + 2.0 * ratio + 0.5 * classes + 0.5 * distance
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(returned, student.logits.float())


def test_tokens_that_are_all_dropped_cost_nothing() -> None:
    tokens = torch.randn(2, 4, 8, requires_grad=True)
    loss = token_loss(tokens, torch.randn(2, 4, 8), torch.zeros(2, 4), "mse")
    loss.backward()
    assert loss.item() == 0
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, torch.zeros_like(tokens))


def test_the_share_kept_is_right_where_every_image_keeps_it() -> None:
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert ratio_loss((half,), (0.5,)).item() == 0
    # Of all images together a half would be kept, but not of each.
    assert ratio_loss((torch.tensor([[1.0, 1.0], [0.0, 0.0]]),), (0.5,)).item() == 0.25


def test_the_parents_weights_are_trained_later_and_more_slowly() -> None:
    config = replace(TRAINING, epochs=6, own_rate=0.25, own_since=0.5)
    task = task_of(DEIT, config)
    names = {id(p): name for name, p in task.module.named_parameters()}
    trained: dict[str, tuple[float, int, bool]] = {}
    for group in task.groups():
        for parameter in group.parameters:
            trained[names[id(parameter)]] = group.rate, group.since, group.decay
    assert trained["blocks.0.attn.qkv.weight"] == (0.25, 3, True)
    assert trained["blocks.0.norm1.weight"] == (0.25, 3, False)
    assert trained["score_predictor.0.in_conv.1.weight"] == (1.0, 0, True)
    assert trained["score_predictor.2.out_conv.4.bias"] == (1.0, 0, False)
    assert set(names.values()) - set(trained) == {"cls_token", "pos_embed"}


def test_statistics_of_batch_norms_stay_the_parents() -> None:
    task = task_of(LVVIT)
    before = {n: b.clone() for n, b in task.module.named_buffers() if "running" in n}
    assert before
    task.outputs(task.module, images(LVVIT))
    for name, value in task.module.named_buffers():
        if name in before:
            assert torch.equal(value, before[name])
    assert any(child.training for child in task.module.modules() if isinstance(child, Predictor))


@_EACH
def test_under_mixed_precision_the_loss_stays_near_and_gradients_reach_all(spec: ModelSpec) -> None:
    losses = []
    for enabled in (False, True):
        task = task_of(spec)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = task.outputs(task.module, images(spec))
        assert (outputs.student.logits.dtype == torch.bfloat16) == enabled
        loss, logits = task.loss(outputs, lambda logits: logits.square().mean())
        assert (loss.dtype, logits.dtype) == (torch.float32, torch.float32)
        loss.backward()
        for name, parameter in task.module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.dtype == torch.float32, name
                assert torch.isfinite(parameter.grad).all(), name
        losses.append(loss.item())
    # A dozen layers of 8 bits each; a decision drawn near its threshold may fall otherwise.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_some_images_go_without_a_branch_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    depth = StochasticDepth()
    depth.rate = 0.4
    branch = torch.ones(20000, 3, 2)
    dropped = depth.train()(branch)
    assert torch.equal(depth.eval()(branch), branch)
    # Of each image all or nothing.
    assert torch.equal(dropped.amax((1, 2)), dropped.amin((1, 2)))
    # Four deviations of the mean of 20000 draws of deviation sqrt(0.4 / 0.6).
    assert dropped.mean().item() == pytest.approx(1, abs=4 * (0.4 / 0.6 / 20000) ** 0.5)


@_EACH
def test_stochastic_depth_grows_with_the_blocks(spec: ModelSpec) -> None:
    module = build(spec)
    set_stochastic_depth(module, 0.2)
    rates = [child.rate for child in module.modules() if isinstance(child, StochasticDepth)]
    assert len(rates) == sum(spec.depths)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)
    assert np.diff(rates) == pytest.approx(0.2 / (len(rates) - 1))
    image = images(spec)
    with torch.no_grad():
        assert torch.equal(module(image), build(spec)(image))


@_EACH
@pytest.mark.usefixtures("workplace")
def test_a_fine_tuned_checkpoint_is_one_of_the_model(spec: ModelSpec) -> None:
    path = finetuned(spec, replace(TRAINING, depth_rate=0.1))
    assert path == Path(f"{spec.name}-pruned.safetensors")
    assert not path.with_name(f"{path.name}.training").exists()
    loaded = load_model(spec.name, checkpoint=path)
    start = draw_weights(parent_of(spec), 0)
    state = loaded.module.state_dict()
    for name in ("cls_token", "pos_embed"):
        if name in start:
            assert torch.equal(state[name], start[name])
    assert not torch.equal(state["head.weight"], start["head.weight"])
    with torch.no_grad():
        assert torch.isfinite(loaded.module(images(spec))).all()


@pytest.mark.usefixtures("workplace")
def test_predictors_learn_to_keep_the_share_that_is_asked_for() -> None:
    training = replace(
        TRAINING, epochs=30, lr=5e-3, ratio_weight=20.0, own_rate=0.0, ema=0.0, augment="none"
    )
    ratios = (0.8, 0.5, 0.2)
    path = finetuned(DEIT, training, keep_ratio=ratios)
    module = load_model(DEIT.name, checkpoint=path, keep_ratio=ratios).module.train()
    torch.manual_seed(0)
    with torch.no_grad():
        output = module(images(DEIT, count=4).repeat(4, 1, 1, 1))
    assert isinstance(output, TrainingOutput)
    shares = [decision.mean().item() for decision in output.decisions]
    # Untrained, each stage keeps half of what the one before left: 0.5, 0.25, 0.125.
    assert shares == pytest.approx(ratios, abs=0.1)


class Killed(BaseException):
    """What no handler catches, as a kill."""


class KilledAt(SilentTraining):
    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, record: StepRecord) -> None:
        if record.step == self.last:
            raise Killed


@pytest.mark.usefixtures("workplace")
def test_a_killed_fine_tuning_goes_on_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(TRAINING, epochs=3, mixup=0.2, depth_rate=0.2)
    wanted = finetuned(LVVIT, training, output=Path("whole.safetensors")).read_bytes()
    path = Path("resumed.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneConfig, "listeners", lambda *_: KilledAt(5))
        with pytest.raises(Killed):
            finetuned(LVVIT, training, output=path)
    assert not path.exists()
    assert finetuned(LVVIT, training, output=path).read_bytes() == wanted
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneConfig, "listeners", lambda *_: KilledAt(3))
        with pytest.raises(Killed):
            finetuned(LVVIT, training, output=path)
    with pytest.raises(UserError, match="keep_ratios was"):
        finetuned(LVVIT, training, output=path, keep_ratio=0.9)


def test_every_pruning_model_has_its_published_training() -> None:
    for name in model_names():
        if model_spec(name).prune_before:
            training = published_training(name)
            assert training.lr == pytest.approx(1e-3 * 64 / 1024)
            assert (training.token_loss == "kl") == ("lvvit" in name)
    assert published_training("dynamicvit_deit_b").ratio_weight == 5.0
    assert published_training("swin_b", epochs=3).epochs == 3
    assert published_training("convnext_t", lr=0.5).lr == 0.5
    with pytest.raises(UserError, match="gfnet_xs drops no patches; fine-tuning is for dynamicvit"):
        published_training("gfnet_xs")


def test_the_help_tells_what_was_published(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in (
        "training images (default: 30 or 120)",
        "patches kept, in the loss (default: 2 or 5 or 10)",
        "1e-3 for 1024 images",
    ):
        assert words in told


OPTIONS = ("--train-data", "data", "--epochs", "2", "--batch-size", "10", "--device", "cpu")


@pytest.mark.usefixtures("workplace")
def test_a_model_is_fine_tuned_and_then_trained_for_int8(
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = str(write_teacher(DEIT))
    more = ("--val-data", "data", "--keep-ratio", "0.8")
    command = ["--model", DEIT.name, *OPTIONS, *more]
    assert main(["finetune", *command, "--teacher", teacher]) == 0
    said = capsys.readouterr()
    assert "top-1: teacher" in said.out
    assert "epoch 2/2: loss" in said.err
    path = f"{DEIT.name}-pruned.safetensors"
    assert main(["quantize", *command, "--checkpoint", path]) == 0
    assert "score_predictor.0.inner" in capsys.readouterr().out
    quantized = Path(f"{DEIT.name}-int8.safetensors")
    read = read_quantized(quantized)
    assert [layer.name for layer in read.layers][1:5] == [
        "blocks.0.attn.qkv",
        "blocks.0.attn.q",
        "blocks.0.attn.k",
        "blocks.0.attn.v",
    ]
    assert read.training["keep_ratios"] == list(DEIT.pruned(0.8).keep_ratios)
    assert load_model(DEIT.name, checkpoint=quantized).spec.kept_patches == (28, 23, 18)
    with pytest.raises(UserError, match=r"quantized for keep ratios 0\.8, 0\.64, 0\.512"):
        load_model(DEIT.name, checkpoint=quantized, keep_ratio=0.7)
    with pytest.raises(UserError, match="quantized for 48 pixels, not 64"):
        load_model(DEIT.name, checkpoint=quantized, image_size=64)
    with pytest.raises(UserError, match="is quantized, of another model than gfnet_ti"):
        load_model("gfnet_ti", checkpoint=quantized)


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("spec", "precision", "ratio"),
    [(DEIT, ("--weight-bits", "4", "--group-size", "16"), "1,0.8,0.5"), (CONVNEXT, (), "0.7")],
    ids=["deit-int4", "convnext-int8"],
)
def test_from_a_parent_to_a_running_bundle(
    spec: ModelSpec,
    precision: tuple[str, ...],
    ratio: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ["--model", spec.name, "--keep-ratio", ratio]
    assert main(["finetune", *model, *OPTIONS, "--teacher", str(write_teacher(spec))]) == 0
    quantize = ["--checkpoint", f"{spec.name}-pruned.safetensors", "--learn-scales", *precision]
    assert main(["quantize", *model, *OPTIONS, *quantize, "--output", "q.safetensors"]) == 0
    capsys.readouterr()
    compiling = ["--checkpoint", "q.safetensors", "--target", "host", "--int8", "--quiet"]
    assert main(["--model", spec.name, *compiling]) == 0
    bundle = Path(capsys.readouterr().out.strip())
    manifest = json.loads((bundle / "manifest.json").read_text())
    (entry,) = (entry for entry in manifest["ledger"] if entry["stage"] == "artifact")
    # The stages that drop patches, each as the graph does: 36 of small images hold no near-ties
    # that an int8 step moves, but for one.
    given = load_model(spec.name, checkpoint=Path("q.safetensors")).spec
    assert len(entry["tokens_kept"]) == len(given.dropping)
    assert min(entry["tokens_kept"]) >= 0.9
    assert manifest["extra"]["training"]["epochs"] == 2
    assert manifest["precision"]["storage"].startswith("int4" if precision else "int8")
    assert main(["run", str(bundle), "data/3/0.png", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    # The same photo, through torch in float32, gives much the same probabilities.
    top = {entry["index"]: entry["probability"] for entry in result["top"]}
    float_model = load_model(
        spec.name, checkpoint=Path(f"{spec.name}-pruned.safetensors"), keep_ratio=given.keep_ratios
    )
    pixels = preprocess(Path("data/3/0.png"), float_model.transform)
    with torch.no_grad():
        wanted = float_model.module(torch.from_numpy(pixels)).softmax(1)[0]
    for index, probability in top.items():
        assert probability == pytest.approx(wanted[index].item(), abs=0.1)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--model", "gfnet_ti", "--teacher", "none.pth"), "gfnet_ti drops no patches"),
        (("--model", DEIT.name, "--teacher", "none.pth"), "no such checkpoint"),
        (("--model", DEIT.name, "--teacher", "other.safetensors"), "does not fit small_deit_whole"),
        (("--model", DEIT.name, "--teacher", "t.pth", "--output", "t.pth"), "give another --outp"),
        (("--model", DEIT.name, "--teacher", "t.pth", "--output", "."), "is a folder"),
        (("--model", DEIT.name, "--teacher", "t.pth", "--own-rate", "2"), "--own-rate 2.0 is not"),
        (("--model", DEIT.name, "--teacher", "t.pth", "--keep-ratio", "2"), "keep ratio 2"),
    ],
)
def test_mistakes_are_said_in_one_line(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, "other.safetensors")
    assert main(["finetune", *arguments, *OPTIONS]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint in line


_MAIN = """
import sys
from dataclasses import replace
from gfcompile.compile import models
from gfcompile.compile.cli import main
from pruning_cases import DEIT, whole
models._SPECS["small_deit_whole"] = replace(whole(DEIT), name="small_deit_whole")
models._SPECS["small_deit"] = replace(DEIT, parent="small_deit_whole")
sys.exit(main())
"""


@pytest.mark.slow
def test_two_processes_fine_tune_together_and_one_writes(workplace: Path) -> None:
    script = workplace / "main.py"
    script.write_text(_MAIN)
    teacher = str(write_teacher(DEIT))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["finetune", "--model", DEIT.name, "--teacher", teacher, *OPTIONS]
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", str(script), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("next: gfcompile") == 1
    assert done.stderr.count("epoch 2/2: loss") == 1
    load_model(DEIT.name, checkpoint=Path(f"{DEIT.name}-pruned.safetensors"))
    # And then for int8: predictors, which no gradient reaches, hold nobody up.
    command = ["quantize", "--model", DEIT.name, *OPTIONS]
    command += ["--checkpoint", f"{DEIT.name}-pruned.safetensors"]
    subprocess.run(
        [*launcher, "--nproc-per-node=2", str(script), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        check=True,
    )
    assert read_quantized(Path(f"{DEIT.name}-int8.safetensors")).training["processes"] == 2
