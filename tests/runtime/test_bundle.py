"""Bundles that are not what they should be: each is refused in one line that says what to do."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_bundle import Toy, write_manifest

from gfcompile.runtime import load
from gfcompile.runtime.bundle import FORMAT_VERSION, Manifest, check_bundle, read_manifest
from gfcompile.runtime.device import gfrt
from gfcompile.runtime.errors import BundleError


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def edit_manifest(toy: Toy, **changes: Any) -> None:
    path = toy.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def mine(toy: Toy, tmp_path: Path) -> Toy:
    """A bundle to damage."""
    return toy.copy(tmp_path / "toy")


def test_a_manifest_survives_the_file(toy: Toy) -> None:
    manifest = read_manifest(toy.folder)
    again = Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))
    assert again == manifest
    assert manifest.files["weights.bin"].size_bytes == 1280
    assert next(iter(manifest.to_dict())) == "format_version"


def test_keys_of_a_later_version_are_kept(mine: Toy) -> None:
    edit_manifest(mine, colour="blue", extra={"shape": "round"})
    assert read_manifest(mine.folder).extra == {"colour": "blue", "shape": "round"}


def test_no_bundle(tmp_path: Path, toy: Toy) -> None:
    refused(tmp_path / "none", "is not a bundle: there is no such folder")
    refused(tmp_path, r"is not a bundle: it has no manifest\.json")
    refused(toy.folder / "plan.bin", "is not a bundle: there is no such folder")


@pytest.mark.parametrize("text", ["", "{", "[" * 100000, "\x00\xff"])
def test_a_manifest_that_is_no_json(mine: Toy, text: str) -> None:
    (mine.folder / "manifest.json").write_text(text)
    refused(mine.folder, r"manifest\.json is damaged: .*copy the bundle again")


@pytest.mark.parametrize("text", ["[]", "3", '{"format_version": "1"}', "{}"])
def test_json_that_is_no_manifest(mine: Toy, text: str) -> None:
    (mine.folder / "manifest.json").write_text(text)
    refused(mine.folder, r"is not a gfcompile manifest")


def test_a_newer_format(mine: Toy) -> None:
    edit_manifest(mine, format_version=FORMAT_VERSION + 1)
    refused(mine.folder, r"newer gfcompile \(format 2, this one reads up to 1\): upgrade")


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": None},
        {"precision": {"wanted": "int8"}},
        {"inputs": [{"name": "image"}]},
        {"inputs": 3},
        {"compute_capability": [6]},
        {"files": {"plan.bin": {}}},
        {"files": {"plan.bin": None}},
        {"files": {"plan.bin": {"sha256": "", "size_bytes": float("inf")}}},
        {"model": ["gfnet_xs"]},
        {"weights": None},
        {"kind": ["gfrt"]},
        {"library": 3},
        {"device": "tpu"},
        {"transform": [1, 2]},
        {"notes": "a note"},
        {"ledger": ["artifact"]},
        {"versions": {"numpy": 2}},
        {"cpu_features": None},
        {"inputs": [{"name": "image", "dtype": "float32", "shape": [1, 3, 8, True]}]},
        {"inputs": [{"name": "image", "dtype": "float32", "shape": [1, 3, 8, 0]}]},
        {"outputs": [{"name": "logits", "dtype": "O", "shape": [1, 16]}]},
        {"outputs": [{"name": "logits", "dtype": "float32", "shape": [16], "scale": float("nan")}]},
    ],
)
def test_a_manifest_with_wrong_values(mine: Toy, changes: dict[str, Any]) -> None:
    edit_manifest(mine, **changes)
    refused(mine.folder, r"manifest\.json is damaged")


def test_a_manifest_without_a_model(mine: Toy) -> None:
    path = mine.folder / "manifest.json"
    values = json.loads(path.read_text())
    del values["model"]
    path.write_text(json.dumps(values))
    refused(mine.folder, r"manifest\.json is damaged.*'model'")


@pytest.mark.parametrize("files", [{}, [], None])
def test_a_manifest_without_files(mine: Toy, files: Any) -> None:
    edit_manifest(mine, files=files)
    refused(mine.folder, "it lists no files")


@pytest.mark.parametrize("name", ["plan.bin", "weights.bin", "libtoy.so", "gfbench", "gfrt.h"])
def test_a_flipped_byte_is_named_with_its_hash(mine: Toy, name: str) -> None:
    path = mine.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    want = read_manifest(mine.folder).files[name].sha256[:16]
    refused(mine.folder, rf"{name} was changed: its sha256 is \w{{16}}\.\.\., .* {want}\.\.\.")


def test_a_truncated_file(mine: Toy) -> None:
    path = mine.folder / "weights.bin"
    path.write_bytes(path.read_bytes()[:1000])
    refused(mine.folder, r"weights\.bin has 1000 bytes instead of 1280: copy the bundle again")


def test_a_missing_file(mine: Toy) -> None:
    (mine.folder / "plan.bin").unlink()
    refused(mine.folder, r"plan\.bin is missing: copy the bundle again")


def test_an_unreadable_manifest(mine: Toy) -> None:
    (mine.folder / "manifest.json").unlink()
    (mine.folder / "manifest.json").mkdir()
    refused(mine.folder, r"manifest\.json cannot be read: Is a directory")


@pytest.mark.parametrize(
    "name", ["../plan.bin", "/etc/passwd", "a/../../b", "a//b", "", ".", "a\\b"]
)
def test_a_path_out_of_the_bundle(mine: Toy, name: str) -> None:
    edit_manifest(mine, files={name: {"sha256": "0" * 64, "size_bytes": 1}})
    refused(mine.folder, "names a file outside the bundle")


def test_a_link_out_of_the_bundle(mine: Toy, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (mine.folder / "plan.bin").rename(outside)
    (mine.folder / "plan.bin").symlink_to(outside)
    refused(mine.folder, "links to a file outside the bundle")


def test_links_that_lead_to_each_other_are_refused(mine: Toy) -> None:
    (mine.folder / "plan.bin").unlink()
    (mine.folder / "plan.bin").symlink_to("plan.bin")
    refused(mine.folder, r"plan\.bin (cannot be read|links to)")


@pytest.mark.parametrize("name", ["manifest.json", "plan.bin"])
def test_a_pipe_is_not_waited_for(mine: Toy, name: str) -> None:
    empty = {"sha256": hashlib.sha256().hexdigest(), "size_bytes": 0}
    edit_manifest(mine, files={"plan.bin": empty})
    (mine.folder / name).unlink()
    os.mkfifo(mine.folder / name)
    command = [sys.executable, "-m", "gfcompile", "run", str(mine.folder), "photo.jpg"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.stderr.endswith(f"{name} is no file: copy the bundle again\n")
    assert result.returncode == 1


def test_a_manifest_without_end_is_not_read(mine: Toy) -> None:
    path = mine.folder / "manifest.json"
    os.truncate(path, 1 << 40)
    refused(mine.folder, r"manifest\.json is damaged: 1099511627776 bytes are too many")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(mine.folder, r"manifest\.json is no file")


@pytest.mark.parametrize("library", ["", "../libtoy.so", "/lib/libc.so", "libother.so"])
def test_a_library_that_was_not_checked_is_not_loaded(mine: Toy, library: str) -> None:
    (mine.folder / "libother.so").symlink_to(mine.library)
    edit_manifest(mine, library=library)
    refused(mine.folder, "has no library that gfrt could load")
    with pytest.raises(gfrt.GfrtError, match="has no library that gfrt could load"):
        gfrt.Model(str(mine.folder))


@pytest.mark.parametrize("library", ["", "../model.tflite", "/etc/passwd", "model.tflite"])
@pytest.mark.parametrize("kind", ["tflite", "coreml"])
def test_a_model_that_was_not_checked_is_not_loaded(mine: Toy, kind: str, library: str) -> None:
    (mine.folder / "model.tflite").touch()
    edit_manifest(mine, kind=kind, library=library)
    refused(mine.folder, f"has no model '{library}' among its files")


def test_a_library_that_is_none(mine: Toy) -> None:
    mine.library.write_bytes(b"#!/bin/sh\n")
    write_manifest(mine)
    refused(mine.folder, r"libtoy\.so cannot be loaded")


def test_tensors_that_are_not_the_models_are_refused(mine: Toy) -> None:
    """A batch of 2**28 images would be filled up before the model was asked."""
    for shape, dtype in (([2**28, 3, 8, 8], "float32"), ([1, 3, 8, 8], "uint8")):
        edit_manifest(mine, inputs=[{"name": "image", "dtype": dtype, "shape": shape}])
        refused(mine.folder, "do not belong together")
    edit_manifest(mine, inputs=[])
    refused(mine.folder, "do not belong together")


def test_another_architecture(arm_toy: Toy) -> None:
    assert platform.machine() == "x86_64"
    refused(
        arm_toy.folder,
        "the bundle is for aarch64, this machine is x86_64: use --device qemu or copy it to the",
    )
    assert check_bundle(arm_toy.folder, local=False).arch == "aarch64"


def test_what_is_for_a_gpu_is_not_for_qemu(mine: Toy) -> None:
    edit_manifest(mine, arch="aarch64", device="cuda")
    refused(mine.folder, "the bundle is for aarch64, this machine is x86_64: copy it there")


def test_another_kind_of_bundle(mine: Toy) -> None:
    edit_manifest(mine, kind="other")
    refused(mine.folder, "a bundle of kind 'other' does not run on this machine")


def test_the_runtime_imports_numpy_and_the_standard_library_alone() -> None:
    """What makes it start at once on a board; how soon, the machine decides."""
    code = (
        "import sys; before = set(sys.modules); import gfcompile.runtime;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert loaded - sys.stdlib_module_names == {"gfcompile", "numpy"}
