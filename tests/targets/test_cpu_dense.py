"""Dense kernels on CPUs against NumPy in float64, for every instruction set that runs here."""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import erf
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_kernel import (
    ARM_LEVELS,
    CPUS,
    compile_object,
    cpus_here,
    host_cpu,
    poison,
    run_kernel,
    tvm_target,
)
from tvm import tirx
from tvm.sym import Analyzer

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.kernel import Act, Array, Dense, Scheduled, quant_args
from gfcompile.targets.tvm.schedule import schedule
from gfcompile.targets.tvm.schedules import cpu_in_order, neon_epilogue
from gfcompile.targets.tvm.schedules.cpu_dense import (
    DenseChoice,
    act_storage,
    choose_tile,
    counts_steps,
    cut,
    epilogue_vectors,
)
from gfcompile.targets.tvm.schedules.cpu_dot import Tile, product_of
from gfcompile.targets.tvm.schedules.math import GELU_TO_QUANTIZE_ERROR

TILED_FLOATS = Dense(m=68, n=96, k=64, fixed_point=True)

EPS = float(np.finfo(np.float32).eps) / 2  # what one float32 operation rounds by, relatively
Y_SCALE = 0.03


@dataclass(frozen=True)
class Problem:
    """Arguments of a kernel, with int8 activations as they are stored, and what it must give.

    `value` is the result in exact arithmetic before it is quantized, `bound` how far float32 may
    be from it.
    """

    args: dict[str, Array]
    value: Array
    bound: Array


def problem(kernel: Dense, cpu: Cpu, *, extreme: bool = False) -> Problem:
    """Random arguments; with `extreme`, the int8 ones that overflow what adds two in 16 bits."""
    rng = np.random.default_rng(kernel.m * 10007 + kernel.n * 101 + kernel.k)
    storage = act_storage(cpu)
    m, n, k = kernel.m, kernel.n, kernel.k
    args: dict[str, Array] = {}
    if kernel.x == "int8":
        x, w = rng.integers(-128, 128, (m, k)), rng.integers(-127, 128, (k, n))
        if extreme:
            x, w = np.where(x < 0, -128, 127), np.where(w < 0, -127, 127)
            x[0], w[:, 0] = -128, -127  # every product positive, and the largest there is
        bias = rng.integers(-3000, 3000, n)
        scale = (rng.uniform(0.5, 1.5, n) / 5000 / np.sqrt(k)).astype(np.float32)
        args["x"] = (x + storage.offset).astype(storage.dtype)
        args["w"], args["bias"] = w.astype(np.int8), bias.astype(np.int32)
        args["scale"] = scale
        value = (x @ w + bias) * scale.astype(np.float64)
        bound = 2 * EPS * np.abs(value)  # int32 to float32, and the multiplication
    else:
        x = rng.standard_normal((m, k)).astype(np.float32)
        w = (rng.standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32)
        args |= {"x": x, "w": w, "bias": bias}
        value = x.astype(np.float64) @ w + bias
        # A sum of k products and the bias, in any order (Higham's gamma).
        bound = (k + 1) * EPS * (np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(bias))
        if kernel.fixed_point:
            bound = np.maximum(bound, fixed_point_bound(x, w, bias))
    epilogue = ["gelu"] * kernel.gelu + ["residual"] * bool(kernel.residual_rows)
    for part in reversed(epilogue) if kernel.residual_first else epilogue:
        if part == "gelu":
            # GELU's slope is at most 1.13; what its own approximation adds is in test_math.
            bound = 1.13 * bound + (0.5 * 5e-7 + 4 * EPS) * np.abs(value)
            value = 0.5 * value * (1 + np.vectorize(erf)(value / np.sqrt(2)))
            if kernel.out == "int8":
                in_steps = counts_steps(kernel, storage)
                bound = bound + (neon_epilogue.GELU_ERROR if in_steps else GELU_TO_QUANTIZE_ERROR)
        else:
            stored = np.dtype(kernel.residual_dtype)
            residual = rng.standard_normal((kernel.residual_rows, n)).astype(stored)
            args["residual"] = residual.view(np.uint16) if stored.itemsize == 2 else residual
            value = value + residual[np.arange(m) % kernel.residual_rows]
            bound = bound + EPS * np.abs(value)
    if kernel.out == "int8":
        quants = [quant_args(Y_SCALE * (i + 1), -10 + 30 * i) for i in range(kernel.out_groups)]
        args["quant"] = np.stack(quants) if kernel.out_groups > 1 else quants[0]
    args["y"] = poison((m, n), storage.dtype if kernel.out == "int8" else "float32")
    return Problem(args, value, bound)


def fixed_point_bound(x: Array, w: Array, bias: Array) -> Array:
    """How far from x @ w + bias it is with 24 bits for the largest number of a row and a column.

    A row's numbers are rounded to a step, of which there are 0x7F7F00 in the largest one, and so
    are a column's; four float32 operations make steps of x, which may move that. Of three digits
    the product of the last ones, up to 2^14 each, is left out. Sums of products are exact until
    they are put together, in ten float32 operations.
    """
    x, w = np.abs(x).astype(np.float64), np.abs(w).astype(np.float64)
    x_step, w_step = (largest / 0x7F7F00 for largest in (x.max(1)[:, None], w.max(0)))
    x_error = 0.5 * x_step + 4 * EPS * x
    w_error = np.broadcast_to(0.5 * w_step, w.shape)
    operands = x @ w_error + x_error @ (w + w_error)
    left_out = len(w) * 2**14 * x_step * w_step
    # Digits are at most half of one of the order above larger than what they stand for.
    together = 10 * EPS * ((x + 2**15 * x_step) @ (w + 2**15 * w_step) + np.abs(bias))
    return np.asarray(operands + left_out + together)


def scheduled_for(kernel: Dense, cpu: Cpu) -> Scheduled:
    return schedule(kernel, cpu, act_storage(cpu))


def check(kernel: Dense, cpu: Cpu, *, threads: int = 1, extreme: bool = False) -> Array:
    """Runs the kernel, holds the result against the reference and returns it."""
    given_problem = problem(kernel, cpu, extreme=extreme)
    scheduled = scheduled_for(kernel, cpu)
    after = run_kernel(scheduled, given_problem.args, cpu, threads=threads)
    y, value, bound = after["y"], given_problem.value, given_problem.bound
    if kernel.out == "float32":
        assert (np.abs(y - value) <= bound + 1e-30).all(), np.abs(y - value).max()
        return y
    quants = given_problem.args["quant"].astype(np.float64).reshape(-1, 4)
    # Each (n,): a group of columns has its own.
    inverse, lowest, highest, zero = np.repeat(quants, kernel.n // len(quants), axis=0).T
    steps = np.clip(value * inverse, lowest, highest)
    error = np.abs(y.astype(np.int32) - act_storage(cpu).offset - (np.rint(steps) + zero))
    # Equal, but where rounding may take a value over the tie between two steps.
    to_tie = np.abs(np.abs(steps - np.trunc(steps)) - 0.5)
    near_tie = to_tie <= bound * inverse + 4 * EPS * np.abs(steps)
    assert (error[~near_tie] == 0).all()
    assert (error <= 1).all()
    return y


def kernels() -> list[Dense]:
    """Sizes that do not divide by any tile, and those of real layers, with mixed epilogues."""
    return [
        Dense(m=1, n=1000, k=48),
        Dense(m=7, n=10, k=147, residual_rows=7),
        Dense(m=5, n=1, k=1, gelu=True),
        Dense(m=13, n=97, k=33, gelu=True, residual_rows=1, out="int8"),
        Dense(m=49, n=64, k=12, out="int8"),
        Dense(m=1, n=100, k=64, x="int8"),
        Dense(m=7, n=10, k=147, x="int8", residual_rows=7),
        Dense(m=8, n=40, k=20, residual_rows=4, residual_dtype="float16"),
        Dense(m=5, n=3, k=1, x="int8", gelu=True),
        Dense(m=13, n=97, k=33, x="int8", gelu=True, residual_rows=1, out="int8"),
        Dense(m=49, n=64, k=12, x="int8", out="int8"),
        Dense(m=28, n=48, k=32, x="int8", gelu=True, out="int8"),
        # What AMX takes: one tile of rows, an odd number of vectors, columns and rows that overlap,
        # tiles of 40 k, groups of columns.
        Dense(m=9, n=16, k=64, x="int8"),
        Dense(m=37, n=100, k=80, x="int8", gelu=True, out="int8"),
        Dense(m=197, n=176, k=64, x="int8", residual_rows=197),
        Dense(m=17, n=144, k=40, x="int8", out="int8", out_groups=3),
        Dense(m=9, n=24, k=32, gelu=True, residual_rows=1, residual_first=True),
        # What it takes of float32: one tile of rows, rows and columns that overlap, groups.
        Dense(m=9, n=16, k=64, fixed_point=True),
        Dense(m=37, n=100, k=192, gelu=True, fixed_point=True),
        Dense(m=17, n=72, k=128, out="int8", out_groups=3, fixed_point=True),
        Dense(m=31, n=48, k=64, gelu=True, residual_rows=1, residual_first=True, fixed_point=True),
    ]


@pytest.mark.parametrize("kernel", kernels(), ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_every_instruction_set_computes_the_reference(cpu: str, kernel: Dense) -> None:
    check(kernel, CPUS[cpu], threads=2)


@pytest.mark.parametrize(
    "kernel",
    [
        Dense(m=9, n=8, k=32),
        Dense(m=35, n=30, k=96, gelu=True, residual_rows=35),
        Dense(m=26, n=30, k=64, out="int8"),
        Dense(m=18, n=45, k=64, out="int8", out_groups=3),
        Dense(m=4, n=4, k=128, x="int8"),
        Dense(m=11, n=23, k=256, x="int8", gelu=True, residual_rows=11),
        Dense(m=14, n=24, k=384, x="int8", gelu=True, out="int8"),
        Dense(m=8, n=36, k=128, x="int8", out="int8", out_groups=3),
    ],
    ids=str,
)
def test_loops_for_a_core_that_issues_in_order_compute_the_reference(kernel: Dense) -> None:
    assert cpu_in_order.takes(kernel, CPUS["a53"])
    check(kernel, CPUS["a53"], threads=2)


def test_a_core_that_issues_in_order_computes_little_twice() -> None:
    few_rows, few_columns = Dense(m=10, n=96, k=64), Dense(m=90, n=10, k=64)
    for kernel in (few_rows, few_columns, Dense(m=90, n=96, k=65)):
        assert not cpu_in_order.takes(kernel, CPUS["a53"])


def test_int8_loops_for_a_core_that_issues_in_order_are_exact() -> None:
    kernel = Dense(m=4, n=16, k=256, x="int8")
    y = check(kernel, CPUS["a53"], extreme=True)
    expected = problem(kernel, CPUS["a53"], extreme=True).value
    np.testing.assert_array_equal(y, expected.astype(np.float32))


def bytes_read(lines: Sequence[str], pointers: dict[str, int]) -> Iterator[int]:
    """Of x and w, what these instructions read; `pointers` are moved on as they say."""
    for line in lines:
        mnemonic, operands = line.split(" ", 1)
        if moved := re.fullmatch(r"(x\d+), (x\d+|\$\d)(?:, #(\d+))?", operands):
            target, source, distance = moved.groups()
            pointers[target] = pointers[source] + int(distance or 0)
        elif mnemonic.startswith("ld"):
            base, offset = re.findall(r"\[(\S+?)(?:, #(\d+))?\]", operands)[0]
            if base != "$3":  # the bias
                start = pointers[base] + int(offset or 0)
                yield from range(start, start + 16 * len(re.findall(r"\b[vq]\d+", operands)))


@pytest.mark.parametrize("loop", cpu_in_order.LOOPS.values(), ids=lambda loop: loop.name)
def test_loops_for_a_core_that_issues_in_order_read_all_once_and_little_more(
    loop: cpu_in_order.Loop,
) -> None:
    rounds, x, w = 3, 1 << 20, 1 << 21
    pointers = {"$1": x, "$2": w, "$4": rounds}
    read = [*bytes_read(loop.before, pointers)]
    for _ in range(rounds):
        read += bytes_read([line for line in loop.round if "subs" not in line], pointers)
    item = 4 if "float" in loop.name else 1
    k = rounds * loop.depth * item
    for start, columns in ((x, loop.tile.rows), (w, loop.columns)):
        size = columns * k
        mine = sorted(at - start for at in read if start <= at < start + (1 << 20))
        assert mine[:size] == list(range(size))
        assert size < len(mine) <= size + cpu_in_order.SPARE
        assert mine[-1] < size + cpu_in_order.SPARE
    assert len(read) == sum(at >= x for at in read), "nothing before x"


@pytest.mark.parametrize("kernel", [k for k in kernels() if k.x == "int8"], ids=str)
@pytest.mark.parametrize("cpu", ["armv8", "i8mm"])
def test_the_levels_of_arm_compute_the_reference(cpu: str, kernel: Dense) -> None:
    check(kernel, ARM_LEVELS[cpu], threads=2)


@pytest.mark.parametrize("cpu", ARM_LEVELS)
def test_int8_products_of_every_level_of_arm_are_exact(cpu: str) -> None:
    kernel = Dense(m=5, n=24, k=64, x="int8")
    y = check(kernel, ARM_LEVELS[cpu], extreme=True)
    expected = problem(kernel, ARM_LEVELS[cpu], extreme=True).value
    np.testing.assert_array_equal(y, expected.astype(np.float32))


@pytest.mark.parametrize(
    "kernel",
    [
        Dense(m=196, n=384, k=1536, x="int8"),
        Dense(m=197, n=1000, k=64, x="int8"),
        Dense(m=1, n=1000, k=384, x="int8"),
        Dense(m=9, n=90, k=32, x="int8", out="int8", out_groups=3),
        Dense(m=196, n=64, k=147),
    ],
    ids=str,
)
def test_the_levels_of_arm_have_their_weights_in_common(kernel: Dense) -> None:
    raw = {name: problem(kernel, ARM_LEVELS["armv8"]).args[name] for name in ("w", "bias")}
    packed = [scheduled_for(kernel, cpu).pack["w"](raw).reshape(-1) for cpu in ARM_LEVELS.values()]
    for other in packed[1:]:
        np.testing.assert_array_equal(other, packed[0])


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("out", ["float32", "int8"])
@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
@pytest.mark.parametrize("residual_rows", [0, 1, 4, 8])
@pytest.mark.parametrize("cpu", cpus_here())
def test_every_epilogue(cpu: str, x: str, out: str, gelu: bool, residual_rows: int) -> None:
    kernel = Dense(m=8, n=40, k=20, gelu=gelu, residual_rows=residual_rows)
    check(replace(kernel, x=x, out=out), cpus_here()[cpu])  # type: ignore[arg-type]


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("n", [3, 24, 90, 288, 576])
@pytest.mark.parametrize("cpu", ["avx512_amx", "avx512_vnni", "avx2", "a72", "a76"])
def test_groups_of_columns_have_scales_of_their_own(cpu: str, n: int, x: str) -> None:
    """Groups of 1 to 192 columns: narrower than a vector, broken panels, whole ones."""
    kernel = Dense(m=9, n=n, k=20, out="int8", out_groups=3)
    check(replace(kernel, x=x), CPUS[cpu], threads=2)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 120),
    k=st.integers(1, 70),
    x=st.sampled_from(["float32", "int8"]),
    out=st.sampled_from(["float32", "int8"]),
    threads=st.integers(1, 5),
)
def test_every_size(m: int, n: int, k: int, x: str, out: str, threads: int) -> None:
    kernel = Dense(m=m, n=n, k=k, x=x, out=out)  # type: ignore[arg-type]
    check(kernel, host_cpu(), threads=threads)


@pytest.mark.parametrize("cpu", CPUS)
def test_int8_products_never_saturate(cpu: str) -> None:
    kernel = Dense(m=8, n=16, k=64, x="int8")  # rows enough for AMX
    y = check(kernel, CPUS[cpu], extreme=True)
    expected = problem(kernel, CPUS[cpu], extreme=True).value
    # The sums are integers below 2**24, so float32 has them exactly and rounds once, by `scale`.
    np.testing.assert_array_equal(y, expected.astype(np.float32))


@pytest.mark.parametrize("cpu", ["a72", "a76"])
def test_layer_of_gfnet_xs_under_qemu(cpu: str) -> None:
    check(Dense(m=196, n=96, k=384, x="int8", gelu=True, out="int8"), CPUS[cpu])


@pytest.mark.parametrize("x", ["float32", "int8"])
def test_results_do_not_depend_on_threads(x: str) -> None:
    kernel = Dense(m=25, n=77, k=30, x=x, gelu=True)  # type: ignore[arg-type]
    results = [check(kernel, host_cpu(), threads=threads) for threads in (1, 3, 16)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(
    "kernel",
    [
        Dense(m=197, n=96, k=64, x="int8"),  # parts of rows, one tile of k
        Dense(m=197, n=96, k=192, x="int8", gelu=True, out="int8", out_groups=3),
        Dense(m=40, n=416, k=576, x="int8", residual_rows=40),  # columns, nine tiles of k
        Dense(m=137, n=96, k=192, gelu=True, fixed_point=True),
    ],
    ids=str,
)
def test_blocks_of_amx_are_finished_whatever_a_thread_has_of_them(kernel: Dense) -> None:
    results = [check(kernel, CPUS["avx512_amx"], threads=threads) for threads in (1, 2, 5, 16)]
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("m", "k"), [(197, 64), (68, 192), (17, 640), (64, 384), (9, 4)])
def test_amx_adds_to_a_residual_in_its_place(m: int, k: int, threads: int) -> None:
    cpu, kernel = CPUS["avx512_amx"], Dense(m=m, n=96, k=k, x="int8", residual_rows=m)
    given = problem(kernel, cpu)
    scheduled = scheduled_for(kernel, cpu)
    assert scheduled.in_place == {"y": "residual"}
    apart = run_kernel(scheduled, given.args, cpu)["y"]
    (step,) = scheduled.steps
    args = tuple("residual" if name == "y" else name for name in step.args)
    inside = replace(scheduled, steps=(replace(step, args=args),))
    after = run_kernel(inside, given.args, cpu, threads=threads)
    np.testing.assert_array_equal(after["residual"], apart)


def test_amx_keeps_a_residual_that_columns_overlap_in() -> None:
    kernel = Dense(m=32, n=80, k=64, x="int8", residual_rows=32)
    assert not scheduled_for(kernel, CPUS["avx512_amx"]).in_place


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("x", ["float32", "int8"])
def test_tiles_fit_the_registers_and_cover_what_they_must(cpu: str, x: str) -> None:
    for m in (1, 2, 49, 68, 97, 138, 196, 256, 576, 784, 3136):
        for n, k in ((384, 1536), (1536, 384), (64, 48), (1000, 384), (10, 512)):
            kernel = Dense(m=m, n=n, k=k, x=x)  # type: ignore[arg-type]
            product = product_of(kernel, CPUS[cpu])
            tile = choose_tile(kernel, product, CPUS[cpu].vector_registers)
            assert product.registers(tile) <= CPUS[cpu].vector_registers
            assert tile.rows <= m
            rows = -(-m // tile.rows) * tile.rows
            assert rows <= 1.1 * m, f"{tile} computes {rows} rows for {m}"


@pytest.mark.parametrize(
    "kernel", [Dense(m=196, n=384, k=1536, x="int8"), Dense(m=49, n=512, k=2048)]
)
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 33])
@pytest.mark.parametrize("columns", [1, 2, 5, 12])
def test_tasks_cover_every_tile_once_and_no_two_differ_much(
    kernel: Dense, steps: int, columns: int
) -> None:
    tasks = cut(kernel, product_of(kernel, CPUS["avx512_vnni"]), steps, columns)
    assert tasks.by_rows == (kernel.x == "int8")
    covered = []
    counts = []
    for task in range(tasks.count):
        column, first, count = (
            int(Analyzer().simplify(value)) for value in tasks.at(tirx.IntImm("int32", task))
        )
        covered += [(column, step) for step in range(first, first + count)]
        counts.append(count)
    assert sorted(covered) == [(c, s) for c in range(columns) for s in range(steps)]
    assert max(counts) - min(counts) <= 1


def test_tiles_are_those_that_were_measured_best() -> None:
    mlp = Dense(m=196, n=384, k=1536)
    chosen = {
        name: choose_tile(mlp, product_of(mlp, CPUS[name]), CPUS[name].vector_registers)
        for name in ("avx512", "avx2", "sse", "a72")
    }
    assert chosen == {
        "avx512": Tile(rows=7, vectors=3),
        "avx2": Tile(rows=4, vectors=3),
        "sse": Tile(rows=4, vectors=3),
        "a72": Tile(rows=7, vectors=3),
    }


@pytest.mark.parametrize("out", ["float32", "int8"])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_an_epilogue_cover_every_column(lanes: int, out: str) -> None:
    for columns in range(1, 100):
        vectors = list(epilogue_vectors(columns, lanes, out))
        assert {at + i for at, width in vectors for i in range(width)} == set(range(columns))
        assert all(width & (width - 1) == 0 for _, width in vectors)


def test_arm_lays_rows_out_for_its_tiles_where_many_columns_read_them() -> None:
    cpu = CPUS["a76"]
    for x, chunk in (("float32", 4), ("int8", 16)):
        kernel = Dense(m=10, n=384, k=33, x=x)  # type: ignore[arg-type]
        choice = DenseChoice(rows=7, vectors=3)
        scheduled = schedule(kernel, cpu, act_storage(cpu), choice)
        chunks = -(-33 // chunk)
        assert scheduled.temps["x_panels"][1] == (2, chunks, 7, chunk)
        x_rows = np.arange(10 * 33).reshape(10, 33).astype(np.int8 if x == "int8" else np.float32)
        after = run_kernel(scheduled, problem(kernel, cpu).args | {"x": x_rows}, cpu)
        padded = np.pad(x_rows, ((0, 0), (0, chunks * chunk - 33)))
        for panel, first in ((0, 0), (1, 3)):  # the last one overlaps
            rows = after["x_panels"][panel].transpose(1, 0, 2).reshape(7, -1)
            np.testing.assert_array_equal(rows, padded[first : first + 7])
    assert "x_panels" not in scheduled_for(Dense(m=196, n=24, k=64), cpu).temps
    assert "x_panels" not in scheduled_for(Dense(m=1, n=384, k=64), cpu).temps


# Arithmetic on one float32, which an epilogue must not contain: x86, then ARM.
SCALAR = re.compile(r"\b(v?(mul|add|sub|max|min|div)ss|f(mul|add|sub|maxnm|minnm)\s+s\d)\b")


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("x", ["float32", "int8"])
def test_compiled_kernels_are_vectors_and_small(cpu: str, x: str, tmp_path: Path) -> None:
    import tvm

    kernel = Dense(m=196, n=1536, k=384, x=x, gelu=True, residual_rows=196, out="int8")  # type: ignore[arg-type]
    scheduled = scheduled_for(kernel, CPUS[cpu])
    func = scheduled.steps[-1].func.with_attr("global_symbol", "main")
    module = tvm.compile(tvm.IRModule({"main": func}), tvm_target(CPUS[cpu])).mod
    assembly = module.inspect_source("asm")
    assert not SCALAR.search(assembly)
    assert "erff" not in assembly
    compile_object(scheduled, CPUS[cpu], tmp_path / "kernel.o")
    # Some 30 kernels of a model have to fit 600 KB with the runtime.
    assert loaded_bytes(tmp_path / "kernel.o") < 20_000


def loaded_bytes(path: Path) -> int:
    """Bytes of an ELF object's sections that end up in memory."""
    elf = path.read_bytes()
    (offset,) = struct.unpack_from("<Q", elf, 40)
    entry, count = struct.unpack_from("<HH", elf, 58)
    headers = [struct.unpack_from("<QQQQ", elf, offset + i * entry + 8) for i in range(count)]
    return sum(size for flags, _, _, size in headers if flags & 2)  # SHF_ALLOC


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("cpu", ["sse", "avx2", "avx512", "avx512_vnni", "a53", "a76"])
def test_weights_are_asked_for_ahead_on_x86(cpu: str, x: Act) -> None:
    import tvm

    step = scheduled_for(Dense(m=68, n=384, k=96, x=x), CPUS[cpu]).steps[-1]
    module = tvm.IRModule({"main": step.func.with_attr("global_symbol", "main")})
    assembly = tvm.compile(module, tvm_target(CPUS[cpu])).mod.inspect_source("asm")
    asks = re.search(r"\b(prefetcht1|prfm)\b", assembly) is not None
    assert asks == (CPUS[cpu].arch == "x86_64")


def hottest_loop(kernel: Dense, cpu: Cpu, instruction: str) -> list[str]:
    """Of the kernel's innermost loops, the one with the most of `instruction`."""
    import tvm

    func = scheduled_for(kernel, cpu).steps[-1].func.with_attr("global_symbol", "main")
    module = tvm.compile(tvm.IRModule({"main": func}), tvm_target(cpu)).mod
    blocks = re.split(r"(?m)^(\.LBB\w+):", module.inspect_source("asm"))[1:]
    loops = [
        body[: end.start()].splitlines()
        for label, body in zip(blocks[::2], blocks[1::2], strict=True)
        if (end := re.search(rf"b\.\w+\s+{re.escape(label)}\b", body))
    ]
    return max(loops, key=lambda lines: sum(f"\t{instruction}\t" in line for line in lines))


@pytest.mark.parametrize(
    ("cpu", "kernel", "instruction"),
    [
        pytest.param("a53", Dense(m=196, n=384, k=388), "fmla", id="in order"),
        pytest.param("a76", Dense(m=196, n=384, k=384), "fmla", id="float32"),
        pytest.param("a76", Dense(m=196, n=384, k=384, x="int8"), "sdot", id="sdot"),
        pytest.param(
            "a76",
            Dense(m=196, n=384, k=384, x="int8", gelu=True, out="int8"),
            "fcvtns",
            id="epilogue",
        ),
    ],
)
def test_no_loop_of_arm_needs_the_stack(cpu: str, kernel: Dense, instruction: str) -> None:
    loop = hottest_loop(kernel, CPUS[cpu], instruction)
    assert any(f"\t{instruction}\t" in line for line in loop)
    assert not [line for line in loop if "[sp" in line]


def test_only_vnni_stores_activations_unsigned() -> None:
    assert {name for name in CPUS if act_storage(CPUS[name]).offset} == {
        "avx512_vnni",
        "avx512_amx",
    }


def test_each_level_of_arm_multiplies_by_the_best_that_it_has() -> None:
    """Seen in the code, and nothing of the levels above it."""
    import tvm

    kernel = Dense(m=197, n=384, k=1536, x="int8", out="int8")
    found = {}
    for name, cpu in ARM_LEVELS.items():
        func = scheduled_for(kernel, cpu).steps[-1].func.with_attr("global_symbol", "main")
        assembly = tvm.compile(tvm.IRModule({"main": func}), tvm_target(cpu)).mod.inspect_source(
            "asm"
        )
        words = ("sadalp", "ld4", "sdot", "smmla")
        found[name] = {word for word in words if re.search(rf"\s{word}\s", assembly)}
    assert found == {"armv8": {"sadalp", "ld4"}, "dotprod": {"sdot"}, "i8mm": {"smmla"}}


@pytest.mark.parametrize("kernel", [Dense(m=68, n=96, k=64, x="int8"), TILED_FLOATS], ids=str)
def test_each_thread_of_amx_has_sums_of_its_own(kernel: Dense) -> None:
    import tvm

    cpu = CPUS["avx512_amx"]
    func = scheduled_for(kernel, cpu).steps[-1].func.with_attr("global_symbol", "kernel")
    code = tvm.compile(tvm.IRModule({"kernel": func}), tvm_target(cpu)).mod.inspect_source("ll")
    before, task = code.split("@__tvm_parallel_lambda(i32", 1)
    assert re.findall(r"alloca (\S+),", before.split("@kernel_compute_(")[-1]) == [
        "%closure_pragma_parallel"
    ], "the threads would share what is on the stack of their caller"
    assert len(re.findall(r"alloca \[\d+ x \[128 x i8\]\]", task)) == 4


def test_amx_kernels_are_made_of_tiles() -> None:
    """Seen in the code, since few machines could run it."""
    import tvm

    cpu = CPUS["avx512_amx"]
    kernel = Dense(m=197, n=384, k=1536, x="int8", out="int8")
    (step,) = scheduled_for(kernel, cpu).steps
    module = tvm.IRModule({"main": step.func.with_attr("global_symbol", "main")})
    assembly = tvm.compile(module, tvm_target(cpu)).mod.inspect_source("asm")
    products, loads = (
        len(re.findall(rf"\b{name}\b", assembly)) for name in ("tdpbusd", "tileloadd")
    )
    assert products == loads > 0, "two and two tiles make four products"
    assert "prefetcht1" in assembly
    for once in ("ldtilecfg", "tilerelease"):
        assert len(re.findall(rf"\b{once}\b", assembly)) == 1
    head = Dense(m=1, n=1000, k=384, x="int8")
    assert "config" not in scheduled_for(head, cpu).consts, "a row fills no tile"


@pytest.mark.parametrize(
    ("kernel", "tiles"),
    [
        (Dense(m=8, n=16, k=64, fixed_point=True), True),
        (Dense(m=8, n=16, k=64), False),
        (Dense(m=7, n=16, k=64, fixed_point=True), False),
        (Dense(m=8, n=15, k=64, fixed_point=True), False),
        (Dense(m=8, n=16, k=96, fixed_point=True), False),
    ],
    ids=str,
)
def test_amx_takes_float32_in_fixed_point_where_it_fills_tiles(kernel: Dense, tiles: bool) -> None:
    assert ("config" in scheduled_for(kernel, CPUS["avx512_amx"]).consts) == tiles
    assert scheduled_for(kernel, CPUS["avx512_vnni"]).temps == {}


def test_fixed_point_is_nine_products_of_digits_less_the_smallest() -> None:
    import tvm

    cpu = CPUS["avx512_amx"]
    step = scheduled_for(Dense(m=196, n=192, k=384, fixed_point=True), cpu).steps[-1]
    module = tvm.IRModule({"main": step.func.with_attr("global_symbol", "main")})
    assembly = tvm.compile(module, tvm_target(cpu)).mod.inspect_source("asm")
    products, loads = (
        len(re.findall(rf"\b{name}\b", assembly)) for name in ("tdpbssd", "tileloadd")
    )
    assert products > 0
    assert products % 8 == 0
    assert loads * 8 == products * 6, "each of six digits is loaded once"


def test_digits_of_weights_are_within_half_a_step_of_them() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((128, 16)).astype(np.float32)
    w[:, 3] = 0
    pack = scheduled_for(Dense(m=9, n=16, k=128, fixed_point=True), CPUS["avx512_amx"]).pack
    digits = pack["w"]({"w": w}).reshape(3, 2, 16, 16, 4).astype(np.int64)  # k = 64a + b + 16d
    digits = digits.transpose(0, 1, 4, 2, 3).reshape(3, 128, 16)
    step = pack["scale"]({"w": w}).astype(np.float64) / 2**16
    error = (digits[0] * 2**16 + digits[1] * 2**8 + digits[2]) * step - w
    assert (np.abs(error) <= 0.5 * step * (1 + 1e-9)).all()
    assert (error[:, 3] == 0).all()
    assert (step <= np.maximum(np.abs(w).max(0), 1e-30) * 2.0**-23 * 1.005).all()


@pytest.mark.parametrize("k", [192, 384, 1536])
def test_fixed_point_is_as_exact_as_float32(k: int) -> None:
    """Its errors, the largest and their root mean square, are not above those of float32."""
    kernel = Dense(m=30, n=48, k=k, fixed_point=True)
    case = problem(kernel, CPUS["avx512_amx"])

    def errors(kernel: Dense) -> Array:
        scheduled = scheduled_for(kernel, CPUS["avx512_amx"])
        y = run_kernel(scheduled, case.args, CPUS["avx512_amx"])["y"]
        error = y - case.value
        return np.array([np.abs(error).max(), np.sqrt(np.mean(error**2))])

    assert (errors(kernel) <= errors(replace(kernel, fixed_point=False))).all()


def test_fixed_point_takes_any_row() -> None:
    """Rows of zeros, of tiny numbers, with one large number, and sums that use all their bits."""
    kernel = Dense(m=8, n=16, k=4096, fixed_point=True)
    cpu = CPUS["avx512_amx"]
    args = dict(problem(kernel, cpu).args)
    x, w = args["x"].copy(), args["w"].copy()
    x[0], x[1], x[2, 7], x[3], w[:, 5], w[:, 6] = 0, x[1] * 1e-20, 1e10, -1, 0, 1
    y = run_kernel(scheduled_for(kernel, cpu), args | {"x": x, "w": w}, cpu)["y"]
    error = np.abs(y - (x.astype(np.float64) @ w + args["bias"]))
    assert (error <= fixed_point_bound(x, w, args["bias"])).all()
    np.testing.assert_array_equal(y[0], args["bias"])
