"""Validation over TVM's RPC tracker, with a server on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from boards import Board
from toy_bundle import Toy, add_golden, build_toy, toy_object, with_gfbench

from gfcompile.runtime.devices import open_device
from gfcompile.runtime.errors import NoVerdictError, UserError
from gfcompile.runtime.results import Budget
from gfcompile.runtime.validate import ValidateConfig, validate
from tools import need_module

_SERVERS = """
import sys, time
from tvm import rpc
from tvm.rpc.tracker import Tracker
tracker = Tracker("127.0.0.1", port=9190, port_end=9990, silent=True)
server = rpc.Server("127.0.0.1", port=9190, port_end=9990, key="toys",
                    tracker_addr=("127.0.0.1", tracker.port), silent=True)
print(tracker.port, flush=True)
sys.stdin.read()
server.terminate()
tracker.terminate()
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """A tracker, and one board registered there."""
    need_module("tornado")
    home = tmp_path_factory.mktemp("fleet")
    temporary = home / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(temporary)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    port = int(process.stdout.readline())
    url = f"rpc://127.0.0.1:{port}/toys"
    try:
        _wait_until_registered(url)
        yield Board(url=url, temporary=temporary, home=home, process=process)
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def golden(tmp_path: Path) -> Toy:
    return add_golden(build_toy(tmp_path / "toy", toy_object("x86_64", tmp_path), "x86_64"))


def config(toy: Toy, url: str, **changes: object) -> ValidateConfig:
    options = {"runs": 5, "warmup": 1, **changes}
    return ValidateConfig(bundle=toy.folder, device=url, **options)  # type: ignore[arg-type]


def test_a_bundle_is_validated_on_a_board_of_a_fleet(fleet: Board, golden: Toy) -> None:
    result = validate(config(golden, fleet.url, budget=Budget(max_latency_ms=1e6)))
    assert result.verdict.passed, result.verdict
    assert result.device.kind == "rpc"
    assert result.device.before is not None
    assert result.numbers is not None
    assert result.numbers.within
    assert result.latencies is not None
    assert len(result.latencies.samples_us) == 5
    assert len(result.kernels) == 4
    assert bundle_files(fleet) == []


def test_a_program_that_hangs_or_fails_is_ended_and_said(fleet: Board, golden: Toy) -> None:
    toy = with_gfbench(golden, "exec sleep 64")
    with pytest.raises(NoVerdictError, match="did not end within 1 s"):
        validate(config(toy, fleet.url, timeout_s=1))
    assert not fleet.runs("sleep 64")
    toy = with_gfbench(golden, "kill -9 $$")
    with pytest.raises(NoVerdictError, match="killed"):
        validate(config(toy, fleet.url))
    assert bundle_files(fleet) == []


def test_an_interruption_leaves_nothing_on_the_board(fleet: Board, golden: Toy) -> None:
    toy = with_gfbench(golden, "touch started; exec sleep 65")
    command = [sys.executable, "-m", "gfcompile", "validate", str(toy.folder)]
    process = subprocess.Popen([*command, "--device", fleet.url], stderr=subprocess.PIPE, text=True)
    fleet.wait_for("started")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "gfcompile: interrupted; nothing was written"
    assert bundle_files(fleet) == []
    assert not fleet.runs("sleep 65")


def test_a_tracker_or_a_key_that_is_not_there_is_said(fleet: Board) -> None:
    with pytest.raises(NoVerdictError, match="no board of key 'boats', registered there: toys"):
        open_device(fleet.url.replace("toys", "boats"))
    with pytest.raises(NoVerdictError, match=r"cannot reach rpc://127.0.0.1:1/toys"):
        open_device("rpc://127.0.0.1:1/toys")
    for address in ("rpc://", "rpc://host:9190", "rpc://host/a/b", "rpc://host:x/key"):
        with pytest.raises(UserError):
            open_device(address)


def bundle_files(fleet: Board, wait_s: float = 10) -> list[Path]:
    """What is left of a session, once the server had the time to clean up."""
    end = time.monotonic() + wait_s
    while (left := list(fleet.temporary.rglob("gfbench"))) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _wait_until_registered(url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            open_device(url).close()
        except NoVerdictError:
            assert time.monotonic() < end
            time.sleep(0.2)
        else:
            return
