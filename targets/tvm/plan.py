"""The static plan: which kernel runs on which tensors, in order; written as plan.bin.

plan.bin is what runtime/device/gfrt_plan.c reads: little-endian, fixed-size records, one pool of
NUL-terminated strings. The C side checks every field and never trusts this one; the order and
sizes of the fields here and in gfrt_internal.h are the same by definition, and the tests run
plans through both.
"""

import dataclasses
import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

FORMAT_VERSION = 2
ALIGNMENT = 64  # of every tensor: TVM's kernels assume it
MAX_DIMS = 6
MAX_ARGS = 32

DType = Literal["float32", "int8", "uint8", "int32", "uint16", "int64", "bool", "int16", "float16"]
Space = Literal["arena", "weights"]
Device = Literal["cpu", "cuda"]
Arch = Literal["x86_64", "aarch64"]

_DTYPES: tuple[DType, ...] = get_args(DType)
_SPACES: tuple[Space, ...] = get_args(Space)
_DEVICES: tuple[Device, ...] = get_args(Device)
_ARCHES: tuple[Arch, ...] = get_args(Arch)
_ITEM_BYTES: dict[DType, int] = {
    "float32": 4,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "uint16": 2,
    "int64": 8,
    "bool": 1,
    "int16": 2,
    "float16": 2,
}

_MAGIC = b"GFRTPLAN"
# magic, format, header bytes, plan bytes, sha256 of what follows, sha256 of the weights,
# weights, packed, arena and workspace bytes, device, capability (2), arch, library id, library,
# counts (tensors, steps, args, kernels, inputs, outputs, string bytes), CPU features, grouped, 0
_HEADER = struct.Struct("<8s2IQ32s32s4Q4I72s120s10I")
_HASHED_FROM = 8 + 4 + 4 + 8 + 32
_TENSOR = struct.Struct("<4I6qQf2iI")  # name, dtype, space, ndim, shape, offset, scale, zp, so, 0
_STEP = struct.Struct("<4I3I3I2I")  # kernel, label, first arg, args, grid, block, shared, 0
_ARG = struct.Struct("<2I")  # tensor, whether it is written
_KERNEL = struct.Struct("<2I")  # name, 0
_IO = struct.Struct("<3I3f3fI")  # name, tensor, whether normalized, mean, std, 0
_GROUPED = struct.Struct("<3Q4I")  # as `PlanGrouped`


@dataclass(frozen=True, kw_only=True)
class PlanTensor:
    """One tensor: dense, row-major, at a fixed place; tensors may share memory over time.

    Attributes:
        name: unique; a trace is keyed by it.
        space: "arena" (activations, writable) or "weights" (read from weights.bin).
        offset: into the space, a multiple of ALIGNMENT.
        scale, zero_point, storage_offset: real = (stored - storage_offset - zero_point) * scale;
            a scale of 0 says that it is not quantized.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    space: Space = "arena"
    offset: int
    scale: float = 0.0
    zero_point: int = 0
    storage_offset: int = 0

    @property
    def size_bytes(self) -> int:
        size = _ITEM_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True, kw_only=True)
class PlanStep:
    """One call of a kernel.

    Attributes:
        kernel: the function's name: `__tvm_ffi_<kernel>` in the library, or in the CUDA module.
        label: the layer it serves, for profiles and traces.
        args: indices into the plan's tensors, in the order of the kernel's parameters.
        outputs: which tensors (not: which arguments) it writes; each is one of `args`.
        grid, block, shared_bytes: the launch, on a GPU.
    """

    kernel: str
    label: str
    args: tuple[int, ...]
    outputs: tuple[int, ...]
    grid: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int, int] = (1, 1, 1)
    shared_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class PlanIO:
    """An input or output of the model; `mean` and `std` per channel if it is an RGB image."""

    name: str
    tensor: int
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class PlanGrouped:
    """Packed weights whose groups have factors; loading multiplies them by these.

    They lie in panels of `rows` rows; `shared` rows have their factors in common, uint8, one for
    each run of `run` bytes.

    Attributes:
        offset: of the weights, as expanded, a multiple of ALIGNMENT.
        factors: their offset among the weights that are stored as they are.
    """

    offset: int
    size_bytes: int
    factors: int
    row_bytes: int
    rows: int
    shared: int
    run: int

    @property
    def factor_bytes(self) -> int:
        panels = self.size_bytes // (self.row_bytes * self.rows)
        return panels * -(-self.rows // self.shared) * (self.row_bytes // self.run)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the runtime needs to run a model, beside its kernels and weights.

    Attributes:
        arch: of the library.
        library: its file name within the bundle.
        library_id: hexadecimal; the library was linked with the same one.
        cpu_features: what the kernels need, see `link.cpu_features`.
        compute_capability: of the GPU that kernels.cubin was assembled for.
        workspace_bytes: scratch per thread for kernels that allocate within themselves; 0 for
            the project's own schedules, which take their scratch as arguments.
        packed_bytes: of the weights, how many at their end are int8 that weights.bin holds in four
            bits each, see `quantize.int4`; loading brings them to their size.
        grouped: those of the packed weights that have factors.
        weights_sha256: of weights.bin.
    """

    device: Device = "cpu"
    arch: Arch
    library: str
    library_id: str
    cpu_features: tuple[str, ...] = ()
    compute_capability: tuple[int, int] = (0, 0)
    tensors: tuple[PlanTensor, ...]
    steps: tuple[PlanStep, ...]
    inputs: tuple[PlanIO, ...]
    outputs: tuple[PlanIO, ...]
    arena_bytes: int
    workspace_bytes: int = 0
    weights_bytes: int = 0
    packed_bytes: int = 0
    grouped: tuple[PlanGrouped, ...] = ()
    weights_sha256: str = hashlib.sha256(b"").hexdigest()


class _Strings:
    """The string pool: equal strings are stored once."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._at: dict[str, int] = {}

    def add(self, text: str) -> int:
        if text not in self._at:
            assert "\0" not in text, text
            self._at[text] = len(self.data)
            self.data += text.encode() + b"\0"
        return self._at[text]


def check(plan: Plan) -> None:
    """Asserts what the runtime will demand of `plan`, so that a fault shows where it is made."""
    assert re.fullmatch(r"[0-9a-f]{16,64}", plan.library_id), plan.library_id
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,118}", plan.library), plan.library
    sizes = {"arena": plan.arena_bytes, "weights": plan.weights_bytes}
    names = set[str]()
    for tensor in plan.tensors:
        assert tensor.name not in names, f"two tensors are called {tensor.name}"
        names.add(tensor.name)
        assert len(tensor.shape) <= MAX_DIMS, tensor
        assert all(extent >= 1 for extent in tensor.shape), tensor
        assert tensor.offset >= 0, tensor
        assert tensor.offset % ALIGNMENT == 0, tensor
        assert tensor.offset + tensor.size_bytes <= sizes[tensor.space], tensor
    for step in plan.steps:
        assert step.kernel.isidentifier(), step
        assert 1 <= len(step.args) <= MAX_ARGS, step
        assert all(0 <= arg < len(plan.tensors) for arg in step.args), step
        assert step.outputs, step
        assert set(step.outputs) <= set(step.args), step
        assert all(plan.tensors[arg].space == "arena" for arg in step.outputs), step
    assert 0 <= plan.packed_bytes <= plan.weights_bytes, plan
    plain_bytes = plan.weights_bytes - plan.packed_bytes
    for grouped in plan.grouped:
        assert plain_bytes <= grouped.offset, grouped
        assert grouped.offset + grouped.size_bytes <= plan.weights_bytes, grouped
        assert grouped.size_bytes % (grouped.row_bytes * grouped.rows) == 0, grouped
        assert grouped.row_bytes % grouped.run == 0, grouped
        assert grouped.factors + grouped.factor_bytes <= plain_bytes, grouped
    assert plan.inputs, "a model needs an input"
    assert plan.outputs, "a model needs an output"
    for io in (*plan.inputs, *plan.outputs):
        assert plan.tensors[io.tensor].space == "arena", io
        assert (io.mean is None) == (io.std is None), io


def serialize(plan: Plan, *, format_version: int = FORMAT_VERSION) -> bytes:
    """plan.bin. `format_version` is another one in tests only."""
    check(plan)
    strings = _Strings()
    kernels = {name: i for i, name in enumerate(dict.fromkeys(s.kernel for s in plan.steps))}
    body = bytearray()
    for t in plan.tensors:
        shape = t.shape + (1,) * (MAX_DIMS - len(t.shape))
        body += _TENSOR.pack(
            strings.add(t.name),
            _DTYPES.index(t.dtype),
            _SPACES.index(t.space),
            len(t.shape),
            *shape,
            t.offset,
            t.scale,
            t.zero_point,
            t.storage_offset,
            0,
        )
    first_arg = 0
    args = bytearray()
    for s in plan.steps:
        body += _STEP.pack(
            kernels[s.kernel],
            strings.add(s.label),
            first_arg,
            len(s.args),
            *s.grid,
            *s.block,
            s.shared_bytes,
            0,
        )
        first_arg += len(s.args)
        for arg in s.args:
            args += _ARG.pack(arg, arg in s.outputs)
    body += args
    for name in kernels:
        body += _KERNEL.pack(strings.add(name), 0)
    for io in (*plan.inputs, *plan.outputs):
        mean, std = io.mean or (0.0,) * 3, io.std or (1.0,) * 3
        body += _IO.pack(strings.add(io.name), io.tensor, io.mean is not None, *mean, *std, 0)
    for grouped in plan.grouped:
        body += _GROUPED.pack(*dataclasses.astuple(grouped))
    features = strings.add(" ".join(plan.cpu_features))
    body += strings.data
    header = _HEADER.pack(
        _MAGIC,
        format_version,
        _HEADER.size,
        _HEADER.size + len(body),
        bytes(32),
        bytes.fromhex(plan.weights_sha256),
        plan.weights_bytes,
        plan.packed_bytes,
        plan.arena_bytes,
        plan.workspace_bytes,
        _DEVICES.index(plan.device),
        *plan.compute_capability,
        _ARCHES.index(plan.arch),
        plan.library_id.encode(),
        plan.library.encode(),
        len(plan.tensors),
        len(plan.steps),
        first_arg,
        len(kernels),
        len(plan.inputs),
        len(plan.outputs),
        len(strings.data),
        features,
        len(plan.grouped),
        0,
    )
    return seal(header + bytes(body))


def seal(data: bytes) -> bytes:
    """`data`, a plan.bin, with the hash that its content asks for."""
    digest = hashlib.sha256(data[_HASHED_FROM:]).digest()
    return data[: _HASHED_FROM - 32] + digest + data[_HASHED_FROM:]


def parse(data: bytes) -> Plan:
    """The plan that `serialize` wrote; what is not one fails an assertion."""
    assert seal(data) == data, "the hash differs"
    header = _HEADER.unpack_from(data)
    assert header[:4] == (_MAGIC, FORMAT_VERSION, _HEADER.size, len(data)), header[:4]
    *counts, string_bytes, features, grouped, _ = header[-10:]
    counts += [grouped, string_bytes]
    sizes = [r.size for r in (_TENSOR, _STEP, _ARG, _KERNEL, _IO, _IO, _GROUPED)] + [1]
    starts = [_HEADER.size]
    for count, size in zip(counts, sizes, strict=True):
        starts.append(starts[-1] + count * size)
    assert starts[-1] == len(data), (starts, len(data))
    strings = data[starts[7] :]

    def text(offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    def records(layout: struct.Struct, section: int) -> Sequence[tuple[int, ...]]:
        return list(layout.iter_unpack(data[starts[section] : starts[section + 1]]))

    def io(record: tuple[int, ...]) -> PlanIO:
        name, tensor, normalized, m0, m1, m2, s0, s1, s2, _ = record
        return PlanIO(
            name=text(name),
            tensor=tensor,
            mean=(m0, m1, m2) if normalized else None,
            std=(s0, s1, s2) if normalized else None,
        )

    names = [field.name for field in dataclasses.fields(PlanGrouped)]
    tensors = tuple(
        PlanTensor(
            name=text(r[0]),
            dtype=_DTYPES[r[1]],
            space=_SPACES[r[2]],
            shape=tuple(r[4 : 4 + r[3]]),
            offset=r[10],
            scale=r[11],
            zero_point=r[12],
            storage_offset=r[13],
        )
        for r in records(_TENSOR, 0)
    )
    args = records(_ARG, 2)
    kernels = [text(name) for name, _ in records(_KERNEL, 3)]
    steps = tuple(
        PlanStep(
            kernel=kernels[r[0]],
            label=text(r[1]),
            args=tuple(tensor for tensor, _ in args[r[2] : r[2] + r[3]]),
            outputs=tuple(tensor for tensor, written in args[r[2] : r[2] + r[3]] if written),
            grid=(r[4], r[5], r[6]),
            block=(r[7], r[8], r[9]),
            shared_bytes=r[10],
        )
        for r in records(_STEP, 1)
    )
    return Plan(
        device=_DEVICES[header[10]],
        arch=_ARCHES[header[13]],
        library=header[15].rstrip(b"\0").decode(),
        library_id=header[14].rstrip(b"\0").decode(),
        cpu_features=tuple(text(features).split()),
        compute_capability=(header[11], header[12]),
        tensors=tensors,
        steps=steps,
        inputs=tuple(io(r) for r in records(_IO, 4)),
        outputs=tuple(io(r) for r in records(_IO, 5)),
        arena_bytes=header[8],
        workspace_bytes=header[9],
        weights_bytes=header[6],
        packed_bytes=header[7],
        grouped=tuple(
            PlanGrouped(**dict(zip(names, record, strict=True))) for record in records(_GROUPED, 6)
        ),
        weights_sha256=header[5].hex(),
    )
