"""Attention and softmax on CPUs against NumPy, for every instruction set that runs here.

int8 attention is held against exact integers and a softmax in float64.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_kernel import CPUS, cpus_here, host_cpu, poison, run_kernel, tvm_target

from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.choices import space_of
from gfcompile.targets.tvm.kernel import ActStorage, Array, Attention, Softmax, quant_args
from gfcompile.targets.tvm.schedule import schedule
from gfcompile.targets.tvm.schedules.cpu_attention import (
    choose_tiles,
    schedule_attention,
    schedule_softmax,
)
from gfcompile.targets.tvm.schedules.cpu_dense import act_storage, fits_registers
from gfcompile.targets.tvm.schedules.cpu_dot import Tile, activation_product_of

EPS = float(np.finfo(np.float32).eps) / 2  # what one float32 operation rounds by, relatively
EXP = 1.9e-7  # relative error of math.exp2, see test_math
Q_ZERO, K_ZERO, V_ZERO = 3, -7, 11
Act = Literal["float32", "int8"]


@dataclass(frozen=True)
class Problem:
    """Arguments, int8 ones as they are stored, the result in exact arithmetic, and its bound."""

    args: dict[str, Array]
    value: Array
    bound: Array


def problem(kernel: Attention, cpu: Cpu, *, extreme: bool = False) -> Problem:
    """Random arguments; with `extreme`, int8 ones that are -128 and 127 alone."""
    rng = np.random.default_rng(kernel.tokens * 1009 + kernel.heads * 101 + kernel.dim)
    storage = act_storage(cpu)
    batch, tokens, heads, dim = kernel.batch, kernel.tokens, kernel.heads, kernel.dim
    shape = (batch * tokens, 3 * heads * dim)
    args: dict[str, Array] = {}
    if kernel.x == "int8":
        wide = np.clip(np.rint(rng.normal(0, 45, shape)), -128, 127)
        if extreme:
            wide = np.where(wide < 20, -128, 127)
            wide[0] = -128
        scales = (3 / 45**2 / np.sqrt(dim), 0.02 / 256)
        params = np.array([scales[0], Q_ZERO, K_ZERO, V_ZERO, scales[1]], np.float32)
        args["x"] = (wide + storage.offset).astype(storage.dtype)
    else:
        args["x"] = rng.standard_normal(shape).astype(np.float32)
        wide = args["x"].astype(np.float64)
        params = np.array([2 / np.sqrt(dim), 0, 0, 0, 0], np.float32)
    args["params"] = params
    s_scale, *zeros, o_scale = (float(value) for value in params)
    q, k, v = (
        part - zero
        for part, zero in zip(
            wide.reshape(batch, tokens, 3, heads, dim).transpose(2, 0, 3, 1, 4), zeros, strict=True
        )
    )
    scores = q @ k.swapaxes(2, 3) * s_scale
    below = scores.max(axis=-1, keepdims=True) - scores
    weights = np.exp(-below)
    weights /= weights.sum(axis=-1, keepdims=True)
    # Relative error of an exponential: its own, and what its argument is off by, of which a
    # subtraction, a multiplication and the scale (twice rounded) are a share.
    off = EXP + 4 * EPS * below
    if kernel.x == "float32":
        off += s_scale * dim * EPS * (np.abs(q) @ np.abs(k).swapaxes(2, 3))
        value = weights @ v
        # The sum of exponentials is off by their weighted mean and its roundings; then come the
        # roundings of the second product, the division and the multiplication.
        off = off + (weights * off).sum(axis=-1, keepdims=True) + (2 * tokens + 3) * EPS
        bound = 1.01 * (weights * off) @ np.abs(v)
    else:
        p = np.minimum(np.rint(weights * 256), 255)
        value = p @ (v * o_scale)
        # Equal, but where rounding may take p over a tie, by 1.
        to_tie = np.abs(np.abs(weights * 256 % 1) - 0.5)
        ties = to_tie <= 1.01 * 256 * weights * (off + off.max() + (tokens + 3) * EPS)
        assert ties.mean() < 0.002
        bound = ties @ np.abs(v * o_scale) + 3 * EPS * np.abs(value)
    value, bound = (y.transpose(0, 2, 1, 3).reshape(batch * tokens, -1) for y in (value, bound))
    if kernel.out == "int8":
        args["quant"] = quant_args(0.012, -4)
    args["y"] = poison(value.shape, storage.dtype if kernel.out == "int8" else "float32")
    return Problem(args, value, bound)


def check(kernel: Attention, cpu: Cpu, *, threads: int = 1, extreme: bool = False) -> Array:
    """Runs the kernel, holds the result against the reference and returns it."""
    given_problem = problem(kernel, cpu, extreme=extreme)
    storage = act_storage(cpu)
    scheduled = schedule(kernel, cpu, storage)
    y = run_kernel(scheduled, given_problem.args, cpu, threads=threads)["y"]
    value, bound = given_problem.value, given_problem.bound
    if kernel.out == "float32":
        assert (np.abs(y - value) <= bound + 1e-30).all(), np.abs(y - value).max()
        return y
    inverse, lowest, highest, zero = (float(v) for v in given_problem.args["quant"])
    steps = np.clip(value * inverse, lowest, highest)
    error = np.abs(y.astype(np.int32) - storage.offset - (np.rint(steps) + zero))
    to_tie = np.abs(np.abs(steps % 1) - 0.5)
    near_tie = to_tie <= bound * inverse + 4 * EPS * np.abs(steps)
    assert (error[~near_tie] == 0).all()
    assert (error <= np.ceil(bound * inverse)).all()
    return y


def kernels() -> list[Attention]:
    """Tails of every kind; whole and broken vectors of tokens and of channels."""
    return [
        Attention(batch=2, tokens=13, heads=2, dim=32),
        Attention(batch=1, tokens=37, heads=1, dim=20, out="int8"),
        Attention(batch=2, tokens=13, heads=2, dim=32, x="int8"),
        Attention(batch=1, tokens=37, heads=1, dim=20, x="int8", out="int8"),
    ]


@pytest.mark.parametrize("kernel", kernels(), ids=str)
@pytest.mark.parametrize("cpu", CPUS)
def test_every_instruction_set_computes_the_reference(cpu: str, kernel: Attention) -> None:
    check(kernel, CPUS[cpu], threads=2)


@pytest.mark.parametrize("cpu", CPUS)
def test_extreme_int8_stays_exact(cpu: str) -> None:
    check(Attention(batch=1, tokens=18, heads=2, dim=64, x="int8"), CPUS[cpu], extreme=True)


@pytest.mark.parametrize(
    "kernel",
    [
        Attention(batch=1, tokens=1, heads=3, dim=5),
        Attention(batch=1, tokens=1, heads=3, dim=5, x="int8"),
        Attention(batch=1, tokens=68, heads=1, dim=64, x="int8", out="int8"),
    ],
    ids=str,
)
def test_a_single_token_and_whole_vectors(kernel: Attention) -> None:
    check(kernel, host_cpu())


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 60),
    heads=st.integers(1, 3),
    dim=st.integers(1, 66),
    x=st.sampled_from(["float32", "int8"]),
    out=st.sampled_from(["float32", "int8"]),
    threads=st.integers(1, 5),
)
def test_every_size(
    batch: int, tokens: int, heads: int, dim: int, x: Act, out: Act, threads: int
) -> None:
    kernel = Attention(batch=batch, tokens=tokens, heads=heads, dim=dim, x=x, out=out)
    check(kernel, host_cpu(), threads=threads)


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("cpu", ["a72", "a76"])
def test_layer_of_deit_tiny_under_qemu(cpu: str, x: Act) -> None:
    check(Attention(batch=1, tokens=197, heads=3, dim=64, x=x), CPUS[cpu])


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("cpu", cpus_here())
def test_results_do_not_depend_on_threads(cpu: str, x: Act) -> None:
    kernel = Attention(batch=2, tokens=29, heads=3, dim=16, x=x)
    results = [check(kernel, cpus_here()[cpu], threads=threads) for threads in (1, 3, 16)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("cpu", CPUS)
def test_no_more_than_a_tile_of_rows_of_the_matrix_is_held(cpu: str, x: Act) -> None:
    kernel = Attention(batch=1, tokens=197, heads=6, dim=64, x=x)
    temps = schedule(kernel, CPUS[cpu], act_storage(CPUS[cpu])).temps
    # By AMX, the scores of the next tile are computed beside those of one.
    tiles = {"s": 2 if "sums" in temps else 1, "p": 1}
    for name in ("s", *(("p",) if x == "int8" else ())):
        dtype, (workers, rows, columns) = temps[name]
        assert workers <= CPUS[cpu].cores
        # And what keeps the scratch of two workers a page apart.
        assert rows <= 16 * tiles[name] + -(-4096 // (columns * np.dtype(dtype).itemsize))
        assert columns < 2 * 197


@pytest.mark.parametrize(
    ("kernel", "threads"),
    [
        # Rows, columns and groups of four vectors that tiles divide, and that they do not.
        (Attention(batch=1, tokens=16, heads=1, dim=16, x="int8"), 1),
        (Attention(batch=3, tokens=17, heads=2, dim=48, x="int8", out="int8"), 4),
        (Attention(batch=1, tokens=64, heads=3, dim=64, x="int8", out="int8"), 2),
        (Attention(batch=2, tokens=68, heads=2, dim=64, x="int8", out="int8"), 2),
        (Attention(batch=1, tokens=97, heads=2, dim=32, x="int8"), 3),
        (Attention(batch=1, tokens=138, heads=1, dim=64, x="int8", out="int8"), 1),
        (Attention(batch=1, tokens=197, heads=3, dim=64, x="int8", out="int8"), 2),
        (Attention(batch=1, tokens=290, heads=1, dim=64, x="int8", out="int8"), 1),
    ],
    ids=str,
)
def test_tiles_compute_the_bits_of_vnni(kernel: Attention, threads: int) -> None:
    cpu = CPUS["avx512_amx"]
    y = check(kernel, cpu, threads=threads)
    vnni = run_kernel(
        schedule_attention(kernel, cpu, act_storage(cpu)), problem(kernel, cpu).args, cpu
    )
    np.testing.assert_array_equal(y, vnni["y"])


@pytest.mark.parametrize("tokens", [16, 49])
def test_a_thread_does_the_tiles_of_all_its_workers(tokens: int) -> None:
    """Of one, of a few or of none: 4 workers, or as many as there are tiles."""
    cpu = CPUS["avx512_amx"]
    assert cpu.cores == 4
    kernel = Attention(batch=1, tokens=tokens, heads=3, dim=16, x="int8")
    results = [check(kernel, cpu, threads=threads) for threads in (1, 2, 3, 7)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
def test_tiles_take_any_scale(scale: float) -> None:
    """Of -128 and 127 alone: all weights equal, or all on one token; those in between vanish."""
    kernel = Attention(batch=1, tokens=21, heads=2, dim=64, x="int8")
    cpu = CPUS["avx512_amx"]
    args = dict(problem(kernel, cpu, extreme=True).args)
    args["params"] = args["params"] * np.array([scale / args["params"][0], 1, 1, 1, 1], np.float32)
    results = [
        run_kernel(build(kernel, cpu, act_storage(cpu)), args, cpu)["y"]
        for build in (schedule, schedule_attention)
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("step", [1e-9, 1e-3, 0.3])
def test_tiles_saturate(step: float) -> None:
    """Results that no int32 counts the steps of, those that no int8 does, and a few small ones."""
    kernel = Attention(batch=1, tokens=21, heads=2, dim=32, x="int8", out="int8")
    cpu = CPUS["avx512_amx"]
    args = problem(kernel, cpu).args | {"quant": quant_args(step, 5)}
    results = [
        run_kernel(build(kernel, cpu, act_storage(cpu)), args, cpu)["y"]
        for build in (schedule, schedule_attention)
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("kernel", "tiles"),
    [
        (Attention(batch=1, tokens=16, heads=1, dim=64, x="int8"), True),
        (Attention(batch=1, tokens=15, heads=1, dim=64, x="int8"), False),
        (Attention(batch=1, tokens=197, heads=1, dim=20, x="int8"), False),
        (Attention(batch=1, tokens=197, heads=1, dim=80, x="int8"), False),
        (Attention(batch=1, tokens=197, heads=1, dim=64), False),
    ],
    ids=str,
)
def test_amx_takes_what_fills_tiles(kernel: Attention, tiles: bool) -> None:
    cpu = CPUS["avx512_amx"]
    assert ("config" in schedule(kernel, cpu, act_storage(cpu)).consts) == tiles
    assert (space_of(kernel, cpu) is None) == tiles
    vnni = CPUS["avx512_vnni"]
    assert not schedule(kernel, vnni, act_storage(vnni)).consts


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("cpu", CPUS)
def test_tiles_fit_the_registers_and_cover_what_they_must(cpu: str, x: Act) -> None:
    product = activation_product_of(x, CPUS[cpu])
    registers = CPUS[cpu].vector_registers
    for tokens in (197, 138, 97, 68, 49, 5):
        kernel = Attention(batch=1, tokens=tokens, heads=6, dim=64, x=x)
        rows, scores, values = choose_tiles(kernel, product, registers)
        for vectors in (scores, values):
            assert fits_registers(product, Tile(rows=rows, vectors=vectors), registers)
        computed = -(-tokens // rows) * rows
        assert computed <= 1.1 * tokens, f"{rows} rows compute {computed} for {tokens}"


# Arithmetic on one float32, of which a row of s has very little: x86, then ARM.
SCALAR = re.compile(r"\b(v?(mul|add|sub|max|min|div)ss|f(mul|add|sub|maxnm|minnm)\s+s\d)\b")


@pytest.mark.parametrize("x", ["float32", "int8"])
@pytest.mark.parametrize("cpu", ["avx2", "avx512_vnni", "avx512_amx", "a72"])
def test_compiled_kernels_are_vectors_and_small(cpu: str, x: Act, tmp_path: Path) -> None:
    import tvm

    kernel = Attention(batch=1, tokens=197, heads=6, dim=64, x=x, out=x)
    scheduled = schedule(kernel, CPUS[cpu], act_storage(CPUS[cpu]))
    func = scheduled.steps[-1].func.with_attr("global_symbol", "main")
    module = tvm.compile(tvm.IRModule({"main": func}), tvm_target(CPUS[cpu])).mod
    assembly = module.inspect_source("asm")
    # The maximum and the sum of a row's last vector, the scale, the quotient.
    assert len(SCALAR.findall(assembly)) <= 16
    assert (
        ("tdpbusd" in assembly) == ("config" in scheduled.consts) == (CPUS[cpu].amx and x == "int8")
    )
    assert "expf" not in assembly
    assert "exp2f" not in assembly
    module.write_to_file(str(tmp_path / "kernel.o"))
    # A pruned model has four of them, and 600 KB for everything.
    assert loaded_bytes(tmp_path / "kernel.o") < 28_000


def loaded_bytes(path: Path) -> int:
    """Bytes of an ELF object's sections that end up in memory."""
    import struct

    elf = path.read_bytes()
    (offset,) = struct.unpack_from("<Q", elf, 40)
    entry, count = struct.unpack_from("<HH", elf, 58)
    headers = [struct.unpack_from("<QQQQ", elf, offset + i * entry + 8) for i in range(count)]
    return sum(size for flags, _, _, size in headers if flags & 2)  # SHF_ALLOC


@pytest.mark.parametrize("shape", [(3, 2), (7, 37)], ids=str)
@pytest.mark.parametrize("name", CPUS)
def test_softmax(name: str, shape: tuple[int, int]) -> None:
    rows, n = shape
    x = np.random.default_rng(n).normal(50, 8, shape).astype(np.float32)
    scheduled = schedule_softmax(Softmax(rows=rows, n=n), CPUS[name], ActStorage())
    y = run_kernel(scheduled, {"x": x, "y": poison(shape, "float32")}, CPUS[name], threads=2)["y"]
    below = x.max(axis=1, keepdims=True) - x.astype(np.float64)
    weights = np.exp(-below)
    expected = weights / weights.sum(axis=1, keepdims=True)
    # As above; what the sum is off by is at most the largest error, and n roundings.
    off = EXP + 3 * EPS * below
    bound = 1.01 * (off + (expected * off).sum(axis=1, keepdims=True) + (n + 3) * EPS) * expected
    assert (np.abs(y - expected) <= bound).all()
