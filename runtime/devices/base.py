"""What a device can be asked: the same few verbs on each."""

import re
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from gfcompile.runtime.errors import NoVerdictError, UserError

Kind = Literal["local", "ssh", "adb", "qemu", "rpc"]

# Names of files on a device: nothing that a shell could take for anything else.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,118}")
_FOLDER = re.compile(r"/[A-Za-z0-9_./+-]{1,200}")


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A program that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def reason(self) -> str:
        """Its last complaint, or how it ended."""
        lines = self.stderr.strip().splitlines()
        return lines[-1].strip() if lines else f"exit status {self.status}"


class Device(ABC):
    """A device with a private folder on it, which is gone when the device is closed.

    Programs run in that folder; names are of files in it.

    Attributes:
        kind, url: how it was asked for.
        name: of the device in words, before anyone asked it.
        measures: whether times mean anything there.
        commands: that were run, as typed in a shell there.
    """

    kind: Kind
    measures = True

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name
        self.commands: list[str] = []

    @abstractmethod
    def send(self, files: Mapping[str, Path]) -> None:
        """Copies files there, each under its name; all may be executed.

        Raises:
            NoVerdictError: the device is gone, or its disk is full.
        """

    @abstractmethod
    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        """Runs a program of the folder, such as ("./gfbench", "."), until it ends.

        Raises:
            NoVerdictError: the device is gone, or the program did not end in time and was killed.
        """

    @abstractmethod
    def script(self, text: str, *, timeout_s: float = 30) -> str:
        """What a POSIX shell there prints for a script, whatever its exit status.

        Raises:
            NoVerdictError: as for `run`.
        """

    @abstractmethod
    def fetch(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            NoVerdictError: the device is gone, or the file is not there.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends what still runs there and removes the folder; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def checked_name(name: str) -> str:
    """The name, which is safe in any shell.

    Raises:
        UserError: it is not; a manifest that has such a name was not written by gfcompile.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be the name of a file on a device")
    return name


def checked_folder(path: str, url: str) -> str:
    """A folder that the device named, safe in any shell.

    Raises:
        NoVerdictError: it is not.
    """
    if not _FOLDER.fullmatch(path) or ".." in path:
        raise NoVerdictError(f"{url} names {path[:80]!r} as its temporary folder; set TMPDIR there")
    return path


def too_slow(program: str, timeout_s: float, url: str) -> NoVerdictError:
    """The error for a program that was killed."""
    return NoVerdictError(
        f"{program} did not end within {timeout_s:.0f} s on {url} and was killed; is the device "
        "busy or hung? --timeout gives it more time"
    )


def slow_copy(name: str, timeout_s: float, url: str) -> NoVerdictError:
    """The error for a file that was on its way for too long."""
    return NoVerdictError(
        f"{name} could not be copied within {timeout_s:.0f} s from or to {url}; is the connection "
        "slow, or the device hung?"
    )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kills it, and waits for nothing else that may have its pipes."""
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


# What a script's own output ends with; its exit status follows.
_STATUS = "gfcompile-status "

NO_SPACE = ("no space left", "disk quota exceeded", "file too large", "file size limit")


class ShellDevice(Device):
    """A device that is reached through a program which runs shell scripts there."""

    folder = ""
    # A program keeps its process number there while it runs, so that it can be ended.
    _RUNNING = "running.pid"

    @abstractmethod
    def shell(self, script: str, *, timeout_s: float) -> Completed:
        """Runs a POSIX script there.

        Raises:
            NoVerdictError: the device is gone.
            subprocess.TimeoutExpired: it did not end in time.
        """

    def run(self, command: Sequence[str], *, timeout_s: float) -> Completed:
        typed = shlex.join(command)
        self.commands.append(typed)
        # The shell stays, so that it can tell of a program that a signal has ended.
        script = (
            f"cd {shlex.quote(self.folder)} || exit 1\n"
            f"{typed} </dev/null &\n"
            f"echo $! >{self._RUNNING}\n"
            "wait $!\n"
            f"printf '\\n{_STATUS}%s\\n' $?\n"
        )
        try:
            done = self.shell(script, timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            self._end_running()
            raise too_slow(command[0].removeprefix("./"), timeout_s, self.url) from None
        output, marker, status = done.stdout.rpartition(f"\n{_STATUS}")
        if not marker or not status.strip().isdigit():
            raise NoVerdictError(f"the connection to {self.url} was lost: {done.reason}")
        return Completed(status=int(status), stdout=output, stderr=done.stderr)

    def script(self, text: str, *, timeout_s: float = 30) -> str:
        try:
            return self.shell(text, timeout_s=timeout_s).stdout
        except subprocess.TimeoutExpired:
            raise too_slow("a script", timeout_s, self.url) from None

    def end_script(self) -> str:
        """Ends what still runs there and removes the folder."""
        folder = shlex.quote(self.folder)
        return (
            f"if [ -f {folder}/{self._RUNNING} ]; then "
            f"kill -9 $(cat {folder}/{self._RUNNING}) 2>/dev/null; fi\n"
            f"rm -rf {folder}\n"
        )

    def _end_running(self) -> None:
        self.script(f"kill -9 $(cat {shlex.quote(self.folder)}/{self._RUNNING}) 2>/dev/null")


def full_disk(url: str, folder: str) -> NoVerdictError:
    """The error for a device that has no space left."""
    return NoVerdictError(
        f"the disk of {url} is full: the bundle does not fit into {folder}; "
        "free some space there, or set TMPDIR for that user"
    )


def looks_full(message: str) -> bool:
    """Whether a program's complaint is about the disk."""
    return any(words in message.lower() for words in NO_SPACE)
