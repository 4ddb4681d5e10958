"""Writes a bundle: whole and hashed, or not at all."""

import ctypes
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gfcompile.compile import interruption
from gfcompile.compile.cache import sync_files
from gfcompile.runtime.bundle import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from gfcompile.runtime.errors import BundleError, UserError
from gfcompile.runtime.records import parse_json


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on the disk."""

    path: Path
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        """The size of all files, the manifest included."""
        listed = sum(entry.size_bytes for entry in self.manifest.files.values())
        return listed + (self.path / MANIFEST_NAME).stat().st_size


def default_output(model: str, target: str, precision: str, batch: int = 1) -> Path:
    """The folder for a bundle where none was named."""
    return Path(f"{model}-{target}-{precision}" + (f"-batch{batch}" if batch > 1 else ""))


def check_output(output: Path) -> None:
    """Says early what would stop `write_bundle` at the end.

    A bundle of ours is replaced, and an empty folder is used. Anything else is left alone: to
    delete a folder that someone mistyped would be worse than to ask for another name.

    Raises:
        UserError: something else lies there, its place cannot be written to, or it is within
            another bundle, which the next compilation would not replace then.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} exists and is no folder; choose another --output")
    if output.is_dir():
        foreign = _foreign_file(output)
        if foreign is not None:
            raise UserError(
                f"{output} holds {foreign}, which is not of a gfcompile bundle; "
                "choose another --output or move it away"
            )
    for outer in output.absolute().parents:
        if _files_of_bundle(outer) is not None:
            raise UserError(f"{output} lies in the bundle {outer}; choose another --output")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {output}: {parent} is no folder that can be written to")


def write_bundle(build: Callable[[Path], Manifest], output: Path) -> Bundle:
    """The bundle at `output`, which appears there in one step or not at all.

    An older bundle stays in its place until the new one is complete, and programs that have it
    loaded keep it.

    Args:
        build: puts every file into the empty folder that it is given and returns the manifest;
            its `files` are filled in here.
        output: see `check_output`.
    """
    check_output(output)
    with _sibling(output) as made:
        manifest = dataclasses.replace(build(made), files=_entries(made))
        text = json.dumps(manifest.to_dict(), indent=2, allow_nan=False)
        (made / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        _put_in_place(made, output)
    return Bundle(path=output, manifest=manifest)


def copy_bundle(source: Path, output: Path) -> Bundle:
    """A copy of the bundle `source`, as safely written as by `write_bundle`.

    Raises:
        BundleError: `source` is not whole.
    """
    check_output(output)
    manifest = read_manifest(source)
    with _sibling(output) as made:
        for name in (*manifest.files, MANIFEST_NAME):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, made / name)
        if _entries(made) != manifest.files:
            raise BundleError(f"{source} is not what its {MANIFEST_NAME} says; compile it again")
        _put_in_place(made, output)
    return Bundle(path=output, manifest=manifest)


@contextmanager
def _sibling(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, on the same file system, that is gone in the end."""
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=parent, prefix=f".{output.name}-", suffix=".tmp"))
    try:
        inner = made / output.name
        inner.mkdir()  # with the permissions that the user's umask gives, unlike mkdtemp's
        yield inner
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _entries(folder: Path) -> dict[str, FileEntry]:
    """Hash and size of every file of a bundle but its manifest, by path in the folder."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = FileEntry(sha256=sha256, size_bytes=path.stat().st_size)
    return entries


def _put_in_place(made: Path, output: Path) -> None:
    interruption.check()
    written = [path for path in made.rglob("*") if path.is_file()]
    sync_files(written)
    _forget(written)
    try:
        made.rename(output)  # where nothing is, or an empty folder
    except OSError:
        if not output.is_dir():
            raise
        if not _exchange(made, output):
            _replace(made, output)
    sync_files([output])


def _forget(files: Iterable[Path]) -> None:
    """Takes files out of the page cache.

    There they are in pieces as small as they were written in. Whoever maps weights wants huge ones,
    and gets them when they are read from the disk.
    """
    if not hasattr(os, "posix_fadvise"):
        return  # macOS
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _replace(made: Path, output: Path) -> None:
    """Where the kernel has no exchange: two steps, the first undone if the second one fails."""
    aside = made.with_name("replaced")
    output.rename(aside)
    try:
        made.rename(output)
    except BaseException:
        aside.rename(output)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step; False where system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    code = renameat2(
        at_fdcwd, os.fsencode(one.absolute()), at_fdcwd, os.fsencode(other.absolute()),
        ctypes.c_uint(rename_exchange),
    )  # fmt: skip
    return int(code) == 0


def _foreign_file(folder: Path) -> str | None:
    """A file that is not of a bundle in this folder, or None if there is none."""
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        # What Python leaves where gfrt.py was imported from the bundle.
        if not path.is_dir() and "__pycache__" not in path.parts
    }
    if not present:
        return None
    files = _files_of_bundle(folder)
    if files is None:
        return MANIFEST_NAME if MANIFEST_NAME in present else min(present)
    return min(present - files - {MANIFEST_NAME}, default=None)


def _files_of_bundle(folder: Path) -> set[str] | None:
    """What the manifest lists; None if there is none, or none of ours."""
    try:
        manifest = parse_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if str(manifest["created_by"]).startswith("gfcompile"):
            return set(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
