"""Models of every family, at batch 1 and above, as an .mlpackage; for .tflite see its own tests."""

from pathlib import Path

import numpy as np
import pruning_cases
import pytest
import torch
from mil import DESCRIPTION
from onnx_models import run
from small_models import PYRAMID, SPEC, build
from torch import nn

from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.passes import lower
from gfcompile.compile.prune import freeze
from gfcompile.compile.trace import rounding_tolerance, trace
from gfcompile.targets.coreml.emit import emit
from gfcompile.targets.coreml.evaluate import Evaluator
from gfcompile.targets.coreml.options import CoremlOptions, Layout
from gfcompile.targets.coreml.program import read_program

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES: list[tuple[ModelSpec, int, Layout]] = [
    (SPEC, 1, "plain"),
    (PYRAMID, 3, "ane"),
    (pruning_cases.DEIT, 2, "ane"),
    (pruning_cases.LVVIT, 2, "plain"),
    (pruning_cases.CONVNEXT, 2, "ane"),
    (pruning_cases.SWIN, 2, "plain"),
    (pruning_cases.whole(pruning_cases.LVVIT), 1, "ane"),
]


@pytest.mark.parametrize(("spec", "batch", "layout"), CASES)
def test_a_family_converts_and_computes_its_graph(
    spec: ModelSpec, batch: int, layout: Layout, tmp_path: Path
) -> None:
    module: nn.Module
    if isinstance(spec, GFNetSpec):
        module = build(spec)
        image = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    else:
        module = freeze(pruning_cases.build(spec))
        image = pruning_cases.images(spec, count=batch)
    model = lower(
        trace(module, image), fft="dft", choose_form=lambda *_: "dft", half_constants=False
    ).model
    package = tmp_path / "model.mlpackage"
    emitted = emit(
        model,
        package,
        options=CoremlOptions(input="tensor", layout=layout),
        half=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        description=DESCRIPTION,
    )
    assert emitted.logits_shape == (batch, spec.num_classes)
    expected = run(model, image.numpy())
    logits = Evaluator(read_program(package)).run({"image": image.numpy()})["logits"]
    tolerance = rounding_tolerance(model) * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
