"""Attention and softmax for CUDA against float64 and exact integers, behind the stand-in driver."""

import numpy as np
import pytest
from run_gpu_kernel import (
    GPUS,
    QUANT,
    STORAGE,
    TX2,
    Array,
    Case,
    quantized,
    run_cases,
)

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm.cuda import SHARED_BYTES, compile_cuda
from gfcompile.targets.tvm.kernel import Attention, Softmax
from gfcompile.targets.tvm.schedules.gpu_attention import (
    product_mode,
    schedule_attention,
    schedule_softmax,
)

EPS = 2.0**-24
EXP_ERROR = 2e-7  # of math.exp, relative, and
EXP_SLOPE = 1.2e-7  # as much more for each unit of the argument


def parts(kernel: Attention, x: Array) -> Array:
    """q, k and v: (part, batch, heads, tokens, dim)."""
    shape = (kernel.batch, kernel.tokens, 3, kernel.heads, kernel.dim)
    return x.reshape(shape).transpose(2, 0, 3, 1, 4)


def merged(kernel: Attention, y: Array) -> Array:
    """(batch, heads, tokens, dim) as the kernel writes it."""
    return y.transpose(0, 2, 1, 3).reshape(kernel.batch * kernel.tokens, -1)


def softmax_of(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def reference(kernel: Attention, args: dict[str, Array]) -> tuple[Array, Array]:
    """The result before it is quantized, and by how much rounding may change it."""
    s_scale, q_zero, k_zero, v_zero, o_scale = args["params"].astype(np.float64)
    if kernel.x == "float32":
        q, k, v = parts(kernel, args["x"].astype(np.float64))
        scores = q @ k.swapaxes(-1, -2) * s_scale
        weights = softmax_of(scores)
        # Each of dim products and additions rounds; so do the exponential and the sums.
        size = (np.abs(q) @ np.abs(k).swapaxes(-1, -2)).max(axis=-1, keepdims=True) * s_scale
        delta = (
            (kernel.dim + 3) * EPS * size + EXP_ERROR + EXP_SLOPE * np.ptp(scores, -1)[..., None]
        )
        bound = (2 * delta + (kernel.tokens + 8) * EPS) * (weights @ np.abs(v))
        return merged(kernel, weights @ v), merged(kernel, bound)
    q, k, v = parts(kernel, args["x"].astype(np.int64))
    q, k, v = q - int(q_zero), k - int(k_zero), v - int(v_zero)
    scores = (q @ k.swapaxes(-1, -2)) * s_scale
    shares = softmax_of(scores) * 256
    weights = np.minimum(np.rint(shares), 255).astype(np.int64)
    y = (weights @ v).astype(np.float32) * np.float32(o_scale)
    # A share within float error of a rounding tie may fall to its other side, and nothing else.
    span = np.ptp(scores, axis=-1, keepdims=True)
    error = 2 * shares * (EXP_ERROR + (EXP_SLOPE + EPS) * span + 8 * EPS)
    ties = np.abs(np.abs(shares - np.rint(shares)) - 0.5) <= error
    bound = ties.astype(np.float64) @ np.abs(v) * o_scale + 2 * EPS * np.abs(y)
    return merged(kernel, y), merged(kernel, bound)


def params_of(kernel: Attention, zero_points: tuple[int, int, int] = (5, -7, 11)) -> Array:
    if kernel.x == "float32":
        return np.array([2 / np.sqrt(kernel.dim), 0, 0, 0, 0], np.float32)
    # Scores of deviation 2; a product of two such values has one of some 5400.
    return np.array([2 / (5400 * np.sqrt(kernel.dim)), *zero_points, 7e-5], np.float32)


def arguments(kernel: Attention, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shape = (kernel.batch * kernel.tokens, 3 * kernel.heads * kernel.dim)
    int8 = kernel.x == "int8"
    x = rng.integers(-128, 128, shape, np.int8) if int8 else rng.standard_normal(shape, np.float32)
    args = {"x": x, "params": params_of(kernel)}
    return args | ({"quant": QUANT} if kernel.out == "int8" else {})


def attention_case(kernel: Attention, gpu: Gpu, args: dict[str, Array]) -> Case:
    y, _ = reference(kernel, args)
    expected = quantized(y, args["quant"]) if kernel.out == "int8" else y
    return schedule_attention(kernel, gpu, STORAGE), args, expected


def assert_close(kernel: Attention, y: Array, case: Case) -> None:
    _, args, expected = case
    value, bound = reference(kernel, args)
    if kernel.out == "int8":
        steps = np.abs(y.astype(int) - expected)
        assert (steps <= np.ceil(bound * args["quant"][0])).all()
        assert (steps > 0).mean() <= 1e-2
    else:
        assert (np.abs(y - value) <= bound).all()


FLOAT_KERNELS = [
    Attention(batch=2, tokens=45, heads=2, dim=64),
    Attention(batch=1, tokens=20, heads=3, dim=32, out="int8"),
    Attention(batch=1, tokens=13, heads=2, dim=7),  # nothing divides
    Attention(batch=1, tokens=1, heads=1, dim=4),
    Attention(batch=1, tokens=1100, heads=1, dim=8),  # a row is more than registers hold
    Attention(batch=1, tokens=9, heads=1, dim=200),  # more channels than a block has threads for
]
INT8_KERNELS = [
    Attention(batch=2, tokens=69, heads=2, dim=64, x="int8", out="int8"),
    Attention(batch=1, tokens=50, heads=2, dim=48, x="int8"),
    Attention(batch=1, tokens=29, heads=1, dim=36, x="int8", out="int8"),  # 9 words
    Attention(batch=2, tokens=11, heads=3, dim=13, x="int8"),  # no whole words
    Attention(batch=1, tokens=1100, heads=1, dim=8, x="int8"),
    Attention(batch=1, tokens=9, heads=1, dim=200, x="int8"),
]


@pytest.mark.parametrize(
    ("arch", "order"), [("sm_62", "forward"), ("sm_62", "reverse"), ("sm_87", "reverse")]
)
def test_attention_is_right_in_either_thread_order(arch: str, order: str) -> None:
    gpu = GPUS[arch]
    kernels = [*FLOAT_KERNELS, *INT8_KERNELS]
    cases = [attention_case(kernel, gpu, arguments(kernel)) for kernel in kernels]
    for kernel, case, y in zip(kernels, cases, run_cases(cases, gpu, order=order), strict=True):
        assert_close(kernel, y, case)


@pytest.mark.parametrize("arch", ["sm_62", "sm_87"])
def test_int8_of_the_largest_magnitudes_is_exact(arch: str) -> None:
    """Partial sums of scores that a float32 does not count in ones; extreme zero points."""
    gpu = GPUS[arch]
    long = Attention(batch=1, tokens=33, heads=1, dim=1100, x="int8")
    rng = np.random.default_rng(1)
    x = rng.integers(-128, 128, (33, 3 * 1100), np.int8)
    x[:, :1100] = 127  # q - q_zero is 255
    x[:, 1100:1650] = 127  # 255 * 127 * 550 > 2**24, odd all along the way,
    x[:, 1650:2200] = -127  # and back to where single ones tell
    x[:, 1650:1700] += rng.integers(0, 2, (33, 50)).astype(np.int8)
    exact = {"x": x, "params": np.array([0.002, -128, 127, -128, 1], np.float32)}
    short = Attention(batch=1, tokens=33, heads=1, dim=64, x="int8")
    edge = {
        "x": rng.choice(np.array([-128, 127], np.int8), (33, 3 * 64)),
        "params": params_of(short, (127, -128, 127)),
    }
    kernels = [long, short]
    cases = [attention_case(k, gpu, args) for k, args in zip(kernels, (exact, edge), strict=True)]
    for kernel, case, y in zip(kernels, cases, run_cases(cases, gpu), strict=True):
        assert_close(kernel, y, case)


@pytest.mark.parametrize("arch", GPUS)
def test_attention_stays_within_a_block_on_every_gpu(arch: str) -> None:
    """No registers spilled (compile_cuda sees to it), no scores in global memory."""
    gpu = GPUS[arch]
    kernels = [
        Attention(batch=1, tokens=tokens, heads=6, dim=dim, x=act, out=act)
        for tokens, dim in ((197, 64), (3137, 45))
        for act in ("float32", "int8")
    ]
    scheduled = [schedule_attention(kernel, gpu, STORAGE) for kernel in kernels]
    assert not any(one.temps or one.consts for one in scheduled)
    module = compile_cuda({f"k{i}": one.steps[0].func for i, one in enumerate(scheduled)}, gpu)
    for kernel in module.kernels.values():
        assert kernel.shared_bytes <= SHARED_BYTES
        assert kernel.stack_bytes == 0


def test_int8_is_computed_in_what_the_gpu_has() -> None:
    kernel = Attention(batch=1, tokens=197, heads=6, dim=64, x="int8")
    modes = {arch: product_mode(kernel, gpu) for arch, gpu in GPUS.items()}
    assert modes == {"sm_53": "widened", "sm_62": "widened", "sm_72": "dp4a", "sm_87": "dp4a"}


def test_more_tokens_than_shared_memory_holds_are_refused() -> None:
    with pytest.raises(CompileError, match="attention over 20000 tokens"):
        schedule_attention(Attention(batch=1, tokens=20000, heads=1, dim=64), TX2, STORAGE)


SOFTMAXES = [
    Softmax(rows=8, n=196),
    Softmax(rows=5, n=45),
    Softmax(rows=3, n=2),
    Softmax(rows=6, n=1501),  # longer than a warp's registers hold
    Softmax(rows=2, n=2000),
]


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_softmax_of_rows_of_any_length(order: str) -> None:
    rng = np.random.default_rng(0)
    cases: list[Case] = []
    for kernel in SOFTMAXES:
        x = rng.standard_normal((kernel.rows, kernel.n), np.float32) * 10 + 500
        scheduled = schedule_softmax(kernel, TX2, STORAGE)
        cases.append((scheduled, {"x": x}, softmax_of(x.astype(np.float64))))
    results = run_cases(cases, TX2, order=order)
    for kernel, (_, args, expected), y in zip(SOFTMAXES, cases, results, strict=True):
        span = args["x"].max(axis=1, keepdims=True) - args["x"]
        bound = (2 * EXP_ERROR + EXP_SLOPE * (span + 1) + (kernel.n / 32 + 8) * EPS) * expected
        # Below 2**-126 the exponential is 2**-126.
        assert (np.abs(y - expected) <= bound + 2.0**-126).all()
