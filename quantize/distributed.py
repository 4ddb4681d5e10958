"""Several processes that train together, as torchrun starts them, or one that trains alone."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gfcompile.runtime.errors import UserError

__all__ = ["Group", "choose_device", "open_group"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """This process among those that train together.

    Attributes:
        rank: its number; 0 is the one that writes and reports.
        world: how many there are.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the group."""
        if self.world == 1:
            return module
        # Buffers hold ranges, which change between epochs only: see `agree`.
        return nn.parallel.DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
        )

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the group; NaN if it is NaN anywhere."""
        return self.total(value) / self.world

    def total(self, value: Tensor) -> Tensor:
        """The sum over the group."""
        result = value.detach().clone()
        if self.world > 1:
            dist.all_reduce(result)
        return result

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the first one's values."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


@contextmanager
def open_group(device: str = "auto") -> Iterator[Group]:
    """The group that torchrun's variables describe, by NCCL on GPUs and by gloo elsewhere."""
    chosen = choose_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Group(rank=0, world=1, device=chosen)
        return
    if chosen.type == "cuda":
        dist.init_process_group("nccl", device_id=chosen)
    else:
        dist.init_process_group("gloo")
    try:
        yield Group(rank=dist.get_rank(), world=world, device=chosen)
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one.

    Of several processes on a machine each takes the GPU of its own number there.

    Raises:
        UserError: there is none of that name, or not one for each process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; choose from auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; install a torch built for CUDA")
    # cuBLAS computes deterministically only with a workspace of its own, fixed before its start.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"process {number + 1} of this machine has no GPU, which has {count}; lower "
            "--nproc-per-node of torchrun, or take --device cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device
