"""An Android device over adb."""

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
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

_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,100}")
_PLACE = "/data/local/tmp"  # the one folder of Android where adb's user may run programs
_CONNECT_S = 15
_SEND_S = 600

_HINTS = (
    ("unauthorized", "allow this computer on the device's screen"),
    ("offline", "unplug it and plug it in again, or: adb reconnect"),
    ("not found", "adb devices lists those that are there"),
    ("no devices", "is USB debugging on? adb devices lists those that are there"),
    ("more than one", "name one: adb://SERIAL, as adb devices lists it"),
)


class AdbDevice(ShellDevice):
    """An Android device with USB or network debugging on."""

    kind = "adb"

    def __init__(self, url: str, serial: str | None) -> None:
        """Connects.

        Raises:
            NoVerdictError: the device cannot be reached.
        """
        super().__init__(url, serial or "Android device")
        if shutil.which("adb") is None:
            raise NoVerdictError("--device adb:// needs adb: apt-get install adb")
        self._adb = ["adb"] if serial is None else ["adb", "-s", serial]
        try:
            made = self.shell(
                f"umask 077; mktemp -d {_PLACE}/gfcompile.XXXXXX", timeout_s=_CONNECT_S
            )
        except subprocess.TimeoutExpired:
            raise NoVerdictError(f"cannot reach {url}: it did not answer; adb reconnect") from None
        if made.status != 0:
            if looks_full(made.stderr):
                raise full_disk(url, _PLACE)
            raise self._refused(made.reason)
        self.folder = checked_folder(made.stdout.strip(), url)

    def send(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            done = self._copy(name, ["push", str(path), f"{self.folder}/{checked_name(name)}"])
            if done.status != 0:
                if looks_full(done.stderr + done.stdout):
                    raise full_disk(self.url, self.folder)
                raise self._lost(done.reason)
        self.script(f"chmod 700 {self.folder}/*")

    def fetch(self, name: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="gfcompile-") as folder:
            target = Path(folder) / "fetched"
            done = self._copy(name, ["pull", f"{self.folder}/{checked_name(name)}", str(target)])
            if done.status != 0 or not target.is_file():
                raise self._lost(done.reason)
            return target.read_bytes()

    def shell(self, script: str, *, timeout_s: float) -> Completed:
        return self._call(["shell", script], timeout_s)

    def close(self) -> None:
        if not self.folder:
            return
        script, self.folder = self.end_script(), ""
        # If it is gone, nothing can be removed there.
        with contextlib.suppress(subprocess.TimeoutExpired, NoVerdictError):
            self.shell(script, timeout_s=_CONNECT_S)

    def _copy(self, name: str, arguments: Sequence[str]) -> Completed:
        try:
            return self._call(arguments, _SEND_S)
        except subprocess.TimeoutExpired:
            raise slow_copy(name, _SEND_S, self.url) from None

    def _call(self, arguments: Sequence[str], timeout_s: float) -> Completed:
        process = subprocess.Popen(
            [*self._adb, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for us; the clean-up needs adb
        )
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            end_process(process)
            raise
        return Completed(
            status=process.returncode,
            stdout=out.decode(errors="replace").replace("\r\n", "\n"),
            stderr=err.decode(errors="replace"),
        )

    def _lost(self, reason: str) -> NoVerdictError:
        return NoVerdictError(f"the connection to {self.url} was lost: {reason}")

    def _refused(self, reason: str) -> NoVerdictError:
        hints = (hint for words, hint in _HINTS if words in reason.lower())
        hint = next(hints, "adb shell must work")
        return NoVerdictError(f"cannot reach {self.url}: {reason.removeprefix('adb: ')}; {hint}")


def open_adb(parts: SplitResult) -> Device:
    """`adb://SERIAL`, or `adb://` where only one device is there.

    Raises:
        UserError: that is no serial number.
        NoVerdictError: the device cannot be reached.
    """
    serial = parts.netloc
    if (serial and not _SERIAL.fullmatch(serial)) or parts.path not in ("", "/"):
        raise UserError(f"--device adb://SERIAL: {serial + parts.path!r} is no serial number")
    return AdbDevice(f"adb://{serial}", serial or None)
