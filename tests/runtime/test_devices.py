"""Validation over every kind of connection: the whole flow, and what may go wrong on the way."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from boards import Board, adb_board, ssh_board
from toy_bundle import Toy, add_golden, with_gfbench, write_manifest

from gfcompile.runtime.devices import open_device
from gfcompile.runtime.errors import BundleError, NoVerdictError, UserError
from gfcompile.runtime.results import Budget
from gfcompile.runtime.validate import ValidateConfig, validate
from tools import need, need_arm64_sysroot

QUICK = {"runs": 5, "warmup": 1}


@pytest.fixture
def golden(toy: Toy, tmp_path: Path) -> Toy:
    return add_golden(toy.copy(tmp_path / "toy"))


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    yield from ssh_board(tmp_path / "board", monkeypatch)


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return adb_board(tmp_path / "board", monkeypatch)


@pytest.fixture(params=["ssh", "adb"])
def board(request: pytest.FixtureRequest) -> Board:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Board)
    return found


def config(toy: Toy, url: str, **changes: object) -> ValidateConfig:
    return ValidateConfig(bundle=toy.folder, device=url, **{**QUICK, **changes})  # type: ignore[arg-type]


def test_a_bundle_is_validated_and_nothing_stays_on_the_board(board: Board, golden: Toy) -> None:
    budget = Budget(max_latency_ms=1e6, min_agreement=0.99)
    result = validate(config(golden, board.url, budget=budget, threads=2))
    assert result.verdict.passed, result.verdict
    assert result.device.url == board.url
    assert result.device.arch == os.uname().machine
    assert result.device.before is not None
    assert result.device.after is not None
    assert result.numbers is not None
    assert (result.numbers.inferences, result.numbers.within) == (8, True)
    assert result.latencies is not None
    assert len(result.latencies.samples_us) == 5
    assert result.protocol is not None
    assert (result.protocol.threads, result.protocol.runs) == (2, 5)
    assert [kernel.label for kernel in result.kernels] == [s.label for s in golden.plan.steps]
    assert all(command.startswith("./gfbench . --json") for command in result.commands)
    assert board.left() == []


def test_everything_goes_over_one_connection(ssh: Board, golden: Toy) -> None:
    validate(config(golden, ssh.url))
    assert ssh.log().count("Accepted publickey") == 1


def test_what_the_shell_of_a_board_says_of_its_own_is_in_no_file(ssh: Board, golden: Toy) -> None:
    """As where ~/.bashrc sets the title of a window, or greets."""
    key = (ssh.home / "authorized_keys").read_text()
    says = "printf 'Welcome to\\nthe board'"
    greets = rf'command="{says}; exec sh -c \"$SSH_ORIGINAL_COMMAND\"" '
    (ssh.home / "authorized_keys").write_text(greets + key)
    result = validate(config(golden, ssh.url))
    assert result.device.arch == os.uname().machine
    assert result.numbers is not None
    assert result.numbers.within


def test_a_bundle_for_another_cpu_is_not_run(board: Board, arm_toy: Toy) -> None:
    with pytest.raises(NoVerdictError, match="it is x86_64, the bundle is for aarch64"):
        validate(config(arm_toy, board.url))
    assert board.left() == []


def test_a_run_that_hangs_is_ended_in_time(board: Board, golden: Toy) -> None:
    toy = with_gfbench(golden, "exec sleep 61")
    start = time.monotonic()
    with pytest.raises(NoVerdictError, match=r"gfbench did not end within 1 s on .*--timeout"):
        validate(config(toy, board.url, timeout_s=1))
    assert time.monotonic() - start < 30
    assert board.left() == []
    running = subprocess.run(
        ["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True
    )
    assert "sleep 61" not in running.stdout.splitlines()


def test_a_program_that_crashes_is_said(board: Board, golden: Toy) -> None:
    toy = with_gfbench(golden, "echo gfbench: bad luck >&2; exit 1")
    with pytest.raises(NoVerdictError, match=r"gfbench failed on .*: bad luck"):
        validate(config(toy, board.url))
    toy = with_gfbench(golden, "kill -9 $$")
    with pytest.raises(NoVerdictError, match="killed, is its memory full"):
        validate(config(toy, board.url))
    toy = with_gfbench(golden, "echo hello")
    with pytest.raises(NoVerdictError, match="printed no report"):
        validate(config(toy, board.url))
    toy = with_gfbench(golden, "echo gfbench: it needs a GPU >&2; exit 3")
    with pytest.raises(NoVerdictError, match="cannot run this bundle: it needs a GPU"):
        validate(config(toy, board.url))
    assert board.left() == []


def test_a_board_that_loses_its_power_leaves_a_clear_message(ssh: Board, golden: Toy) -> None:
    toy = with_gfbench(golden, "exec sleep 62")
    command = [sys.executable, "-m", "gfcompile", "validate", str(toy.folder), "--device", ssh.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ssh.wait_for("running.pid")
    ssh.break_connections()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"the connection to {ssh.url} was lost" in err.splitlines()[-1]
    assert ssh.left() == []  # the board itself cleans up once its end of the connection is gone
    running = subprocess.run(
        ["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True
    )
    assert "sleep 62" not in running.stdout.splitlines()


def test_an_android_device_that_is_unplugged_leaves_a_clear_message(
    adb: Board, golden: Toy
) -> None:
    toy = with_gfbench(golden, f"touch {adb.temporary}.gone; sleep 1; kill -9 $PPID")
    with pytest.raises(NoVerdictError, match="the connection to adb://toy-serial was lost"):
        validate(config(toy, adb.url))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interruption_leaves_nothing_on_the_board(
    ssh: Board, golden: Toy, tmp_path: Path, number: signal.Signals
) -> None:
    toy = with_gfbench(golden, "exec sleep 63")
    command = [sys.executable, "-m", "gfcompile", "validate", str(toy.folder), "--device", ssh.url]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    ssh.wait_for("running.pid")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert err.splitlines()[-1] == "gfcompile: interrupted; nothing was written"
    assert ssh.left() == []
    assert not (tmp_path / "toy-results").exists()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Toy) -> None:
    (golden.folder / "weights.bin").write_bytes(bytes(1 << 20))
    with_gfbench(golden, "exit 0")
    for small in ssh_board(tmp_path / "small", monkeypatch, file_limit=256 << 10):
        with pytest.raises(NoVerdictError, match=r"the disk of ssh://.* is full"):
            validate(config(golden, small.url))
        assert small.left() == []
    android = adb_board(tmp_path / "android", monkeypatch)
    Path(f"{android.temporary}.full").touch()
    with pytest.raises(NoVerdictError, match="the disk of adb://toy-serial is full"):
        validate(config(golden, android.url))
    assert android.left() == []


def test_a_board_without_a_temporary_folder_is_said(ssh: Board, golden: Toy) -> None:
    ssh.temporary.rmdir()
    refused = r"no temporary folder can be made on ssh://.*: mktemp: .*; set TMPDIR for that user"
    with pytest.raises(NoVerdictError, match=refused):
        validate(config(golden, ssh.url))


def test_a_board_that_allows_one_session_alone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Toy
) -> None:
    for strict in ssh_board(tmp_path / "strict", monkeypatch, settings="MaxSessions 1\n"):
        with pytest.raises(NoVerdictError, match="refuses a second session"):
            validate(config(golden, strict.url))
        assert strict.left() == []


def test_a_copy_that_does_not_end_is_said(
    board: Board, golden: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = board.url.partition(":")[0]
    monkeypatch.setattr(f"gfcompile.runtime.devices.{kind}._SEND_S", 0.3)
    client = board.home / "bin" / kind
    hangs = '#!/bin/sh\ncase "$*" in *"cat >"* | *push*) exec sleep 64 ;; esac\n'
    client.write_text(hangs + client.read_text())
    with pytest.raises(NoVerdictError, match=r"could not be copied within 0 s from or to \w+://"):
        validate(config(golden, board.url))
    assert board.left() == []


def test_a_board_that_starts_no_such_programs_is_said(board: Board, golden: Toy) -> None:
    """A 64-bit kernel may have a 32-bit system above it, or musl's, and /tmp may be noexec."""
    toy = with_gfbench(golden, "echo sh: ./gfbench: Permission denied >&2; exit 126")
    with pytest.raises(NoVerdictError, match="mounted noexec"):
        validate(config(toy, board.url))
    gfbench = golden.folder / "gfbench"
    gfbench.write_text("#!/lib/ld-linux-aarch64.so.1\n")
    write_manifest(golden)
    with pytest.raises(NoVerdictError, match=r"it does not start gfbench \(.*\); .* with glibc"):
        validate(config(golden, board.url))
    assert board.left() == []


def at(ssh: Board) -> str:
    """The board as ssh's own arguments have it."""
    return f"-p {ssh.url.rpartition(':')[2]} 127.0.0.1"


def test_a_host_key_that_is_not_the_known_one_is_refused(ssh: Board, golden: Toy) -> None:
    known = (ssh.home / "known_hosts").read_text().split()
    other = (ssh.home / "other.pub").read_text().split()[:2]
    (ssh.home / "known_hosts").write_text(" ".join([known[0], *other]) + "\n")
    port = ssh.url.rpartition(":")[2]
    removed = rf"ssh-keygen -R '\[127.0.0.1\]:{port}', then ssh {at(ssh)} once"
    with pytest.raises(NoVerdictError, match=f"Host key verification failed; .*{removed}"):
        validate(config(golden, ssh.url))


def test_a_host_key_that_nobody_has_seen_yet_is_said(ssh: Board, golden: Toy) -> None:
    (ssh.home / "known_hosts").write_text("")
    unknown = f"verification failed; its key is not known yet: ssh {at(ssh)} once"
    with pytest.raises(NoVerdictError, match=unknown):
        validate(config(golden, ssh.url))


def test_a_key_that_is_not_accepted_is_said(ssh: Board, golden: Toy) -> None:
    shutil.copy(ssh.home / "other.pub", ssh.home / "authorized_keys")
    with pytest.raises(NoVerdictError, match=rf"Permission denied .*; .*ssh-copy-id {at(ssh)}$"):
        validate(config(golden, ssh.url))


def test_nobody_at_the_address_is_said(ssh: Board, golden: Toy) -> None:
    assert ssh.process is not None
    ssh.process.terminate()
    ssh.process.wait()
    with pytest.raises(NoVerdictError, match=r"cannot reach .*Connection refused; does sshd run"):
        validate(config(golden, ssh.url))


def test_an_unknown_serial_number_is_said(adb: Board, golden: Toy) -> None:
    with pytest.raises(NoVerdictError, match="device 'other' not found; adb devices lists"):
        validate(config(golden, adb.url.replace("toy-serial", "other")))


@pytest.mark.parametrize("program", ["ssh", "adb"])
def test_a_missing_client_is_named(
    golden: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoVerdictError, match="apt-get install"):
        validate(config(golden, f"{program}://board"))


@pytest.mark.parametrize(
    "address",
    [
        "boat://x",
        "nowhere",
        "",
        "ssh://",
        "ssh://-oProxyCommand=reboot",
        "ssh://-l@board",
        "ssh://me:secret@board",
        "ssh://board/folder",
        "ssh://board:port",
        "ssh://bo ard",
        "ssh://$(reboot)",
        "ssh://[::1",
        "adb://a b",
        "adb://serial/folder",
        "qemu:",
        "qemu:cortex-a72;reboot",
    ],
)
def test_what_is_no_address_is_refused_before_anything_runs(address: str) -> None:
    with pytest.raises(UserError):
        open_device(address)


def test_names_that_a_shell_could_misread_are_refused(ssh: Board, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open_device(ssh.url) as device:
        for name in ("../up", "a b", "$(reboot)", "-rf", "", "a" * 200, "a;b", ".hidden"):
            with pytest.raises(UserError, match="cannot be the name"):
                device.send({name: tmp_path / "file"})


def test_qemu_shows_what_an_arm_library_computes_and_counts_instructions(
    arm_toy: Toy, tmp_path: Path
) -> None:
    need("qemu-aarch64")
    need_arm64_sysroot()
    toy = add_golden(arm_toy.copy(tmp_path / "toy"))
    result = validate(config(toy, "qemu:cortex-a72"))
    assert result.verdict.passed
    assert result.latencies is None
    assert "not how fast" in result.no_latency
    assert result.instructions is not None
    # 3072 multiply-adds in the largest kernel, some instructions for each.
    assert 1_000 < result.instructions < 1_000_000
    # What gfbench itself takes depends on the digits that it prints: some hundreds for a number.
    again = validate(config(toy, "qemu:cortex-a72")).instructions
    assert again == pytest.approx(result.instructions, abs=10_000)
    with pytest.raises(UserError, match="not how fast"):
        validate(config(toy, "qemu:cortex-a72", budget=Budget(max_latency_ms=1)))
    with pytest.raises(UserError, match=r"--against.*not how fast"):
        validate(config(toy, "qemu:cortex-a72", against="last"))


def test_a_damaged_bundle_is_not_sent(golden: Toy) -> None:
    (golden.folder / "weights.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights\.bin"):
        validate(config(golden, "ssh://nowhere.invalid"))
