"""A board of a TVM RPC fleet, found through its tracker.

TVM's RPC server can keep files and load libraries, but starts no programs; so a library of ours
goes there first and runs them (runtime/device/rpc_helper.c). The server keeps every session's files
in a folder of its own and removes it when the session ends.
"""

import re
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import gfcompile.runtime.device
from gfcompile.runtime.devices.base import (
    Completed,
    Device,
    checked_name,
    full_disk,
    looks_full,
    too_slow,
)
from gfcompile.runtime.errors import NoVerdictError, UserError
from gfcompile.targets.raspberry_pi import CORTEX_A53
from gfcompile.targets.tvm.link import zig_cc
from gfcompile.targets.x86 import SSE

_SOURCE = Path(gfcompile.runtime.device.__file__).with_name("rpc_helper.c")
_HELPER = "libgfcompile_rpc"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,100}")
_DEFAULT_PORT = 9190
_CONNECT_S = 15
_RUNNING, _NOT_STARTED = -1, -2
# Asking takes the board's time, so it is asked less and less often.
_FIRST_POLL_S, _LAST_POLL_S = 0.01, 1.0


class RpcDevice(Device):
    """A board that has registered at a tracker under a key; any free one of that key."""

    kind = "rpc"

    def __init__(self, url: str, *, host: str, port: int, key: str) -> None:
        """Asks the tracker for a board, and waits for one where all are in use.

        Raises:
            NoVerdictError: no tracker, no such board, or none that can run our helper.
        """
        super().__init__(url, key)
        from tvm import rpc

        try:  # TVM would try for a minute
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except OSError as error:
            raise NoVerdictError(
                f"cannot reach {url}: {error.strerror or error}; does a tracker run there? "
                f"python3 -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}"
            ) from error
        with self._lost_is_no_verdict(f"cannot reach {url}"):
            tracker = rpc.connect_tracker(host, port)
            keys = {
                str(server["key"]).removeprefix("server:")
                for server in tracker.summary()["server_info"]
            }
        if key not in keys:
            known = f"registered there: {', '.join(sorted(keys))}" if keys else "none is registered"
            raise NoVerdictError(
                f"cannot reach {url}: no board of key {key!r}, {known}; on the board: "
                f"python3 -m tvm.exec.rpc_server --tracker {host}:{port} --key {key}"
            )
        with self._lost_is_no_verdict(f"cannot reach {url}"):
            self._session: Any = tracker.request(key)
        self._helper = self._load_helper()

    def send(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            self._upload(checked_name(name), path.read_bytes())
        self.script("chmod 700 ./*")

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        typed = shlex.join(command)
        self.commands.append(typed)
        return self._execute(f"exec {typed}\n", command[0].removeprefix("./"), timeout_s)

    def script(self, text: str, *, timeout_s: float = 30) -> str:
        return self._execute(text, "a script", timeout_s).stdout

    def fetch(self, name: str) -> bytes:
        return self._download(checked_name(name))

    def close(self) -> None:
        # The server ends the session, and with it what runs there and its files, when the last
        # reference to it is gone.
        self._helper = None
        self._session = None

    def _execute(self, script: str, what: str, timeout_s: float) -> Completed:
        self._upload("command.sh", script.encode())
        if self._ask("gfcompile_start") != 0:
            raise NoVerdictError(f"{self.url} cannot start programs: is its memory full?")
        end, pause_s = time.monotonic() + timeout_s, _FIRST_POLL_S
        try:
            while (status := self._ask("gfcompile_status")) == _RUNNING:
                if time.monotonic() > end:
                    raise too_slow(what, timeout_s, self.url)
                time.sleep(min(pause_s, max(end - time.monotonic(), _FIRST_POLL_S)))
                pause_s = min(2 * pause_s, _LAST_POLL_S)
        except BaseException:
            self._ask("gfcompile_stop")
            raise
        if status == _NOT_STARTED:
            raise NoVerdictError(f"{self.url} lost its program")
        out, err = (self._download(name) for name in ("command.out", "command.err"))
        return Completed(
            status=status,
            stdout=out.decode(errors="replace"),
            stderr=err.decode(errors="replace"),
        )

    def _ask(self, function: str) -> int:
        with self._lost_is_no_verdict(f"the connection to {self.url} was lost"):
            return int(self._helper[function]())

    def _upload(self, name: str, data: bytes) -> None:
        with self._lost_is_no_verdict(f"the connection to {self.url} was lost"):
            self._session.upload(bytearray(data), name)

    def _download(self, name: str) -> bytes:
        with self._lost_is_no_verdict(f"the connection to {self.url} was lost"):
            return bytes(self._session.download(name))

    def _load_helper(self) -> Any:
        """The helper, loaded there; which architecture it needs is found by trying."""
        reason = ""
        with tempfile.TemporaryDirectory(prefix="gfcompile-") as folder:
            for cpu in (SSE, CORTEX_A53):
                library = Path(folder) / f"{_HELPER}-{cpu.arch}.so"
                zig_cc(cpu, "-shared", "-fPIC", str(_SOURCE), "-ldl", "-o", str(library))
                self._upload(library.name, library.read_bytes())
                try:
                    return self._session.load_module(library.name)
                except _FAILURES as error:
                    reason = _last_line(error)
        raise NoVerdictError(f"{self.url} cannot load gfcompile's helper: {reason}")

    @contextmanager
    def _lost_is_no_verdict(self, what: str) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            reason = _last_line(error)
            if looks_full(reason):
                raise full_disk(self.url, "its temporary folder") from error
            raise NoVerdictError(f"{what}: {reason}") from error


# TVM raises its own errors as these.
_FAILURES = (RuntimeError, OSError, ValueError, AttributeError)


def open_rpc(parts: SplitResult) -> Device:
    """`rpc://TRACKER[:PORT]/KEY`.

    Raises:
        UserError: the address is no such thing.
        NoVerdictError: no board can be had.
    """
    wanted = "--device rpc://tracker:port/key"
    try:
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError as error:
        raise UserError(f"{wanted}: {error}") from None
    key = parts.path.removeprefix("/")
    if not host or not _KEY.fullmatch(key) or parts.username is not None:
        raise UserError(f"{wanted}: {parts.netloc + parts.path!r} is no such address")
    return RpcDevice(f"rpc://{host}:{port}/{key}", host=host, port=port, key=key)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
