"""DeiT, LV-ViT, ConvNeXt and Swin, whole and pruned, are those of the papers' code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pruning_cases import DEIT, LVVIT, SPECS, SWIN, build, family, images, kept, reference, weights
from pruning_cases import whole as parent_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gfcompile.compile import models
from gfcompile.compile.cli import main
from gfcompile.compile.models import load_model, load_student, model_names, model_spec
from gfcompile.compile.models.predictor import Predictor, TrainingOutput, masked_softmax
from gfcompile.compile.models.spec import ModelSpec, kept_patches
from gfcompile.compile.models.weights import draw_weights
from gfcompile.compile.prune import freeze
from gfcompile.runtime.errors import UserError
from gfcompile.runtime.images import preprocess, stand_in_photos

pytestmark = pytest.mark.usefixtures("one_thread")

_NAMES = [name for name in model_names() if model_spec(name).family != "gfnet"]
_PRUNING = [name for name in _NAMES if model_spec(name).prune_before]
_EACH = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
_EACH_WHOLE = pytest.mark.parametrize("spec", map(parent_of, SPECS), ids=lambda spec: spec.name)


@_EACH
@pytest.mark.parametrize("whole", [False, True])
def test_networks_equal_the_published_code(spec: ModelSpec, whole: bool) -> None:
    spec = parent_of(spec) if whole else spec
    state, image = weights(spec), images(spec)
    expected = reference(spec, state, image)
    found = kept(spec, build(spec), image)
    for ours, theirs in zip(found.kept, expected.kept, strict=True):
        assert torch.equal(ours, theirs)
    # Some fifty float32 roundings of 6e-8 in sequence, most of sums that average them out.
    error = (found.logits - expected.logits).abs().max()
    assert error <= 1e-5 * expected.logits.abs().max()


@_EACH
def test_different_images_keep_different_patches(spec: ModelSpec) -> None:
    for stage in kept(spec, build(spec), images(spec)).kept:
        assert not torch.equal(stage[0], stage[1])


@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [
        # Sizes and costs from the papers and from the READMEs beside the weights.
        ("deit_tiny", 5.7, 1.3),
        ("deit_small", 22.1, 4.6),
        ("deit_base", 86.6, 17.6),
        ("lvvit_s", 26.2, 6.6),
        ("lvvit_m", 55.8, 12.7),
        ("convnext_tiny", 28.6, 4.5),
        ("convnext_small", 50.2, 8.7),
        ("convnext_base", 88.6, 15.4),
        ("swin_tiny", 28.3, 4.5),
        ("swin_small", 49.6, 8.7),
        ("swin_base", 87.8, 15.4),
        ("dynamicvit_deit_256", None, 1.3),
        ("dynamicvit_deit_s", None, 2.9),
        ("dynamicvit_deit_b", None, 11.4),
        ("dynamicvit_lvvit_s", None, 4.6),
        ("dynamicvit_lvvit_m", None, 8.5),
        ("convnext_t", None, 3.6),
        ("convnext_s", None, 5.8),
        ("convnext_b", None, 10.2),
        ("swin_t", None, 4.0),
        ("swin_s", None, 6.9),
        ("swin_b", None, 12.1),
    ],
)
def test_sizes_and_costs_are_the_papers(name: str, millions: float | None, billions: float) -> None:
    spec = model_spec(name)
    assert millions is None or round(spec.parameters / 1e6, 1) == millions
    # The READMEs truncate or round to one digit, and count the predictors in part.
    assert spec.macs / 1e9 == pytest.approx(billions, abs=0.1)


def test_pruning_saves_what_the_paper_says() -> None:
    parent, pruned = model_spec("deit_small").macs, model_spec("dynamicvit_deit_s").macs
    # 37.4% of the transformer; the predictors take two points of that back.
    assert 0.35 < 1 - pruned / parent < 0.38


@pytest.mark.parametrize("name", _NAMES)
def test_shapes_are_those_of_the_module(name: str) -> None:
    spec = model_spec(name).resized(num_classes=7)
    meta = {key: torch.empty(shape, device="meta") for key, shape in spec.shapes().items()}
    state = family(spec).build(spec, meta).state_dict()
    learned = {key: value for key, value in state.items() if "num_batches" not in key}
    assert [(key, tuple(value.shape)) for key, value in learned.items()] == list(
        spec.shapes().items()
    )
    assert spec.parameters == sum(
        value.numel() for key, value in learned.items() if ".running_" not in key
    )


@pytest.mark.parametrize("name", _NAMES)
def test_macs_are_those_that_torch_counts_in_the_frozen_model(name: str) -> None:
    spec = model_spec(name)
    meta = {key: torch.empty(shape, device="meta") for key, shape in spec.shapes().items()}
    module = freeze(family(spec).build(spec, meta).to("meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.empty(1, 3, 224, 224, device="meta"))
    assert spec.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "count", "entries"),
    [
        (
            "dynamicvit_deit_s",
            2 + 2 + 12 * 12 + 4 + 3 * 10,
            {
                "cls_token": (1, 1, 384),
                "pos_embed": (1, 197, 384),
                "patch_embed.proj.weight": (384, 3, 16, 16),
                "blocks.11.attn.qkv.weight": (1152, 384),
                "blocks.0.attn.qkv.bias": (1152,),
                "blocks.3.mlp.fc1.weight": (1536, 384),
                "score_predictor.0.in_conv.0.weight": (384,),
                "score_predictor.1.in_conv.1.weight": (384, 384),
                "score_predictor.2.out_conv.0.weight": (192, 384),
                "score_predictor.2.out_conv.2.weight": (96, 192),
                "score_predictor.2.out_conv.4.bias": (2,),
            },
        ),
        ("deit_tiny", 2 + 2 + 12 * 12 + 4, {"head.weight": (1000, 192), "norm.bias": (192,)}),
        (
            "dynamicvit_lvvit_m",
            2 + 3 * 5 + 2 + 20 * 11 + 4 + 3 * 10 + 2,
            {
                "patch_embed.conv1.weight": (64, 3, 7, 7),
                "patch_embed.bn1.running_var": (64,),
                "patch_embed.conv3.weight": (64, 64, 3, 3),
                "patch_embed.proj.weight": (512, 64, 8, 8),
                "blocks.19.mlp.fc1.weight": (1536, 512),
                "blocks.0.attn.proj.bias": (512,),
                "aux_head.weight": (1000, 512),
            },
        ),
        (
            "convnext_s",
            4 + 3 * 4 + 36 * 9 + 24 * 5 + 4 + 3 * 10,
            {
                "downsample_layers.0.0.weight": (96, 3, 4, 4),
                "downsample_layers.0.1.weight": (96,),
                "downsample_layers.2.0.weight": (192,),
                "downsample_layers.2.1.weight": (384, 192, 2, 2),
                "stages.0.0.dwconv.weight": (96, 1, 7, 7),
                "stages.2.2.pwconv1.weight": (1536, 384),
                "stages.2.3.fast_path.0.weight": (384,),
                "stages.2.26.fast_path.1.weight": (384, 384),
                "stages.2.26.fast_path_gamma": (384,),
                "score_predictor.0.in_conv.1.weight": (384, 384, 1, 1),
                "score_predictor.2.out_conv.4.weight": (2, 96, 1, 1),
            },
        ),
        (
            "swin_b",
            4 + 24 * 13 + 16 * 4 + 3 * 3 + 4 + 3 * 10,
            {
                "patch_embed.norm.weight": (128,),
                "layers.0.blocks.1.attn.relative_position_bias_table": (169, 4),
                "layers.3.blocks.1.attn.qkv.weight": (3072, 1024),
                "layers.1.downsample.reduction.weight": (512, 1024),
                "layers.1.downsample.norm.weight": (1024,),
                "layers.2.blocks.2.fastmlp.fc1.0.weight": (512,),
                "layers.2.blocks.17.fastmlp.fc1.1.weight": (512, 512),
                "layers.2.score_predictor.2.out_conv.4.weight": (2, 128),
                "head.weight": (1000, 1024),
            },
        ),
    ],
)
def test_names_are_those_of_the_published_weights(
    name: str, count: int, entries: dict[str, tuple[int, ...]]
) -> None:
    shapes = model_spec(name).shapes()
    assert entries.items() <= shapes.items()
    assert len(shapes) == count


def test_fast_paths_begin_with_the_first_predictor() -> None:
    assert "stages.2.2.fast_path_gamma" not in model_spec("convnext_s").shapes()
    assert "stages.2.1.fast_path_gamma" in model_spec("convnext_t").shapes()
    assert "layers.2.blocks.1.fastmlp.fc1.0.weight" not in model_spec("swin_s").shapes()
    assert "layers.2.blocks.1.fastmlp.fc1.0.weight" in model_spec("swin_t").shapes()


@pytest.mark.parametrize("name", _PRUNING)
def test_parents_differ_by_predictors_and_fast_paths_alone(name: str) -> None:
    spec = model_spec(name)
    assert spec.parent is not None
    parent = model_spec(spec.parent)
    extra = {key for key in spec.shapes() if key not in parent.shapes()}
    assert all("score_predictor" in key or "fast" in key for key in extra)
    assert parent.shapes().items() <= spec.shapes().items()
    assert spec.macs < parent.macs


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("dynamicvit_deit_s", {0.9: (176, 158, 142), 0.7: (137, 96, 67), 0.5: (98, 49, 24)}),
        # 0.7 - 0.2 is a hair below 0.5 in binary; the published code keeps 97.
        ("convnext_t", {0.9: (176, 137, 98), 0.7: (137, 97, 58), 0.5: (98, 58, 19)}),
        ("swin_s", {0.7: (137, 97, 58)}),
    ],
)
def test_counts_are_truncated_as_published(name: str, counts: dict[float, tuple[int, ...]]) -> None:
    for ratio, expected in counts.items():
        assert model_spec(name).pruned(ratio).kept_patches == expected
    assert model_spec(name).kept_patches == counts[0.7]
    assert kept_patches(196, (0.7, 0.7**2, 0.7**3)) == (137, 96, 67)


def test_keep_ratio_can_be_given_per_stage() -> None:
    spec = model_spec("dynamicvit_deit_s")
    assert spec.pruned((0.8, 0.5, 0.5)).kept_patches == (156, 98, 98)
    assert spec.top1_percent == spec.pruned(0.7).top1_percent == 79.32
    assert spec.pruned(0.8).top1_percent is None
    # A patch on ConvNeXt's fast path is still there.
    assert model_spec("convnext_t").pruned((0.3, 0.5, 0.9)).kept_patches == (58, 98, 176)


@pytest.mark.parametrize(
    ("name", "ratio", "message"),
    [
        ("gfnet_xs", 0.7, "gfnet_xs takes no keep ratio: its global filters need the whole grid"),
        ("deit_small", 0.7, "keeps all its patches; dynamicvit_deit_s takes a keep ratio"),
        ("deit_tiny", 0.7, "deit_tiny takes no keep ratio: it was not trained to drop patches"),
        (
            "convnext_tiny",
            0.7,
            "keeps all its patches; convnext_t takes a keep ratio",
        ),
        ("dynamicvit_deit_s", 0.0, "above 0 and at most 1"),
        ("dynamicvit_deit_s", 1.2, "above 0 and at most 1"),
        ("dynamicvit_deit_s", float("nan"), "above 0 and at most 1"),
        ("dynamicvit_deit_s", (0.7, 0.5), "2 keep ratios; dynamicvit_deit_s takes one, or 3"),
        ("dynamicvit_deit_s", (0.5, 0.7, 0.3), "cannot bring back"),
        ("dynamicvit_deit_s", 0.1, "196 patches at 224 pixels, of which .* leave none"),
        ("swin_t", 0.4, "keeps 0.4, 0.2, 0 of the patches"),
    ],
)
def test_impossible_keep_ratios_are_refused(
    name: str, ratio: float | tuple[float, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(name, keep_ratio=ratio)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gfnet_xs", "0.7"), "global filters need the whole grid"),
        (("dynamicvit_deit_s", "0.9,0.7"), "takes one, or 3, one per pruning stage"),
        (("dynamicvit_deit_s", "most"), "'most' is no number"),
    ],
)
def test_the_command_refuses_impossible_keep_ratios(
    arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, ratio = arguments
    assert main(["--model", model, "--target", "host", "--keep-ratio", ratio]) == 2
    assert message in capsys.readouterr().err


def test_images_too_small_to_prune_are_refused() -> None:
    with pytest.raises(UserError, match="has 1 patches at 16 pixels, of which"):
        load_model("dynamicvit_deit_256", image_size=16)
    with pytest.raises(UserError, match="divisible by 224, not 256"):
        load_model("swin_t", image_size=256)


@_EACH
def test_keeping_all_gives_the_parent(spec: ModelSpec) -> None:
    all_kept = replace(spec, keep_ratios=(1.0, 1.0, 1.0))
    state, image = weights(spec), images(spec)
    parent = parent_of(spec)
    inherited = {key: state[key] for key in parent.shapes()}
    with torch.no_grad():
        found = family(spec).build(all_kept, state)(image)
        assert torch.equal(found, family(spec).build(parent, inherited)(image))
    assert all_kept.macs == parent.macs


@pytest.mark.parametrize("name", ["dynamicvit_deit_256", "swin_t"])
def test_random_models_tell_photos_apart(name: str) -> None:
    model = load_model(name)
    photos = [preprocess(path, model.transform) for path in stand_in_photos()]
    with torch.no_grad():
        logits = model.module(torch.cat([torch.from_numpy(photo) for photo in photos]))
    # How far images differ in a logit, against how far logits differ in an image.
    assert logits.std(0).mean() > 0.2 * logits.std(1).mean()


@_EACH
def test_no_parameter_of_a_random_model_could_be_lost_unnoticed(spec: ModelSpec) -> None:
    module, image = build(spec), images(spec, count=2)
    with torch.no_grad():
        logits = module(image)
        for name, value in module.named_parameters():
            if "score_predictor" in name:
                continue  # shows in what is kept alone: see test_predictors_decide_clearly
            is_gain = value.ndim == 1 and not name.endswith("bias")
            lost = torch.ones_like(value) if is_gain else torch.zeros_like(value)
            change = (torch.func.functional_call(module, {name: lost}, image) - logits).std()
            assert change > 1e-4 * logits.std(), name  # two orders above float32 rounding


@_EACH
def test_predictors_decide_clearly(spec: ModelSpec) -> None:
    """Scores at the limit differ by far more than rounding, or no two backends would agree."""
    gaps = []
    module = build(spec)
    for predictor in (m for m in module.modules() if isinstance(m, Predictor)):
        patches = torch.randn(4, 36, spec.dims[min(2, len(spec.dims) - 1)])
        with torch.no_grad():
            scores = predictor.log_probabilities(patches, torch.ones(4, 36, 1))[..., 0]
        gaps.append(scores.sort(1).values.diff(dim=1).median())
    assert min(gaps) > 1e-4


# --- checkpoints


def _register(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> None:
    monkeypatch.setitem(models._SPECS, spec.name, spec)


@_EACH
def test_published_checkpoints_load(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(monkeypatch, spec)
    state = dict(weights(spec, seed=5))
    published = dict(state)  # with what the published code saves besides
    for name in state:
        if name.endswith("running_var"):
            published[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            published[index] = torch.zeros(9, 9, dtype=torch.int64)
            published[name.replace("relative_position_bias_table", "attn_mask")] = torch.zeros(1)
    path = tmp_path / "weights.pth"
    torch.save({"model": published, "epoch": 3}, path)
    model = load_model(spec.name, checkpoint=path)
    image = images(spec)
    with torch.no_grad():
        assert torch.equal(model.module(image), build(spec, seed=5)(image))
    pruned = load_model(spec.name, checkpoint=path, keep_ratio=0.9)
    assert pruned.spec.kept_patches[0] == int(0.9 * spec.prunable_patches)


def test_plain_and_distilled_checkpoints_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(parent_of(DEIT), name="plain_deit")
    _register(monkeypatch, DEIT)
    _register(monkeypatch, plain)
    state = dict(weights(plain))
    path = tmp_path / "deit.pth"
    torch.save({"model": state}, path)
    assert not load_model("plain_deit", checkpoint=path).is_random
    with pytest.raises(UserError, match=r"score_predictor.0.* missing.*\(it fits plain_deit\)"):
        load_model("small_deit", checkpoint=path)
    torch.save({"model": {**state, "dist_token": torch.zeros(1, 1, 32)}}, path)
    with pytest.raises(UserError, match=r"dist_token \(1, 1, 32\) is unknown"):
        load_model("plain_deit", checkpoint=path)


def test_class_count_and_image_size_follow_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(monkeypatch, LVVIT)
    trained = LVVIT.resized(image_size=64, num_classes=4)
    path = tmp_path / "weights.pth"
    torch.save(weights(trained), path)
    model = load_model("small_lvvit", checkpoint=path)
    assert (model.image_size, model.num_classes) == (64, 4)
    assert model.spec.kept_patches == (44, 31, 21)
    larger = load_model("small_lvvit", checkpoint=path, image_size=96)
    assert larger.spec.kept_patches == (100, 70, 49)
    assert "interpolated from 64 to 96 pixels" in larger.weights
    with torch.no_grad():
        assert larger.module(torch.zeros(2, 3, 96, 96)).shape == (2, 4)


def test_position_embeddings_are_resampled_around_the_class_token() -> None:
    state = dict(weights(DEIT))
    larger = DEIT.resized(image_size=96)
    resized = family(DEIT).resize_weights(state, larger)
    old, new = state["pos_embed"][0], resized["pos_embed"][0]
    assert torch.equal(new[0], old[0])
    grid = old[1:].reshape(1, 6, 6, 32).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(new[1:], expected.permute(0, 2, 3, 1).reshape(144, 32))
    assert all(resized[name] is state[name] for name in state if name != "pos_embed")


# --- training


def test_masked_attention_equals_attention_without_the_dropped_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    policy = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.float64).expand(2, -1)[..., None]
    alive = policy[0, :, 0].bool()
    found = masked_softmax(scores, policy)
    expected = scores[:, :, alive][..., alive].softmax(-1)
    # The trace of eps = 1e-6 that each token gets.
    torch.testing.assert_close(found[:, :, alive][..., alive], expected, rtol=0, atol=2e-6)
    assert found[:, :, alive][..., ~alive].max() < 2e-6
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 8, dtype=torch.float64))


def test_gradients_of_masked_attention_reach_scores_and_policy() -> None:
    """Against finite differences, dropped tokens included."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    policy = torch.tensor([[1, 0, 0.5, 1, 0], [0, 0.25, 1, 1, 0]], dtype=torch.float64)[..., None]
    inputs = (scores.requires_grad_(), policy.requires_grad_())
    assert torch.autograd.gradcheck(masked_softmax, inputs)


@pytest.mark.parametrize("spec", [DEIT, LVVIT], ids=lambda spec: spec.name)
def test_training_computes_what_dropping_the_same_patches_would(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the decisions of evaluation put in place of drawn ones, logits are evaluation's."""
    module, image = build(spec), images(spec)
    chosen = kept(spec, module, image)
    stages = iter(chosen.kept)

    def decided(_log_p: torch.Tensor, *, hard: bool) -> torch.Tensor:
        assert hard
        keep = torch.zeros(len(image), spec.prunable_patches).scatter(1, next(stages), 1.0)
        return torch.stack([keep, 1 - keep], dim=-1)

    monkeypatch.setattr(nn.functional, "gumbel_softmax", decided)
    module.train()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    with torch.no_grad():
        output = module(image)
    logits = output.logits
    if spec is LVVIT:
        alive = output.kept.bool().unsqueeze(-1)
        best = output.tokens.masked_fill(~alive, -torch.inf).amax(1)
        logits = logits + 0.5 * best
    # The trace of attention that dropped tokens keep, 1e-6 of 36, through five blocks.
    torch.testing.assert_close(logits, chosen.logits, rtol=0, atol=2e-4)


@_EACH
def test_decisions_are_drawn_and_gradients_reach_every_predictor(spec: ModelSpec) -> None:
    torch.manual_seed(0)
    module = build(spec).train()
    output = module(images(spec))
    assert isinstance(output, TrainingOutput)
    count = spec.prunable_patches
    assert [tuple(decision.shape) for decision in output.decisions] == [(3, count)] * 3
    assert output.kept.shape == output.tokens.shape[:2]
    assert not output.kept.requires_grad
    for decision in output.decisions:
        assert set(decision.unique().tolist()) == {0.0, 1.0}
    # The ratio loss alone reaches each predictor, and so do the logits.
    for loss in (sum(d.mean() for d in output.decisions), output.logits.square().sum()):
        assert isinstance(loss, torch.Tensor)
        module.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in module.named_parameters():
            if "score_predictor" in name:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("spec", [DEIT, LVVIT], ids=lambda spec: spec.name)
def test_a_dropped_patch_stays_dropped(spec: ModelSpec) -> None:
    torch.manual_seed(0)
    output = build(spec).train()(images(spec))
    for before, after in zip(output.decisions, output.decisions[1:], strict=False):
        assert (after <= before).all()
    assert torch.equal(output.kept, output.decisions[-1].detach())


@_EACH
def test_a_draw_that_drops_all_patches_stays_finite(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        nn.functional, "gumbel_softmax", lambda log_p, hard: 0 * log_p.exp() if hard else None
    )
    output = build(spec).train()(images(spec))
    assert all(not decision.any() for decision in output.decisions)
    output.logits.sum().backward()
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("spec", SPECS[2:], ids=lambda spec: spec.name)
def test_training_takes_both_paths_as_the_published_code(spec: ModelSpec) -> None:
    """A mask of ones (zeros) leads every patch down the full (fast) path."""
    module, image = build(spec), images(spec)
    name = "stages" if spec.family == "convnext" else "layers"
    stage = module.get_submodule(f"{name}.2")
    blocks = list(stage.children() if spec.family == "convnext" else stage.blocks)
    block = blocks[-1]
    side = 8 if spec.family == "convnext" else 6
    shape = (3, side, side) if spec.family == "convnext" else (3, side * side)
    generator = torch.Generator().manual_seed(0)
    slow, fast = (torch.randn(*shape, 32, generator=generator) for _ in range(2))
    ones, zeros = torch.ones(*shape, 1), torch.zeros(*shape, 1)
    with torch.no_grad():
        torch.testing.assert_close(block.both((slow, fast), ones)[0], block(slow))
        if spec is SWIN:
            x = block.attended(fast)
            expected = x + block.fastmlp(x)
        else:
            expected = fast + block.fast(block.convolved(fast))
        torch.testing.assert_close(block.both((slow, fast), zeros)[1], expected)
        assert module(image).shape == (3, 10)


@_EACH_WHOLE
def test_parents_teach_and_do_not_decide(spec: ModelSpec) -> None:
    module, image = build(spec), images(spec)
    with torch.no_grad():
        logits, tokens = module.teach(image)
        answer = module(image)
    if spec.name == "small_lvvit":
        assert tokens.shape == (3, 36, 10)
        torch.testing.assert_close(logits + 0.5 * tokens.amax(1), answer)
    else:
        torch.testing.assert_close(logits, answer)
        assert tokens.shape[0] == 3
        assert tokens.ndim == 3
    assert isinstance(module.train()(image), torch.Tensor)


@_EACH
def test_students_start_as_their_teacher(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = replace(parent_of(spec), name="teacher")
    spec = replace(spec, parent="teacher")
    _register(monkeypatch, parent)
    _register(monkeypatch, spec)
    teacher = load_model("teacher", seed=3)
    student = load_student(spec.name, teacher, keep_ratio=0.8)
    assert student.spec.kept_patches[0] == int(0.8 * spec.prunable_patches)
    for name, value in teacher.module.state_dict().items():
        assert torch.equal(student.module.state_dict()[name], value)
    predictors = [v for n, v in student.module.state_dict().items() if "score_predictor" in n]
    assert max(value.abs().max() for value in predictors if value.ndim > 1) <= 2  # truncated
    full = load_student(spec.name, teacher, keep_ratio=(1.0, 1.0, 1.0))
    image = images(spec)
    with torch.no_grad():
        assert torch.equal(full.module(image), teacher.module(image))
    with pytest.raises(UserError, match="learns from teacher, not from deit_tiny"):
        load_student(spec.name, load_model("deit_tiny"))


def test_what_prunes_nothing_has_no_teacher() -> None:
    teacher = load_model("deit_tiny")
    with pytest.raises(UserError, match="gfnet_ti prunes nothing, so has no parent"):
        load_student("gfnet_ti", teacher)


def test_random_weights_repeat() -> None:
    first, again, other = (draw_weights(SWIN, seed) for seed in (3, 3, 4))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
