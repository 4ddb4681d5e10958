"""A first Ctrl-C always ends the command with 130, whoever catches it on the way."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# What may hold a KeyboardInterrupt up: each of these is interrupted while it sleeps.
PLACES = {
    "exec": "exec('import time; time.sleep(60)')",  # torch does so
    "swallowed": """
try:
    time.sleep(60)
except BaseException:
    pass
""",
    "made an error": """
try:
    time.sleep(60)
except BaseException as error:
    raise RuntimeError("something else") from error
""",
    "destructor": """
class Slow:
    def __del__(self):
        time.sleep(60)
Slow()
time.sleep(60)
""",
    "callback": """
import ctypes
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
slow = compare(lambda a, b: time.sleep(60) or 0)
ctypes.CDLL(None).qsort((ctypes.c_int * 2)(2, 1), 2, 4, slow)
time.sleep(60)
""",
}

PROGRAM = """
import sys, time
from pathlib import Path
from gfcompile.compile import cli, pipeline
from gfcompile.compile.bundle import write_bundle

def compile_model(config, progress):
    def build(folder):
        (folder / "weights.bin").write_bytes(bytes(10))
        print("building", flush=True)
        with progress.stage("compile"):
            work()
        print("committed", flush=True)
    return write_bundle(build, Path("out"))

def work():
{place}

pipeline.compile_model = compile_model
if __name__ == "__main__":
    sys.exit(cli.main(["--model", "gfnet_xs", "--target", "host", "--quiet"]))
"""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_not_lost(tmp_path: Path, place: str, number: signal.Signals) -> None:
    body = "\n".join(f"    {line}" for line in PLACES[place].splitlines())
    (tmp_path / "interrupted_command.py").write_text(PROGRAM.format(place=body))
    process = subprocess.Popen(
        [sys.executable, "-m", "interrupted_command"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    # It is asleep a moment later; earlier is as good an interruption.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert err == "gfcompile: interrupted; nothing was written\n"
    assert out == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == [
        "interrupted_command.py"
    ]
