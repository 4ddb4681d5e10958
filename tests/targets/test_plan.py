"""plan.bin, written and read back; tests/runtime holds it against the reader in C."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import toy_plan

from gfcompile.targets.tvm import plan as plans
from gfcompile.targets.tvm.plan import Plan, PlanIO, PlanStep, PlanTensor

TOY = toy_plan("x86_64", library="libtoy.so", library_id="0123456789abcdef", weights=bytes(1280))

names = st.text("abcdefgh._/é", min_size=1, max_size=12)
float32 = st.floats(0, 1e6, width=32)


@st.composite
def any_plan(draw: st.DrawFn) -> Plan:
    tensors = tuple(
        PlanTensor(
            name=name,
            dtype=draw(
                st.sampled_from(
                    ["float32", "int8", "uint8", "int32", "uint16", "int64", "int16", "float16"]
                )
            ),
            shape=draw(st.lists(st.integers(1, 9), max_size=4).map(tuple)),
            offset=64 * draw(st.integers(0, 1000)),
            scale=draw(float32),
            zero_point=draw(st.integers(-128, 127)),
            storage_offset=draw(st.sampled_from([0, 128])),
        )
        for name in draw(st.lists(names, min_size=1, max_size=6, unique=True))
    )
    index = st.integers(0, len(tensors) - 1)
    steps = tuple(
        PlanStep(
            kernel=draw(st.sampled_from(["k", "dense_1", "softmax"])),
            label=draw(names),
            args=(args := tuple(draw(st.lists(index, min_size=1, max_size=5)))),
            # In the order of the arguments, an argument that comes twice counted twice.
            outputs=tuple(arg for arg in args if arg == args[-1]),
            grid=draw(st.tuples(*[st.integers(1, 99)] * 3)),
            block=draw(st.tuples(*[st.integers(1, 9)] * 3)),
            shared_bytes=draw(st.integers(0, 48 << 10)),
        )
        for _ in range(draw(st.integers(0, 5)))
    )
    ios = st.lists(st.builds(PlanIO, name=names, tensor=index), min_size=1, max_size=3)
    return Plan(
        device=draw(st.sampled_from(["cpu", "cuda"])),
        arch=draw(st.sampled_from(["x86_64", "aarch64"])),
        library="lib-x+y.1.so",
        library_id="0" * 64,
        cpu_features=draw(st.sampled_from([(), ("avx2",), ("avx2", "fma")])),
        compute_capability=draw(st.tuples(st.integers(0, 9), st.integers(0, 9))),
        tensors=tensors,
        steps=steps,
        inputs=tuple(draw(ios)),
        outputs=tuple(draw(ios)),
        arena_bytes=64_000 + 9**4 * 8,
        workspace_bytes=draw(st.integers(0, 1 << 40)),
    )


@given(any_plan())
@settings(max_examples=60, deadline=None)
def test_a_plan_survives_the_file(plan: Plan) -> None:
    assert plans.parse(plans.serialize(plan)) == plan


def test_the_toy_survives_the_file() -> None:
    again = plans.parse(plans.serialize(TOY))
    # Mean and standard deviation are float32 in the file.
    assert again.inputs[0].mean == pytest.approx(TOY.inputs[0].mean, rel=2**-24)
    assert replace(again, inputs=TOY.inputs) == TOY


def test_a_plan_is_the_same_bytes_each_time() -> None:
    assert plans.serialize(TOY) == plans.serialize(TOY)
    assert len(plans.serialize(TOY)) < 2000


def test_a_changed_byte_changes_the_hash() -> None:
    data = bytearray(plans.serialize(TOY))
    data[-3] ^= 1
    with pytest.raises(AssertionError, match="the hash differs"):
        plans.parse(bytes(data))


STEP = TOY.steps[0]
TENSOR = TOY.tensors[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"library_id": "xyz"},
        {"library": "../lib.so"},
        {"tensors": (TENSOR, *TOY.tensors[:1], *TOY.tensors[2:])},  # a name twice
        {"tensors": (replace(TENSOR, offset=8), *TOY.tensors[1:])},
        {"tensors": (replace(TENSOR, offset=3072), *TOY.tensors[1:])},
        {"tensors": (replace(TENSOR, shape=(1, 0)), *TOY.tensors[1:])},
        {"tensors": (replace(TENSOR, shape=(1,) * 7), *TOY.tensors[1:])},
        {"steps": (replace(STEP, kernel="two words"),)},
        {"steps": (replace(STEP, args=(0, 99), outputs=(99,)),)},
        {"steps": (replace(STEP, outputs=()),)},
        {"steps": (replace(STEP, outputs=(7,)),)},  # not one of its arguments
        {"steps": (replace(STEP, outputs=(2,)),)},  # a weight
        {"inputs": ()},
        {"outputs": (PlanIO(name="w", tensor=2),)},
        {"inputs": (replace(TOY.inputs[0], std=None),)},
    ],
)
def test_a_plan_that_the_runtime_would_refuse_is_not_written(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        plans.serialize(replace(TOY, **changes))
