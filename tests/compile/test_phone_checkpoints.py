"""A model trained for int8 becomes a .tflite and an .mlpackage of the very integers and scales."""

import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from ai_edge_litert import schema_py_generated as schema
from PIL import Image

from gfcompile.compile import models
from gfcompile.compile.models import gfnet
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import Paper
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.compile.quantization import QuantizeConfig, quantize_model
from gfcompile.quantize import TrainConfig, read_quantized
from gfcompile.quantize.checkpoint import QuantizedCheckpoint
from gfcompile.runtime.bundle import Manifest
from gfcompile.targets.coreml.options import CoremlOptions
from gfcompile.targets.coreml.program import read_program

SPEC = GFNetSpec(
    name="gfnet_trained",
    family="gfnet",
    paper=Paper(title="none", arxiv="0"),
    image_size=32,
    num_classes=3,
    patch_size=8,
    dims=(16,),
    depths=(1,),
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizedCheckpoint]:
    """A checkpoint after an epoch over noise, and where it lies."""
    folder = tmp_path_factory.mktemp("trained")
    state = dict(gfnet.random_weights(SPEC, seed=0))
    safetensors.torch.save_file(state, folder / "float.safetensors")
    noise = np.random.default_rng(0)
    for label in ("a", "b", "c"):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(4):
            pixels = noise.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "data" / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._SPECS, SPEC.name, SPEC)
        quantized = quantize_model(
            QuantizeConfig(
                model=SPEC.name,
                checkpoint=folder / "float.safetensors",
                train_data=folder / "data",
                output=folder / "quantized.safetensors",
                device="cpu",
                weight_bits=request.param,
                training=TrainConfig(epochs=1, batch_size=4),
            )
        )
    return quantized.path, read_quantized(quantized.path)


def compiled(
    checkpoint: Path, folder: Path, target: str, coreml: CoremlOptions | None = None
) -> tuple[Path, Manifest]:
    """The model file in a bundle of `checkpoint`, and what the bundle says."""
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        precision="int8",
        checkpoint=checkpoint,
        output=folder / "bundle",
        coreml=coreml or CoremlOptions(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._SPECS, SPEC.name, SPEC)
        bundle = compile_model(config)
    return bundle.path / bundle.manifest.library, bundle.manifest


def integers(checkpoint: QuantizedCheckpoint, name: str) -> np.ndarray:
    """A weight's integers, output channels first."""
    scales = checkpoint.scales[name].reshape(-1, *[1] * (checkpoint.state[name].ndim - 1))
    return np.rint(checkpoint.state[name].numpy() / scales).astype(np.int8)


@pytest.mark.parametrize(
    ("trained", "target"),
    [(8, "tflite-xnnpack"), (8, "tflite-int-only"), (4, "tflite-xnnpack")],
    indirect=["trained"],
)
def test_a_tflite_file_has_the_checkpoints_integers_and_scales(
    trained: tuple[Path, QuantizedCheckpoint], target: str, tmp_path: Path
) -> None:
    path, checkpoint = trained
    library, manifest = compiled(path, tmp_path, target)
    model = schema.ModelT.InitFromPackedBuf(library.read_bytes())
    found: dict[bytes, list[tuple[np.ndarray, np.ndarray]]] = {}
    activations = set()
    for tensor in model.subgraphs[0].tensors:
        quantization = tensor.quantization
        if quantization is None or quantization.scale is None:
            continue
        data = model.buffers[tensor.buffer].data
        if data is not None:
            entry = (quantization.scale, quantization.zeroPoint)
            found.setdefault(bytes(data), []).append(entry)
        elif tensor.type == schema.TensorType.INT8:
            activations.add((quantization.scale[0], int(quantization.zeroPoint[0])))
    assert checkpoint.scales
    for name, scales in checkpoint.scales.items():
        weight = integers(checkpoint, name)
        # Convolutions have their channels last: (O, I, H, W) -> (O, H, W, I).
        stored = weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight
        ((scale, zero_points),) = found[np.ascontiguousarray(stored).tobytes()]
        np.testing.assert_array_equal(scale, scales)  # bit by bit: float32 on both sides
        assert not np.any(zero_points)
    for layer in checkpoint.layers:
        assert (np.float32(layer.activation_scale), layer.activation_zero_point) in activations
    note = "from a quantized checkpoint: epochs of training 1, images 12"
    assert note in manifest.notes
    four_bits = checkpoint.scheme.weight_bits == 4
    assert four_bits == any("4 bits" in note for note in manifest.notes)
    assert four_bits == manifest.precision.storage.startswith("weights of 4 bits as int8")


@pytest.mark.parametrize(("trained", "ios"), [(8, 17), (4, 17), (4, 18)], indirect=["trained"])
def test_an_mlpackage_has_the_checkpoints_integers_and_scales(
    trained: tuple[Path, QuantizedCheckpoint], ios: int, tmp_path: Path
) -> None:
    path, checkpoint = trained
    library, manifest = compiled(path, tmp_path, "coreml", CoremlOptions(ios=ios))  # type: ignore[arg-type]
    program = read_program(library)
    key = "data" if ios == 18 else "quantized_data"
    stored = [op for op in program.operations if op.kind.startswith("constexpr_")]
    assert len(stored) == len(checkpoint.scales)
    found = {op.literals[key].tobytes(): op for op in stored}
    four_bits = checkpoint.scheme.weight_bits == 4
    for name, scales in checkpoint.scales.items():
        op = found[integers(checkpoint, name).tobytes()]
        # A program in float16 has its scales in float16.
        np.testing.assert_array_equal(op.literals["scale"].reshape(-1), scales.astype(np.float16))
        width = "int4" if four_bits and ios == 18 else "int8"
        kind = op.literal_types[key]
        assert (kind.dtype, math.prod(kind.shape)) == (width, checkpoint.state[name].numel())
    words = "int4 weights" if four_bits and ios == 18 else "int8 weights"
    assert manifest.precision.storage.startswith(words)
    assert (four_bits and ios < 18) == any("--ios 18 does" in note for note in manifest.notes)
