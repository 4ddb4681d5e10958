"""Pruning models become bundles that keep the same patches as their graph."""

from pathlib import Path

import numpy as np
import pruning_cases
import pytest
import torch

import gfcompile.runtime
from gfcompile.compile.emission import Pruning
from gfcompile.compile.pipeline import CompileConfig, compile_model


@pytest.mark.parametrize("family", ["DEIT", "LVVIT", "CONVNEXT", "SWIN"])
def test_every_family_compiles_and_agrees_with_torch(tmp_path: Path, family: str) -> None:
    spec = getattr(pruning_cases, family)
    module = pruning_cases.build(spec).eval()
    config = CompileConfig(
        model=spec.name,
        target="host",
        image_size=spec.image_size,
        output=tmp_path / "out",
        cache=False,
    )
    pruning = Pruning(kept=spec.dropping, chosen_anew=spec.chooses_anew)
    bundle = compile_model(config, module=module, pruning=pruning)
    (entry,) = (e for e in bundle.manifest.ledger if e["stage"] == "artifact")
    assert len(entry["tokens_kept"]) == len(spec.kept_patches)
    assert min(entry["tokens_kept"]) == 1
    generator = np.random.default_rng(0)
    image = generator.standard_normal((1, 3, spec.image_size, spec.image_size), np.float32)
    with gfcompile.runtime.load(bundle.path) as session:
        logits = session.run(image)
    with torch.no_grad():
        expected = module(torch.from_numpy(image)).numpy()
    # Sums of at most 192 terms in a dozen layers, of logits around 1.
    np.testing.assert_allclose(logits, expected, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "precision"),
    [("host", "int8"), ("jetson-tx2", "float32"), ("jetson-orin", "int8")],
)
def test_a_pruned_deit_says_which_patches_its_artifact_keeps(
    tmp_path: Path, target: str, precision: str
) -> None:
    config = CompileConfig(
        model="dynamicvit_deit_256",
        target=target,
        precision=precision,  # type: ignore[arg-type]
        image_size=96,  # 36 patches, of which 25, 17 and 12 are kept
        output=tmp_path / "out",
    )
    bundle = compile_model(config)
    (entry,) = (e for e in bundle.manifest.ledger if e["stage"] == "artifact")
    shares = entry["tokens_kept"]
    assert len(shares) == 3
    # Patches whose scores differ by less than rounding, or than an int8 step, may change places.
    assert min(shares) >= (0.999 if precision == "float32" else 0.9)
    assert any("an estimated" in note for note in bundle.manifest.notes)
