"""Writing a bundle: all of it appears at once, or nothing changes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gfcompile.compile import bundle as bundle_module
from gfcompile.compile.bundle import check_output, copy_bundle, default_output, write_bundle
from gfcompile.runtime.bundle import MANIFEST_NAME, Manifest, Precision, TensorSpec, check_bundle
from gfcompile.runtime.errors import BundleError, UserError

MANIFEST = Manifest(
    created_by="gfcompile 0.0.0",
    model="tiny",
    target="host",
    precision=Precision(requested="float32", storage="float32", compute="float32"),
    arch="any",
    inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 2, 2)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(1, 2)),),
    weights="random (seed 0)",
)


def build(folder: Path, text: str = "one") -> Manifest:
    (folder / "plan.bin").write_text(text)
    (folder / "golden").mkdir()
    (folder / "golden" / "input.npy").write_bytes(b"\1" * 100)
    return MANIFEST


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_manifest_lists_every_file_as_it_is(tmp_path: Path) -> None:
    bundle = write_bundle(build, tmp_path / "out")
    assert set(bundle.manifest.files) == {"plan.bin", "golden/input.npy"}
    assert check_bundle(bundle.path) == bundle.manifest
    assert bundle.size_bytes == sum(len(data) for data in snapshot(bundle.path).values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    bundle = write_bundle(build, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert bundle.path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("can_exchange", [True, False])
def test_older_bundle_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(bundle_module, "_exchange", lambda *_: False)
    write_bundle(build, tmp_path / "out")
    (tmp_path / "out" / "__pycache__").mkdir()  # gfrt.py was imported from it
    (tmp_path / "out" / "__pycache__" / "gfrt.pyc").write_bytes(b"")
    write_bundle(lambda folder: build(folder, "two"), tmp_path / "out")
    assert (tmp_path / "out" / "plan.bin").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_bundle(tmp_path / "out")


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")]
)
@pytest.mark.parametrize("older", [True, False])
def test_failure_changes_nothing(tmp_path: Path, error: BaseException, older: bool) -> None:
    output = tmp_path / "out"
    if older:
        write_bundle(build, output)
    before = snapshot(tmp_path)

    def broken(folder: Path) -> Manifest:
        build(folder, "half")
        raise error

    with pytest.raises(type(error)):
        write_bundle(broken, output)
    assert snapshot(tmp_path) == before
    assert output.exists() == older
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * older


def test_failure_in_the_last_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(build, tmp_path / "out")
    before = snapshot(tmp_path)
    monkeypatch.setattr(bundle_module, "_exchange", lambda *_: False)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "out" and not target.exists() and target.name == "out":
            # The second of the two steps; neither the first nor its undoing.
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(lambda folder: build(folder, "two"), tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_killed_writer_leaves_the_older_bundle(tmp_path: Path) -> None:
    """Even SIGKILL, which no program can tidy up after, leaves `output` as it was."""
    write_bundle(build, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    program = f"""
import time
from pathlib import Path
from gfcompile.compile.bundle import write_bundle

def build(folder):
    (folder / "plan.bin").write_text("half")
    print("building", flush=True)
    time.sleep(60)

write_bundle(build, Path({str(tmp_path / "out")!r}))
"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"building\n"
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=10)
    run.stdout.close()
    assert snapshot(tmp_path / "out") == before


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_bundle(build, tmp_path / "out")
    check_bundle(tmp_path / "out")


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("")
    with pytest.raises(UserError, match=r"holds cat\.jpg, which is not of a gfcompile bundle"):
        write_bundle(build, photos)
    # A file that was put into a bundle of ours is not ours either.
    write_bundle(build, tmp_path / "out")
    (tmp_path / "out" / "my-notes.txt").write_text("")
    with pytest.raises(UserError, match=r"my-notes\.txt"):
        write_bundle(build, tmp_path / "out")
    # Nor is a folder with somebody else's manifest.
    (photos / "cat.jpg").unlink()
    for text in (json.dumps({"name": "web app"}), "[" * 100_000):
        (photos / MANIFEST_NAME).write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json"):
            check_output(photos)


def test_file_or_link_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_bundle(build, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is no folder"):
            check_output(tmp_path / name)
    with pytest.raises(UserError, match="can be written to"):
        check_output(tmp_path / "file" / "out")


def test_a_place_within_a_bundle_is_refused(tmp_path: Path) -> None:
    outer = write_bundle(build, tmp_path / "outer").path
    for name in ("inner", "a/b/inner"):
        with pytest.raises(UserError, match=f"lies in the bundle {outer}"):
            check_output(outer / name)
    check_output(outer)


def test_unwritable_place_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="locked"):
        check_output(tmp_path / "locked" / "out")


def test_parents_are_made(tmp_path: Path) -> None:
    write_bundle(build, tmp_path / "a" / "b" / "out")
    check_bundle(tmp_path / "a" / "b" / "out")


def test_copy_keeps_programs_executable(tmp_path: Path) -> None:
    def with_program(folder: Path) -> Manifest:
        (folder / "gfbench").write_bytes(b"")
        (folder / "gfbench").chmod(0o755)
        return build(folder)

    source = write_bundle(with_program, tmp_path / "source")
    copied = copy_bundle(source.path, tmp_path / "copy")
    assert os.access(copied.path / "gfbench", os.X_OK)


def test_copy_to_a_full_disk_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(build, tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_module.shutil, "copy", full)
    with pytest.raises(OSError, match="No space") as caught:
        copy_bundle(tmp_path / "source", tmp_path / "copy")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_copy_is_whole_or_refused(tmp_path: Path) -> None:
    write_bundle(build, tmp_path / "source")
    copied = copy_bundle(tmp_path / "source", tmp_path / "copy")
    assert snapshot(tmp_path / "source") == snapshot(copied.path)
    (tmp_path / "source" / "plan.bin").write_text("0ne")
    with pytest.raises(BundleError, match="compile it again"):
        copy_bundle(tmp_path / "source", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert snapshot(copied.path)["plan.bin"] == b"one"


def test_files_reach_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    put = bundle_module.sync_files
    monkeypatch.setattr(
        bundle_module,
        "sync_files",
        lambda paths: (order.append("sync" if len(paths) > 1 else "sync name"), put(paths)),
    )
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (order.append("rename"), rename(self, to))[1]
    )
    write_bundle(build, tmp_path / "out")
    assert order == ["sync", "rename", "sync name"]


def test_default_name_says_model_target_and_precision() -> None:
    assert default_output("gfnet_xs", "jetson-tx2", "int8") == Path("gfnet_xs-jetson-tx2-int8")


def test_concurrent_writers_leave_one_whole_bundle(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_bundle_write as t
for i in range(10):
    t.write_bundle(lambda folder: t.build(folder, sys.argv[1]), Path({str(tmp_path / "out")!r}))
"""
    runs = [subprocess.Popen([sys.executable, "-c", program, text]) for text in ("left", "right")]
    deadline = time.monotonic() + 60
    while any(run.poll() is None for run in runs):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [run.returncode for run in runs] == [0, 0]
    check_bundle(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
