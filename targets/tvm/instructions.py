"""What a scheduled kernel issues: its instructions, counted in TIR, and the least time they take.

A roofline knows products and bytes alone. Here every value that a kernel computes, loads or stores
counts, in whole registers on a CPU and per thread on a GPU: polynomials of GELU, conversions of
int8 where a device multiplies in float32, lanes that a short row leaves empty. Index arithmetic is
left out, as compilers hoist most of it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import PointerType
from tvm.ir import expr as ir_expr
from tvm.ir.prim import expr as prim
from tvm.s_tir import SBlockRealize
from tvm.target import codegen

from gfcompile.targets.target import Cpu, Gpu, Target
from gfcompile.targets.tvm.schedules import amx_pipeline, cpu_in_order

Kind = Literal["product", "arithmetic", "convert", "special", "load", "store"]

# A division or a root keeps the unit that multiplies busy for about so many additions (uops.info
# for x86; Arm's optimization guides). GPUs have units of their own for them.
_CPU_SPECIAL_SLOTS = 8
# Of a GPU's lanes, those that convert, load and compute special functions: 32 of 128 on Maxwell
# and Pascal, 16 of 64 on Volta and later (CUDA C++ programming guide, arithmetic throughput).
_GPU_SLOW_LANES = 0.25
_GPU_LOAD_BYTES = 16

_BINARY = (prim.Add, prim.Sub, prim.Mul, prim.Min, prim.Max, prim.Select)
_LOGIC = (prim.LT, prim.LE, prim.GT, prim.GE, prim.EQ, prim.NE)
_FREE_CALLS = ("tirx.reinterpret", "tirx.vectorlow", "tirx.vectorhigh", "tirx.tvm_storage_sync")
_ROOTS = ("tirx.sqrt", "tirx.rsqrt")
_LIBM_CALLS = ("exp", "log", "tanh", "erf", "pow")  # on CPUs one call per lane


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """How many a call issues: of whole vector registers (CPU) or of single threads (GPU).

    Attributes:
        counts: by kind; of "product", integer products on a CPU, operations instead, since how
            many instructions make one differs: smull, smlal2 and sadalp, or one vpdpbusd.
        blocks: of a GPU's launch; 1 on a CPU.
    """

    counts: Mapping[str, float]
    blocks: int = 1


def count_instructions(func: Any, target: Target) -> Instructions:
    """What one call of the scheduled PrimFunc issues on `target`."""
    counter = _Counter(func, target)
    counter.statement(func.body, 1.0, 1)
    return Instructions(counts=counter.counts, blocks=counter.blocks)


def issue_us(instructions: Instructions, target: Target) -> float:
    """The least time to issue them: on one core, or on the whole GPU."""
    counts = defaultdict(float, instructions.counts)
    if target.gpu is not None:
        return _gpu_us(counts, instructions.blocks, target.gpu)
    return _cpu_us(counts, target.cpu)


def _cpu_us(counts: Mapping[str, float], cpu: Cpu) -> float:
    # An FMA over a whole register is 2 operations per lane.
    ports = max(1.0, cpu.fp32_gflops / cpu.clock_ghz / (2 * cpu.float_lanes))
    others = counts["arithmetic"] + counts["convert"] + _CPU_SPECIAL_SLOTS * counts["special"]
    compute = others / ports + counts["product"] * cpu.clock_ghz / cpu.int8_gops
    cycles = max(compute, counts["load"] / ports, counts["store"])
    return cycles / cpu.clock_ghz * 1e-3


def _gpu_us(counts: Mapping[str, float], blocks: int, gpu: Gpu) -> float:
    lanes = gpu.fp32_tflops * 1e3 / (2 * gpu.clock_ghz)
    slow = lanes * _GPU_SLOW_LANES
    cycles = max(
        sum(counts.values()) / lanes,
        (counts["convert"] + counts["special"]) / slow,
        (counts["load"] + counts["store"]) / slow,
    )
    # Blocks are dealt out whole: with 7 of them, one of 2 multiprocessors gets 4.
    uneven = math.ceil(blocks / gpu.sms) * gpu.sms / blocks
    return cycles * uneven / gpu.clock_ghz * 1e-3


# A tile of AMX has 16 rows of 64 bytes: 16 loads, or 16 x 16 sums of 64 products.
_TILE_ROWS = 16
_TILE_OPERATIONS = 2 * _TILE_ROWS * 16 * 64


class _Counter:
    """Walks a function; `times` is how often a node runs, `lanes` the width of vectorized loops."""

    def __init__(self, func: Any, target: Target) -> None:
        self.cpu = target.cpu if target.gpu is None else None
        self.counts: defaultdict[str, float] = defaultdict(float)
        self.blocks = 1
        self.parameters = set(func.params)
        self.bounds = tvm.sym.Analyzer()
        self.loops: list[tuple[Any, int]] = []  # those around, with their lengths

    def statement(self, node: Any, times: float, lanes: int) -> None:
        match node:
            case tirx.SeqStmt():
                for part in node.seq:
                    self.statement(part, times, lanes)
            case tirx.For():
                usual = (node.annotations or {}).get(amx_pipeline.USUAL_LENGTH)
                length = node.extent if usual is None else tirx.IntImm("int32", int(usual))
                extent = self.number(length)
                self.bounds.bind(node.loop_var, tvm.ir.Range.from_min_extent(0, extent))
                if node.kind == tirx.ForKind.VECTORIZED or self.vectorizes(node):
                    self.statement(node.body, times, lanes * extent)
                else:
                    rounds = self.rounds(length)
                    self.loops.append((node.loop_var, extent))
                    self.statement(node.body, times * rounds, lanes)
                    self.loops.pop()
            case tirx.AttrStmt():
                if node.attr_key == "thread_extent":
                    extent = self.number(node.value)
                    if str(node.node.thread_tag).startswith("blockIdx"):
                        self.blocks *= extent
                    times *= extent
                self.statement(node.body, times, lanes)
            case tirx.IfThenElse():
                self.statement(node.then_case, times, lanes)
                if node.else_case is not None:
                    self.statement(node.else_case, times, lanes)
            case tirx.BufferStore():
                self.value(node.value, times, lanes)
                self.memory("store", node.buffer, node.value.ty, times, lanes)
            case tirx.Bind() if isinstance(node.var.ty, PointerType):
                pass  # memory that is taken from the stack
            case tirx.Bind() | tirx.Evaluate():
                if isinstance(node, tirx.Bind) and _is_index(node.value):
                    self.bounds.bind(node.var, node.value)
                self.value(node.value, times, lanes)
            case SBlockRealize():
                self.statement(node.block.body, times, lanes)

    def vectorizes(self, loop: Any) -> bool:
        """Whether LLVM makes vectors of an innermost loop of Relax's: one that sums nothing."""
        body = loop.body
        return (
            self.cpu is not None
            and isinstance(body, SBlockRealize)
            and isinstance(body.block.body, tirx.BufferStore)
            and body.block.init is None
        )

    def value(self, node: Any, times: float, lanes: int) -> None:
        if not isinstance(node, tvm.ir.Expr) or _is_index(node):
            return
        children = _children(node)
        match node:
            case prim.Add() | prim.Sub() if isinstance(node.a, prim.Mul) or isinstance(
                node.b, prim.Mul
            ):
                # One fused multiply-add.
                product, other = (
                    (node.a, node.b) if isinstance(node.a, prim.Mul) else (node.b, node.a)
                )
                children = (product.a, product.b, other)
                self.add("arithmetic", node.ty, times, lanes)
            case prim.Add() if any(map(_is_integer_product, children)):
                pass  # summing up belongs to the product
            case _ if isinstance(node, (*_BINARY, *_LOGIC)):
                self.add("arithmetic", node.ty, times, lanes)
            case prim.Div():
                self.add("special", node.ty, times, lanes)
            case prim.Cast():
                self.add("convert", node.ty, times, lanes)
            case ir_expr.TensorLoad():
                self.memory("load", node.source, node.ty, times, lanes)
            case ir_expr.Call() if _is_tile_instruction(node):
                self.tile(node, times)
                return
            case ir_expr.Call() if str(getattr(node.op, "name", "")) == "tirx.call_extern":
                self.loop(node, times)
                return
            case ir_expr.Call():
                self.call(node, times, lanes)
        for child in children:
            self.value(child, times, lanes)

    def call(self, node: Any, times: float, lanes: int) -> None:
        name = str(getattr(node.op, "name", node.op))
        if name in _FREE_CALLS:
            return
        if self.cpu is not None and _is_integer_product(node):
            self.counts["product"] += times * lanes * _product_operations(node)
            return
        if any(part in name for part in _LIBM_CALLS):
            self.counts["special"] += times * lanes * _lanes_and_bytes(node.ty)[0]
            return
        self.add("special" if name in _ROOTS else "arithmetic", node.ty, times, lanes)

    def loop(self, node: Any, times: float) -> None:
        """A call of a loop over k that is assembly."""
        loop = cpu_in_order.LOOPS[node.args[0].value]
        rounds = times * self.number(node.args[-1])
        self.counts[loop.kind] += rounds * loop.products
        self.counts["load"] += rounds * loop.loads

    def tile(self, node: Any, times: float) -> None:
        """An instruction on whole tiles of AMX; smaller ones count as full ones."""
        if self.cpu is None:
            return  # a GPU's barrier
        known = {
            codegen.llvm_lookup_intrinsic_id(f"llvm.x86.{name}"): name
            for name in ("tdpbusd", "tdpbssd", "tileloadd64", "tilestored64")
        }
        match known.get(self.number(node.args[0])):
            case "tdpbusd" | "tdpbssd":
                self.counts["product"] += times * _TILE_OPERATIONS
            case "tileloadd64":
                self.counts["load"] += times * _TILE_ROWS
            case "tilestored64":
                self.counts["store"] += times * _TILE_ROWS

    def memory(self, kind: Kind, buffer: Any, ty: Any, times: float, lanes: int) -> None:
        if buffer not in self.parameters and self.in_registers(buffer):
            return
        self.add(kind, ty, times, lanes)

    def rounds(self, extent: Any) -> float:
        """How long a loop is: where the loop around it decides that, on average."""
        for var, length in () if isinstance(extent, tirx.IntImm) else reversed(self.loops):
            found = []
            for i in range(length):
                known = tvm.sym.Analyzer()
                known.bind(var, tirx.IntImm("int32", i))
                found.append(known.simplify(extent))
            if found and all(isinstance(value, tirx.IntImm) for value in found):
                return float(sum(map(int, found)) / length)
        return self.number(extent)

    def number(self, value: Any) -> int:
        """A constant; of a length that the last piece of a loop has less of, the full one."""
        return int(self.bounds.const_int_bound(value).max_value)

    def in_registers(self, buffer: Any) -> bool:
        if self.cpu is None:
            return str(buffer.scope()) == "local"
        elements = math.prod(self.number(extent) for extent in buffer.shape)
        size = elements * _lanes_and_bytes(buffer)[1]
        return size <= self.cpu.vector_bytes * self.cpu.vector_registers

    def add(self, kind: Kind, ty: Any, times: float, lanes: int) -> None:
        own_lanes, item_bytes = _lanes_and_bytes(ty)
        width = own_lanes * lanes
        if self.cpu is not None:
            number = math.ceil(width * item_bytes / self.cpu.vector_bytes)
        elif kind in ("load", "store"):
            number = math.ceil(width * item_bytes / _GPU_LOAD_BYTES)
        else:
            number = width
        self.counts[kind] += times * number


def _children(node: Any) -> tuple[Any, ...]:
    match node:
        case ir_expr.TensorLoad():
            return ()  # its indices are index arithmetic
        case ir_expr.Call():
            return tuple(node.args)
        case prim.Let():
            return (node.value, node.body)
        case prim.Select():
            return (node.condition, node.true_value, node.false_value)
        case prim.Shuffle():
            return tuple(node.vectors)
        case prim.Cast() | prim.Broadcast():
            return (node.value,)
    return tuple(getattr(node, side) for side in ("a", "b") if hasattr(node, side))


def _is_index(node: Any) -> bool:
    """Whether it is a scalar integer made of loop variables and constants alone."""
    if isinstance(node, prim.IntImm | prim.FloatImm | ir_expr.StringImm):
        return True
    if isinstance(node, ir_expr.TensorLoad | ir_expr.Call) or "float" in str(node.ty.dtype):
        return False
    if isinstance(node, ir_expr.Var):
        return True
    children = _children(node)
    return bool(children) and all(_is_index(child) for child in children)


def _is_integer_product(node: Any) -> bool:
    """Whether an LLVM intrinsic multiplies or sums up products of int8 or int16 values."""
    if isinstance(node, prim.Add):
        return _is_integer_product(node.a) or _is_integer_product(node.b)
    return (
        isinstance(node, ir_expr.Call)
        and str(getattr(node.op, "name", "")).startswith("tirx.call_llvm")
        and str(node.ty.dtype).startswith(("int16x", "int32x"))
        and str(node.args[-1].ty.dtype).startswith(("int8x", "uint8x", "int16x"))
        and int(node.args[0]) != codegen.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sqadd")
    )


def _is_tile_instruction(node: Any) -> bool:
    """Whether it is an LLVM intrinsic that returns nothing: one of AMX."""
    name = str(getattr(node.op, "name", ""))
    return name.startswith("tirx.call_llvm") and not str(getattr(node.ty, "dtype", "?"))


def _product_operations(node: Any) -> int:
    """Multiplications and additions in the intrinsic; one of one operand only sums up."""
    if len(node.args) == 2:  # the first one names the intrinsic
        return 0
    uses = 1
    if int(node.args[0]) == codegen.llvm_lookup_intrinsic_id("llvm.aarch64.neon.smmla"):
        uses = 2  # each value meets two of the other side
    return uses * 2 * _lanes_and_bytes(node.args[-1].ty)[0]


def _lanes_and_bytes(thing: Any) -> tuple[int, int]:
    dtype = str(thing.dtype)
    name, _, lanes = dtype.partition("x")
    return int(lanes or 1), 1 if name == "bool" else np.dtype(name).itemsize
