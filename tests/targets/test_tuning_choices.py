"""Design spaces: what is chosen changes no result, and nothing else can be chosen."""

import dataclasses
import json
from itertools import product

import numpy as np
import pytest
from run_kernel import CPUS, HALF_LEVELS, host_cpu, poison, run_kernel
from tvm import te

from gfcompile.targets.target import Cpu, Gpu, Target, find_target
from gfcompile.targets.tvm.choices import choices, device_key, kernel_key, parse_choice, to_json
from gfcompile.targets.tvm.kernel import Array, Attention, Dense, DftFilter, Kernel, LayerNorm
from gfcompile.targets.tvm.schedule import act_storage, schedule
from gfcompile.targets.tvm.schedules.generic import GeneratedSchedule

DENSE = Dense(m=13, n=97, k=70, gelu=True)
INT8 = Dense(m=13, n=97, k=70, x="int8", out="int8", out_groups=1)
FILTER = DftFilter(batch=1, h=6, w=9, c=20)
ATTENTION = Attention(batch=1, tokens=11, heads=2, dim=16)
# Sums of more than one span of products.
HALF_DENSE = Dense(m=13, n=97, k=150, x="float16", w="float16", gelu=True, out="float16")
HALF_FILTER = dataclasses.replace(FILTER, x="float16", k_dtype="float16")
HALF_ATTENTION = Attention(batch=1, tokens=75, heads=2, dim=16, x="float16", out="float16")
HALVES = (HALF_DENSE, HALF_FILTER, HALF_ATTENTION)


def device(name: str) -> Cpu | Gpu:
    found = find_target(name)
    assert isinstance(found, Target)
    return found.gpu or found.cpu


def arguments(kernel: Kernel, on: Cpu | Gpu) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    storage = act_storage(on)

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    if isinstance(kernel, Dense) and kernel.x == "int8":
        return {
            "x": rng.integers(0, 100, (kernel.m, kernel.k)).astype(storage.dtype),
            "w": rng.integers(-127, 128, (kernel.k, kernel.n)).astype(np.int8),
            "bias": rng.integers(-500, 500, kernel.n).astype(np.int32),
            "scale": np.full(kernel.n, 1e-3, np.float32),
            "quant": np.array([20, -118, 137, -10], np.float32),
            "y": poison((kernel.m, kernel.n), storage.dtype),
        }
    if isinstance(kernel, Dense):
        shapes = {"x": (kernel.m, kernel.k), "w": (kernel.k, kernel.n), "bias": (kernel.n,)}
        y = (kernel.m, kernel.n)
    elif isinstance(kernel, DftFilter):
        half = (kernel.h, kernel.w // 2 + 1, kernel.c)
        y = (kernel.batch, kernel.h, kernel.w, kernel.c)
        shapes = {"x": y, "k_re": half, "k_im": half}
    else:
        assert isinstance(kernel, Attention)
        width = kernel.heads * kernel.dim
        shapes = {"x": (kernel.tokens, 3 * width), "params": (5,)}
        y = (kernel.tokens, width)
    dtype = "float16" if kernel.x == "float16" else "float32"
    args = {
        name: floats(*shape).astype(dtype if name in ("x", "w", "k_re", "k_im") else "float32")
        for name, shape in shapes.items()
    }
    if isinstance(kernel, DftFilter) and dtype == "float16":  # as bits
        args |= {name: args[name].view(np.uint16) for name in ("k_re", "k_im")}
    return args | {"y": poison(y, getattr(kernel, "out", "float32"))}


@pytest.mark.parametrize(
    ("cpu", "kernel"),
    [
        *product(("host", "a72"), (DENSE, INT8, FILTER, ATTENTION)),
        *product(("a76", "float16"), HALVES),
    ],
    ids=lambda value: value if isinstance(value, str) else kernel_key(value),
)
def test_whatever_is_chosen_results_are_the_same_bits(cpu: str, kernel: Kernel) -> None:
    on = host_cpu() if cpu == "host" else {**CPUS, **HALF_LEVELS}[cpu]
    args = arguments(kernel, on)
    space = choices(kernel, on)
    # The rule's own, one that only unrolls or reorders, and some from all over the space.
    picked = [None, *space[2:4], *space[4 :: max(1, len(space) // 2)]]
    results = [
        run_kernel(schedule(kernel, on, act_storage(on), choice), args, on, threads=2)["y"]
        for choice in picked
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_a_loop_over_spans_is_unrolled_one_way_alone() -> None:
    space = choices(HALF_DENSE, CPUS["a76"])
    assert len({(c.rows, c.vectors, c.order) for c in space}) == len(space) > 10  # type: ignore[union-attr]


def test_loops_that_are_assembly_leave_no_choice() -> None:
    on = device("raspberry-pi-3")
    kernel = Dense(m=18, n=97, k=128)
    assert not choices(kernel, on)
    assert choices(dataclasses.replace(kernel, k=130), on)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *product(
            ("x86-64-v4", "x86-64", "raspberry-pi-3", "raspberry-pi-5"),
            (DENSE, INT8, FILTER, ATTENTION),
        ),
        *product(("raspberry-pi-5",), HALVES),
    ],
    ids=lambda value: value if isinstance(value, str) else kernel_key(value),
)
def test_the_rules_own_choice_leads_its_space(name: str, kernel: Kernel) -> None:
    on = device(name)
    first = choices(kernel, on)[0]
    chosen, ruled = (schedule(kernel, on, act_storage(on), choice) for choice in (first, None))
    for one, other in zip(chosen.steps, ruled.steps, strict=True):
        assert one.func.script() == other.func.script()


def test_a_filter_whose_transforms_stay_in_registers_leaves_nothing_open() -> None:
    kernel = DftFilter(batch=1, h=14, w=14, c=64)
    assert not choices(kernel, CPUS["a72"])
    assert choices(kernel, CPUS["avx2"])


def test_the_rules_own_tile_leads_its_space_on_gpus() -> None:
    on, kernel = device("jetson-tx2"), Dense(m=196, n=96, k=64)
    first = choices(kernel, on)[0]
    chosen, ruled = (schedule(kernel, on, act_storage(on), choice) for choice in (first, None))
    assert chosen.steps[0].func.script() == ruled.steps[0].func.script()


@pytest.mark.parametrize("name", ["x86-64-v4", "raspberry-pi-5", "jetson-tx2"])
def test_choices_survive_json_and_nothing_else_is_accepted(name: str) -> None:
    on, kernel = device(name), Dense(m=196, n=384, k=1536)
    for choice in choices(kernel, on)[:5]:
        assert parse_choice(kernel, on, to_json(choice)) == choice
    values = dict(to_json(choices(kernel, on)[0]))
    field = next(name for name, value in values.items() if isinstance(value, int))
    hostile: list[dict[str, object]] = [
        {},
        values | {field: 10**9},
        values | {field: -1},
        values | {field: float(values[field])},  # type: ignore[arg-type]
        values | {field: str(values[field])},
        values | {field: [values[field]]},
        values | {"more": 1},
        {key: value for key, value in values.items() if key != field},
    ]
    for wrong in hostile:
        with pytest.raises(ValueError, match="design space"):
            parse_choice(kernel, on, wrong)


@pytest.mark.parametrize(
    ("trace", "why"),
    [
        ("", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[[], []", "damaged"),
        ('[[["Split"]], []]', "damaged|unpack"),
        ('[[["Annotate", [], {}, []]], []]', "may not give"),
        ('[[["UnsafeSetDType", [], [], []]], []]', "may not contain"),
        ('[[["GetSBlock", [], ["y", "main"], ["b0"]]], [[0, null]]]', "may not decide"),
        ('[[["GetSBlock", [], ["y", "main"], ["b0"]]], [[0, [1, null]]]]', "may not decide"),
        ('[[["GetSBlock", [], ["y", "main"], ["b0"]]], [[1, 0]]]', "may not decide"),
        ('[[["GetSBlock", [], ["y", "main"], ["b0"]]], [0]]', "damaged"),
        ('[[["GetLoops", ["b0"], "x", ["l1"]]], []]', "may not give"),
        ('[[["GetSBlock", [], [null, "main"], ["b0"]]], []]', "may not give"),
        ('[[["Annotate", ["b0", "x"], ["pragma_import_llvm"], []]], []]', "may not annotate"),
    ],
)
def test_a_generated_schedule_only_transforms_loops(trace: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        GeneratedSchedule.parse({"trace": trace})


def test_a_trace_of_another_function_is_refused_in_one_line() -> None:
    trace = '[[["GetSBlock", [], ["nowhere", "main"], ["b0"]]], []]'
    func = te.create_prim_func([te.placeholder((4,), name="x")])
    with pytest.raises(ValueError, match="does not fit the function"):
        GeneratedSchedule.parse({"trace": trace}).apply(func)


@pytest.mark.parametrize(
    ("instructions", "copies"),
    [
        ([["Unroll", ["l1"], [], []]], 4096),
        ([["Vectorize", ["l1"], [], []]], 4096),
        ([["Annotate", ["l1", 10**9], ["pragma_auto_unroll_max_step"], []]], 10**9),
        ([["Annotate", ["b0", 10**9], ["pragma_auto_unroll_max_step"], []]], 10**9),
        (
            [
                ["Split", ["l1", 64, 64], [1, 0], ["l2", "l3"]],
                ["Unroll", ["l2"], [], []],
                ["Vectorize", ["l3"], [], []],
            ],
            4096,
        ),
        ([["Annotate", ["l1", 512], ["pragma_auto_unroll_max_step"], []]], None),
        ([["Split", ["l1", 64, 64], [1, 0], ["l2", "l3"]], ["Vectorize", ["l3"], [], []]], None),
    ],
)
def test_a_generated_schedule_makes_no_endless_code(
    instructions: list[object], copies: int | None
) -> None:
    x = te.placeholder((4096,), name="x")
    func = te.create_prim_func([x, te.compute((4096,), lambda i: x[i] + 1, name="y")])
    found = [["GetSBlock", [], ["y", "main"], ["b0"]], ["GetLoops", ["b0"], [], ["l1"]]]
    schedule = GeneratedSchedule.parse({"trace": json.dumps([found + instructions, []])})
    if copies is None:
        schedule.apply(func)
        return
    with pytest.raises(ValueError, match=f"makes {copies} copies of a statement"):
        schedule.apply(func)


def test_keys_say_what_is_computed_and_for_which_instructions() -> None:
    assert kernel_key(Dense(m=1, n=2, k=3)) == "Dense(m=1, n=2, k=3)"
    assert kernel_key(LayerNorm(rows=4, n=8, eps=1e-6)) == "LayerNorm(rows=4, n=8, eps=1e-06)"
    assert device_key(device("jetson-tx2")) == "cuda sm_62 2 SM"
    pi5 = device("raspberry-pi-5")
    assert isinstance(pi5, Cpu)
    assert device_key(pi5) == "aarch64 cortex-a76 sdot"
    assert device_key(dataclasses.replace(pi5, cores=1, clock_ghz=3.0)) == device_key(pi5)
