"""A content-addressed cache of folders: what was once built from the same inputs is not rebuilt.

    root/v1/entries/<2 hex>/<key>/content/...   what a build left, read-only by agreement
    root/v1/entries/<2 hex>/<key>/entry.json    sha256 of each of its files
    root/v1/building/                           entries in the making, moved into place when whole
    root/v1/locks/<key>                         held while that entry is in the making

An entry appears by one rename, so any number of runs may share a root. Of two that want the same
key at once one waits for the other; where file locks do not work both build, and the first one's
entry stays. Every use checks the hashes, and an entry that does not match is built again. The
oldest entries go when the cache outgrows its bound.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from gfcompile.runtime.records import parse_json

_LAYOUT = "v1"
_DEFAULT_MAX_GB = 5.0
# An entry that was used this recently may be in another run's hands.
_IN_USE_SECONDS = 3600.0
# Nothing is under construction for a day: its run was killed.
_ABANDONED_SECONDS = 24 * 3600.0
# The packages whose version changes what a compilation makes.
_PACKAGES = (
    *("torch", "torchao", "apache-tvm", "apache-tvm-ffi", "onnx", "onnx-ir", "onnxscript"),
    *("onnxsim", "onnxruntime", "numpy", "pillow", "safetensors", "ziglang", "ai-edge-litert"),
    *("coremltools", "flatbuffers"),
    *("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-runtime-cu12"),
)


class Cache:
    """Folders by key, under one root.

    Args:
        root: where entries are kept; made on first use.
        max_bytes: the bound that old entries are evicted for.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._entries = root / _LAYOUT / "entries"
        self._building = root / _LAYOUT / "building"
        self._locks = root / _LAYOUT / "locks"
        self._max_bytes = max_bytes

    def lookup(self, key: Mapping[str, object]) -> Path | None:
        """The folder built for `key` before, every file of it checked; None if there is none."""
        return self._checked(self._place(key))

    def folder(self, key: Mapping[str, object], build: Callable[[Path], None]) -> Path:
        """The folder for `key`, built if it is not there; it must not be changed.

        Args:
            key: all that the content depends on, see `digest`: the resolved `Target` rather
                than the name "host", say. The versions of the tools and of gfcompile itself are
                added to it.
            build: fills the empty folder that it is given. If it raises, nothing is kept.
        """
        place = self._place(key)
        content = self._checked(place)
        if content is None:
            with _locked(self._locks / place.name):
                content = self._checked(place) or self._build(place, build)
        return content

    def _build(self, place: Path, build: Callable[[Path], None]) -> Path:
        self._building.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._building, ignore_cleanup_errors=True) as made:
            entry = Path(made) / "entry"
            (entry / "content").mkdir(parents=True)
            build(entry / "content")
            _seal(entry)
            _move_into_place(entry, place)
        self._evict()
        return place / "content"

    def _place(self, key: Mapping[str, object]) -> Path:
        name = digest({"key": key, "made_by": toolchain()})
        return self._entries / name[:2] / name

    def _checked(self, place: Path) -> Path | None:
        try:
            recorded = parse_json((place / "entry.json").read_text(encoding="utf-8"))
            content = place / "content"
            if recorded["files"] == _hashes(content):
                os.utime(place)  # for the order of eviction
                return content
        except FileNotFoundError:
            return None  # not there, or evicted this moment
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._discard(place)
        return None

    def _discard(self, place: Path) -> None:
        """Takes an entry away in one step, so that nobody finds half of it."""
        self._building.mkdir(parents=True, exist_ok=True)
        grave = tempfile.mkdtemp(dir=self._building)
        with suppress(OSError):  # another run was faster
            place.rename(Path(grave) / "entry")
        shutil.rmtree(grave, ignore_errors=True)

    def _evict(self) -> None:
        now = time.time()
        for left in (*self._building.iterdir(), *self._locks.iterdir()):
            with suppress(OSError):
                if now - left.stat().st_mtime < _ABANDONED_SECONDS:
                    continue
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink()
        entries = []
        for place in self._entries.glob("??/*"):
            with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
                recorded = parse_json((place / "entry.json").read_text(encoding="utf-8"))
                entries.append((place.stat().st_mtime, int(recorded["size_bytes"]), place))
        total = sum(size for _, size, _ in entries)
        for used, size, place in sorted(entries):
            if total <= self._max_bytes or now - used < _IN_USE_SECONDS:
                break
            self._discard(place)
            total -= size


@contextmanager
def open_cache(
    *, enabled: bool = True, note: Callable[[str], None] | None = None
) -> Iterator[Cache]:
    """The user's cache, or one that is gone when the context ends.

    The user's lies in $GFCOMPILE_CACHE, else $XDG_CACHE_HOME/gfcompile, else ~/.cache/gfcompile,
    and holds up to $GFCOMPILE_CACHE_MAX_GB (5).

    Args:
        enabled: False for one that is gone afterwards.
        note: told when the user's cache cannot be written to.
    """
    root = cache_root()
    if enabled:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            enabled = False
            if note is not None:
                note(f"no cache is kept: {root} cannot be written to ({error.strerror})")
    if enabled:
        yield Cache(root, max_bytes=_max_bytes())
    else:
        with tempfile.TemporaryDirectory(prefix="gfcompile-", ignore_cleanup_errors=True) as made:
            yield Cache(Path(made), max_bytes=sys.maxsize)


def cache_root() -> Path:
    """Where the user's cache lies."""
    chosen = os.environ.get("GFCOMPILE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path there is to be ignored.
    home = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return home / "gfcompile"


def digest(value: object) -> str:
    """The SHA-256 of a value: of what it says, not of where it lies.

    Takes what JSON takes, and bytes, frozen dataclasses, and paths, which stand for the content
    of the file or folder.
    """
    canonical = json.dumps(
        value, sort_keys=True, default=_describe, ensure_ascii=True, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


@functools.cache
def toolchain() -> Mapping[str, str]:
    """What built an entry: package versions, and the hash of gfcompile's own sources."""
    versions = {"python": f"{sys.version_info.major}.{sys.version_info.minor} {sys.platform}"}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {**versions, "gfcompile": _sources_hash()}


def _sources_hash() -> str:
    import gfcompile

    package = Path(gfcompile.__file__).parent
    total = hashlib.sha256()
    found = []
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [Path(folder) / name for name in names if not name.endswith(".pyc")]
    for path in sorted(found):
        total.update(f"{path.relative_to(package)}\0{_file_hash(path)}\n".encode())
    return total.hexdigest()


def _describe(value: object) -> object:
    """What `json.dumps` cannot take, as something that it can."""
    if isinstance(value, Path):
        return {"folder": _hashes(value)} if value.is_dir() else {"file": _file_hash(value)}
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, "fields": fields}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a cache key cannot hold a {type(value).__name__}: {value!r}")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): _file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _seal(entry: Path) -> None:
    """Writes entry.json and puts all of the entry on the disk, not just into its buffers."""
    files = [path for path in (entry / "content").rglob("*") if path.is_file()]
    record = {
        "files": _hashes(entry / "content"),
        "size_bytes": sum(path.stat().st_size for path in files),
    }
    recorded = entry / "entry.json"
    recorded.write_text(json.dumps(record, indent=1), encoding="utf-8")
    sync_files([*files, recorded])


def sync_files(paths: list[Path]) -> None:
    """Puts files, or folders, and the folders that hold them on the disk.

    Without it a rename can reach the disk before the bytes do, and a power cut leaves empty files.
    """
    for path in [*paths, *{path.parent for path in paths}]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other run holds this lock; it is let go even by a run that is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):  # not on every network file system
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _move_into_place(entry: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        entry.rename(place)
    except OSError:
        # Another run may have put the same content there in the meantime, which is as good.
        if not place.exists():
            raise


def _max_bytes() -> int:
    from gfcompile.runtime.errors import UserError

    given = os.environ.get("GFCOMPILE_CACHE_MAX_GB", str(_DEFAULT_MAX_GB))
    try:
        gigabytes = float(given)
        if not 0 <= gigabytes < float("inf"):
            raise ValueError(given)
    except ValueError:
        raise UserError(
            f"GFCOMPILE_CACHE_MAX_GB is {given!r}; give a number of gigabytes, such as 5"
        ) from None
    return int(gigabytes * 1e9)
