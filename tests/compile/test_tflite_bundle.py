"""From a module to a .tflite bundle: it runs, agrees with its graph, and XNNPACK takes it all."""

import json
from pathlib import Path

import numpy as np
import pruning_cases
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from small_models import PYRAMID, SPEC, build
from tflite_models import check_tflite

import gfcompile.runtime
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.models.gfnet_specs import GFNetSpec
from gfcompile.compile.models.spec import ModelSpec
from gfcompile.compile.passes import lower
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.compile.prune import freeze
from gfcompile.compile.trace import trace
from gfcompile.runtime.errors import BundleError, CompileError, UserError
from gfcompile.runtime.images import Transform, dequantize, preprocess, stand_in_photos
from gfcompile.targets.tflite.options import TfliteOptions


def compiled(
    folder: Path,
    precision: str,
    spec: GFNetSpec = SPEC,
    target: str = "tflite",
    options: TfliteOptions | None = None,
    **more: object,
) -> Bundle:
    config = CompileConfig(
        model=spec.name,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        image_size=spec.image_size,
        output=folder / "bundle",
        tflite=options or TfliteOptions(),
        cache=False,
        **more,  # type: ignore[arg-type]
    )
    return compile_model(config, module=build(spec))


def torch_logits(spec: GFNetSpec, bundle: Bundle, photo: Path) -> np.ndarray:
    image = preprocess(photo, Transform.from_dict(dict(bundle.manifest.transform or {})))
    with torch.no_grad():
        return build(spec)(torch.from_numpy(image)).numpy()


@pytest.mark.parametrize(
    ("spec", "precision"),
    [(SPEC, "float32"), (SPEC, "float16"), (SPEC, "int8"), (PYRAMID, "int8")],
    ids=lambda value: getattr(value, "name", value),
)
def test_bundle_agrees_with_torch_and_is_delegated_whole(
    tmp_path: Path, spec: GFNetSpec, precision: str
) -> None:
    bundle = compiled(tmp_path, precision, spec)
    photo = stand_in_photos()[0]
    with gfcompile.runtime.load(bundle.path) as session:
        logits = session.run(session.encode(photo))
        top = session.classify(photo, top=3)
        assert session.device_name.startswith("cpu, ai-edge-litert")
    expected = torch_logits(spec, bundle, photo)
    share = {"float32": 1e-5, "float16": 5e-3, "int8": 0.1}[precision]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=share * np.abs(expected).max())
    assert [index for index, _, _ in top] == list(np.argsort(-logits[0])[:3])
    manifest = bundle.manifest
    assert (manifest.kind, manifest.arch) == ("tflite", "any")
    assert manifest.extra["not_delegated"] == {}
    assert manifest.extra["partitions"] == 1
    stages = [entry["stage"] for entry in manifest.ledger]
    added = {"float32": [], "float16": ["halved"], "int8": ["quantized", "completed"]}[precision]
    assert stages == ["traced", "lowered", *added, "artifact"]


@pytest.mark.parametrize(
    "options",
    [
        TfliteOptions(interface="int8"),
        TfliteOptions(interface="uint8"),
        TfliteOptions(input="uint8-image"),
    ],
    ids=str,
)
def test_integer_interfaces_classify_as_the_float_one_does(
    tmp_path: Path, options: TfliteOptions
) -> None:
    photo = stand_in_photos()[0]
    reference = compiled(tmp_path / "float", "int8")
    bundle = compiled(tmp_path / "integer", "int8", options=options)
    with gfcompile.runtime.load(reference.path) as session:
        wanted = {index: p for index, _, p in session.classify(photo, top=10)}
    with gfcompile.runtime.load(bundle.path) as session:
        got = {index: p for index, _, p in session.classify(photo, top=10)}
        dtype = "uint8" if options.input == "uint8-image" else options.interface
        assert session.inputs[0].dtype == session.encode(photo).dtype == dtype
        assert session.inputs[0].shape == (1, 64, 64, 3)
    for index, probability in wanted.items():
        assert got[index] == pytest.approx(probability, abs=0.01)


def test_integer_only_bundle_has_no_real_tensor(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, "int8", PYRAMID, "tflite-int-only", TfliteOptions(interface="int8"))
    model = schema.ModelT.InitFromPackedBuf((bundle.path / bundle.manifest.library).read_bytes())
    types = {tensor.type for tensor in model.subgraphs[0].tensors}
    assert types == {schema.TensorType.INT8, schema.TensorType.INT32}
    completed = next(e for e in bundle.manifest.ledger if e["stage"] == "completed")
    assert completed["sqnr_db"] > 20
    photo = stand_in_photos()[0]
    expected = torch_logits(PYRAMID, bundle, photo)
    with gfcompile.runtime.load(bundle.path) as session:
        logits = dequantize(session.run(session.encode(photo)), session.outputs[0])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.15 * np.abs(expected).max())


def test_integer_only_refuses_what_has_no_integer_form(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"\(node .*no integer form.*--fft circular"):
        compiled(tmp_path, "int8", target="tflite-int-only", fft="dft")


def test_equal_configurations_give_equal_files(tmp_path: Path) -> None:
    first = compiled(tmp_path / "a", "int8")
    second = compiled(tmp_path / "b", "int8")
    assert first.manifest.files == second.manifest.files
    # A byte for each weight, and as much again for the operators of so small a model.
    parameters = sum(p.numel() for p in build(SPEC).parameters())
    assert first.manifest.files["gfnet_small.tflite"].size_bytes < 2.5 * parameters


def test_a_manifest_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, "float32")
    path = bundle.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["inputs"][0]["dtype"] = "uint8"
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="do not belong together"):
        gfcompile.runtime.load(bundle.path)


def test_labels_are_in_the_bundle_and_behind_the_model(tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    # With a byte order mark, as editors on Windows write it.
    labels.write_text("\n".join(f"thing {i}" for i in range(10)), encoding="utf-8-sig")
    bundle = compiled(tmp_path, "float32", labels=labels)
    assert b"thing 0\nthing 1\n" in (bundle.path / "gfnet_small.tflite").read_bytes()
    with gfcompile.runtime.load(bundle.path) as session:
        assert session.classify(stand_in_photos()[0], top=1)[0][1].startswith("thing ")


def test_trace_shows_the_integers_of_the_graph(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, "int8")
    with gfcompile.runtime.load(bundle.path) as session:
        trace = session.trace(session.encode(stand_in_photos()[0]))
        profile = session.profile(runs=2)
    assert sum(value.dtype == np.int8 for value in trace.values()) >= 8
    assert [step.calls for step in profile] == [2]


@pytest.mark.parametrize(
    ("target", "precision", "options", "message"),
    [
        ("host", "float16", TfliteOptions(), "--fp16 is for ARM's CPUs|AVX512-FP16"),
        ("host", "int8", TfliteOptions(interface="int8"), "are for tflite, not for"),
        ("tflite", "float32", TfliteOptions(interface="int8"), "--interface int8 needs --int8"),
        ("tflite-int-only", "float32", TfliteOptions(), "integer operators alone: add --int8"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    tmp_path: Path, target: str, precision: str, options: TfliteOptions, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compiled(tmp_path, precision, target=target, options=options)


def test_batches_of_images_are_taken_where_the_graph_has_them() -> None:
    images = torch.from_numpy(
        np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)
    )
    lowered = lower(
        trace(build(PYRAMID), images),
        fft="dft",
        choose_form=lambda *_: "dft",
        half_constants=False,
    )
    check_tflite(lowered.model, images.numpy())


@pytest.mark.parametrize("spec", pruning_cases.SPECS, ids=lambda spec: spec.name)
def test_pruning_models_of_every_family_convert(spec: ModelSpec) -> None:
    image = pruning_cases.images(spec, count=2)
    module = freeze(pruning_cases.build(spec))
    lowered = lower(
        trace(module, image), fft="dft", choose_form=lambda *_: "dft", half_constants=False
    )
    check_tflite(lowered.model, image.numpy())


@pytest.mark.parametrize(
    ("spec", "target"),
    [
        (pruning_cases.DEIT, "tflite"),
        (pruning_cases.DEIT, "tflite-int-only"),
        (pruning_cases.LVVIT, "tflite"),  # its logits are a sum in float
    ],
    ids=lambda case: getattr(case, "name", case),
)
def test_int8_pruning_model_is_held_against_its_graph(
    tmp_path: Path, spec: ModelSpec, target: str
) -> None:
    config = CompileConfig(
        model=spec.name,
        target=target,
        precision="int8",
        image_size=spec.image_size,
        output=tmp_path / "bundle",
        cache=False,
    )
    bundle = compile_model(config, module=freeze(pruning_cases.build(spec)))
    entry = next(e for e in bundle.manifest.ledger if e["stage"] == "artifact")
    assert entry["int8"]["max_steps"] <= 1
    left = set(bundle.manifest.extra["not_delegated"])
    chosen = {"ADD", "CONCATENATION", "GATHER", "RESHAPE", "TOPK_V2"}
    assert left <= chosen if target == "tflite" else chosen <= left
