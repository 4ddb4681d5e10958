"""The steps that a program becomes, run by the device runtime."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gfcompile.runtime.device import gfrt
from gfcompile.targets.host import host_target
from gfcompile.targets.tvm.emit import emit
from gfcompile.targets.tvm.kernel import Array, Dense, DftFilter
from gfcompile.targets.tvm.program import Call, Program, Tensor
from gfcompile.targets.x86 import X86_64

LIBRARY = "libprogram.so"
GRID = (12, 10, 64)
ROWS, COLUMNS, DEPTH = 5, 16, 18  # without an instruction for int8, x is laid out as int16 first


def products_of(*operands: str) -> Program:
    """Products of int8, one of each operand, with weights of their own."""
    rng = np.random.default_rng(1)

    def call(i: int, x: str) -> Call:
        return Call(
            kernel=Dense(m=ROWS, n=COLUMNS, k=DEPTH, x="int8"),
            label=f"product{i}",
            reads={"x": x},
            writes={"y": f"y{i}"},
            constants={
                "w": rng.integers(-127, 128, (DEPTH, COLUMNS)).astype(np.int8),
                "scale": np.ones(COLUMNS, np.float32),
                "bias": rng.integers(-999, 999, COLUMNS).astype(np.int32),
            },
        )

    inputs = tuple(dict.fromkeys(operands))
    outputs = tuple(f"y{i}" for i in range(len(operands)))
    tensors = {x: Tensor(name=x, dtype="int8", shape=(ROWS, DEPTH), scale=1.0) for x in inputs}
    tensors |= {y: Tensor(name=y, dtype="float32", shape=(ROWS, COLUMNS)) for y in outputs}
    calls = tuple(call(i, x) for i, x in enumerate(operands))
    return Program(inputs=inputs, outputs=outputs, tensors=tensors, calls=calls)


def chain_of_filters(outputs: tuple[str, ...]) -> Program:
    """Filters of x to y0, of y0 to y1, of y1 to y2."""
    rng = np.random.default_rng(3)
    shape, k_shape = (1, *GRID), (GRID[0], GRID[1] // 2 + 1, GRID[2])
    names = ("x", "y0", "y1", "y2")
    calls = tuple(
        Call(
            kernel=DftFilter(batch=1, h=GRID[0], w=GRID[1], c=GRID[2]),
            label=f"filter{i}",
            reads={"x": names[i]},
            writes={"y": names[i + 1]},
            constants={
                name: rng.standard_normal(k_shape).astype(np.float32) for name in ("k_re", "k_im")
            },
        )
        for i in range(3)
    )
    tensors = {name: Tensor(name=name, dtype="float32", shape=shape) for name in names}
    return Program(inputs=("x",), outputs=outputs, tensors=tensors, calls=calls)


def run(bundle: Path, inputs: list[Array], threads: int = 1) -> list[Array]:
    manifest = {"format_version": gfrt.MANIFEST_FORMAT, "library": LIBRARY, "files": {LIBRARY: {}}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with gfrt.Model(str(bundle), verify=False) as model, model.context(threads) as context:
        return [np.array(y) for y in context.run(*inputs)]


@pytest.mark.parametrize(
    ("operands", "layouts"),
    [(("a", "a", "a"), 1), (("a", "b", "b"), 2), (("a", "b", "a"), 3)],
)
def test_neighbours_that_multiply_the_same_lay_it_out_once(
    operands: tuple[str, ...], layouts: int, tmp_path: Path
) -> None:
    program = products_of(*operands)
    target = replace(X86_64, levels=())
    made = emit(program, target, tmp_path, library=LIBRARY, mean=None, std=None)
    layout, product = made.kernels
    assert (layout["calls"], product["calls"]) == (layouts, len(operands))
    steps = [step.kernel for step in made.plan.steps]
    assert (steps.count(layout["name"]), len(steps)) == (layouts, layouts + len(operands))

    rng = np.random.default_rng(2)
    given = {x: rng.integers(-128, 128, (ROWS, DEPTH)).astype(np.int8) for x in program.inputs}
    for call, y in zip(program.calls, run(tmp_path, list(given.values())), strict=True):
        # Integers below 2^24, and a scale of 1: float32 has them exactly.
        w, bias = (call.constants[name].astype(np.int64) for name in ("w", "bias"))
        np.testing.assert_array_equal(y, given[call.reads["x"]].astype(np.int64) @ w + bias)


def test_a_filter_takes_the_place_of_what_nobody_else_needs(tmp_path: Path) -> None:
    x = np.random.default_rng(4).standard_normal((1, *GRID)).astype(np.float32)
    results = []
    # How many neighbours of x, y0, y1, y2 share a place: none with x, which is the caller's, and
    # none with an output that is still to be read.
    for outputs, in_place in ((("y2",), 2), (("y1", "y2"), 1), (("y0", "y1", "y2"), 0)):
        bundle = tmp_path / str(in_place)
        bundle.mkdir()
        program = chain_of_filters(outputs)
        made = emit(program, host_target(), bundle, library=LIBRARY, mean=None, std=None)
        offsets = {tensor.name: tensor.offset for tensor in made.plan.tensors}
        x_at, *y_at = (offsets[name] for name in program.tensors)
        assert x_at != y_at[0]
        assert sum(a == b for a, b in pairwise(y_at)) == in_place
        results.append(run(bundle, [x], threads=2)[-1])
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[2])
