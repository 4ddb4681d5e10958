"""What int8 and int4 cost in accuracy, calibrated and trained, measured with compiled bundles.

    python benchmarks/accuracy.py [--seeds 5] [--only deit] [--quick] [--json FILE]

Small models of three architectures learn scikit-learn's digits, several times with other seeds.
Each is compiled for this machine in float32 and from quantized checkpoints, and each bundle
classifies the same test images. "outliers" is the same float function with a few channels of every
MLP's input scaled up, and their weights down, which is what ranges per tensor suffer from. A DeiT
becomes a DynamicViT by fine-tuning, and that an int8 one; each takes the one before for its parent.

Exits with 1 if a bound is missed:
    trained int8 is at most 0.3 points under float, trained int4 at most 1.5;
    where calibration alone loses more than 1 point, training wins back at least two thirds of it;
    the fine-tuned model is at most 0.5 points under its parent, and so is int8 under that;
    fake quantization, QDQ graph and bundle agree on at least 99.9% of the predictions.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import gfcompile
from gfcompile.compile import command_line
from gfcompile.compile.emission import Pruning
from gfcompile.compile.finetuning import PruningConfig
from gfcompile.compile.models import dynamicvit, gfnet
from gfcompile.compile.models.dynamicvit_specs import ViTSpec
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import ModelSpec, Paper
from gfcompile.compile.models.weights import start_weights
from gfcompile.compile.prune import freeze
from gfcompile.compile.pruning_task import finetune
from gfcompile.compile.quantization import QuantizeConfig, quantize_model
from gfcompile.compile.trace import session
from gfcompile.quantize import TrainConfig, read_quantized
from gfcompile.quantize.checkpoint import settle_as
from gfcompile.quantize.data import Images, read_images
from gfcompile.quantize.distributed import open_group
from gfcompile.quantize.prepared import prepare_training
from gfcompile.quantize.qparams import QParams
from gfcompile.runtime import load
from gfcompile.runtime.images import imagenet_transform, preprocess
from gfcompile.targets.target import find_target

Array = npt.NDArray[Any]
Kind = Literal["gfnet", "pyramid", "deit"]

SIZE = 32  # pixels; 8x8 tokens of the first stage
TRAIN_IMAGES = 1000
MAX_LOSS = {8: 0.3, 4: 1.5}  # points of top-1 that training may leave lost
WORTH_TRAINING = 1.0  # points
WON_BACK = 2 / 3
MIN_AGREEMENT = 0.999
KEEP_RATIO = 0.7
MAX_STEP_LOSS = 0.5  # points of top-1, from a DeiT to a pruned one, and from that to int8
PACKAGES = ("gfcompile", "torch", "torchao", "apache-tvm", "onnxruntime", "scikit-learn", "numpy")

DEIT = ViTSpec(
    name="deit_digits",
    family="dynamicvit",
    kind="deit",
    paper=Paper(title="DynamicViT", arxiv="2106.02034"),
    image_size=SIZE,
    num_classes=10,
    patch_size=4,
    dims=(32,),
    depths=(4,),
    heads=4,
)
SPECS: dict[Kind, ModelSpec] = {
    "gfnet": GFNetSpec(
        name="gfnet_digits",
        family="gfnet",
        paper=Paper(title="Global Filter Networks", arxiv="2107.00645"),
        image_size=SIZE,
        num_classes=10,
        patch_size=4,
        dims=(32,),
        depths=(3,),
    ),
    "pyramid": GFNetSpec(
        name="gfnet_h_digits",
        family="gfnet",
        paper=Paper(title="Global Filter Networks", arxiv="2107.00645"),
        image_size=SIZE,
        num_classes=10,
        patch_size=4,
        dims=(24, 48),
        depths=(1, 2),
    ),
    "deit": DEIT,
}
PRUNED_SPEC = replace(
    DEIT, prune_before=(1, 2, 3), keep_ratios=tuple(KEEP_RATIO**s for s in (1, 2, 3))
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to quantize: bits of the weights, trained or calibrated only, from which checkpoint."""

    bits: int
    trained: bool
    outliers: bool = False

    @property
    def name(self) -> str:
        how = "trained" if self.trained else "calibrated"
        return f"int{self.bits} {how}" + (", outliers" if self.outliers else "")


PRUNED = f"pruned to {KEEP_RATIO}"
PRUNING = Pruning(kept=PRUNED_SPEC.dropping, chosen_anew=PRUNED_SPEC.chooses_anew)
VARIANTS = (
    *(Variant(bits=bits, trained=trained) for bits in (8, 4) for trained in (False, True)),
    *(Variant(bits=8, trained=trained, outliers=True) for trained in (False, True)),
)

PRUNED_VARIANTS = tuple(Variant(bits=8, trained=trained) for trained in (False, True))
ROWS: dict[Kind, tuple[str, ...]] = {
    "gfnet": ("float32", *(variant.name for variant in VARIANTS)),
    "pyramid": ("float32", *(variant.name for variant in VARIANTS)),
    "deit": ("float32", PRUNED, *(f"{PRUNED}, {variant.name}" for variant in PRUNED_VARIANTS)),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One bundle on the test images.

    Attributes:
        variant: what was done to the model, as in `ROWS`.
        top1: percent.
        graph_agreement, fake_agreement: of the predictions, the fraction that the QDQ graph in
            ONNX Runtime and the fake-quantized torch model make as well.
    """

    model: str
    seed: int
    variant: str
    top1: float
    graph_agreement: float = 1.0
    fake_agreement: float = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_digits(folder / "digits")
        # The longest first: what comes last keeps one core alone busy.
        kinds = sorted(options.only or SPECS, key=lambda kind: kind != "deit")
        jobs = [(kind, seed) for kind in kinds for seed in range(options.seeds)]
        results: list[Result] = []
        # The models are too small for two threads; two at a time keep two cores busy. Tracing and
        # TVM keep what they allocate, so each measurement has a process of its own.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
            futures = [
                pool.submit(measure, kind, seed, folder, options.quick) for kind, seed in jobs
            ]
            for future in as_completed(futures):
                results += future.result()
                print(f"{len(results)} bundles measured", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    print_table(results)
    images = sum(1 for _ in _digits_split()[1])
    print(f"\n{options.seeds} seeds, {images} test images; {seconds:.0f} s")
    missed = list(misses(results))
    if options.json:
        report = {
            "benchmark": "accuracy",
            "machine": {
                "cpu": find_target("host").description,
                "load": os.getloadavg()[0],
                "kernel": platform.release(),
                "python": platform.python_version(),
            },
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "seeds": options.seeds,
            "quick": options.quick,
            "seconds": seconds,
            "results": [asdict(result) for result in results],
            "missed": missed,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return 1 if missed else 0


def write_digits(folder: Path) -> None:
    """The digits as PNG files, a folder per class, such that the evaluation crop shows all of each.

    The evaluation transform cuts away a border of 1/16; it is black here.
    """
    digits, (training, _) = _digits(), _digits_split()
    outer = imagenet_transform(SIZE).resize
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        grey = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
        canvas = Image.new("L", (outer, outer))
        border = (outer - SIZE) // 2
        canvas.paste(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC), (border, border))
        part = folder / ("train" if index in training else "test") / str(label)
        part.mkdir(parents=True, exist_ok=True)
        canvas.save(part / f"{index:04}.png")


def _digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits()


def _digits_split() -> tuple[frozenset[int], frozenset[int]]:
    """Numbers of the images to train on, and of those to test on."""
    order = np.random.default_rng(0).permutation(len(_digits().target)).tolist()
    return frozenset(order[:TRAIN_IMAGES]), frozenset(order[TRAIN_IMAGES:])


def measure(kind: Kind, seed: int, folder: Path, quick: bool) -> list[Result]:
    """Float and every variant of one model, trained from one seed."""
    torch.set_num_threads(1)
    training, test = (read(folder / "digits" / part) for part in ("train", "test"))
    spec = SPECS[kind]
    module = train_float(spec, seed, *training, epochs=8 if quick else 40)
    run = Run(kind=kind, seed=seed, place=folder / f"{kind}-{seed}", quick=quick, test=test)
    run.place.mkdir()
    results = [run.floating(module, "float32")]
    if kind == "deit":
        pruned = prune(module, seed, folder / "digits" / "train", quick)
        results.append(run.floating(pruned, PRUNED))
        # Quantized as it is compiled, as the zoo's models are.
        frozen, kept = freeze(pruned), PRUNED_SPEC.float_layers
        for variant in PRUNED_VARIANTS:
            name = f"{PRUNED}, {variant.name}"
            results.append(run.quantized(frozen, variant, name, keep_float=kept))
        return results
    for variant in VARIANTS:
        subject = with_outliers(module) if variant.outliers else module
        results.append(run.quantized(subject, variant, variant.name))
    return results


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model from one seed.

    Attributes:
        test: images and labels.
    """

    kind: Kind
    seed: int
    place: Path
    quick: bool
    test: tuple[torch.Tensor, torch.Tensor]

    def floating(self, module: nn.Module, name: str) -> Result:
        """The module compiled in float32."""
        logits, _ = run_bundle(
            self.kind,
            module,
            self.place / name,
            self.test[0],
            checkpoint=None,
            is_pruned=name.startswith(PRUNED),
        )
        return _result(self.kind, self.seed, name, logits, self.test[1])

    def quantized(
        self, module: nn.Module, variant: Variant, name: str, *, keep_float: tuple[str, ...] = ()
    ) -> Result:
        """The module quantized and compiled."""
        place, images = self.place, self.test[0]
        path = place / f"{name}.safetensors"
        config = QuantizeConfig(
            model=SPECS[self.kind].name,
            train_data=place.parent / "digits" / "train",
            output=path,
            image_size=SIZE,
            num_classes=10,
            weight_bits=variant.bits,
            keep_float=keep_float,
            training=recipe(variant, self.seed, self.quick),
            device="cpu",
        )
        quantize_model(config, module=module)
        logits, graph = run_bundle(
            self.kind,
            module,
            place / name,
            images,
            checkpoint=path,
            is_pruned=name.startswith(PRUNED),
        )
        fake = run_fake_quantized(module, path, images)
        result = _result(self.kind, self.seed, name, logits, self.test[1])
        predicted = logits.argmax(1)
        return replace(
            result,
            graph_agreement=float((graph.argmax(1) == predicted).mean()),
            fake_agreement=float((fake.argmax(1) == predicted).mean()),
        )


def prune(parent: nn.Module, seed: int, data: Path, quick: bool) -> nn.Module:
    """The DynamicViT that a DeiT becomes by the paper's fine-tuning.

    The backbone is trained at a third of the learning rate, not a hundredth: it has 320 steps, not
    the 40,000 of the paper.
    """
    state = {**start_weights(PRUNED_SPEC, seed), **parent.state_dict()}
    config = PruningConfig(
        epochs=4 if quick else 20,
        lr=1e-3,
        own_rate=0.3,
        ema=0.99,
        augment="none",  # mirrored digits are no digits
        seed=seed,
    )
    images = Images(
        files=read_images(data, classes=10), transform=imagenet_transform(SIZE), threads=1
    )
    with open_group("cpu") as group:
        trained = finetune(
            dynamicvit.build(PRUNED_SPEC, state),
            parent,
            images,
            keep_ratios=PRUNED_SPEC.keep_ratios,
            config=config,
            group=group,
        )
    return dynamicvit.build(PRUNED_SPEC, trained.state)


def recipe(variant: Variant, seed: int, quick: bool) -> TrainConfig:
    """The same for both widths and all models: nothing is tuned to one of them."""
    if not variant.trained:
        return TrainConfig(epochs=0, augment="none", seed=seed)
    return TrainConfig(
        epochs=3 if quick else 8,
        lr=1e-3,
        ema=0.98,  # over some 50 steps, three epochs
        learn_scales=True,
        augment="none",  # mirrored digits are no digits
        seed=seed,
    )


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image as the model sees it, and its label."""
    transform = imagenet_transform(SIZE)
    paths = sorted(folder.glob("*/*.png"))
    images = np.concatenate([preprocess(path, transform) for path in paths])
    return torch.from_numpy(images), torch.tensor([int(path.parent.name) for path in paths])


def train_float(
    spec: ModelSpec, seed: int, images: torch.Tensor, labels: torch.Tensor, epochs: int
) -> nn.Module:
    """A model trained from random weights by the usual means."""
    family: Any = {"gfnet": gfnet, "dynamicvit": dynamicvit}[spec.family]
    module: nn.Module = family.build(spec, family.random_weights(spec, seed))
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.01, fused=True)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(module(images[batch]), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    # As any checkpoint is loaded: filters Hermitian.
    state = {name: value.detach() for name, value in module.state_dict().items()}
    trained: nn.Module = family.build(spec, state)
    return trained


def with_outliers(module: nn.Module) -> nn.Module:
    """The same float function with every eighth channel of MLP inputs 100 times as large."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for name in [name for name in state if name.endswith(".norm2.weight")]:
        block = name.removesuffix("norm2.weight")
        state[f"{block}norm2.weight"][::8] *= 100
        state[f"{block}norm2.bias"][::8] *= 100
        state[f"{block}mlp.fc1.weight"][:, ::8] /= 100
    return _copy(module, state)


def _copy(module: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    other = copy.deepcopy(module)
    other.load_state_dict(dict(state))
    return other


def run_bundle(
    kind: Kind,
    module: nn.Module,
    place: Path,
    images: torch.Tensor,
    *,
    checkpoint: Path | None,
    is_pruned: bool,
) -> tuple[Array, Array]:
    """Logits of the compiled bundle, and of the graph that it was compiled from."""
    bundle = gfcompile.compile_model(
        gfcompile.CompileConfig(
            model=SPECS[kind].name,
            target="host",
            precision="float32" if checkpoint is None else "int8",
            checkpoint=checkpoint,
            image_size=SIZE,
            output=place / "bundle",
            dump=place / "dump",
        ),
        module=module,
        pruning=PRUNING if is_pruned else None,
    )
    with load(bundle.path) as compiled:
        ours = np.concatenate([compiled.run(image[np.newaxis]) for image in images.numpy()])
    graph = session(onnx_ir.load(max((place / "dump").glob("*.onnx"))))
    theirs = [graph.run(None, {"image": image[np.newaxis]})[0] for image in images.numpy()]
    return ours, np.concatenate(theirs)


def run_fake_quantized(module: nn.Module, path: Path, images: torch.Tensor) -> Array:
    """Logits of the torch model as it is while it is trained."""
    checkpoint = read_quantized(path)
    own = _copy(module, checkpoint.state)
    prepared = prepare_training(own, images[:2], checkpoint.scheme, learn_scales=False)
    ranges = [QParams(x.activation_scale, x.activation_zero_point) for x in checkpoint.layers]
    settle_as(prepared, ranges, checkpoint.scales, checkpoint.factors)
    for fake in prepared.fake_quants():
        fake.freeze(torch.device("cpu"))
    with torch.no_grad():
        return np.asarray(prepared.graph(images).numpy())


def _result(kind: Kind, seed: int, variant: str, logits: Array, labels: torch.Tensor) -> Result:
    top1 = 100 * float((logits.argmax(1) == labels.numpy()).mean())
    return Result(model=SPECS[kind].name, seed=seed, variant=variant, top1=top1)


def by_variant(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """The results of all seeds, by model and variant, in the order of the table."""
    keys = [(SPECS[kind].name, name) for kind, names in ROWS.items() for name in names]
    groups = {
        (model, name): [r for r in results if (r.model, r.variant) == (model, name)]
        for model, name in keys
    }
    return {key: group for key, group in groups.items() if group}


def misses(results: Sequence[Result]) -> Sequence[str]:
    """What was not reached, a line each."""
    found = []
    groups = by_variant(results)
    mean = {key: statistics.mean(r.top1 for r in group) for key, group in groups.items()}
    steps = ("float32", PRUNED, f"{PRUNED}, {PRUNED_VARIANTS[-1].name}")
    for before, after in pairwise(steps if (DEIT.name, PRUNED) in mean else ()):
        lost = mean[DEIT.name, before] - mean[DEIT.name, after]
        if lost > MAX_STEP_LOSS:
            found.append(f"{DEIT.name}, {after}: {lost:.2f} points under {before}")
    for model in dict.fromkeys(model for model, _ in groups if model != DEIT.name):
        expected = mean[model, "float32"]
        for variant in (variant for variant in VARIANTS if variant.trained):
            lost = expected - mean[model, variant.name]
            calibrated = expected - mean[model, replace(variant, trained=False).name]
            if not variant.outliers and lost > MAX_LOSS[variant.bits]:
                found.append(f"{model}, {variant.name}: {lost:.2f} points under float")
            if calibrated > WORTH_TRAINING and calibrated - lost < WON_BACK * calibrated:
                found.append(
                    f"{model}, {variant.name}: wins back {calibrated - lost:.2f} of "
                    f"{calibrated:.2f} points"
                )
    quantized = [result for result in results if result.variant not in ("float32", PRUNED)]
    for what in ("graph_agreement", "fake_agreement"):
        agreement = statistics.mean(getattr(result, what) for result in quantized)
        if agreement < MIN_AGREEMENT:
            found.append(f"{what.replace('_', ' ')}: {agreement:.4%} of all predictions")
    return found


def print_table(results: Sequence[Result]) -> None:
    header = ("model", "", "top-1 %", "spread", "under float", "as QDQ graph", "as fake quant")
    rows: list[tuple[str, ...]] = []
    groups = by_variant(results)
    for (model, variant), group in groups.items():
        top1 = [result.top1 for result in group]
        expected = statistics.mean(result.top1 for result in groups[model, "float32"])
        rows.append(
            (
                model,
                variant,
                f"{statistics.mean(top1):.2f}",
                f"{statistics.pstdev(top1):.2f}",
                "" if variant == "float32" else f"{expected - statistics.mean(top1):.2f}",
                f"{statistics.mean(result.graph_agreement for result in group):.3%}",
                f"{statistics.mean(result.fake_agreement for result in group):.3%}",
            )
        )
    command_line.print_table(header, rows, right=set(range(2, len(header))))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--only", action="append", choices=list(SPECS), help="this model; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short trainings, for a first look; bounds may be missed",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
