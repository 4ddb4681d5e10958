"""Reads what `gfbench --trace` writes: every tensor that the steps of a run wrote."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfcompile.runtime.device.gfrt import DTYPES, TensorInfo, TraceRecord
from gfcompile.runtime.errors import DeviceError

_MAGIC = b"GFTRACE1"
# inference, step, bytes of the name and of the label, dtype, ndim, shape, scale, zero_point,
# storage_offset, 0, bytes of the data: gfbench.c's trace_record
_RECORD = struct.Struct("<6I6qf2iIQ")


def read_trace(path: Path) -> Iterator[tuple[int, TraceRecord]]:
    """Each record of the trace file, with the number of the inference that it belongs to.

    Raises:
        DeviceError: the file ends before its last record does, or is no trace.
    """
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise DeviceError(f"{path} is not a trace of gfbench")
    at = len(_MAGIC)

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        if at > len(data):
            raise DeviceError(f"{path} is truncated: did gfbench end early?")
        return data[at - count : at]

    while at < len(data):
        (
            inference,
            step,
            name_bytes,
            label_bytes,
            dtype,
            ndim,
            *shape,
            scale,
            zero_point,
            storage_offset,
            _,
            data_bytes,
        ) = _RECORD.unpack(take(_RECORD.size))
        name, label = (take(n).decode(errors="replace") for n in (name_bytes, label_bytes))
        info = TensorInfo(
            name,
            DTYPES[dtype],
            tuple(shape[:ndim]),
            data_bytes,
            scale,
            zero_point,
            storage_offset,
        )
        yield inference, TraceRecord(step, label, info, take(data_bytes))


def logical_values(record: TraceRecord) -> npt.NDArray[Any]:
    """The tensor of a record; a quantized one as the graph has it, whatever it is stored as."""
    info = record.tensor
    values: npt.NDArray[Any] = np.frombuffer(record.data, info.dtype).reshape(info.shape)
    if info.storage_offset:
        values = (values.astype(np.int16) - info.storage_offset).astype(np.int8)
    return values
