"""Where everything that kernels read and write lies: in the arena, or in weights.bin."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from gfcompile.quantize.int4 import fits_int4, pack_int4
from gfcompile.targets.tvm import cuda
from gfcompile.targets.tvm.grouped import GroupedRows, find_rows
from gfcompile.targets.tvm.kernel import Array, Dense, Kernel
from gfcompile.targets.tvm.levels import Function, Level
from gfcompile.targets.tvm.memory import Arena, Lifetime, align, plan_arena
from gfcompile.targets.tvm.plan import DType, PlanGrouped, PlanStep, PlanTensor
from gfcompile.targets.tvm.program import Call, Program


@dataclass
class _Part:
    """A part of weights.bin as it grows: aligned, equal arrays once."""

    data: bytearray = field(default_factory=bytearray)
    offsets: dict[tuple[str, bytes], int] = field(default_factory=dict)

    def add(self, array: Array, belongs_to: bytes = b"") -> int:
        """Where it lies; what belongs to something else is another array."""
        raw = np.ascontiguousarray(array).tobytes()
        key = (str(array.dtype), hashlib.sha256(raw + belongs_to).digest())
        if key not in self.offsets:
            self.data.extend(bytes(align(len(self.data)) - len(self.data)))
            self.offsets[key] = len(self.data)
            self.data.extend(raw)
        return self.offsets[key]


@dataclass
class Weights:
    """weights.bin as it grows, for every level of a target together.

    Attributes:
        whole: what is stored as it is.
        packed: what comes after it, in four bits each.
    """

    whole: _Part = field(default_factory=_Part)
    packed: _Part = field(default_factory=_Part)

    @property
    def plain_bytes(self) -> int:
        """The size of the weights that are stored as they are."""
        return align(len(self.whole.data)) if self.packed.data else len(self.whole.data)

    def stored(self) -> bytes:
        """What weights.bin holds."""
        plain = bytes(self.whole.data).ljust(self.plain_bytes, b"\0")
        return plain + pack_int4(np.frombuffer(self.packed.data, np.int8)).tobytes()


class PlanBuilder:
    """Gives every operand of every step a place, and an index in the plan."""

    def __init__(
        self,
        program: Program,
        level: Level,
        module: cuda.CudaModule | None,
        weights: Weights,
        group_size: int | None,
    ) -> None:
        self.program = program
        self.scheduled = level.scheduled
        self.functions = level.functions
        self.storage = level.storage
        self.module = module
        self.weights = weights
        self.group_size = group_size
        self._packed_tensors: set[int] = set()
        self._grouped: dict[int, PlanGrouped] = {}  # by offset in `packed`
        self._rows: dict[Kernel, GroupedRows | None] = {}
        self.index_of: dict[str, int] = {}
        self.uses: Counter[str] = Counter()  # calls of each function
        self._tensors: list[PlanTensor] = []
        self._offsets: Mapping[str, int] = {}
        self._prepared: list[int] = []  # for each call, the one whose temporaries it reads
        calls = program.calls
        for position, call in enumerate(calls):
            shares = position > 0 and self._shares_temps(calls[position - 1], call)
            self._prepared.append(self._prepared[-1] if shares else position)

    def _shares_temps(self, before: Call, call: Call) -> bool:
        """Whether a product finds its x as the one before it has laid it out.

        That is what the first step does, if it does that alone; those after it only read it.
        """
        first, *rest = self.scheduled[call.kernel].steps
        return (
            isinstance(call.kernel, Dense)
            and call.kernel == before.kernel
            and call.reads["x"] == before.reads["x"]
            and bool(rest)
            and set(first.args) == {"x", *self.scheduled[call.kernel].temps}
        )

    def build(self) -> tuple[tuple[PlanStep, ...], Arena]:
        host = self._hosts()
        arena = plan_arena(self._lifetimes(host))
        guests = {name: arena.offsets[host[name]] for name in host}
        self._offsets = {**arena.offsets, **guests}
        for name in self.program.inputs:
            self._activation(name, self.program.tensors[name].shape)
        steps = [step for i, call in enumerate(self.program.calls) for step in self._steps(i, call)]
        for name in self.program.outputs:
            assert name in self.index_of, f"nothing writes the output {name}"
        return tuple(steps), arena

    def tensors(self) -> tuple[PlanTensor, ...]:
        """The plan's tensors, once the weights of every level are known."""
        placed = list(self._tensors)
        for index in self._packed_tensors:  # they come after the others
            offset = self.weights.plain_bytes + placed[index].offset
            placed[index] = dataclasses.replace(placed[index], offset=offset)
        return tuple(placed)

    def grouped(self) -> tuple[PlanGrouped, ...]:
        """The packed weights that have factors, once everything has its place."""
        return tuple(
            dataclasses.replace(grouped, offset=self.weights.plain_bytes + offset)
            for offset, grouped in self._grouped.items()
        )

    def _hosts(self) -> Mapping[str, str]:
        """For each tensor that takes the place of one before it: the first of that place."""
        program = self.program
        last = {
            name: i for i, call in enumerate(program.calls) for name in call.reads.values()
        } | dict.fromkeys(program.outputs, len(program.calls))
        host: dict[str, str] = {}
        for i, call in enumerate(program.calls):
            for result, argument in self.scheduled[call.kernel].in_place.items():
                if argument not in call.reads:
                    continue  # a constant
                name, before = call.writes[result], call.reads[argument]
                alone = [*call.reads.values()].count(before) == 1 and last[before] == i
                fits = self._size(name) == self._size(before)
                if alone and fits and before not in program.inputs:
                    host[name] = host.get(before, before)
        return host

    def _lifetimes(self, host: Mapping[str, str]) -> list[Lifetime]:
        first = dict.fromkeys(self.program.inputs, 0)
        last: dict[str, int] = {}
        sizes = {name: self._size(name) for name in self.program.tensors}
        temporaries = {}
        for i, call in enumerate(self.program.calls):
            for name in call.writes.values():
                first.setdefault(name, i)
                last[name] = i
            for name in call.reads.values():
                last[name] = i
            for temp, (dtype, shape) in self.scheduled[call.kernel].temps.items():
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                made = self._prepared[i]
                name = _temp_name(made, temp)
                temporaries[name] = Lifetime(name=name, size_bytes=size, first=made, last=i)
        for name in self.program.outputs:
            last[name] = len(self.program.calls)
        for name, of in host.items():  # in the order of the calls
            last[of] = last[name]
            del first[name]
        return [*temporaries.values()] + [
            Lifetime(name=name, size_bytes=sizes[name], first=first[name], last=last.get(name, 0))
            for name in first
        ]

    def _size(self, name: str) -> int:
        tensor = self.program.tensors[name]
        return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize

    def _steps(self, position: int, call: Call) -> list[PlanStep]:
        plan = self.scheduled[call.kernel]
        constants = {
            **plan.consts,
            **call.constants,
            **{name: pack(call.constants) for name, pack in plan.pack.items()},
        }
        steps = []
        made = self._prepared[position]
        for function in self.functions[call.kernel][made < position :]:
            self.uses[function.name] += 1
            operands = {}
            outputs = []
            params = function.func.params
            assert len(params) == len(function.args), (function.name, function.args)
            for param, arg in zip(params, function.args, strict=True):
                shape = tuple(int(dim) for dim in param.shape)
                dtype = str(param.dtype)
                if arg in call.writes:
                    operands[arg] = self._activation(call.writes[arg], shape, dtype)
                    outputs.append(operands[arg])
                elif arg in call.reads:
                    operands[arg] = self._activation(call.reads[arg], shape, dtype)
                elif arg in plan.temps:
                    name = _temp_name(made, arg)
                    operands[arg] = self._place(name, dtype, shape, "arena", self._offsets[name])
                else:
                    array = constants[arg]
                    assert array.size == np.prod(shape), f"{call.label}.{arg}: {array.shape}"
                    operands[arg] = (
                        self._weight(call.kernel, array, shape)
                        if isinstance(call.kernel, Dense) and arg == "w"
                        else self._constant(array, shape)
                    )
            if not outputs:  # it fills a scratch tensor; which one does not matter to the plan
                outputs = [operands[arg] for arg in function.args if arg in plan.temps]
            steps.append(self._step(function, call.label, operands, outputs))
        return steps

    def _step(
        self, function: Function, label: str, operands: Mapping[str, int], outputs: list[int]
    ) -> PlanStep:
        order: Sequence[str] = function.args
        if self.module is None:
            return PlanStep(
                kernel=function.name,
                label=label,
                args=tuple(operands[arg] for arg in order),
                outputs=tuple(outputs),
            )
        launch = self.module.kernels[function.name]
        return PlanStep(
            kernel=launch.symbol,
            label=label,
            args=tuple(operands[order[i]] for i in launch.args),
            outputs=tuple(outputs),
            grid=launch.grid,
            block=launch.block,
        )

    def _activation(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> int:
        tensor = self.program.tensors[name]
        quantized = tensor.dtype == "int8"
        stored = self.storage.dtype if quantized else tensor.dtype
        # A kernel may read int8 values as words of four.
        size = int(np.prod(shape)) * np.dtype(dtype or stored).itemsize
        assert size == self._size(name), f"{name}: {tensor.shape} {stored} as {shape} {dtype}"
        return self._place(
            name,
            dtype or stored,
            shape,
            "arena",
            self._offsets[name],
            scale=tensor.scale,
            zero_point=tensor.zero_point,
            storage_offset=self.storage.offset if quantized else 0,
        )

    def _weight(self, kernel: Dense, array: Array, shape: tuple[int, ...]) -> int:
        """A matrix of weights: of four bits where they fit, as it is where they do not."""
        # Four may be in a word; of a float matrix, int8 ones are digits.
        if kernel.x == "float32" or array.dtype not in (np.int8, np.int32):
            return self._constant(array, shape)
        values = np.ascontiguousarray(array).view(np.int8).reshape(-1)
        if fits_int4(values):
            return self._packed(array, shape, self.weights.packed.add(array))
        rows = self._grouped_rows(kernel)
        split = None if rows is None else rows.split(values)
        if rows is None or split is None:
            return self._constant(array, shape)
        codes, factors = split
        # Equal codes with other factors become other weights.
        offset = self.weights.packed.add(codes, belongs_to=factors.tobytes())
        self._grouped[offset] = PlanGrouped(
            offset=0,  # known once all is placed
            size_bytes=len(codes),
            factors=self.weights.whole.add(factors),
            **dataclasses.asdict(rows),
        )
        return self._packed(array, shape, offset)

    def _grouped_rows(self, kernel: Dense) -> GroupedRows | None:
        if self.group_size is None:
            return None
        if kernel not in self._rows:
            pack = self.scheduled[kernel].pack.get("w")
            self._rows[kernel] = find_rows(
                lambda w: w if pack is None else pack({"w": w}),
                kernel.k,
                kernel.n,
                self.group_size,
            )
        return self._rows[kernel]

    def _packed(self, array: Array, shape: tuple[int, ...], offset: int) -> int:
        name = f"{array.dtype}@packed+{offset}"
        index = self._place(name, str(array.dtype), shape, "weights", offset)
        self._packed_tensors.add(index)
        return index

    def _constant(self, array: Array, shape: tuple[int, ...]) -> int:
        offset = self.weights.whole.add(array)
        return self._place(f"{array.dtype}@{offset}", str(array.dtype), shape, "weights", offset)

    def _place(
        self, name: str, dtype: str, shape: tuple[int, ...], space: Any, offset: int, **quant: Any
    ) -> int:
        """The index of the tensor, new or known; a second shape is a view under another name."""
        index = self.index_of.get(name)
        known = None if index is None else self._tensors[index]
        if known is not None and (known.shape, known.dtype) != (shape, dtype):
            name = f"{name}:{'x'.join(map(str, shape))}:{dtype}"
            index = self.index_of.get(name)
        if index is None:
            index = self.index_of[name] = len(self._tensors)
            self._tensors.append(
                PlanTensor(
                    name=name,
                    dtype=cast(DType, dtype),
                    shape=shape,
                    space=space,
                    offset=offset,
                    **quant,
                )
            )
        return index


def _temp_name(position: int, name: str) -> str:
    return f"step{position}.{name}"
