"""Small pruning models of each family, and what their papers' code makes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pruning_reference
import torch
from pruning_reference import Result, State
from torch import Tensor, nn

from gfcompile.compile.models import Paper, convnext, dynamicvit, swin
from gfcompile.compile.models.convnext_specs import ConvNeXtSpec
from gfcompile.compile.models.dynamicvit_specs import ViTSpec
from gfcompile.compile.models.predictor_specs import sparse_ratios
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.models.swin_specs import SwinSpec
from gfcompile.compile.models.weights import draw_weights

_PAPER = Paper(title="none", arxiv="0000.00000")

DEIT = ViTSpec(
    name="small_deit",
    family="dynamicvit",
    kind="deit",
    paper=_PAPER,
    image_size=48,  # 6x6 patches, of which 25, 17 and 12 are kept
    num_classes=10,
    patch_size=8,
    dims=(32,),
    depths=(5,),
    heads=2,
    prune_before=(1, 2, 4),
    keep_ratios=(0.7, 0.7**2, 0.7**3),
)
LVVIT = replace(DEIT, name="small_lvvit", kind="lvvit")
CONVNEXT = ConvNeXtSpec(
    name="small_convnext",
    family="convnext",
    paper=_PAPER,
    image_size=64,  # grids of 32, 16, 8 and 4; of 64 patches 44, 31 and 19 are kept
    num_classes=10,
    patch_size=2,
    dims=(8, 16, 32, 48),
    depths=(1, 1, 5, 1),
    prune_before=(1, 2, 4),
    keep_ratios=sparse_ratios(),
)
SWIN = SwinSpec(
    name="small_swin",
    family="swin",
    paper=_PAPER,
    image_size=48,  # grids of 24, 12, 6 and 3: of 36 patches 25, 17 and 10 are kept
    num_classes=10,
    patch_size=2,
    dims=(8, 16, 32, 48),
    depths=(2, 1, 5, 2),
    head_dim=8,
    window=3,
    prune_before=(1, 2, 4),
    keep_ratios=sparse_ratios(),
)
SPECS: tuple[ModelSpec, ...] = (DEIT, LVVIT, CONVNEXT, SWIN)


def family(spec: ModelSpec) -> ModuleType:
    return {"dynamicvit": dynamicvit, "convnext": convnext, "swin": swin}[spec.family]


def whole(spec: ModelSpec) -> ModelSpec:
    """The unpruned parent of `spec`."""
    return replace(spec, prune_before=(), keep_ratios=())


def weights(spec: ModelSpec, seed: int = 0) -> State:
    return draw_weights(spec, seed)


def build(spec: ModelSpec, seed: int = 0) -> nn.Module:
    module = family(spec).build(spec, weights(spec, seed))
    assert isinstance(module, nn.Module)
    return module


def images(spec: ModelSpec, count: int = 3, seed: int = 0) -> Tensor:
    """Noise of which each image has less detail than the one before, so that they differ."""
    generator = torch.Generator().manual_seed(seed)
    size = spec.image_size
    scales = [
        nn.functional.interpolate(
            torch.randn(1, 3, size >> scale, size >> scale, generator=generator), size=(size, size)
        )
        for scale in range(count)
    ]
    return torch.cat(scales)


def reference(spec: ModelSpec, state: State, image: Tensor) -> Result:
    """What the papers' code computes, in float64."""
    doubles = {name: value.double() for name, value in state.items()}
    common = {"prune_before": spec.prune_before, "ratios": spec.keep_ratios}
    match spec:
        case ViTSpec():
            return pruning_reference.vision_transformer(
                doubles,
                image.double(),
                kind=spec.kind,
                patch_size=spec.patch_size,
                depth=spec.depths[0],
                heads=spec.heads,
                **common,
            )
        case ConvNeXtSpec():
            return pruning_reference.convnext(
                doubles, image.double(), patch_size=spec.patch_size, depths=spec.depths, **common
            )
        case SwinSpec():
            return pruning_reference.swin(
                doubles,
                image.double(),
                patch_size=spec.patch_size,
                depths=spec.depths,
                head_dim=spec.head_dim,
                window=spec.window,
                **common,
            )
    raise AssertionError(spec)


def kept(spec: ModelSpec, module: nn.Module, image: Tensor) -> Result:
    """What `module` computes, and which patches it keeps, ascending, by their place in the grid."""
    chosen: list[Tensor] = []
    with _watched(module, lambda output: chosen.append(output)), torch.no_grad():
        logits = module(image)
    alive = torch.arange(spec.prunable_patches).expand(len(image), -1)
    stages = []
    for keep, index in zip(spec.kept_patches, chosen, strict=True):
        now = alive.gather(1, index[:, :keep])
        stages.append(now.sort(1).values)
        if isinstance(spec, ViTSpec):  # the others choose anew among all
            alive = now
    return Result(logits, stages)


@contextmanager
def _watched(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    hooks = [
        predictor.register_forward_hook(lambda _module, _inputs, output: see(output))
        for name, predictor in module.named_modules()
        if name.rpartition(".")[0].endswith("score_predictor")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
