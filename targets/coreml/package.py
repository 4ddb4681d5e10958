"""MIL programs as .mlpackage folders, the same bytes for the same program."""

import gc
import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gfcompile.targets.coreml.tools import coremltools

_DATA = "com.apple.CoreML"
MODEL_FILE = f"Data/{_DATA}/model.mlmodel"
WEIGHTS_FILE = f"Data/{_DATA}/weights/weight.bin"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What Xcode shows of a model; `extra` is for whoever reads the file."""

    text: str
    author: str
    version: str
    license: str
    extra: Mapping[str, str] = field(default_factory=dict)


def write_package(
    program: Any,
    package: Path,
    *,
    ios: int,
    image_shape: tuple[int, ...] | None,
    classes: Sequence[str] | None,
    description: Description,
) -> None:
    """Writes a MIL program as the folder `package`.

    Args:
        image_shape: (1, 3, H, W) where its input is an RGB image.
        classes: names of what its second output, `probabilities`, holds; None where it has none.
    """
    ct = coremltools()
    inputs = classifier = None
    if image_shape is not None:
        inputs = [ct.ImageType(name="image", shape=image_shape, color_layout=ct.colorlayout.RGB)]
    if classes is not None:
        classifier = ct.ClassifierConfig(
            list(classes), predicted_probabilities_output="probabilities"
        )
    # coremltools saves before it returns; where it chooses the place, that stays until exit.
    with tempfile.TemporaryDirectory(prefix="gfcompile-") as folder:
        gc.freeze()  # `convert` ends with a collection: half a second over all that is imported
        try:
            model = ct.convert(
                program,
                source="milinternal",
                convert_to="mlprogram",
                inputs=inputs,
                classifier_config=classifier,
                minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
                # The program has its types and its operations already; no pass is to change them.
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
                package_dir=str(Path(folder) / "saved.mlpackage"),
            )
        finally:
            gc.unfreeze()
        spec = model.get_spec()
        _describe(spec.description, description)
        weights = Path(model.weights_dir) / "weight.bin"
        (package / MODEL_FILE).parent.mkdir(parents=True)
        if weights.exists():  # not so where every constant is small
            (package / WEIGHTS_FILE).parent.mkdir()
            shutil.copyfile(weights, package / WEIGHTS_FILE)
    (package / MODEL_FILE).write_bytes(spec.SerializeToString(deterministic=True))
    _write_manifest(package)


def _describe(target: Any, description: Description) -> None:
    metadata = target.metadata
    metadata.shortDescription = description.text
    metadata.author = description.author
    metadata.license = description.license
    metadata.versionString = description.version
    # The date of the conversion would make every file another one.
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    metadata.userDefined.update(description.extra)
    texts = {
        "image": "the picture: RGB, cropped to a square",
        "classLabel": "the likeliest class",
        "classLabel_probs": "the probability of each class",
        "logits": "the last layer's output, before the softmax",
    }
    for feature in (*target.input, *target.output):
        feature.shortDescription = texts.get(feature.name, "")


def _write_manifest(package: Path) -> None:
    """The package's index, with identifiers that come from the names instead of from chance."""

    def identifier(name: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, name)).upper()

    def item(description: str, name: str) -> dict[str, str]:
        path = f"{_DATA}/{name}"
        return {"author": _DATA, "description": description, "name": name, "path": path}

    items = {identifier("model"): item("CoreML Model Specification", "model.mlmodel")}
    if (package / WEIGHTS_FILE).exists():
        items[identifier("weights")] = item("CoreML Model Weights", "weights")
    index = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": identifier("model"),
    }
    text = json.dumps(index, indent=4)
    (package / "Manifest.json").write_text(text + "\n", encoding="utf-8")
