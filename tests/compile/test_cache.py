"""The cache: same key same folder, and nothing broken or half-made is ever handed out."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gfcompile.compile import cache as cache_module
from gfcompile.compile.cache import Cache, cache_root, digest, open_cache
from gfcompile.runtime.errors import UserError

KEY = {"model": "gfnet_xs", "seed": 0}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", max_bytes=10**9)


class Builder:
    """Writes one file and a nested one; counts how often it had to."""

    def __init__(self, text: str = "built") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "a.txt").write_text(self.text)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(b"\0" * 1000)


def test_second_request_is_not_built(cache: Cache) -> None:
    build = Builder()
    first = cache.folder(KEY, build)
    second = cache.folder(dict(reversed(KEY.items())), build)
    assert (first, build.calls) == (second, 1)
    assert (second / "a.txt").read_text() == "built"
    assert cache.lookup(KEY) == first
    assert cache.lookup({**KEY, "seed": 1}) is None


def _change(content: Path) -> None:
    (content / "a.txt").write_text("bu1lt")


def _truncate(content: Path) -> None:
    (content / "deep" / "b.bin").write_bytes(b"\0" * 999)


def _remove(content: Path) -> None:
    (content / "a.txt").unlink()


def _add(content: Path) -> None:
    (content / "c.txt").write_text("more")


def _damage_record(content: Path) -> None:
    (content.parent / "entry.json").write_text('{"files": {')


def _nest_record(content: Path) -> None:
    (content.parent / "entry.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "damage", [_change, _truncate, _remove, _add, _damage_record, _nest_record]
)
def test_damaged_entry_is_built_again(cache: Cache, damage: Callable[[Path], None]) -> None:
    build = Builder()
    damage(cache.folder(KEY, build))
    content = cache.folder(KEY, build)
    assert build.calls == 2
    assert sorted(p.name for p in content.rglob("*")) == ["a.txt", "b.bin", "deep"]
    assert (content / "a.txt").read_text() == "built"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_failed_build_leaves_nothing(
    cache: Cache, tmp_path: Path, error: type[BaseException]
) -> None:
    def build(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise error

    with pytest.raises(error):
        cache.folder(KEY, build)
    assert cache.lookup(KEY) is None
    assert not list((tmp_path / "cache").rglob("half.txt"))
    assert not list((tmp_path / "cache" / "v1" / "building").iterdir())


def test_without_locks_the_first_of_two_builds_stays(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(cache_module.fcntl, "flock", refuse)

    def slow(folder: Path) -> None:
        cache.folder(KEY, Builder("first"))
        Builder("second")(folder)

    content = cache.folder(KEY, slow)
    assert (content / "a.txt").read_text() == "first"


def test_of_two_runs_that_want_the_same_one_waits(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from gfcompile.compile.cache import Cache

def build(folder: Path) -> None:
    print("built", flush=True)
    time.sleep(0.5)
    (folder / "a.txt").write_text("built")

print(Cache(Path(sys.argv[1]), max_bytes=0).folder({}, build))
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    output = "".join(run.communicate(timeout=60)[0].decode() for run in runs)
    assert output.count("built\n") == 1
    assert len(set(output.replace("built\n", "").split())) == 1


def test_processes_share_a_cache(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from gfcompile.compile.cache import Cache

def build(folder: Path) -> None:
    for i in range(20):
        (folder / f"{i}.bin").write_bytes(bytes([i]) * 10_000)

cache = Cache(Path(sys.argv[1]), max_bytes=0)
for number in range(15):
    content = cache.folder({"number": number}, build)
    for i in range(20):
        assert (content / f"{i}.bin").read_bytes() == bytes([i]) * 10_000
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors.decode()
    assert not list((tmp_path / "v1" / "building").iterdir())


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=2500)  # two entries of about 1000 bytes
    contents = [cache.folder({"n": n}, Builder()) for n in range(3)]
    hours_ago = time.time() - 7200
    for age, content in enumerate(contents):
        os.utime(content.parent, (hours_ago + age, hours_ago + age))
    assert cache.lookup({"n": 0}) == contents[0]  # used just now, so 1 is the oldest
    cache.folder({"n": 3}, Builder())
    assert cache.lookup({"n": 1}) is None
    assert cache.lookup({"n": 0}) is not None


def test_an_entry_of_no_known_size_is_left_when_others_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=0)
    record = cache.folder({"n": 0}, Builder()).parent / "entry.json"
    record.write_text('{"size_bytes": Infinity}')
    cache.folder({"n": 1}, Builder())
    assert record.exists()


def test_entry_in_use_is_not_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=0)
    contents = [cache.folder({"n": n}, Builder()) for n in range(3)]
    assert all((content / "a.txt").exists() for content in contents)


def test_abandoned_builds_are_removed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10**9)
    cache.folder(KEY, Builder())
    building = tmp_path / "v1" / "building"
    old, fresh = building / "old", building / "fresh"
    for folder in (old, fresh):
        folder.mkdir()
    two_days_ago = time.time() - 48 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    cache.folder({"other": True}, Builder())
    assert (old.exists(), fresh.exists()) == (False, True)


def test_digest_follows_content_and_not_place(tmp_path: Path) -> None:
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert digest(a) == digest(b) != digest(c)
    assert digest(a / "photo.jpg") == digest(b / "photo.jpg") != digest(c / "photo.jpg")
    assert digest(a) != digest(a / "photo.jpg")


def test_digest_tells_values_apart() -> None:
    @dataclass(frozen=True)
    class Left:
        x: int = 0

    @dataclass(frozen=True)
    class Right:
        x: int = 0

    values = [None, 0, "0", 0.5, b"0", [0], {"0": 0}, Left(), Right(), Left(1), {"x": 0}]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1})
    with pytest.raises(TypeError, match="cannot hold a object"):
        digest({"x": object()})


def test_key_covers_tools_and_sources(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    cache.folder(KEY, build)
    tools = dict(cache_module.toolchain())
    assert {"torch", "apache-tvm", "gfcompile"} <= tools.keys()
    monkeypatch.setattr(cache_module, "toolchain", lambda: {**tools, "gfcompile": "edited"})
    assert cache.lookup(KEY) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GFCOMPILE_CACHE": "/x/y", "XDG_CACHE_HOME": "/z"}, "/x/y"),
        ({"XDG_CACHE_HOME": "/z"}, "/z/gfcompile"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/u"}, "/home/u/.cache/gfcompile"),
        ({"HOME": "/home/u"}, "/home/u/.cache/gfcompile"),
    ],
)
def test_place_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("GFCOMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


def test_without_cache_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFCOMPILE_CACHE", str(tmp_path / "cache"))
    with open_cache(enabled=False) as cache:
        content = cache.folder(KEY, Builder())
        assert content.exists()
    assert not content.exists()
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_unwritable_cache_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GFCOMPILE_CACHE", str(tmp_path / "file" / "cache"))
    notes: list[str] = []
    with open_cache(note=notes.append) as cache:
        assert (cache.folder(KEY, Builder()) / "a.txt").exists()
    assert len(notes) == 1
    assert "no cache is kept" in notes[0]


def test_bad_bound_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("GFCOMPILE_CACHE_MAX_GB", "lots")
    with pytest.raises(UserError, match="'lots'"), open_cache():
        pass


def test_entry_record_is_readable_json(cache: Cache) -> None:
    content = cache.folder(KEY, Builder())
    record = json.loads((content.parent / "entry.json").read_text())
    assert record["files"].keys() == {"a.txt", "deep/b.bin"}
    assert record["size_bytes"] == 1005
