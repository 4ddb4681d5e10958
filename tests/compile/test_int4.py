"""Bundles whose weights have four bits: half the size of int8's, and exact on every kind of target.

That they are exact, `compile_model` itself checks: it runs each bundle against its graph, or fails.
"""

import math
from pathlib import Path

import pytest

from gfcompile.compile.models import gfnet
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import Paper
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.targets.tvm import plan as plans
from tools import need, need_arm64_sysroot

SPEC = GFNetSpec(
    name="gfnet_small",
    family="gfnet",
    paper=Paper(title="none", arxiv="0"),
    image_size=32,
    num_classes=10,
    patch_size=8,
    dims=(32,),
    depths=(1,),
)


# The last one has four weights to a word.
@pytest.mark.parametrize("target", ["host", "x86-64-v3", "raspberry-pi-4", "jetson-orin"])
def test_four_bit_weights_take_half_a_byte_each(tmp_path: Path, target: str) -> None:
    if target.startswith("raspberry"):
        need("qemu-aarch64")
        need_arm64_sysroot()
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        precision="int8",
        weight_bits=4,
        image_size=SPEC.image_size,
        output=tmp_path / "bundle",
        cache=False,
    )
    bundle = compile_model(config, module=gfnet.build(SPEC, gfnet.random_weights(SPEC, seed=0)))
    plan = plans.parse((bundle.path / "plan.bin").read_bytes())
    dense = sum(
        math.prod(shape)
        for name, shape in SPEC.shapes().items()
        if name.endswith("weight") and len(shape) > 1 and "filter" not in name
    )
    # The head's ten rows are padded to whole vectors; everything else has its size.
    assert dense <= plan.packed_bytes <= dense + 64 * 32
    stored = bundle.manifest.files["weights.bin"].size_bytes
    assert stored == plan.weights_bytes - plan.packed_bytes // 2
    assert bundle.manifest.precision.storage.startswith("int4 weights (expanded")
    entry = next(entry for entry in bundle.manifest.ledger if entry["stage"] == "artifact")
    assert entry["int8"]["max_steps"] <= 1


@pytest.mark.parametrize(
    "target", ["host", "x86-64", "x86-64-v3", "raspberry-pi-4", "jetson-tx2", "jetson-orin"]
)
def test_groups_of_weights_have_factors(tmp_path: Path, target: str) -> None:
    if target.startswith("raspberry"):
        need("qemu-aarch64")
        need_arm64_sysroot()
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        precision="int8",
        weight_bits=4,
        group_size=16,
        image_size=SPEC.image_size,
        output=tmp_path / "bundle",
        cache=False,
    )
    bundle = compile_model(config, module=gfnet.build(SPEC, gfnet.random_weights(SPEC, seed=0)))
    plan = plans.parse((bundle.path / "plan.bin").read_bytes())
    # Embedding, two layers of the MLP, head: each in four bits, though their values are not.
    assert len(plan.grouped) == 4
    assert sum(grouped.size_bytes for grouped in plan.grouped) == plan.packed_bytes
    assert plan.packed_bytes >= 3 * 64 * 32 + 2 * 32 * 128 + 10 * 32
    # A factor for each 16 weights, padding not counted.
    assert sum(g.factor_bytes for g in plan.grouped) <= plan.packed_bytes / 16
    assert bundle.manifest.precision.storage.startswith("int4 weights in groups of 16 (expanded")
    entry = next(entry for entry in bundle.manifest.ledger if entry["stage"] == "artifact")
    assert entry["int8"]["max_steps"] <= 1


def test_eight_bit_weights_are_stored_as_they_are(tmp_path: Path) -> None:
    config = CompileConfig(
        model=SPEC.name,
        target="host",
        precision="int8",
        image_size=SPEC.image_size,
        output=tmp_path / "bundle",
        cache=False,
    )
    bundle = compile_model(config, module=gfnet.build(SPEC, gfnet.random_weights(SPEC, seed=0)))
    plan = plans.parse((bundle.path / "plan.bin").read_bytes())
    assert plan.packed_bytes == 0
    assert bundle.manifest.files["weights.bin"].size_bytes == plan.weights_bytes
