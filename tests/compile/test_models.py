"""The zoo is the paper's: names, shapes, cost and arithmetic, against NumPy and torch."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf
from torch.utils.flop_counter import FlopCounterMode

from gfcompile.compile.models import Paper, gfnet, load_model, model_names, model_spec
from gfcompile.compile.models.gfnet_specs import GFNetSpec, _filter_macs
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import preprocess, stand_in_photos

Array = npt.NDArray[np.float64]

_PAPER = Paper(title="none", arxiv="0000.00000")
_SMALL = GFNetSpec(
    name="small",
    family="gfnet",
    paper=_PAPER,
    image_size=48,
    num_classes=10,
    patch_size=8,
    dims=(16,),
    depths=(3,),
)
_SMALL_PYRAMID = GFNetSpec(
    name="small_pyramid",
    family="gfnet",
    paper=_PAPER,
    image_size=48,  # grids of 12, 6 and 3: even and odd
    num_classes=10,
    patch_size=4,
    dims=(8, 16, 32),
    depths=(1, 2, 1),
)
_SMALLS = pytest.mark.parametrize("spec", [_SMALL, _SMALL_PYRAMID], ids=lambda spec: spec.name)

_ALL = pytest.mark.parametrize(
    "name", [name for name in model_names() if model_spec(name).family == "gfnet"]
)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gfnet_ti", 7.51),
        ("gfnet_xs", 15.99),
        ("gfnet_s", 24.87),
        ("gfnet_b", 43.12),
        ("gfnet_h_ti", 15.09),
        ("gfnet_h_s", 32.16),
        ("gfnet_h_b", 53.74),
    ],
)
def test_parameter_counts_are_the_papers(name: str, millions: float) -> None:
    assert round(model_spec(name).parameters / 1e6, 2) == millions


def _meta(spec: GFNetSpec) -> torch.nn.Module:
    with torch.device("meta"):
        return gfnet.GFNetPyramid(spec) if spec.is_pyramid else gfnet.GFNet(spec)


@_ALL
@pytest.mark.parametrize("image_size", [224, 96])
def test_shapes_are_those_of_the_module(name: str, image_size: int) -> None:
    spec = model_spec(name).resized(image_size=image_size, num_classes=7)
    assert isinstance(spec, GFNetSpec)
    state = _meta(spec).state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(
        spec.shapes().items()
    )


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        (
            "gfnet_xs",
            {
                "pos_embed": (1, 196, 384),
                "patch_embed.proj.weight": (384, 3, 16, 16),
                "blocks.11.norm1.weight": (384,),
                "blocks.0.filter.complex_weight": (14, 8, 384, 2),
                "blocks.5.norm2.bias": (384,),
                "blocks.5.mlp.fc1.weight": (1536, 384),
                "blocks.5.mlp.fc2.bias": (384,),
                "norm.weight": (384,),
                "head.weight": (1000, 384),
                "head.bias": (1000,),
            },
        ),
        (
            "gfnet_h_ti",
            {
                "pos_embed": (1, 3136, 64),
                "patch_embed.0.proj.weight": (64, 3, 4, 4),
                "patch_embed.3.proj.weight": (512, 256, 2, 2),
                "blocks.0.2.gamma": (64,),
                "blocks.0.0.filter.complex_weight": (56, 29, 64, 2),
                "blocks.3.2.filter.complex_weight": (7, 4, 512, 2),
                "blocks.2.9.mlp.fc1.bias": (1024,),
                "norm.bias": (512,),
                "head.weight": (1000, 512),
            },
        ),
    ],
)
def test_names_are_those_of_the_published_weights(
    name: str, entries: dict[str, tuple[int, ...]]
) -> None:
    shapes = model_spec(name).shapes()
    assert entries.items() <= shapes.items()
    per_block = 10 if "_h_" in name else 9
    embeddings = 4 if "_h_" in name else 1
    assert len(shapes) == 1 + 2 * embeddings + per_block * sum(model_spec(name).depths) + 4


@_ALL
def test_macs_are_those_that_torch_counts(name: str) -> None:
    spec = model_spec(name)
    assert isinstance(spec, GFNetSpec)
    with FlopCounterMode(display=False) as counter:
        _meta(spec)(torch.empty(1, 3, 224, 224, device="meta"))
    # The counter sees convolutions and products, two operations each, but no Fourier transform.
    filters = sum(
        depth * dim * _filter_macs(side, side)
        for dim, depth, side in zip(spec.dims, spec.depths, spec.sides, strict=True)
    )
    assert spec.macs == counter.get_total_flops() // 2 + filters


def test_filter_macs_are_those_of_its_real_products() -> None:
    h, w, half = 6, 10, 6
    along_w = h * w * half  # one real (w, half) product on each of h rows
    along_h = half * h * h
    forward = 2 * along_w + 4 * along_h  # to re and im; complex by complex
    backward = 4 * along_h + 2 * along_w
    assert _filter_macs(h, w) == forward + 4 * h * half + backward


def test_gfnet_xs_costs_what_the_paper_says() -> None:
    assert model_spec("gfnet_xs").macs == pytest.approx(2.9e9, rel=0.01)


def _layer_norm(x: Array, state: dict[str, Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(x: Array, state: dict[str, Array], name: str) -> Array:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _patches(grid: Array, state: dict[str, Array], name: str) -> Array:
    """A convolution whose stride is its kernel: (B, H, W, C) -> (B, h, w, D)."""
    weight = state[f"{name}.proj.weight"]  # (D, C, k, k)
    b, height, width, _ = grid.shape
    k = weight.shape[2]
    cut = grid.reshape(b, height // k, k, width // k, k, -1)
    return np.einsum("bhiwjc,dcij->bhwd", cut, weight) + state[f"{name}.proj.bias"]


def _numpy_gfnet(spec: GFNetSpec, state: dict[str, Array], image: Array) -> Array:
    """The paper's network in float64, on NumPy's FFT and whatever filters it is given."""
    x = image.transpose(0, 2, 3, 1)
    for stage, (depth, side) in enumerate(zip(spec.depths, spec.sides, strict=True)):
        x = _patches(x, state, f"patch_embed.{stage}" if spec.is_pyramid else "patch_embed")
        if stage == 0:
            x = x + state["pos_embed"].reshape(side, side, -1)
        for index in range(depth):
            block = f"blocks.{stage}.{index}" if spec.is_pyramid else f"blocks.{index}"
            y = _layer_norm(x, state, f"{block}.norm1")
            k = state[f"{block}.filter.complex_weight"]
            y = np.fft.rfft2(y, axes=(1, 2)) * (k[..., 0] + 1j * k[..., 1])
            y = np.fft.irfft2(y, s=(side, side), axes=(1, 2))
            y = _linear(_layer_norm(y, state, f"{block}.norm2"), state, f"{block}.mlp.fc1")
            y = _linear(y / 2 * (1 + erf(y / math.sqrt(2))), state, f"{block}.mlp.fc2")
            x = x + state.get(f"{block}.gamma", np.ones(1)) * y
    return _linear(_layer_norm(x, state, "norm").mean((1, 2)), state, "head")


@_SMALLS
def test_module_equals_the_paper_in_numpy(spec: GFNetSpec) -> None:
    # Drawn, not Hermitian: the projection on the way in must change nothing.
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.empty(shape).normal_(1.0 if len(shape) == 1 else 0, 0.2, generator=generator)
        for name, shape in spec.shapes().items()
    }
    image = torch.empty(2, 3, spec.image_size, spec.image_size).normal_(generator=generator)
    with torch.no_grad():
        logits = gfnet.build(spec, state)(image).numpy()
    doubles = {name: value.numpy().astype(np.float64) for name, value in state.items()}
    expected = _numpy_gfnet(spec, doubles, image.numpy().astype(np.float64))
    # Some ten float32 roundings of 6e-8 in sequence, each of a sum of at most 192 terms.
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_projection_leaves_numpys_filter_as_it_is(h: int, w: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((h, w, 3))
    k = generator.standard_normal((h, w // 2 + 1, 3, 2)).astype(np.float32)
    projected = gfnet.hermitian(torch.from_numpy(k), w).numpy()

    def filtered(k: npt.NDArray[np.float32]) -> Array:
        spectrum = np.fft.rfft2(x, axes=(0, 1), norm="ortho") * (k[..., 0] + 1j * k[..., 1])
        return np.fft.irfft2(spectrum, s=(h, w), axes=(0, 1), norm="ortho")

    # The projection rounds to float32 once: 6e-8 of values up to 4, over a dozen rows.
    assert np.abs(filtered(projected) - filtered(k)).max() < 1e-6


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_projected_filter_has_a_real_kernel(h: int, w: int, seed: int) -> None:
    k = torch.randn(h, w // 2 + 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    projected = gfnet.hermitian(k, w)
    edge = torch.view_as_complex(projected)[:, [0] if w % 2 else [0, w // 2]].numpy()
    # Real kernel: its transform along h, column by column, has no imaginary part.
    assert np.abs(np.fft.ifft(edge, axis=0).imag).max() < 1e-6
    assert torch.equal(gfnet.hermitian(projected, w), projected)
    interior = slice(1, (w + 1) // 2)
    assert torch.equal(projected[:, interior], k[:, interior])


@_SMALLS
def test_exported_graph_keeps_its_transforms(spec: GFNetSpec) -> None:
    module = gfnet.build(spec, gfnet.random_weights(spec, 0))
    image = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(module, (image,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("rfft2" in target and "irfft2" not in target for target in targets) == sum(
        spec.depths
    )
    assert sum("irfft2" in target for target in targets) == sum(spec.depths)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(image), module(image), rtol=0, atol=0)


def test_random_weights_repeat_and_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    first = load_model("gfnet_ti", seed=3)
    again = load_model("gfnet_ti", seed=3).module.state_dict()
    other = load_model("gfnet_ti", seed=4).module.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
    assert first.weights == "random (seed 3)"
    assert first.is_random
    assert not first.module.training


@_SMALLS
def test_no_parameter_of_a_random_model_could_be_lost_unnoticed(spec: GFNetSpec) -> None:
    spec = replace(spec, dims=tuple(8 * dim for dim in spec.dims))  # about as wide as the zoo
    state = gfnet.random_weights(spec, 0)
    image = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = gfnet.build(spec, state)(image)
        for name, value in state.items():
            is_gain = value.ndim == 1 and not name.endswith("bias")
            lost = torch.ones_like(value) if is_gain else torch.zeros_like(value)
            change = (gfnet.build(spec, {**state, name: lost})(image) - logits).std()
            # Two orders above float32 rounding; in the zoo it is 8e-4 and more.
            assert change > 1e-4 * logits.std(), name


@pytest.mark.parametrize("name", ["gfnet_ti", "gfnet_h_ti"])
def test_random_models_tell_images_apart(name: str) -> None:
    model = load_model(name)
    images = np.concatenate([preprocess(path, model.transform) for path in stand_in_photos()])
    with torch.no_grad():
        logits = model.module(torch.from_numpy(images)).numpy()
    assert logits.shape == (4, 1000)
    # How far images differ in a logit, against how far logits differ in an image.
    assert logits.std(axis=0).mean() > 0.3 * logits.std(axis=1).mean()


@pytest.mark.parametrize(("name", "image_size"), [("gfnet_ti", 16), ("gfnet_h_ti", 96)])
def test_other_sizes_and_class_counts_run(name: str, image_size: int) -> None:
    model = load_model(name, image_size=image_size, num_classes=5)
    assert (model.image_size, model.num_classes) == (image_size, 5)
    assert model.transform.image_size == image_size
    with torch.no_grad():
        logits = model.module(torch.zeros(2, 3, image_size, image_size))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    assert model.spec.top1_percent is None


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("gfnet_xs", 200, "divisible by 16, not 200; the nearest are 192 and 208"),
        ("gfnet_xs", 0, "divisible by 16, not 0; the nearest are 16 and 32"),
        ("gfnet_xs", -16, "divisible by 16, not -16"),
        ("gfnet_h_ti", 240, "divisible by 32, not 240; the nearest are 224 and 256"),
    ],
)
def test_impossible_sizes_are_refused(name: str, image_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(name, image_size=image_size)


def test_no_classes_are_refused() -> None:
    with pytest.raises(UserError, match="0 classes"):
        load_model("gfnet_ti", num_classes=0)


@pytest.mark.parametrize("name", ["gfnet-xs", "GFNet_XS", "gfnetxs"])
def test_unknown_names_get_the_nearest_and_the_list(name: str) -> None:
    with pytest.raises(UserError, match="did you mean gfnet_xs\\?") as caught:
        model_spec(name)
    assert all(known in str(caught.value) for known in model_names())


def test_names_like_none_get_the_list_alone() -> None:
    with pytest.raises(UserError, match="unknown model 'resnet50' \\(known: gfnet_ti, "):
        load_model("resnet50")


def test_specs_say_where_they_come_from() -> None:
    spec = model_spec("gfnet_xs")
    assert "arXiv:2107.00645" in str(spec.paper)
    assert spec.top1_percent == 78.6
    assert (spec.transform.image_size, spec.transform.resize) == (224, 256)


def test_listing_models_does_not_import_torch() -> None:
    script = (
        "import sys, gfcompile.compile.models as m;"
        "[(m.model_spec(n).parameters, m.model_spec(n).macs) for n in m.model_names()];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
