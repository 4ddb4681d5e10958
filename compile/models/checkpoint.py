"""Reads state dicts from files that nobody has to be trusted for."""

import argparse
import hashlib
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfcompile.compile.models.spec import ModelSpec, Shapes
from gfcompile.runtime.errors import UserError

_ACCEPTED = 'a state dict, {"model": state dict}, {"state_dict": ...} or .safetensors'
_UNREADABLE = "truncated, or no PyTorch checkpoint"
# What training wrappers put before every name: DistributedDataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN_MISMATCHES = 3
# Entries that are no weights: a counter of training steps, and what follows from the window size.
_DERIVED = (".num_batches_tracked", ".relative_position_index", ".attn_mask")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint by name, as float32; what follows from the architecture left out.

    Nothing that the file says is executed: pickles are read with `weights_only`, which lets
    tensors and containers through, and the argparse.Namespace that training scripts add.

    Raises:
        UserError: there is no such file, or no state dict can be had from it.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such checkpoint'}")
    try:
        read = _read_safetensors if _is_safetensors(path) else _read_pickle
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    content = read(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds no state dict; accepted: {_ACCEPTED}")
    state = {}
    for name, value in content.items():
        if str(name).endswith(_DERIVED):
            continue
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{path}: {name!r} is a {kind}, not a tensor; accepted: {_ACCEPTED}")
        if not value.is_floating_point() or not _is_dense(value):
            raise UserError(f"{path}: {name!r} holds {value.dtype}, not dense float numbers")
        state[str(name)] = value.detach().to(torch.float32)
    return _unwrap(state)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fits(
    state: Mapping[str, Tensor], spec: ModelSpec, *, path: Path, others: Iterable[ModelSpec]
) -> None:
    """Refuses a state dict whose names, shapes or values `spec` cannot use.

    Args:
        spec: the model asked for, as the checkpoint was trained (`ModelSpec.trained_as`).
        path: for the message.
        others: models that the checkpoint may be of instead, to be suggested.

    Raises:
        UserError: it names the first mismatches.
    """
    found = {name: tuple(value.shape) for name, value in state.items()}
    mismatches = _mismatches(spec.shapes(), found)
    if mismatches:
        shown = "; ".join(mismatches[:_SHOWN_MISMATCHES])
        more = len(mismatches) - _SHOWN_MISMATCHES
        fitting = [
            other.name
            for other in others
            if not _mismatches(other.trained_as(found).shapes(), found)
        ]
        raise UserError(
            f"{path}: does not fit {spec.name}: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + (f" (it fits {' or '.join(fitting)})" if fitting else "")
        )
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name!r} holds numbers that are not finite")


def _mismatches(expected: Shapes, found: Shapes) -> list[str]:
    """What differs, in the model's own order, each in a few words."""
    differences = []
    for name, shape in expected.items():
        if name not in found:
            differences.append(f"{name} {shape} is missing")
        elif found[name] != shape:
            differences.append(f"{name} is {found[name]}, not {shape}")
    unknown = [name for name in found if name not in expected]
    return differences + [f"{name} {found[name]} is unknown" for name in unknown]


def _is_dense(value: Tensor) -> bool:
    """Whether the file holds each number of the tensor, which would otherwise grow without end."""
    if value.layout is not torch.strided or value.is_nested or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins as safetensors do: the length of a JSON header, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{"


def _read_safetensors(path: Path) -> Any:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: truncated, or no safetensors file") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path}: refused, because loading it would run {refused[1]}; "
                "a checkpoint must hold tensors only"
            ) from error
        raise UserError(f"{path}: {_UNREADABLE}") from error
    except Exception as error:  # damaged bytes raise whatever they make the reader stumble over
        raise UserError(f"{path}: {_UNREADABLE}") from error


def _unwrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state
