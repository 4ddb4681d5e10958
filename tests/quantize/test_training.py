import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gfcompile.quantize import load_quantized, loop, training, write_quantized
from gfcompile.quantize.checkpoint import QuantizedCheckpoint
from gfcompile.quantize.data import Images, read_images
from gfcompile.quantize.distributed import choose_device, open_group
from gfcompile.quantize.loop import EpochRecord, SilentTraining, StepRecord, accuracy
from gfcompile.quantize.prepared import prepare_training
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.quantize.train_config import TrainConfig
from gfcompile.quantize.training import train
from gfcompile.runtime.errors import CompileError, UserError
from gfcompile.runtime.images import Transform

CONFIG = TrainConfig(epochs=2, batch_size=8, lr=1e-3, augment="crop", calibration_images=8)
FOUR_BITS = QuantScheme.with_weight_bits(4)


@pytest.fixture
def data(image_folder: Path) -> Images:
    names = [f"class{i}" for i in range(10)]
    return Images(
        files=read_images(image_folder, classes=10, names=names),
        transform=Transform(image_size=16, resize=18),
        threads=2,
    )


def trained(
    module: nn.Module,
    data: Images,
    config: TrainConfig = CONFIG,
    scheme: QuantScheme = FOUR_BITS,
    **options: Any,
) -> QuantizedCheckpoint:
    with open_group("cpu") as group:
        return train(module, data, config=config, scheme=scheme, group=group, **options)


def content(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> bytes:
    write_quantized(checkpoint, tmp_path / "content.safetensors")
    return (tmp_path / "content.safetensors").read_bytes()


def distance(checkpoint: QuantizedCheckpoint, module: nn.Module, data: Images, path: Path) -> float:
    """How far the quantized module's class probabilities are from the float module's."""
    write_quantized(checkpoint, path)
    (batch,) = data.evaluate(24)
    images = torch.from_numpy(batch.images)
    quantized = load_quantized(path, module, images).module
    with torch.no_grad():
        ours, theirs = (F.log_softmax(m(images), dim=1) for m in (quantized, module))
    return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("learn_scales", [False, True])
def test_training_brings_four_bit_weights_nearer_to_the_float_model(
    square_gfnet: nn.Module, data: Images, tmp_path: Path, learn_scales: bool
) -> None:
    config = replace(CONFIG, epochs=16, distill=1.0, augment="none", learn_scales=learn_scales)
    calibrated = trained(square_gfnet, data, replace(config, epochs=0))
    path = tmp_path / "q.safetensors"
    before = distance(calibrated, square_gfnet, data, path)
    after = distance(trained(square_gfnet, data, config), square_gfnet, data, path)
    assert after < 0.8 * before


def test_what_was_trained_is_what_the_checkpoint_computes(
    square_gfnet: nn.Module, data: Images, tmp_path: Path
) -> None:
    checkpoint = trained(square_gfnet, data, validation=data)
    write_quantized(checkpoint, tmp_path / "q.safetensors")
    (batch,) = data.evaluate(24)
    images = torch.from_numpy(batch.images)
    loaded = load_quantized(tmp_path / "q.safetensors", square_gfnet, images)
    with torch.no_grad():
        right = (loaded.module(images).argmax(1).numpy() == batch.labels).mean()
    assert right == checkpoint.training["history"][-1]["val_top1"]


def test_the_float_module_and_the_random_state_are_left_as_they_were(
    square_gfnet: nn.Module, data: Images
) -> None:
    state = {name: tensor.clone() for name, tensor in square_gfnet.state_dict().items()}
    before = torch.get_rng_state()
    trained(square_gfnet, data)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in square_gfnet.state_dict().items():
        assert torch.equal(tensor, state[name]), name


class Killed(BaseException):
    """What no handler catches, as a kill."""


class KilledAt(SilentTraining):
    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, record: StepRecord) -> None:
        if record.step == self.last:
            raise Killed


@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_killed_training_goes_on_to_the_same_bits(
    square_gfnet: nn.Module,
    data: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    learn_scales: bool,
) -> None:
    config = replace(CONFIG, epochs=3, learn_scales=learn_scales, mixup=0.2, augment="crop-flip")
    wanted = content(trained(square_gfnet, data, config), tmp_path)
    state = tmp_path / "state"
    # Killed in an epoch whose state was saved at its start only, then with saves after each step:
    # within an epoch of three, and after its last step.
    for step, seconds in ((5, 600.0), (8, 0.0), (9, 0.0)):
        monkeypatch.setattr(loop, "_SAVE_SECONDS", seconds)
        with pytest.raises(Killed):
            trained(square_gfnet, data, config, state_file=state, progress=KilledAt(step))
    resumed = trained(square_gfnet, data, config, state_file=state)
    assert content(resumed, tmp_path) == wanted


def test_a_state_of_another_training_is_not_gone_on_from(
    square_gfnet: nn.Module, data: Images, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    trained(square_gfnet, data, replace(CONFIG, epochs=1), state_file=state)
    with pytest.raises(UserError, match=r"config\.ema was 0\.998, is 0\.5"):
        trained(square_gfnet, data, replace(CONFIG, epochs=1, ema=0.5), state_file=state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match="no training state that can be resumed"):
        trained(square_gfnet, data, replace(CONFIG, epochs=1), state_file=state)


def test_a_loss_that_is_not_finite_ends_training_and_the_last_good_state_stays(
    square_gfnet: nn.Module, data: Images, tmp_path: Path
) -> None:
    class Poisoning(SilentTraining):
        def epoch(self, record: EpochRecord) -> None:  # noqa: ARG002 - the protocol's
            data.transform = Transform(image_size=16, resize=18, std=(1e-38, 1e-38, 1e-38))

    state = tmp_path / "state"
    with pytest.raises(CompileError, match=r"step 4 \(epoch 2\); lower --lr.* good state is kept"):
        trained(square_gfnet, data, state_file=state, progress=Poisoning())
    data.transform = Transform(image_size=16, resize=18)
    # A lower learning rate may go on from there.
    trained(square_gfnet, data, replace(CONFIG, lr=1e-4), state_file=state)


def test_ranges_follow_the_weights_for_a_while_and_are_frozen_then(
    square_gfnet: nn.Module, data: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(SilentTraining):
        made = 0

        def step(self, record: StepRecord) -> None:
            self.made = record.step

    count = Counting()
    settled: list[int] = []
    original = training._QuantizedTraining.settle_ranges

    def counted(self: Any) -> None:
        settled.append(count.made)
        original(self)

    monkeypatch.setattr(training._QuantizedTraining, "settle_ranges", counted)
    half = replace(CONFIG, epochs=4, range_epochs=0.5)
    trained(square_gfnet, data, half, progress=count)
    assert settled == [0, 3]  # 3 steps an epoch
    settled.clear()
    count.made = 0
    learned = replace(CONFIG, epochs=4, learn_scales=True)
    trained(square_gfnet, data, learned, progress=count)
    assert settled == [0]


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine(
    square_gfnet: nn.Module, data: Images
) -> None:
    class Rates(SilentTraining):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def step(self, record: StepRecord) -> None:
            self.seen.append(record.lr)

    rates = Rates()
    trained(square_gfnet, data, replace(CONFIG, epochs=4, warmup=0.25, lr=1.0), progress=rates)
    assert rates.seen[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert rates.seen[3] == pytest.approx(1.0)
    assert np.all(np.diff(rates.seen[3:]) < 0)
    assert rates.seen[-1] < 0.05


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"epochs": -1}, "--epochs -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"distill": 1.5}, r"--distill 1.5 is not in \[0, 1\]"),
    ],
)
def test_options_that_cannot_be_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        replace(CONFIG, **changes)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="choose from auto, cpu, cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU here"):
            choose_device("cuda")


def test_validation_needs_an_image_that_can_be_read(square_gfnet: nn.Module, data: Images) -> None:
    data.files = replace(data.files, paths=data.files.paths[:1], labels=data.files.labels[:1])
    data.corrupt[0] = "broken"
    with open_group("cpu") as group, pytest.raises(UserError, match="not one image can be read"):
        accuracy(square_gfnet, data, group)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_under_mixed_precision_ranges_and_spectra_stay_in_float32(
    square_gfnet: nn.Module, learn_scales: bool
) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prepared = prepare_training(square_gfnet, images, QuantScheme(), learn_scales=learn_scales)
    with torch.no_grad():
        prepared.graph(images)
    prepared.settle()
    for fake in prepared.fake_quants():
        fake.freeze(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        logits = prepared.graph(images)
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        wanted = prepared.graph(images)
    # bfloat16 has 8 bits; seven layers of it.
    assert (logits - wanted).abs().max() < 7 * 2**-8 * wanted.abs().max()
    logits.float().sum().backward()
    gradient = prepared.graph.get_parameter("first.filter.weight").grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert gradient.abs().max() > 0


_TOGETHER = """
import sys
from pathlib import Path
import torch
from gfcompile.quantize import QuantScheme, TrainConfig, train, write_quantized
from gfcompile.quantize.data import Images, read_images
from gfcompile.quantize.distributed import open_group
from gfcompile.runtime.images import Transform
sys.path.insert(0, sys.argv[1])
from conftest import MiniGfnet
torch.manual_seed(0)
torch.set_num_threads(1)
module = MiniGfnet(4, 4).eval()
names = [f"class{i}" for i in range(10)]
data = Images(
    files=read_images(Path(sys.argv[2]), classes=10, names=names),
    transform=Transform(image_size=16, resize=18),
)
config = TrainConfig(epochs=2, batch_size=8, lr=1e-3, distill=0.5)
with open_group("cpu") as group:
    result = train(
        module, data, config=config, scheme=QuantScheme(), group=group, validation=data,
        state_file=Path(sys.argv[3] + ".state"),
    )
    if group.is_first:
        write_quantized(result, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(image_folder: Path, tmp_path: Path) -> None:
    from gfcompile.quantize import read_quantized

    script = tmp_path / "together.py"
    script.write_text(_TOGETHER)
    results = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.safetensors"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", str(script)]
        arguments = [str(Path(__file__).parent), str(image_folder), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
        results.append(read_quantized(path))
    one, two = results
    for first, second in zip(one.training["history"], two.training["history"], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
        assert first["val_top1"] == second["val_top1"]
    for name, value in one.state.items():
        other = two.state[name]
        if name in one.scales:
            # Gradients are summed in another order; a weight near a tie may fall to either side.
            steps = torch.from_numpy(one.scales[name]).reshape(-1, *[1] * (value.ndim - 1))
            assert one.scales[name] == pytest.approx(two.scales[name], rel=1e-2), name
            assert ((value - other).abs() <= 1.1 * steps).all(), name
            assert ((value - other).abs() > 0.5 * steps).float().mean() < 0.02, name
        else:
            assert other.numpy() == pytest.approx(value.numpy(), abs=1e-3), name
