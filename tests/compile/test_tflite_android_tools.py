"""What Google's own tools for Android make of a .tflite file: metadata, labels, and its classes."""

import json
from pathlib import Path

import numpy as np
import pytest
from other_pythons import python_with_tflite_support
from PIL import Image
from small_models import PYRAMID, build

import gfcompile.runtime
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.targets.tflite.options import TfliteOptions

# The metadata as the library displays it, and the task library's classification of a PNG.
SCRIPT = """
import json, sys
from tflite_support import metadata
from tflite_support.task import core, vision
model, image = sys.argv[1:]
shown = metadata.MetadataDisplayer.with_model_file(model)
options = vision.ImageClassifierOptions(base_options=core.BaseOptions(file_name=model))
classifier = vision.ImageClassifier.create_from_options(options)
result = classifier.classify(vision.TensorImage.create_from_file(image))
print(json.dumps({
    "metadata": json.loads(shown.get_metadata_json()),
    "files": {
        name: shown.get_associated_file_buffer(name).decode()
        for name in shown.get_packed_associated_file_list()
    },
    "classes": [[c.category_name, c.score] for c in result.classifications[0].categories],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tensor", "uint8-image"])
def test_the_task_library_classifies_as_the_bundle_does(source: str, tmp_path: Path) -> None:
    python = python_with_tflite_support()
    labels = tmp_path / "labels"
    labels.write_text("\n".join(f"thing {i}" for i in range(PYRAMID.num_classes)))
    config = CompileConfig(
        model=PYRAMID.name,
        target="tflite",
        precision="int8",
        image_size=PYRAMID.image_size,
        labels=labels,
        output=tmp_path / "bundle",
        tflite=TfliteOptions(input=source),  # type: ignore[arg-type]
        cache=False,
    )
    bundle = compile_model(config, module=build(PYRAMID))
    # Of the model's own size, so that nobody has to resize.
    size = PYRAMID.image_size
    pixels = np.fromfile(bundle.path / "golden" / "image.u8", np.uint8)[: 3 * size * size]
    pixels = pixels.reshape(size, size, 3)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    model = bundle.path / bundle.manifest.library
    told = json.loads(python.run(SCRIPT, str(model), str(tmp_path / "image.png")))

    (graph,) = told["metadata"]["subgraph_metadata"]
    (image,) = graph["input_tensor_metadata"]
    (unit,) = image["process_units"]
    transform = bundle.manifest.transform
    assert transform is not None
    if source == "tensor":
        assert unit["options"]["mean"] == pytest.approx([255 * m for m in transform["mean"]])
        assert unit["options"]["std"] == pytest.approx([255 * s for s in transform["std"]])
    else:
        assert unit["options"] == {"mean": [0.0], "std": [1.0]}
    assert image["content"]["content_properties"]["color_space"] == "RGB"
    assert told["files"] == {"labels.txt": labels.read_text() + "\n"}

    with gfcompile.runtime.load(bundle.path) as session:
        logits = session.run(session.encode(pixels))[0]
    scores = dict(told["classes"])
    (entry,) = (e for e in bundle.manifest.ledger if e["stage"] == "artifact")
    # An older XNNPACK and another normalization in float32: the steps that the ledger allows.
    tolerance = 3 * entry["int8"]["logits_step"]
    # The task library leaves classes of negative scores out.
    found = [scores.get(f"thing {i}", min(0, logit)) for i, logit in enumerate(logits)]
    assert scores.keys() <= {f"thing {i}" for i in range(PYRAMID.num_classes)}
    assert len(scores) >= np.sum(logits > tolerance) >= 2
    np.testing.assert_allclose(found, logits, rtol=0, atol=tolerance)
