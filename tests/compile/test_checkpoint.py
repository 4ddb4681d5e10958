"""Checkpoints of every kind load as the paper's code would; everything else is refused."""

import argparse
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from torch import Tensor

from gfcompile.compile import models
from gfcompile.compile.models import Paper, gfnet, load_model
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.runtime.errors import UserError

State = dict[str, Tensor]

_SMALL = GFNetSpec(
    name="small",
    family="gfnet",
    paper=Paper(title="none", arxiv="0000.00000"),
    image_size=64,
    num_classes=10,
    patch_size=8,
    dims=(12,),
    depths=(2,),
)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of some kilobytes, so that each test writes a checkpoint of its own."""
    monkeypatch.setitem(models._SPECS, _SMALL.name, _SMALL)


@pytest.fixture
def state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(s, generator=generator) for name, s in _SMALL.shapes().items()}


_WRITERS: dict[str, Callable[[State, Path], object]] = {
    "model and arguments": lambda state, path: torch.save(
        {"model": state, "args": argparse.Namespace(lr=1e-3, arch="gfnet-xs"), "epoch": 299}, path
    ),
    "bare": torch.save,
    "state_dict": lambda state, path: torch.save({"state_dict": state}, path),
    "distributed": lambda state, path: torch.save(
        {"model": {f"module.{name}": value for name, value in state.items()}}, path
    ),
    "compiled": lambda state, path: torch.save(
        {f"_orig_mod.{name}": value for name, value in state.items()}, path
    ),
    "parameters": lambda state, path: torch.save(
        {name: torch.nn.Parameter(value) for name, value in state.items()}, path
    ),
    "legacy": lambda state, path: torch.save(
        {"model": state}, path, _use_new_zipfile_serialization=False
    ),
    "safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("kind", _WRITERS)
def test_each_kind_of_checkpoint_loads(kind: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    _WRITERS[kind](state, path)
    model = load_model("small", checkpoint=path)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.module(image), gfnet.build(_SMALL, state)(image))
    assert not model.is_random
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.weights == f"checkpoint weights.pth sha256:{digest}"


def test_half_precision_becomes_float32(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({name: value.half() for name, value in state.items()}, path)
    loaded = load_model("small", checkpoint=path).module.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert torch.equal(loaded["head.weight"], state["head.weight"].half().float())


def test_filters_are_hermitian_once_loaded(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    loaded = load_model("small", checkpoint=path).module.state_dict()
    weight = loaded["blocks.1.filter.complex_weight"]
    assert not torch.equal(weight, state["blocks.1.filter.complex_weight"])
    assert torch.equal(weight, gfnet.hermitian(weight, 8))


def test_class_count_comes_from_the_head(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state | {"head.weight": torch.ones(3, 12), "head.bias": torch.ones(3)}, path)
    assert load_model("small", checkpoint=path).num_classes == 3
    assert load_model("small", checkpoint=path, num_classes=3).num_classes == 3
    with pytest.raises(UserError, match="has 3 classes, not the 10 asked for"):
        load_model("small", checkpoint=path, num_classes=10)


def _cubic_matrix(old: int, new: int, *, align_corners: bool) -> npt.NDArray[np.float64]:
    """Cubic convolution with a = -0.75 and the border repeated, as (new, old)."""
    matrix = np.zeros((new, old))
    for row in range(new):
        aligned, centred = row * (old - 1) / (new - 1), (row + 0.5) * old / new - 0.5
        position = aligned if align_corners else centred
        for tap in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            t, a = abs(position - tap), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[row, min(max(tap, 0), old - 1)] += near if t <= 1 else far
    return matrix


@pytest.mark.parametrize("image_size", [96, 40])
def test_another_size_interpolates_as_the_paper(
    image_size: int, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    model = load_model("small", checkpoint=path, image_size=image_size)
    assert model.weights.endswith(f", interpolated from 64 to {image_size} pixels")
    loaded = model.module.state_dict()
    side = image_size // 8

    rows = _cubic_matrix(8, side, align_corners=False)
    grid = state["pos_embed"].numpy().reshape(8, 8, 12)
    expected = np.einsum("ip,jq,pqc->ijc", rows, rows, grid).reshape(1, side * side, 12)
    np.testing.assert_allclose(loaded["pos_embed"].numpy(), expected, atol=1e-5)

    rows = _cubic_matrix(8, side, align_corners=True)
    columns = _cubic_matrix(5, side // 2 + 1, align_corners=True)
    name = "blocks.0.filter.complex_weight"
    filters = np.einsum("ip,jq,pqcz->ijcz", rows, columns, state[name].numpy())
    projected = gfnet.hermitian(torch.from_numpy(filters), side)
    np.testing.assert_allclose(loaded[name].numpy(), projected.numpy(), atol=1e-5)

    with torch.no_grad():
        assert model.module(torch.zeros(1, 3, image_size, image_size)).shape == (1, 10)


def test_without_a_size_the_checkpoints_own_is_kept(tmp_path: Path) -> None:
    larger = _SMALL.resized(image_size=96)
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({n: torch.randn(s, generator=generator) for n, s in larger.shapes().items()}, path)
    model = load_model("small", checkpoint=path)
    assert model.image_size == 96
    assert "interpolated" not in model.weights


def _refused(path: Path, name: str = "small") -> str:
    with pytest.raises(UserError) as caught:
        load_model(name, checkpoint=path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such checkpoint" in _refused(tmp_path / "weights.pth")
    assert "is a folder" in _refused(tmp_path)


@pytest.mark.parametrize("kind", ["bare", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(kind: str, kept: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    _WRITERS[kind](state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "truncated" in _refused(path)


@pytest.mark.parametrize("content", [b"hello there", b"\x80\x02}q\x00.", b"{}", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    message = _refused(path)
    assert "no PyTorch checkpoint" in message or "no state dict" in message


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x, 2))])
def test_a_malicious_pickle_is_refused_and_not_run(
    write: Callable[[object, Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    write({"model": _Malicious(tmp_path / "hacked")}, path)
    assert "refused, because loading it would run posix.mkdir" in _refused(path)
    assert not (tmp_path / "hacked").exists()


def test_namespaces_are_let_through_for_the_read_only(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    _WRITERS["model and arguments"](state, path)
    load_model("small", checkpoint=path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_another_models_checkpoint_names_what_differs_and_the_model_it_fits(
    state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    message = _refused(path, "gfnet_xs")
    assert "does not fit gfnet_xs: pos_embed is (1, 64, 12), not (1, 64, 384)" in message
    assert "patch_embed.proj.weight is (12, 3, 8, 8), not (384, 3, 16, 16)" in message
    assert message.endswith("more (it fits small)")


def test_missing_and_unknown_names_are_told(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state["head_dist.weight"] = state.pop("norm.weight")
    torch.save(state, path)
    assert _refused(path).endswith(
        "does not fit small: norm.weight (12,) is missing; head_dist.weight (12,) is unknown"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ([1, 2], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"model": {}}, "holds no state dict"),
        ({"head.weight": torch.ones(3, dtype=torch.int8)}, "holds torch.int8"),
        ({"head.weight": torch.tensor(1.0), "pos_embed": torch.ones(3)}, "does not fit"),
        ({"pos_embed": torch.ones(1, 0, 12)}, "does not fit"),
        ({"norm.bias": torch.ones(1).half().expand(10**6, 10**7)}, "not dense float numbers"),
        ({"norm.bias": torch.ones(1).expand(12)}, "not dense float numbers"),
        ({"norm.bias": torch.ones(12, device="meta")}, "not dense float numbers"),
        ({"norm.bias": torch.nested.nested_tensor([torch.ones(2)])}, "not dense float numbers"),
    ],
)
def test_other_contents_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert message in _refused(path)


def test_numbers_that_are_not_finite_are_refused(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state["blocks.1.mlp.fc1.weight"][3, 4] = float("nan")
    torch.save(state, path)
    assert "'blocks.1.mlp.fc1.weight' holds numbers that are not finite" in _refused(path)


def test_an_impossible_size_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="divisible by 8"):
        load_model("small", checkpoint=tmp_path / "none.pth", image_size=60)
