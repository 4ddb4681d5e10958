"""The state of a training on the disk: whole, and of this training, or not used."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gfcompile.quantize.files import write_atomically
from gfcompile.runtime.errors import UserError

__all__ = ["TrainingState", "fingerprint"]


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a training needs to go on as if nothing had happened.

    Order, crops and whatever else is random are functions of the seed and the step, so the step is
    all there is to keep of them.

    Attributes:
        identity: what is trained and how, JSON values.
        step: how many were made.
        graph: parameters and ranges.
        average: of the parameters.
        sums: of loss and top-1 over the epoch so far.
    """

    identity: Mapping[str, Any]
    step: int
    graph: dict[str, Any]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    sums: list[float]
    history: list[dict[str, Any]]

    def write(self, path: Path) -> None:
        """Replaces the state at `path`, in one step."""
        content = {**vars(self), "identity": json.dumps(self.identity, sort_keys=True)}
        write_atomically(path, lambda temporary: torch.save(content, temporary))

    @classmethod
    def read(cls, path: Path, device: torch.device) -> Self:
        """What `write` wrote; nothing in the file is executed.

        Raises:
            UserError: it is no such file.
        """
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            return cls(**{**content, "identity": json.loads(content["identity"])})
        except Exception as error:  # damaged bytes raise whatever they make the reader stumble over
            raise UserError(
                f"{path}: no training state that can be resumed; remove it to begin anew"
            ) from error

    def check(self, identity: Mapping[str, Any], path: Path) -> None:
        """Refuses to go on with another training.

        Raises:
            UserError: it names what differs.
        """
        wanted = json.loads(json.dumps(identity))
        if self.identity == wanted:
            return
        ours, theirs = _flat(wanted), _flat(self.identity)
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        shown = ", ".join(
            f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in differing[:3]
        )
        raise UserError(
            f"{path}: is of another training ({shown}); repeat that one, or remove the file to "
            "begin anew"
        )


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
