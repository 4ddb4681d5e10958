"""Where a process trains, and how it meets the others: GPUs are pretended here."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gfcompile.quantize.distributed import choose_device, open_group
from gfcompile.quantize.loop import Loop
from gfcompile.runtime.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """A machine with four GPUs; yields the devices that torch was set to."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    yield chosen
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # set beside monkeypatch


def test_each_process_takes_the_gpu_of_its_number(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("RANK", "6")  # of two machines, the third process on the second one
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_device("cuda") == torch.device("cuda", 2)
    assert gpus == [torch.device("cuda", 0), torch.device("cuda", 2)]
    # Without it cuBLAS sums in an order of the moment.
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("gpus")
def test_a_process_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="process 5 of this machine has no GPU, which has 4"):
        choose_device("auto")


@pytest.mark.parametrize(
    ("device", "wanted"),
    [("auto", ("nccl", torch.device("cuda", 1))), ("cpu", ("gloo", None))],
)
@pytest.mark.usefixtures("gpus")
def test_gpus_meet_by_nccl_and_others_by_gloo(
    device: str, wanted: tuple[str, torch.device | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def initialize(backend: str, device_id: torch.device | None = None) -> None:
        calls.append((backend, device_id))

    monkeypatch.setattr(dist, "init_process_group", initialize)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with open_group(device) as group:
        assert (group.rank, group.world, group.is_first) == (1, 2, False)
        assert calls == [wanted]
    assert calls == [wanted, "destroyed"]


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "amp", "enabled"),
    [
        ("cuda", True, True, True),
        ("cuda", True, False, False),
        ("cuda", False, True, False),  # before Ampere it would be emulated, and slow
        ("cpu", True, True, False),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_precision_is_mixed_on_gpus_that_have_bfloat16(
    device: str,
    has_bfloat16: bool,
    amp: bool,
    enabled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def is_bf16_supported(*, including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return has_bfloat16

    calls = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: calls.append((given, more)))
    loop = SimpleNamespace(
        group=SimpleNamespace(device=torch.device(device)), config=SimpleNamespace(amp=amp)
    )
    Loop._mixed_precision(loop)  # type: ignore[arg-type]
    assert calls == [((device, torch.bfloat16), {"enabled": enabled})]
    assert not any(asked)
