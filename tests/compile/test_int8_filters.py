"""Filters in int8 are circular convolutions of integers; that they are exact, compiling checks."""

from pathlib import Path
from typing import Any

import pytest
from small_models import PYRAMID, SPEC, build

from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.runtime.bundle import Manifest
from gfcompile.runtime.errors import UserError
from tools import need, need_arm64_sysroot


def compiled(
    folder: Path, target: str, spec: Any = SPEC, **options: Any
) -> tuple[Manifest, set[str]]:
    config = CompileConfig(
        model=spec.name,
        target=target,
        precision="int8",
        image_size=spec.image_size,
        output=folder / target,
        cache=False,
        **options,
    )
    manifest = compile_model(config, module=build(spec)).manifest
    # The host may have kernels for a better level of its CPU as well.
    kernels = {str(kernel["name"]).partition("_level")[0] for kernel in manifest.kernels}
    return manifest, {name for name in kernels if "filter" in name}


@pytest.mark.parametrize("target", ["host", "raspberry-pi-5", "jetson-tx2"])
def test_named_filters_are_computed_in_integers(tmp_path: Path, target: str) -> None:
    if target.startswith("raspberry"):
        need("qemu-aarch64")
        need_arm64_sysroot()
    manifest, kernels = compiled(
        tmp_path, target, fft="circular", int8_filters=("blocks.0.filter",)
    )
    assert kernels == {"circular_filter_1x8x8x48_i8", "circular_filter_1x8x8x48_f32"}
    assert manifest.extra["layers"][1]["name"] == "blocks.0.filter"
    (entry,) = (entry for entry in manifest.ledger if entry["stage"] == "artifact")
    assert entry["int8"]["max_steps"] <= 1


def test_auto_takes_none_whose_dft_form_is_the_faster_one(tmp_path: Path) -> None:
    manifest, kernels = compiled(tmp_path, "x86-64-v3", PYRAMID, int8_filters=("auto",))
    assert manifest.extra["scheme"]["int8_filters"] == []
    assert not any("circular" in name for name in kernels)


def test_in_the_dft_form_a_named_filter_is_computed_in_float(tmp_path: Path) -> None:
    manifest, kernels = compiled(tmp_path, "host", fft="dft", int8_filters=("*",))
    assert kernels == {"dft_filter_1x8x8x48_f32"}
    assert [record["form"] for record in manifest.filters] == ["dft", "dft"]


def test_int8_filters_are_for_int8(tmp_path: Path) -> None:
    config = CompileConfig(
        model="gfnet_xs", target="host", int8_filters=("auto",), output=tmp_path / "out"
    )
    with pytest.raises(UserError, match="--int8-filter are for --int8"):
        compile_model(config)
