"""The same bundle in other interpreters: the older tflite-runtime, and LiteRT's arm64 wheel."""

import json

import numpy as np
import pytest
from other_pythons import Python, python_for_arm64, python_with_tflite_runtime
from small_models import PYRAMID, build

import gfcompile.runtime
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.pipeline import CompileConfig, compile_model

SCRIPT = """
import json, sys
import numpy as np
import gfcompile.runtime
bundle, size = sys.argv[1], int(sys.argv[2])
pixels = np.fromfile(bundle + "/golden/image.u8", np.uint8).reshape(size, size, 3)
with gfcompile.runtime.load(bundle) as session:
    logits = session.run(session.encode(pixels))
    print(json.dumps({"device": session.device_name, "logits": logits[0].tolist()}))
"""


@pytest.fixture(scope="module", params=["float32", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config = CompileConfig(
        model=PYRAMID.name,
        target="tflite",
        precision=request.param,
        image_size=PYRAMID.image_size,
        output=tmp_path_factory.mktemp("bundle") / request.param,
        cache=False,
    )
    return compile_model(config, module=build(PYRAMID))


def check(python: Python, bundle: Bundle) -> str:
    """The logits there are those here, within what kernels may differ by; the device's name."""
    result = json.loads(python.run(SCRIPT, str(bundle.path), str(PYRAMID.image_size)))
    size = PYRAMID.image_size
    pixels = np.fromfile(bundle.path / "golden" / "image.u8", np.uint8).reshape(size, size, 3)
    with gfcompile.runtime.load(bundle.path) as session:
        wanted = session.run(session.encode(pixels))[0]
    entry = next(dict(e) for e in bundle.manifest.ledger if e["stage"] == "artifact")
    # The steps that the ledger allows, of the logits' own scale; else the rounding that it does.
    tolerance = 3 * entry["int8"]["logits_step"] if entry["int8"] else entry["tolerance"]
    np.testing.assert_allclose(result["logits"], wanted, rtol=0, atol=tolerance)
    return str(result["device"])


@pytest.mark.slow
def test_older_runtime_gives_the_same_logits(bundle: Bundle) -> None:
    assert check(python_with_tflite_runtime(), bundle) == "cpu, tflite-runtime 2.14.0"


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_arm64_wheel_gives_the_same_logits(bundle: Bundle, cpu: str) -> None:
    assert check(python_for_arm64(cpu), bundle) == "cpu, ai-edge-litert 2.3.0"
