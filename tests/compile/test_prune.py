"""Freezing changes no logit and keeps the same patches; what it leaves is static."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pruning_reference
import pytest
import torch
from pruning_cases import CONVNEXT, DEIT, LVVIT, SPECS, SWIN, build, images, kept, weights
from pruning_cases import whole as parent_of
from torch import nn

from gfcompile.compile.models import load_model
from gfcompile.compile.models.dynamicvit import Attention, Block, ConvStem
from gfcompile.compile.models.predictor import Partition, Predictor, take_tokens
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.models.swin import WindowAttention
from gfcompile.compile.prune import FrozenPredictor, freeze, selections
from gfcompile.compile.trace import INPUT, OUTPUT, session, trace
from gfcompile.quantize import QuantScheme, calibrate
from gfcompile.runtime.kept_patches import places_in_grid

pytestmark = pytest.mark.usefixtures("one_thread")

_EACH = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
_POINTWISE = pytest.mark.parametrize("pointwise", [False, True], ids=["linear", "pointwise"])


@_EACH
def test_frozen_networks_keep_the_same_patches_and_logits(spec: ModelSpec) -> None:
    """In float64, where no score is so near another that rounding could swap them."""
    module, image = build(spec).double(), images(spec, count=4).double()
    before, after = kept(spec, module, image), kept(spec, freeze(module), image)
    for ours, theirs in zip(after.kept, before.kept, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-13)


@_EACH
def test_frozen_networks_agree_in_float32(spec: ModelSpec) -> None:
    module, image = build(spec), images(spec, count=4)
    before, after = kept(spec, module, image), kept(spec, freeze(module), image)
    for ours, theirs in zip(after.kept, before.kept, strict=True):
        assert torch.equal(ours, theirs)
    error = (after.logits - before.logits).abs().max()
    assert error <= 1e-5 * before.logits.abs().max()  # as between any two orders of summation


@_EACH
def test_each_image_of_a_batch_is_pruned_by_itself(spec: ModelSpec) -> None:
    module, image = freeze(build(spec)), images(spec)
    together = kept(spec, module, image)
    for number in range(len(image)):
        alone = kept(spec, module, image[number : number + 1])
        torch.testing.assert_close(together.logits[number : number + 1], alone.logits)
        for stage, same in zip(together.kept, alone.kept, strict=True):
            assert torch.equal(stage[number : number + 1], same)


@_EACH
def test_freezing_leaves_the_model_as_it_was(spec: ModelSpec) -> None:
    module = build(spec).train()
    before = copy.deepcopy(module.state_dict())
    frozen = freeze(module)
    assert not any(isinstance(part, Predictor) for part in frozen.modules())
    assert any(isinstance(part, Predictor) for part in module.modules())
    assert module.training
    assert not frozen.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    # What no rewrite touches is there once: a large model does not become two.
    addresses = {value.data_ptr() for value in frozen.parameters()}
    assert module.get_parameter("head.weight").data_ptr() in addresses


def test_a_network_with_nothing_to_rewrite_comes_back_equal() -> None:
    module = load_model("gfnet_ti", image_size=32, num_classes=3).module
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(freeze(module)(image), module(image))


def _predictor(keep: int, *, pointwise: bool) -> tuple[Predictor, dict[str, torch.Tensor]]:
    predictor = Predictor(16, keep, eps=1e-6, pointwise=pointwise).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in predictor.parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.5, generator=generator)
    return predictor, {f"p.{name}": value for name, value in predictor.state_dict().items()}


def _patches(count: int = 30) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, count, 16, generator=generator, dtype=torch.float64)


@_POINTWISE
def test_frozen_scores_are_the_difference_of_the_two_logits(pointwise: bool) -> None:
    predictor, state = _predictor(12, pointwise=pointwise)
    patches = _patches()
    log_p = pruning_reference.log_probabilities(patches, state, "p", 1e-6)
    bias = state["p.out_conv.4.bias"]
    with torch.no_grad():
        scores = FrozenPredictor(predictor).scores(patches)
    expected = log_p[..., 0] - log_p[..., 1] - (bias[0] - bias[1])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    # The probability grows with the difference, so the order is the same.
    assert torch.equal(scores.argsort(1), log_p[..., 0].argsort(1))


@_POINTWISE
def test_a_mean_under_a_policy_of_ones_is_a_plain_mean(pointwise: bool) -> None:
    predictor, state = _predictor(12, pointwise=pointwise)
    patches = _patches()
    with torch.no_grad():
        found = predictor.log_probabilities(patches, torch.ones(4, 30, 1).double())
        half = torch.ones(4, 30, 1).double()
        half[:, 15:] = 0
        masked = predictor.log_probabilities(patches, half)[:, :15]
    expected = pruning_reference.log_probabilities(patches, state, "p", 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # And under a policy that drops half of them, the mean of the other half.
    expected = pruning_reference.log_probabilities(patches[:, :15], state, "p", 1e-6)
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-12)


def test_unsorted_top_k_keeps_what_sorting_does() -> None:
    predictor, _ = _predictor(12, pointwise=False)
    patches = _patches()
    alive = torch.ones(4, 30, 1).double()
    with torch.no_grad():
        best = predictor(patches, alive)
        frozen = FrozenPredictor(predictor)(patches, alive)
    assert best.shape == frozen.shape == (4, 12)
    assert torch.equal(best.sort(1).values, frozen.sort(1).values)


def test_order_is_kept_where_all_patches_are_returned() -> None:
    predictor, _ = _predictor(30, pointwise=False)
    patches = _patches()
    alive = torch.ones(4, 30, 1).double()
    with torch.no_grad():
        assert torch.equal(predictor(patches, alive), FrozenPredictor(predictor)(patches, alive))


def test_gathered_rows_are_those_of_each_image() -> None:
    x = torch.arange(24).reshape(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    expected = torch.stack([x[0, [3, 0]], x[1, [1, 1]]])
    assert torch.equal(take_tokens(x, index), expected)


@pytest.mark.parametrize("keep", [1, 5, 9])
def test_partition_puts_every_patch_back(keep: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, 4, generator=generator)
    order = torch.stack([torch.randperm(10, generator=generator) for _ in range(3)])
    found = Partition(order, keep).apply(lambda y: 2 * y, lambda y: -y, x)
    expected = -x
    for image in range(3):
        expected[image, order[image, :keep]] = 2 * x[image, order[image, :keep]]
    assert torch.equal(found, expected)


def _only(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return next(part for part in module.modules() if isinstance(part, kind))


def test_batch_norms_become_part_of_their_convolutions() -> None:
    stem = _only(build(parent_of(LVVIT)).double(), ConvStem)
    frozen = freeze(nn.Sequential(stem))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in frozen.modules())
    image = images(LVVIT).double()
    with torch.no_grad():
        torch.testing.assert_close(frozen(image), stem(image), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("spec", "kind"), [(DEIT, Attention), (LVVIT, Attention), (SWIN, WindowAttention)]
)
def test_queries_are_computed_scaled(spec: ModelSpec, kind: type[nn.Module]) -> None:
    attention = _only(build(parent_of(spec)).double(), kind)
    frozen = freeze(nn.Sequential(attention))
    assert getattr(_only(frozen, kind), "scale", None) == 1
    tokens = (spec.image_size // spec.patch_size) ** 2  # of the first stage
    x = torch.randn(2, tokens, spec.dims[0], generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), attention(x), rtol=0, atol=1e-13)


def test_powers_of_two_are_folded_exactly() -> None:
    """DeiT's heads of 64 channels scale by 1/8, LV-ViT's residuals by 1/2: no bit changes."""
    spec = replace(parent_of(LVVIT), dims=(128,))
    block = _only(build(spec), Block)
    frozen = freeze(nn.Sequential(block))
    assert _only(frozen, Block).gain == 1
    x = torch.randn(2, 37, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(frozen(x), block(x))


@_EACH
def test_exported_sizes_are_constant(spec: ModelSpec) -> None:
    exported = torch.export.export(freeze(build(spec)), (images(spec, count=2),))
    for node in exported.graph.nodes:
        for value in [node.meta.get("val")]:
            if isinstance(value, torch.Tensor):
                assert all(isinstance(size, int) for size in value.shape), node
    targets = {str(node.target) for node in exported.graph.nodes}
    assert not any("log_softmax" in target or "batch_norm" in target for target in targets)


@_EACH
@pytest.mark.parametrize("batch", [1, 2])
def test_traces_run_in_onnx_runtime_as_in_torch(spec: ModelSpec, batch: int) -> None:
    module = freeze(build(spec))
    model = trace(module, images(spec, count=batch, seed=7))
    image = images(spec, count=batch)  # others than those it was traced with
    (found,) = session(model).run([OUTPUT], {INPUT: image.numpy()})
    with torch.no_grad():
        expected = module(image).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    ops = Counter(node.op_type for node in model.graph)
    unexpected = {"ScatterND", "ScatterElements", "GatherElements", "GatherND", "LogSoftmax"}
    assert not unexpected & ops.keys()


@pytest.mark.parametrize("spec", [DEIT, LVVIT], ids=lambda spec: spec.name)
def test_traces_select_with_constant_unsorted_top_k(spec: ModelSpec) -> None:
    model = trace(freeze(build(spec)), images(spec, count=1))
    selections = [node for node in model.graph if node.op_type == "TopK"]
    counts = [ir.convenience.get_const_tensor(node.inputs[1]) for node in selections]
    assert [int(count.numpy().item()) for count in counts if count] == list(spec.kept_patches)
    assert all(node.attributes["sorted"].as_int() == 0 for node in selections)
    static = [v for node in model.graph for v in node.outputs if v.shape is not None]
    assert all(value.shape.is_static() for value in static if value.shape)


@_EACH
def test_selections_of_a_trace_are_the_patches_kept(spec: ModelSpec) -> None:
    module, image = freeze(build(spec)), images(spec, count=2)
    model = trace(module, image)
    names = selections(model)
    for node in model.graph:
        model.graph.outputs.extend(value for value in node.outputs if value.name in names)
    found = session(model).run(list(names), {INPUT: image.numpy()})
    places = places_in_grid(found, spec.kept_patches, chosen_anew=spec.chooses_anew)
    for ours, theirs in zip(places, kept(spec, module, image).kept, strict=True):
        assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(
    ("spec", "ratios", "counts"),
    [
        (DEIT, (1.0, 0.7, 0.5), (25, 18)),
        (DEIT, (0.7, 0.7, 0.5), (25, 18)),
        (CONVNEXT, (1.0, 0.7, 0.7), (44, 44)),
        (SWIN, (1.0, 1.0, 1.0), ()),
    ],
    ids=["first", "second", "anew", "all"],
)
def test_stages_that_drop_nothing_select_nothing(
    spec: ModelSpec, ratios: tuple[float, ...], counts: tuple[int, ...]
) -> None:
    spec = replace(spec, keep_ratios=ratios)
    assert spec.dropping == counts
    assert len(selections(trace(freeze(build(spec)), images(spec, count=1)))) == len(counts)


def test_int8_leaves_predictors_in_float() -> None:
    batches = [images(DEIT, seed=seed) for seed in range(2)]
    scheme = QuantScheme(keep_float=DEIT.float_layers)
    calibrated = calibrate(freeze(build(DEIT)), batches, scheme)
    names = [layer.name for layer in calibrated.layers]
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.4.mlp.fc2", "head"} <= set(names)
    assert not any("score_predictor" in name for name in names)
    assert sum("score_predictor" in layer.name for layer in calibrated.kept_float) == 3 * 5
    # Naming layers that are not there would be an error.
    assert replace(DEIT, keep_ratios=(1.0, 1.0, 1.0)).float_layers == ()


def test_stages_that_drop_nothing_are_skipped() -> None:
    spec = replace(DEIT, keep_ratios=(0.7, 0.7, 0.5))
    state, image = weights(spec), images(spec, count=1)
    model = trace(freeze(build(spec)), image)
    assert sum(node.op_type == "TopK" for node in model.graph) == 2
    expected = pruning_reference.vision_transformer(
        {name: value.double() for name, value in state.items()},
        image.double(),
        kind="deit",
        patch_size=8,
        depth=5,
        heads=2,
        prune_before=spec.prune_before,
        ratios=spec.keep_ratios,
    )
    (found,) = session(model).run([OUTPUT], {INPUT: image.numpy()})
    assert np.abs(found - expected.logits.numpy()).max() < 1e-5
