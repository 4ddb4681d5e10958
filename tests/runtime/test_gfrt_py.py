"""gfrt.py as a board uses it: one file beside the bundle, with the standard library alone."""

import array
import ast
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import RUNTIME, Toy, toy_images, toy_reference

from gfcompile.runtime.device import gfrt

SCRIPT = """
import array, sys
try:
    import numpy
    sys.exit("NumPy should not be there")
except ImportError:
    pass
sys.path.insert(0, sys.argv[1])
import gfrt
assert gfrt.__file__.startswith(sys.argv[1])
pixels = bytes(range(192))
with gfrt.Model(sys.argv[1]) as model, model.context(threads=2) as context:
    image = model.normalize_u8(pixels)
    assert image.shape == (1, 3, 8, 8) and image.format == "f"
    (logits,) = context.run(image)
    assert logits.shape == (1, 16)
    for same in (image.tobytes(), bytearray(image.tobytes()), array.array("f", image.tobytes())):
        assert context.run(same)[0] == logits
    records = []
    context.observe([image], records.append)
    assert [record.tensor.name for record in records] == ["scaled", "mixed", "coded", "logits"]
    assert records[-1].data == logits.tobytes()
    context.enable_profile()
    context.run(image)
    assert [step.calls for step in context.profile()] == [1, 1, 1, 1]
    print(*(logits[0, i] for i in range(16)))
    print(*(index for index, _ in gfrt.top_classes(logits, 5)))
"""


def test_it_runs_without_numpy_and_site_packages(toy: Toy, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", script, toy.folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    logits, top = (line.split() for line in result.stdout.splitlines())
    with gfrt.Model(str(toy.folder)) as model, model.context() as context:
        (expected,) = context.run(model.normalize_u8(np.arange(192, dtype=np.uint8)))
    np.testing.assert_array_equal(np.array(logits, np.float32), expected[0])
    assert [int(i) for i in top] == list(np.argsort(-expected[0], kind="stable")[:5])


@pytest.mark.parametrize("size", [0, 1000, 3 << 20])
def test_files_of_any_size_are_hashed(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "weights.bin").write_bytes(content)
    assert gfrt._digest(tmp_path / "weights.bin", size) == hashlib.sha256(content).hexdigest()


def test_it_is_python_3_6() -> None:
    """JetPack 4.6 has Python 3.6: its grammar, and no name that came with a later one."""
    tree = ast.parse((RUNTIME / "gfrt.py").read_text(), feature_version=(3, 6))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert imported == {
        "contextlib",
        "ctypes",
        "hashlib",
        "json",
        "math",
        "mmap",
        "numpy",
        "os",
        "pathlib",
        "platform",
        "threading",
        "typing",
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & {"removeprefix", "removesuffix", "is_relative_to", "prod", "file_digest"}


def test_the_file_in_a_bundle_is_this_file(toy: Toy) -> None:
    assert (toy.folder / "gfrt.py").read_bytes() == (RUNTIME / "gfrt.py").read_bytes()


def test_one_model_serves_many_threads(toy: Toy) -> None:
    """Its contexts share the weights; each thread has its own."""
    images = toy_images(8)
    results: list[np.ndarray | None] = [None] * 8
    with gfrt.Model(str(toy.folder)) as model:

        def work(i: int) -> None:
            with model.context(threads=1 + i % 3) as context:
                for _ in range(100):
                    (results[i],) = context.run(images[i : i + 1])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for image, result in zip(images, results, strict=True):
        assert result is not None
        # A code next to a rounding tie may be one step off in each of 24 rows.
        np.testing.assert_allclose(result, toy_reference(image)["logits"], atol=2 / 16, rtol=0)


def test_a_context_outlives_its_model(toy: Toy) -> None:
    model = gfrt.Model(str(toy.folder))
    context = model.context()
    (before,) = context.run(toy_images())
    model.close()
    np.testing.assert_array_equal(context.run(toy_images())[0], before)
    with pytest.raises(gfrt.GfrtError, match="the model is closed"):
        model.context()
    context.close()


def test_what_is_closed_says_so(toy: Toy) -> None:
    model = gfrt.Model(str(toy.folder))
    context = model.context()
    for _ in range(2):
        model.close()
        context.close()
    for use in (model.context, lambda: model.normalize_u8(bytes(192))):
        with pytest.raises(gfrt.GfrtError, match="the model is closed"):
            use()
    uses: list[Callable[[], object]] = [
        lambda: context.run(toy_images()),
        lambda: context.observe([toy_images()], print),
        context.enable_profile,
        context.profile,
    ]
    for use in uses:
        with pytest.raises(gfrt.GfrtError, match="the context is closed"):
            use()


def test_a_context_that_runs_is_not_closed(toy: Toy) -> None:
    """Not by another thread, and not by its own observer."""
    told: list[str] = []

    def from_elsewhere() -> None:
        for use in (context.close, context.profile, lambda: context.run(toy_images())):
            try:
                use()
            except gfrt.GfrtError as error:
                told.append(str(error))

    def observer(_record: gfrt.TraceRecord) -> None:
        if not told:
            thread = threading.Thread(target=from_elsewhere)
            thread.start()
            thread.join()
            from_elsewhere()

    with gfrt.Model(str(toy.folder)) as model, model.context(threads=2) as context:
        (observed,) = context.observe([toy_images()], observer)
        np.testing.assert_array_equal(context.run(toy_images())[0], observed)
    running, elsewhere = "the context is running", "another thread is running this context"
    wanted = [running, elsewhere, elsewhere] * 2
    assert [said.partition(":")[0] for said in told] == wanted


def test_a_bundle_in_a_folder_whose_name_is_no_text(toy: Toy, tmp_path: Path) -> None:
    """As is every name that is not ASCII where Python 3.6 was started without a locale."""
    folder = tmp_path / os.fsdecode(b"b\xff\xc3\xbc")
    with gfrt.Model(str(toy.copy(folder).folder)) as model, model.context() as context:
        assert context.run(toy_images())[0].shape == (1, 16)


def test_a_buffer_in_another_order_is_read_in_its_own(toy: Toy) -> None:
    image = toy_images()
    with gfrt.Model(str(toy.folder)) as model, model.context() as context:
        (expected,) = context.run(image)
        for same in (np.asfortranarray(image), np.stack([image] * 2, axis=-1)[..., 1]):
            for given in (same, memoryview(same)):
                np.testing.assert_array_equal(context.run(given)[0], expected)


def test_what_a_model_takes_is_described(toy: Toy) -> None:
    with gfrt.Model(str(toy.folder)) as model:
        assert model.inputs == [gfrt.TensorInfo("image", "float32", (1, 3, 8, 8), 768, 0.0, 0, 0)]
        assert model.outputs == [gfrt.TensorInfo("logits", "float32", (1, 16), 64, 0.0, 0, 0)]
        assert model.device == "cpu"


def test_wrong_inputs_are_named(toy: Toy) -> None:
    with gfrt.Model(str(toy.folder)) as model, model.context() as context:
        for inputs, message in [
            ((), "the model has 1 inputs, got 0"),
            ((bytes(767),), r"input 0 \(image\) has 768 bytes, got 767"),
            ((np.zeros((1, 3, 8, 8)),), r"image is float32 \(1, 3, 8, 8\), got float64"),
        ]:
            with pytest.raises(gfrt.GfrtError, match=message):
                context.run(*inputs)
        with pytest.raises(gfrt.GfrtError, match="8 x 8 pixels"):
            model.normalize_u8(bytes(10))
        for threads in (-1, 257):
            with pytest.raises(gfrt.GfrtError, match=f"{threads} threads: give 1 to 256, or 0"):
                model.context(threads=threads)


def test_an_exception_in_an_observer_reaches_the_caller(toy: Toy) -> None:
    def fail(record: gfrt.TraceRecord) -> None:
        raise KeyError(record.tensor.name)

    with gfrt.Model(str(toy.folder)) as model, model.context() as context:
        with pytest.raises(KeyError, match="scaled"):
            context.observe([toy_images()], fail)
        assert context.run(toy_images())[0].shape == (1, 16)


def test_top_classes_are_softmax_probabilities() -> None:
    logits = np.array([1.0, 3.0, 3.0, -200.0], np.float32)
    top = gfrt.top_classes(logits, 3)
    total = 2 + np.exp(-2)
    assert [index for index, _ in top] == [1, 2, 0]
    assert [p for _, p in top] == pytest.approx([1 / total, 1 / total, np.exp(-2) / total])
    assert gfrt.top_classes([1000.0, 0.0], 5)[0] == (0, 1.0)
    without_numpy = memoryview(array.array("b", [1, -5, 3, 2]))
    assert [index for index, _ in gfrt.top_classes(without_numpy, 4)] == [2, 3, 0, 1]
