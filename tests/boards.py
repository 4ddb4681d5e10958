"""Boards that tests can validate on: an sshd of their own, and a scripted adb."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools import need

_ADB = r"""#!/bin/sh
# Stands in for adb: a "device" whose /data/local/tmp is $ADB_BOARD.
[ "$1" = -s ] && { [ "$2" = toy-serial ] || { echo "error: device '$2' not found" >&2; exit 1; }
    shift 2; }
[ -f "$ADB_BOARD.gone" ] && { echo "error: device offline" >&2; exit 1; }
verb=$1; shift
case $verb in
shell) exec sh -c "$(printf %s "$1" | sed "s#/data/local/tmp#$ADB_BOARD#g")" ;;
push) [ -f "$ADB_BOARD.full" ] && { echo "adb: error: failed to copy: remote couldn't create file:\
 No space left on device" >&2; exit 1; }
    cp "$1" "$2" ;;
pull) cp "$1" "$2" ;;
*) echo "adb: unknown command $verb" >&2; exit 1 ;;
esac
"""


@dataclass(frozen=True, kw_only=True)
class Board:
    """A device at an address.

    Attributes:
        temporary: where it makes its private folders.
        home: of what stands in for it.
    """

    url: str
    temporary: Path
    home: Path
    process: subprocess.Popen[bytes] | None = None

    def left(self, wait_s: float = 10) -> list[str]:
        """What is left on it; given a moment to clean up."""
        end = time.monotonic() + wait_s
        while any(self.temporary.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)
        return [path.name for path in self.temporary.iterdir()]

    def wait_for(self, name: str, wait_s: float = 120) -> Path:
        """The file of that name in the private folder, once it is there."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            for path in self.temporary.glob(f"*/{name}"):
                return path
            time.sleep(0.02)
        raise AssertionError(f"{name} did not appear in {self.temporary}")

    def runs(self, command: str) -> bool:
        """Whether a process with this command line is there."""
        return any(process.command == command for process in _processes())

    def log(self) -> str:
        return (self.home / "log").read_text()

    def break_connections(self) -> None:
        """Ends the processes that serve connections, as a board does that loses its power."""
        assert self.process is not None
        served = {self.process.pid}
        for _ in range(3):  # a connection has a process or two under the listening one
            served |= {p.pid for p in _processes() if p.parent in served and "sshd" in p.command}
        for pid in served - {self.process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    command: str


def _processes() -> Iterator[_Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            # The name, in parentheses, may hold spaces.
            _, _, fields = (folder / "stat").read_text().rpartition(")")
            yield _Process(int(folder.name), int(fields.split()[1]), command)


def ssh_board(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    file_limit: int | None = None,
    settings: str = "",
) -> Iterator[Board]:
    """An sshd on a loopback port; `ssh` on the PATH knows its key.

    Args:
        file_limit: bytes that a file on the board may have.
        settings: more lines of sshd_config.
    """
    sshd, ssh, keygen = need("sshd"), need("ssh"), need("ssh-keygen")
    temporary = home / "tmp"
    temporary.mkdir(parents=True)
    for name in ("host", "user", "other"):
        command = [keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True)
    shutil.copy(home / "user.pub", home / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {home}/authorized_keys\nStrictModes no\nLogLevel VERBOSE\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv TMPDIR={temporary}\n{settings}"
    )
    host_key = " ".join((home / "host.pub").read_text().split()[:2])
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (home / "ssh_config").write_text(
        f"IdentityFile {home}/user\nIdentitiesOnly yes\nUserKnownHostsFile {home}/known_hosts\n"
        "GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\nIdentityAgent none\n"
    )
    programs = home / "bin"
    programs.mkdir()
    # ssh looks for its configuration in the home of the account, not in $HOME.
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {ssh} -F {home}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # for its separation of privileges
    command = [sshd, "-D", "-f", str(home / "sshd_config"), "-E", str(home / "log")]
    if file_limit is not None:
        # In blocks of 512 bytes; the signal is ignored, so that writing fails as on a full disk.
        limited = f'trap "" XFSZ; ulimit -f {file_limit // 512}; exec "$@"'
        command = ["sh", "-c", limited, "sh", *command]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    board = Board(url=f"ssh://127.0.0.1:{port}", temporary=temporary, home=home, process=process)
    try:
        _wait_for_port(port)
        yield board
    finally:
        board.break_connections()
        process.kill()
        process.wait()


def adb_board(home: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """A scripted adb that runs everything here."""
    temporary = home / "tmp"
    temporary.mkdir(parents=True)
    programs = home / "bin"
    programs.mkdir()
    (programs / "adb").write_text(_ADB)
    (programs / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("ADB_BOARD", str(temporary))
    return Board(url="adb://toy-serial", temporary=temporary, home=home)


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("sshd did not start")
