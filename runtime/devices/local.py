"""This machine."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import SplitResult

from gfcompile.runtime.devices.base import (
    Completed,
    Device,
    Kind,
    checked_name,
    full_disk,
    looks_full,
    too_slow,
)
from gfcompile.runtime.errors import NoVerdictError


class LocalDevice(Device):
    """This machine."""

    kind: Kind = "local"

    def __init__(self, url: str = "local", name: str = "this machine") -> None:
        super().__init__(url, name)
        self._folder = Path(tempfile.mkdtemp(prefix="gfcompile-"))

    def send(self, files: Mapping[str, Path]) -> None:
        try:
            for name, path in files.items():
                copied = self._folder / checked_name(name)
                shutil.copyfile(path, copied)
                copied.chmod(0o700)
        except OSError as error:
            if looks_full(str(error)):
                raise full_disk(self.url, str(self._folder)) from error
            raise

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        self.commands.append(shlex.join(command))
        return self._call([*self._prefix(), *command], timeout_s)

    def script(self, text: str, *, timeout_s: float = 30) -> str:
        return self._call(["sh", "-c", text], timeout_s).stdout

    def fetch(self, name: str) -> bytes:
        try:
            return (self._folder / checked_name(name)).read_bytes()
        except OSError as error:
            raise NoVerdictError(f"{name} was not written: {error.strerror}") from error

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _prefix(self) -> list[str]:
        return []

    def _call(self, command: Sequence[str], timeout_s: float) -> Completed:
        try:
            process = subprocess.Popen(
                command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # one signal then ends it with what it has started
            )
        except OSError as error:
            raise NoVerdictError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise too_slow(Path(command[0]).name, timeout_s, self.url) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return Completed(status=process.returncode, stdout=stdout, stderr=stderr)


def open_local(_parts: SplitResult) -> Device:
    """`local`."""
    return LocalDevice()
