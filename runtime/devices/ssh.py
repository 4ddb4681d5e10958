"""A board over OpenSSH: its own client, so its configuration, keys and agent count.

One session stays open. It makes the private folder, waits for the end of its input, and then ends
what still runs and removes the folder. The end of its input comes when the device is closed and
also when the connection breaks or this machine dies, so nothing is left on the board in any case.
Every other command goes over the same connection.
"""

import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO
from urllib.parse import SplitResult

from gfcompile.runtime.devices.base import (
    Completed,
    Device,
    ShellDevice,
    checked_folder,
    checked_name,
    end_process,
    full_disk,
    looks_full,
    slow_copy,
)
from gfcompile.runtime.errors import NoVerdictError, UserError

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]{0,250}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,60}")
_CONNECT_S = 15
_CLOSE_S = 10
_SEND_S = 600

_READY, _NO_FOLDER = "gfcompile-folder ", "gfcompile-no-folder"
# What the user's shell prints of its own comes before this line.
_BEGINS = "gfcompile-begins"
# Read as a whole before it is run: what follows `cat` must not be eaten by it.
_KEEPER = """{
umask 077
folder=$(mktemp -d "${TMPDIR:-/tmp}/gfcompile.XXXXXX") || {
    echo
    echo gfcompile-no-folder
    exit 1
}
trap '' HUP INT TERM PIPE
echo
echo "gfcompile-folder $folder"
cat >/dev/null
if [ -f "$folder"/running.pid ]; then kill -9 $(cat "$folder"/running.pid) 2>/dev/null; fi
rm -rf "$folder"
exit 0
}
"""

# What ssh says, and what helps; `there` is the board as ssh's own arguments have it.
_VERIFICATION = "host key verification failed"
_CHANGED = "identification has changed"
_NEW_KEY = (
    "its key is not the known one. If the board was set up anew: ssh-keygen -R {known}, then "
    "ssh {there} once; otherwise someone may be in between"
)
_HINTS = (
    (_VERIFICATION, "its key is not known yet: ssh {there} once, which asks whether it is right"),
    ("permission denied", "no key of yours is accepted there: ssh-copy-id {there}"),
    ("could not resolve", "is the name right? ssh {there} must work"),
    ("connection refused", "does sshd run there? ssh {there} must work"),
    ("timed out", "is it switched on and in this network? ssh {there} must work"),
    ("no route to host", "is it switched on and in this network? ssh {there} must work"),
)


class SshDevice(ShellDevice):
    """A board that runs sshd; nothing else is needed there."""

    kind = "ssh"

    def __init__(self, url: str, *, host: str, user: str | None, port: int | None) -> None:
        """Connects.

        Raises:
            NoVerdictError: the board cannot be reached, or does not let us in.
        """
        super().__init__(url, host)
        self._host = host
        self._there = f"{user}@{host}" if user else host
        self._known = host  # as its line in known_hosts begins
        if port is not None:
            self._there = f"-p {port} {self._there}"
        if port not in (None, 22):
            self._known = f"'[{host}]:{port}'"
        # Short, as the path of a socket may have no more than some 100 characters.
        self._control = Path(tempfile.mkdtemp(prefix="gfssh-"))
        self._options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-T"]
        self._options += ["-S", str(self._control / "s")]
        # What a user's configuration may have for working there by hand.
        self._options += ["-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes"]
        # A board that lost its power is noticed within 15 s.
        self._options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        self._options += [] if user is None else ["-l", user]
        self._options += [] if port is None else ["-p", str(port)]
        try:
            self._keeper = self._start_keeper()
        except BaseException:
            self.close()
            raise

    _keeper: subprocess.Popen[bytes] | None = None

    def send(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            remote = f"{self.folder}/{checked_name(name)}"
            with path.open("rb") as source:
                done = self._copy(f"cat >{remote}", name, stdin=source)
            if done.status != 0:
                if looks_full(done.stderr):
                    raise full_disk(self.url, self.folder)
                raise self._lost(done.reason)
        self.script(f"chmod 700 {self.folder}/*")

    def fetch(self, name: str) -> bytes:
        with tempfile.TemporaryFile() as target:
            command = f"echo; echo {_BEGINS}; cat {self.folder}/{checked_name(name)}"
            done = self._copy(command, name, stdout=target)
            if done.status != 0:
                raise self._lost(done.reason)
            target.seek(0)
            return target.read().partition(f"\n{_BEGINS}\n".encode())[2]

    def shell(self, script: str, *, timeout_s: float) -> Completed:
        # On the input of `sh`, so that it does not matter which shell the user has there.
        with tempfile.TemporaryFile() as source:
            source.write(f"echo; echo {_BEGINS}\n{script}".encode())
            source.seek(0)
            done = self._ssh("sh -s", stdin=source, timeout_s=timeout_s)
        _, begins, output = done.stdout.partition(f"\n{_BEGINS}\n")
        if not begins:
            raise self._lost(done.reason)
        return replace(done, stdout=output)

    def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            assert keeper.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                keeper.stdin.close()
            try:
                keeper.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                keeper.kill()  # the board removes the folder once it notices
                keeper.wait()
            for stream in (keeper.stdout, keeper.stderr):
                assert stream is not None
                stream.close()
        shutil.rmtree(self._control, ignore_errors=True)

    def _start_keeper(self) -> subprocess.Popen[bytes]:
        ssh = shutil.which("ssh")
        if ssh is None:
            raise NoVerdictError("--device ssh:// needs OpenSSH's client: apt-get install "
                                 "openssh-client")  # fmt: skip
        keeper = subprocess.Popen(
            [ssh, *self._options, "-o", "ControlMaster=yes", "-o", "ControlPersist=no",
             "--", self._host, "sh -s"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for us; the clean-up needs the connection
        )  # fmt: skip
        self._keeper = keeper
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        # Whatever hangs after the connection was made ends here.
        timer = threading.Timer(2 * _CONNECT_S, keeper.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                keeper.stdin.write(_KEEPER.encode())
                keeper.stdin.flush()
            for line in keeper.stdout:  # a login shell may print things of its own before
                text = line.decode(errors="replace")
                if text.startswith(_READY):
                    self.folder = checked_folder(text.removeprefix(_READY).strip(), self.url)
                    return keeper
                if text.strip() == _NO_FOLDER:
                    raise self._no_folder(keeper.stderr.read().decode(errors="replace"))
            keeper.wait()
            raise self._refused(keeper.stderr.read().decode(errors="replace"))
        finally:
            timer.cancel()

    def _copy(self, command: str, name: str, **streams: IO[bytes]) -> Completed:
        try:
            return self._ssh(command, timeout_s=_SEND_S, **streams)
        except subprocess.TimeoutExpired:
            raise slow_copy(name, _SEND_S, self.url) from None

    def _ssh(
        self,
        command: str,
        *,
        timeout_s: float,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int = subprocess.PIPE,
    ) -> Completed:
        if self._keeper is None or self._keeper.poll() is not None:
            raise self._lost("it was closed")
        # Over the connection that is there: if it breaks, no other is made.
        options = [*self._options, "-o", "ControlMaster=no", "-o", "ProxyCommand=false"]
        process = subprocess.Popen(
            ["ssh", *options, "--", self._host, command],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            end_process(process)
            raise
        complaint = err.decode(errors="replace")
        if "session open refused" in complaint.lower():
            raise self._lost("its sshd refuses a second session; gfcompile needs MaxSessions 2")
        return Completed(
            status=process.returncode,
            stdout=(out or b"").decode(errors="replace"),
            stderr=complaint,
        )

    def _lost(self, reason: str) -> NoVerdictError:
        return NoVerdictError(f"the connection to {self.url} was lost: {reason}")

    def _refused(self, complaint: str) -> NoVerdictError:
        lines = _lines(complaint)
        for words, hint in _HINTS:
            if words in complaint.lower():
                said = next(line for line in lines if words in line.lower())
                if words == _VERIFICATION and _CHANGED in complaint.lower():
                    hint = _NEW_KEY
                helps = hint.format(there=self._there, known=self._known)
                return NoVerdictError(f"cannot reach {self.url}: {said.rstrip('.')}; {helps}")
        said = lines[-1] if lines else "it did not answer"
        return NoVerdictError(f"cannot reach {self.url}: {said}; ssh {self._there} must work")

    def _no_folder(self, complaint: str) -> NoVerdictError:
        if looks_full(complaint):
            return full_disk(self.url, "its temporary folder")
        said = (_lines(complaint) or ["mktemp failed"])[-1]
        return NoVerdictError(
            f"no temporary folder can be made on {self.url}: {said}; set TMPDIR for that user"
        )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def open_ssh(parts: SplitResult) -> Device:
    """`ssh://[USER@]HOST[:PORT]`.

    Raises:
        UserError: the address is no such thing.
        NoVerdictError: it cannot be reached.
    """
    wanted = "--device ssh://[user@]host[:port]"
    try:
        host, user, port = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise UserError(f"{wanted}: {error}") from None
    if parts.password is not None:
        raise UserError(f"{wanted}: no password here; use a key (ssh-copy-id)")
    if not host or not _HOST.fullmatch(host) or (user is not None and not _USER.fullmatch(user)):
        raise UserError(f"{wanted}: {parts.netloc!r} is no such address")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UserError(f"{wanted}: nothing may follow the address")
    shown = f"[{host}]" if ":" in host else host
    url = f"ssh://{'' if user is None else user + '@'}{shown}{'' if port is None else f':{port}'}"
    return SshDevice(url, host=host, user=user, port=port)
