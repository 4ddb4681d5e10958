"""The sample apps use the names that bundles have; to check that takes no Swift or Kotlin."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import SPEC, build

from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.runtime.bundle import MANIFEST_NAME
from gfcompile.runtime.device import gfrt
from gfcompile.targets.coreml.program import read_program
from gfcompile.targets.tflite.options import TfliteOptions

EXAMPLES = Path(__file__).parents[2] / "examples"


def bundle_of(folder: Path, target: str) -> Path:
    labels = folder / "names.txt"
    labels.write_text("\n".join(f"kind {i}" for i in range(SPEC.num_classes)))
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        image_size=SPEC.image_size,
        labels=labels,
        output=folder / "bundle",
        tflite=TfliteOptions(input="uint8-image" if target == "tflite" else "tensor"),
        cache=False,
    )
    return compile_model(config, module=build(SPEC)).path


def constants(source: str, pattern: str) -> dict[str, str]:
    return dict(re.findall(pattern + r' = "(.*?)"', source))


def manifest_of(bundle: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((bundle / MANIFEST_NAME).read_text())
    return values


@pytest.mark.slow
def test_swift_uses_the_names_of_a_bundle(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, "coreml")
    manifest = manifest_of(bundle)
    description = read_program(bundle / manifest["library"]).spec.description
    source = (EXAMPLES / "ios" / "Classifier.swift").read_text()
    assert constants(source, r"static let (\w+)") == {
        "manifest": MANIFEST_NAME,
        "image": description.input[0].name,
        "probabilities": description.predictedProbabilitiesName,
    }
    assert description.input[0].type.WhichOneof("Type") == "imageType"
    decoded = source[source.index("struct Manifest") : source.index("struct Guess")]
    for name in re.findall(r"let (\w+): (?:Int|String)", decoded):
        assert name in manifest or name in manifest["transform"]


@pytest.mark.slow
def test_kotlin_uses_the_names_of_a_bundle(tmp_path: Path) -> None:
    from gfcompile.runtime.tflite import TfliteInterpreter

    bundle = bundle_of(tmp_path, "tflite")
    manifest = manifest_of(bundle)
    source = (EXAMPLES / "android" / "Classifier.kt").read_text()
    names = constants(source, r"const val (\w+)")
    assert names["MANIFEST"] == MANIFEST_NAME
    assert (bundle / names["LABELS"]).is_file()
    assert names["LIBRARY"] in manifest
    assert {names["IMAGE_SIZE"], names["RESIZE"]} <= manifest[names["TRANSFORM"]].keys()
    content = (bundle / manifest["library"]).read_bytes()
    signatures = TfliteInterpreter(content)._interpreter.get_signature_list()
    assert signatures == {
        names["SIGNATURE"]: {"inputs": [names["IMAGE"]], "outputs": [names["LOGITS"]]}
    }
    (spec,) = manifest["inputs"]
    size = SPEC.image_size
    assert (spec["dtype"], spec["shape"]) == ("uint8", [1, size, size, 3])


def test_kotlin_declares_what_the_c_header_does() -> None:
    """JNA finds functions by name and passes what Kotlin declares: both must be the header's."""
    kinds = {
        "Pointer": r".*\*",
        "PointerByReference": r".*\*\*",
        "String": "const char \\*",
        "ByteArray": "const uint8_t \\*",
        "Array<Pointer>": r"(const )?void \*const \w+\[\]",
        "LongArray": r"const size_t \w+\[\]",
        "Long": "size_t ",
        "Int": "u?int32_t ",
    }
    kotlin = (EXAMPLES / "android-native" / "Gfrt.kt").read_text()
    header = (Path(gfrt.__file__).parent / "gfrt.h").read_text()
    functions = re.findall(r"fun (gfrt_\w+)\(([^)]*)\)", kotlin)
    assert len(functions) == 7
    for name, parameters in functions:
        (declared,) = re.findall(rf"GFRT_API [\w *]+?{name}\(([^)]*)\);", header)
        in_c = [] if declared == "void" else [" ".join(p.split()) for p in declared.split(",")]
        in_kotlin = [p.split(":")[1].strip() for p in parameters.split(",") if p.strip()]
        for kind, parameter in zip(in_kotlin, in_c, strict=True):
            assert re.match(kinds[kind], parameter), (name, kind, parameter)
    results = re.findall(r"fun (gfrt_\w+)\([^)]*\): (\w+)", kotlin)
    for name, kind in results:
        result = {"Int": "gfrt_status ", "String": "const char \\*"}[kind]
        assert re.search(rf"GFRT_API {result}{name}\(", header)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("ios/Classifier.swift", 100), ("android/Classifier.kt", 100), ("android-native/Gfrt.kt", 60)],
)
def test_the_examples_stay_small(name: str, limit: int) -> None:
    lines = (EXAMPLES / name).read_text().splitlines()
    assert len(lines) <= limit
    assert max(map(len, lines)) <= 100
