import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gfcompile.quantize import is_quantized, load_quantized, read_quantized, write_quantized
from gfcompile.quantize.checkpoint import QuantizedCheckpoint
from gfcompile.quantize.data import Images, read_images
from gfcompile.quantize.distributed import open_group
from gfcompile.quantize.int4 import pack_int4, unpack_int4
from gfcompile.quantize.metadata import KEY
from gfcompile.quantize.scheme import QuantScheme
from gfcompile.quantize.train_config import TrainConfig
from gfcompile.quantize.training import train
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import Transform


@pytest.fixture(params=[(8, None), (4, None), (4, 16)], ids=["int8", "int4", "groups"])
def checkpoint(
    request: pytest.FixtureRequest, square_gfnet: nn.Module, image_folder: Path
) -> QuantizedCheckpoint:
    """Calibrated, not trained."""
    data = Images(
        files=read_images(image_folder, classes=10, names=[f"class{i}" for i in range(10)]),
        transform=Transform(image_size=16, resize=18),
    )
    with open_group("cpu") as group:
        return train(
            square_gfnet,
            data,
            config=TrainConfig(epochs=0),
            scheme=QuantScheme.with_weight_bits(
                request.param[0], group_size=request.param[1], keep_float=("head",)
            ),
            group=group,
        )


@given(st.lists(st.integers(-8, 7)))
def test_four_bits_survive_packing(values: list[int]) -> None:
    array = np.array(values, np.int8)
    packed = pack_int4(array)
    assert packed.nbytes == (len(values) + 1) // 2
    assert np.array_equal(unpack_int4(packed, array.shape), array)


def test_what_is_written_is_read(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    write_quantized(checkpoint, path)
    assert is_quantized(path)
    read = read_quantized(path)
    assert read.state.keys() == checkpoint.state.keys()
    for name, value in checkpoint.state.items():
        assert torch.equal(read.state[name], value), name
    for name, scales in checkpoint.scales.items():
        assert np.array_equal(read.scales[name], scales), name
        if checkpoint.scheme.weight.group_size is not None:
            assert np.array_equal(read.factors[name], checkpoint.factors[name]), name
    assert (read.scheme, read.layers) == (checkpoint.scheme, checkpoint.layers)
    assert read.kept_float == checkpoint.kept_float
    assert [layer.name for layer in read.kept_float] == ["head"]
    assert read.training == json.loads(json.dumps(checkpoint.training))
    assert list(tmp_path.iterdir()) == [path]


def test_quantized_weights_take_their_bits_and_no_more(
    checkpoint: QuantizedCheckpoint, tmp_path: Path
) -> None:
    write_quantized(checkpoint, tmp_path / "q.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "q.safetensors")
    bits = checkpoint.scheme.weight_bits
    for name in checkpoint.scales:
        assert stored[name].nbytes == checkpoint.state[name].numel() * bits // 8


def test_the_loaded_module_computes_with_the_stored_integers(
    checkpoint: QuantizedCheckpoint, square_gfnet: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "q.safetensors"
    write_quantized(checkpoint, path)
    stored = safetensors.torch.load_file(path)
    loaded = load_quantized(path, square_gfnet, torch.zeros(1, 3, 16, 16))
    assert loaded.layers == checkpoint.layers
    integers = [
        tensor for tensor in loaded.module.state_dict().values() if tensor.dtype == torch.int8
    ]
    assert len(integers) == len(checkpoint.scales) == 6
    for tensor, name in zip(integers, checkpoint.scales, strict=True):
        wanted = stored[name].numpy()
        if checkpoint.scheme.weight_bits == 4:
            wanted = unpack_int4(wanted, tuple(tensor.shape))
        if checkpoint.scheme.weight.group_size is not None:
            factors = np.repeat(stored[f"{name}.factor"].numpy(), 16, axis=1).astype(np.int8)
            wanted = wanted * factors[:, : wanted[0].size].reshape(wanted.shape)
        assert np.array_equal(tensor.numpy(), wanted)


def test_other_files_are_no_quantized_checkpoints(tmp_path: Path, square_gfnet: nn.Module) -> None:
    plain, text = tmp_path / "plain.safetensors", tmp_path / "text.pth"
    safetensors.torch.save_file(square_gfnet.state_dict(), plain)
    text.write_text("hello")
    assert not is_quantized(plain)
    assert not is_quantized(text)
    with pytest.raises(UserError, match="no quantized checkpoint"):
        read_quantized(plain)
    with pytest.raises(UserError, match="no such checkpoint"):
        is_quantized(tmp_path / "none")


def write_small(path: Path, bits: int, group_size: int | None, **damage: object) -> None:
    """A checkpoint of one weight, with other values in its header."""
    scheme = QuantScheme.with_weight_bits(bits, group_size=group_size)
    scales = np.full(2, 0.5, np.float32)
    checkpoint = QuantizedCheckpoint(
        state={"fc.weight": torch.ones(2, 40)},
        scales={"fc.weight": scales},
        factors={"fc.weight": np.full((2, 3), 2, np.uint8)} if group_size else {},
        scheme=scheme,
        layers=(),
        kept_float=(),
        images=1,
    )
    write_quantized(checkpoint, path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        header = json.loads(file.metadata()[KEY])
    text = "[" * 100_000 if "nested" in damage else json.dumps(header | damage)
    safetensors.torch.save_file(tensors, path, {KEY: text})


@pytest.mark.parametrize(
    ("bits", "group_size", "damage"),
    [
        (8, None, {"nested": True}),
        (8, None, {"weights": {"fc.weight": [2**40, 2**40]}}),
        (4, None, {"weights": {"fc.weight": [2, float("inf")]}}),
        (4, None, {"scheme": None}),
        (4, 16, {"weights": {"fc.weight": [2, 41]}}),
    ],
)
def test_a_header_that_cannot_be_is_refused(
    tmp_path: Path, bits: int, group_size: int | None, damage: dict[str, object]
) -> None:
    path = tmp_path / "q.safetensors"
    write_small(path, bits, group_size)
    assert torch.equal(read_quantized(path).state["fc.weight"], torch.ones(2, 40))
    write_small(path, bits, group_size, **damage)
    with pytest.raises(UserError, match="damaged"):
        read_quantized(path)


def test_a_size_of_groups_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    scheme = dict(QuantScheme.with_weight_bits(4, group_size=16).to_dict())
    scheme["weight"] = {**scheme["weight"], "group_size": 1 << 44}
    write_small(path, 4, 16, scheme=scheme)
    assert torch.equal(read_quantized(path).state["fc.weight"], torch.ones(2, 40))


def test_a_checkpoint_of_another_model_or_that_is_damaged_is_refused(
    checkpoint: QuantizedCheckpoint, mini_gfnet: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "q.safetensors"
    write_quantized(checkpoint, path)
    with pytest.raises(UserError, match="another model than MiniGfnet"):
        load_quantized(path, mini_gfnet, torch.zeros(1, 3, 24, 16))
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    del tensors["first.fc1.weight.scale"]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="damaged"):
        read_quantized(path)
