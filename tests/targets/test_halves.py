"""Kernels in float16 on ARM, with and without such arithmetic, against NumPy in float64."""

import re
from dataclasses import replace
from math import erf

import numpy as np
import pytest
from run_kernel import CPUS, HALF_LEVELS, poison, run_kernel, tvm_target

from gfcompile.runtime.errors import CompileError
from gfcompile.runtime.exactness import sqnr_db
from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.halves import in_halves
from gfcompile.targets.tvm.kernel import Act, Array, Attention, Dense, DftFilter, LayerNorm
from gfcompile.targets.tvm.program import Call, Program, Tensor
from gfcompile.targets.tvm.schedule import act_storage, schedule
from gfcompile.targets.tvm.schedules.cpu_dot import HalfNeon
from gfcompile.targets.tvm.schedules.math import GELU_TO_QUANTIZE_ERROR

EPS = 2.0**-24  # what one float32 operation rounds by, relatively
HALF_EPS = 2.0**-11
SUBNORMAL = 2.0**-25  # what float16 rounds by near 0
LEVELS = {**HALF_LEVELS, "a76": CPUS["a76"]}


def operands(kernel: Dense) -> dict[str, Array]:
    rng = np.random.default_rng(kernel.m * 10007 + kernel.n * 101 + kernel.k)
    args: dict[str, Array] = {
        "x": rng.standard_normal((kernel.m, kernel.k)).astype(kernel.x),
        "w": (rng.standard_normal((kernel.k, kernel.n)) / np.sqrt(kernel.k)).astype(np.float16),
        "bias": rng.standard_normal(kernel.n).astype(np.float32),
    }
    if kernel.residual_rows:
        shape = (kernel.residual_rows, kernel.n)
        args["residual"] = rng.standard_normal(shape).astype(np.float32)
    return args


def run(kernel: Dense, cpu: Cpu, args: dict[str, Array]) -> Array:
    y = poison((kernel.m, kernel.n), kernel.out)
    scheduled = schedule(kernel, cpu, act_storage(cpu))
    return run_kernel(scheduled, {**args, "y": y}, cpu, threads=2)["y"].astype(np.float64)


def check(kernel: Dense, cpu: Cpu) -> None:
    args = operands(kernel)
    x, w, bias = (args[name].astype(np.float64) for name in ("x", "w", "bias"))
    value = x @ w + bias
    sizes = np.abs(x) @ np.abs(w)
    bound = (kernel.k + 1) * EPS * (sizes + np.abs(bias))
    if cpu.float16:
        # x is rounded, and every term of a span goes through as many sums as the span is long
        # (Higham's gamma).
        steps = min(kernel.k, HalfNeon.span) + 1
        bound += steps * HALF_EPS / (1 - steps * HALF_EPS) * sizes + 3 * kernel.k * SUBNORMAL
    if kernel.gelu:
        bound = 1.13 * bound + 5e-7 * np.abs(value) + GELU_TO_QUANTIZE_ERROR
        value = 0.5 * value * (1 + np.vectorize(erf)(value / np.sqrt(2)))
    if kernel.residual_rows:
        value = value + args["residual"][np.arange(kernel.m) % kernel.residual_rows]
        bound = bound + EPS * np.abs(value)
    if kernel.out == "float16":
        bound = bound + HALF_EPS * (np.abs(value) + bound) + SUBNORMAL
    y = run(kernel, cpu, args)
    assert (np.abs(y - value) <= bound).all(), np.abs(y - value).max()


KERNELS = [
    Dense(m=1, n=1000, k=48, w="float16"),
    Dense(m=1, n=10, k=200, x="float16", w="float16"),
    Dense(m=5, n=1, k=1, x="float16", w="float16", gelu=True),
    Dense(m=13, n=97, k=33, x="float16", w="float16", gelu=True, residual_rows=1, out="float16"),
    Dense(m=49, n=64, k=147, w="float16", residual_rows=49),
    Dense(m=16, n=200, k=136, x="float16", w="float16", gelu=True, out="float16"),
    Dense(m=9, n=24, k=32, x="float16", w="float16", residual_rows=3),
    Dense(m=196, n=384, k=40, w="float16", out="float16"),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("cpu", LEVELS)
def test_products_are_those_of_rounded_operands(cpu: str, kernel: Dense) -> None:
    check(kernel, LEVELS[cpu])


def test_long_sums_keep_what_float16_sums_would_lose() -> None:
    """Added up in float16 alone, 1536 products keep some 44 dB."""
    kernel = Dense(m=7, n=24, k=1536, x="float16", w="float16")
    args = operands(kernel)
    exact = args["x"].astype(np.float64) @ args["w"].astype(np.float64) + args["bias"]
    error = run(kernel, HALF_LEVELS["float16"], args) - exact
    assert sqnr_db(exact, exact + error) > 55


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "out"),
    [(37, 2, 64, "float16"), (13, 1, 20, "float32"), (197, 1, 64, "float16")],
)
@pytest.mark.parametrize("cpu", LEVELS)
def test_attention_is_that_of_numpy(cpu: str, tokens: int, heads: int, dim: int, out: Act) -> None:
    """To 53 dB: a simulation of these roundings in NumPy has 56.8, and 48 with long scores."""
    kernel = Attention(batch=2, tokens=tokens, heads=heads, dim=dim, x="float16", out=out)
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((2 * tokens, 3 * heads * dim)).astype(np.float16)
    params = np.array([2 / np.sqrt(dim), 0, 0, 0, 0], np.float32)
    parts = x.astype(np.float64).reshape(2, tokens, 3, heads, dim).transpose(2, 0, 3, 1, 4)
    q, k, v = parts
    weights = np.exp(q @ k.swapaxes(2, 3) * params[0])
    value = weights / weights.sum(axis=-1, keepdims=True) @ v
    value = value.transpose(0, 2, 1, 3).reshape(2 * tokens, -1)
    args = {"x": x, "params": params, "y": poison(value.shape, out)}
    scheduled = schedule(kernel, LEVELS[cpu], act_storage(LEVELS[cpu]))
    y = run_kernel(scheduled, args, LEVELS[cpu], threads=2)["y"].astype(np.float64)
    assert sqnr_db(value, y) > 53


@pytest.mark.parametrize("grid", [(14, 14, 40), (7, 5, 12), (1, 9, 3), (28, 28, 16)], ids=str)
@pytest.mark.parametrize("cpu", LEVELS)
def test_filters_are_those_of_numpy(cpu: str, grid: tuple[int, int, int]) -> None:
    """To 53 dB: of some 30 operations on a value, as many roundings by 2^-11 / sqrt(12)."""
    h, w, c = grid
    rng = np.random.default_rng(h * 100 + w)
    x = rng.standard_normal((2, h, w, c)).astype(np.float16)
    # The spectrum of real values: Hermitian where it has to be.
    k = np.fft.rfft2(rng.standard_normal((h, w, c)), axes=(0, 1), norm="ortho")
    parts = {"k_re": k.real.astype(np.float16), "k_im": k.imag.astype(np.float16)}
    spectrum = np.fft.rfft2(x.astype(np.float64), axes=(1, 2)) * (
        parts["k_re"] + 1j * parts["k_im"].astype(np.float64)
    )
    value = np.fft.irfft2(spectrum, s=(h, w), axes=(1, 2))
    kernel = DftFilter(batch=2, h=h, w=w, c=c, x="float16", k_dtype="float16")
    args: dict[str, Array] = {name: part.view(np.uint16) for name, part in parts.items()}
    args |= {"x": x, "y": poison(x.shape, "float32")}
    scheduled = schedule(kernel, LEVELS[cpu], act_storage(LEVELS[cpu]))
    assert sqnr_db(value, run_kernel(scheduled, args, LEVELS[cpu], threads=2)["y"]) > 53


@pytest.mark.parametrize(
    "kernel",
    [
        Dense(m=196, n=384, k=1536, x="float16", w="float16"),
        Dense(m=1, n=1000, k=384, x="float16", w="float16"),
        Dense(m=197, n=10, k=147, w="float16"),
    ],
    ids=str,
)
def test_both_levels_have_their_weights_in_common(kernel: Dense) -> None:
    raw = operands(replace(kernel, m=1))
    first, second = (
        schedule(kernel, cpu, act_storage(cpu)).pack["w"](raw).reshape(-1)
        for cpu in HALF_LEVELS.values()
    )
    np.testing.assert_array_equal(first, second)


def test_only_the_level_for_it_computes_in_float16() -> None:
    """Seen in the code: the other one widens, by an instruction that every ARMv8 has."""
    import tvm

    kernel = Dense(m=196, n=384, k=1536, x="float16", w="float16", out="float16")
    for name, cpu in HALF_LEVELS.items():
        functions = {
            f"step{i}": step.func.with_attr("global_symbol", f"step{i}")
            for i, step in enumerate(schedule(kernel, cpu, act_storage(cpu)).steps)
        }
        assembly = tvm.compile(tvm.IRModule(functions), tvm_target(cpu)).mod.inspect_source("asm")
        in_half = re.search(r"\bf(mla|mul|add)\s+v\d+\.(8|4)h", assembly) is not None
        assert in_half == (name == "float16")
        assert re.search(r"\bfcvtl\b", assembly)


def mlp(weight: float = 0.5) -> Program:
    """A norm and two products beside a residual."""
    names = {"image": (4, 8), "normed": (4, 8), "hidden": (4, 16), "logits": (4, 8)}
    ones = {"bias": np.zeros(16, np.float32), "w": np.full((8, 16), weight, np.float32)}
    calls = (
        Call(
            kernel=LayerNorm(rows=4, n=8, eps=1e-5),
            label="norm",
            reads={"x": "image"},
            writes={"y": "normed"},
        ),
        Call(
            kernel=Dense(m=4, n=16, k=8, gelu=True),
            label="fc1",
            reads={"x": "normed"},
            writes={"y": "hidden"},
            constants=ones,
        ),
        Call(
            kernel=Dense(m=4, n=8, k=16, residual_rows=4),
            label="fc2",
            reads={"x": "hidden", "residual": "image"},
            writes={"y": "logits"},
            constants={"w": ones["w"].T, "bias": np.zeros(8, np.float32)},
        ),
    )
    tensors = {n: Tensor(name=n, dtype="float32", shape=shape) for n, shape in names.items()}
    return Program(inputs=("image",), outputs=("logits",), tensors=tensors, calls=calls)


def test_what_products_alone_read_is_float16_and_the_residual_stream_is_not() -> None:
    program = in_halves(mlp())
    dtypes = {name: tensor.dtype for name, tensor in program.tensors.items()}
    assert dtypes == {
        "image": "float32",
        "normed": "float16",
        "hidden": "float16",
        "logits": "float32",
    }
    norm, first, second = (call.kernel for call in program.calls)
    assert norm == LayerNorm(rows=4, n=8, eps=1e-5, out="float16")
    assert first == Dense(m=4, n=16, k=8, x="float16", w="float16", gelu=True, out="float16")
    assert second == Dense(m=4, n=8, k=16, x="float16", w="float16", residual_rows=4)
    assert program.calls[1].constants["w"].dtype == np.float16


def test_a_weight_beyond_float16_is_refused_by_name() -> None:
    with pytest.raises(CompileError, match=r"fc1: a weight of 7e\+04 is beyond float16"):
        in_halves(mlp(7e4))
