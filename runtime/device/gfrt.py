"""Runs a gfcompile bundle: one file over ctypes for Python 3.6 and up.

It needs the standard library alone; NumPy is used where it is installed.

    import gfrt
    with gfrt.Model("bundle") as model:
        print(model.classify(rgb_bytes))
"""

# ruff: noqa: UP - boards with JetPack 4.6 have Python 3.6: no newer syntax, no newer library.

import hashlib
import json
import os
import platform
from typing import Any, Dict

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1


class GfrtError(Exception):
    """A bundle that cannot be loaded or run: one line that says why and what to do."""


def read_manifest(bundle: str) -> Dict[str, Any]:
    """manifest.json of the bundle in folder `bundle`, its format known to this file."""
    path = os.path.join(bundle, MANIFEST_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        reason = "it has no manifest.json" if os.path.isdir(bundle) else "there is no such folder"
        raise GfrtError("{} is not a bundle: {}".format(bundle, reason)) from None
    except OSError as error:
        raise GfrtError("{} cannot be read: {}".format(path, error.strerror)) from error
    except ValueError as error:
        raise GfrtError("{} is damaged: {}; copy the bundle again".format(path, error)) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise GfrtError("{} is not a gfcompile manifest".format(path))
    if version > MANIFEST_FORMAT:
        raise GfrtError(
            "{} was written by a newer gfcompile (format {}, this one reads up to {}): "
            "upgrade gfcompile".format(bundle, version, MANIFEST_FORMAT)
        )
    return manifest


def check_bundle(bundle: str, local: bool = True) -> Dict[str, Any]:
    """The manifest, after every file was found with the size and hash that it gives."""
    manifest = read_manifest(bundle)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise GfrtError("{} is damaged: it lists no files".format(MANIFEST_NAME))
    arch = manifest.get("arch", "any")
    if local and arch not in ("any", platform.machine()):
        raise GfrtError(
            "the bundle is for {}, this machine is {}: copy it to the board{}".format(
                arch,
                platform.machine(),
                " or use --device qemu" if arch == "aarch64" else "",
            )
        )
    for name in sorted(files):
        _check_file(bundle, name, files[name])
    return manifest


def _check_file(bundle: str, name: str, entry: Any) -> None:
    parts = name.split("/")
    if os.path.isabs(name) or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise GfrtError("{} names a file outside the bundle: {!r}".format(MANIFEST_NAME, name))
    try:
        want_size, want_hash = int(entry["size_bytes"]), str(entry["sha256"])
    except (KeyError, TypeError, ValueError):
        raise GfrtError("{} is damaged at file {!r}".format(MANIFEST_NAME, name)) from None
    path = os.path.join(bundle, *parts)
    if os.path.islink(path) and not os.path.realpath(path).startswith(
        os.path.realpath(bundle) + os.sep
    ):
        raise GfrtError("{} links to a file outside the bundle".format(path))
    digest = hashlib.sha256()
    size = 0
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(1 << 20)
                if not block:
                    break
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        raise GfrtError("{} is missing: copy the bundle again".format(path)) from None
    except OSError as error:
        raise GfrtError("{} cannot be read: {}".format(path, error.strerror)) from error
    if size != want_size:
        raise GfrtError(
            "{} has {} bytes instead of {}: copy the bundle again".format(path, size, want_size)
        )
    if digest.hexdigest() != want_hash:
        raise GfrtError(
            "{} was changed: its sha256 is {}..., the manifest says {}...: "
            "copy the bundle again".format(path, digest.hexdigest()[:16], want_hash[:16])
        )
