"""How many operations a saved program has, and what memory it needs: figures of the file alone."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gfcompile.targets.coreml.program import MilProgram, TensorType

# The Neural Engine aligns the last axis of a buffer to this many bytes (Apple, "Deploying
# Transformers on the Apple Neural Engine", 2022): a last axis of one element costs 32 times its
# size there.
ANE_ALIGNMENT = 64

# Decompressed when the model is loaded, or not computed at all.
_FREE = ("constexpr_",)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one program.

    Attributes:
        operations: that are executed, by kind; constants and their decompression do not count.
        weights_bytes: of all constants as they are stored.
        peak_bytes: of the activations that are alive at one time, at most, in program order.
        peak_aligned_bytes: the same with last axes aligned as the Neural Engine does.
        written_bytes: of all results together.
    """

    operations: Mapping[str, int]
    weights_bytes: int
    peak_bytes: int
    peak_aligned_bytes: int
    written_bytes: int

    @property
    def count(self) -> int:
        return sum(self.operations.values())

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, **asdict(self)}


def measure(program: MilProgram) -> Statistics:
    """The figures of `program`."""
    executed = [op for op in program.operations if not op.kind.startswith(_FREE)]
    types = dict(program.inputs)
    types |= {name: kind for op in executed for name, kind in op.outputs}
    last_use = {name: len(executed) for name in program.outputs}
    for step, op in reversed(list(enumerate(executed))):
        for names in op.inputs.values():
            for name in names:
                if name in types:
                    last_use.setdefault(name, step)
    peaks = []
    for size_of in (lambda kind: kind.size_bytes, aligned_bytes):
        alive = sum(size_of(kind) for _, kind in program.inputs)
        peak = alive
        for step, op in enumerate(executed):
            alive += sum(size_of(kind) for _, kind in op.outputs)
            peak = max(peak, alive)
            read = {name for names in op.inputs.values() for name in names}
            gone = {name for name in read & types.keys() if last_use[name] == step}
            # Results that nobody reads are gone at once.
            gone |= {name for name, _ in op.outputs if name not in last_use}
            alive -= sum(size_of(types[name]) for name in gone)
        peaks.append(peak)
    weights = sum(kind.size_bytes for kind in program.constant_types.values())
    weights += sum(
        kind.size_bytes
        for op in program.operations
        if op.kind.startswith(_FREE)
        for kind in op.literal_types.values()
    )
    return Statistics(
        operations=dict(sorted(Counter(op.kind for op in executed).items())),
        weights_bytes=weights,
        peak_bytes=peaks[0],
        peak_aligned_bytes=peaks[1],
        written_bytes=sum(kind.size_bytes for op in executed for _, kind in op.outputs),
    )


def aligned_bytes(kind: TensorType) -> int:
    """The size of a tensor whose last axis is aligned."""
    if not kind.shape or not kind.size_bytes:
        return kind.size_bytes
    rows = math.prod(kind.shape[:-1])
    row = TensorType(dtype=kind.dtype, shape=kind.shape[-1:]).size_bytes
    return rows * math.ceil(row / ANE_ALIGNMENT) * ANE_ALIGNMENT
