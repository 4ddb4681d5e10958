"""What lies in blocks of channels between layer norms and filters, and what must not."""

from dataclasses import replace

import numpy as np
import pytest

from gfcompile.targets.tvm.blocked import in_blocks
from gfcompile.targets.tvm.kernel import DftFilter, Kernel, LayerNorm, channel_blocks
from gfcompile.targets.tvm.program import Call, Program, Tensor

BATCH, H, W, C = 2, 3, 4, 32
NORM = LayerNorm(rows=BATCH * H * W, n=C, eps=1e-6)
FILTER = DftFilter(batch=BATCH, h=H, w=W, c=C)


def _program(
    filter_kernel: DftFilter = FILTER,
    *,
    first: LayerNorm = NORM,
    last: LayerNorm = NORM,
    outputs: tuple[str, ...] = ("y",),
) -> Program:
    """A layer norm, a filter and a layer norm, and one more of the image."""
    chain: list[tuple[Kernel, str, str]] = [
        (first, "image", "normed"),
        (filter_kernel, "normed", "filtered"),
        (last, "filtered", "y"),
        (NORM, "image", "other"),
    ]
    calls = tuple(
        Call(kernel=kernel, label=y, reads={"x": x}, writes={"y": y}) for kernel, x, y in chain
    )
    shape = (BATCH, H * W, filter_kernel.c)
    tensors = {
        name: Tensor(name=name, dtype="float32", shape=shape)
        for name in ("image", "normed", "filtered", "y", "other")
    }
    return Program(inputs=("image",), outputs=outputs, tensors=tensors, calls=calls)


def test_what_lies_between_norms_and_a_filter_is_in_blocks() -> None:
    program = _program()
    blocked = in_blocks(program)
    assert [call.kernel for call in blocked.calls] == [
        replace(NORM, y_in_blocks=True),
        replace(FILTER, in_blocks=True),
        replace(NORM, x_in_blocks=True),
        NORM,
    ]
    shapes = {name: tensor.shape for name, tensor in blocked.tensors.items()}
    inner = channel_blocks(BATCH * H * W, C)
    whole = program.tensors["y"].shape
    assert shapes == {
        **dict.fromkeys(("normed", "filtered"), inner),
        **dict.fromkeys(("image", "y", "other"), whole),
    }


def test_the_graphs_values_are_found_in_the_blocks() -> None:
    pixels = np.random.default_rng(0).standard_normal((BATCH, H * W, C))
    stored = np.stack([pixels[..., c : c + 16].reshape(-1, 16) for c in range(0, C, 16)])
    places = in_blocks(_program()).stored_in
    assert places.keys() == {"normed", "filtered"}
    for name, (tensor, place) in places.items():
        assert tensor == name
        np.testing.assert_array_equal(stored.reshape(-1)[place], pixels)


@pytest.mark.parametrize(
    "program",
    [
        _program(replace(FILTER, c=24)),
        _program(replace(FILTER, x="float16")),
        _program(last=replace(NORM, rows=BATCH * (H * W - 1), images=BATCH, leading=1)),
        _program(outputs=("y", "filtered")),
        _program(outputs=("y", "normed")),
    ],
    ids=["no whole blocks", "float16", "skipped rows", "filtered is an output", "normed is one"],
)
def test_what_others_need_stays_as_it_is(program: Program) -> None:
    assert in_blocks(program) == program


def test_a_tensor_with_a_second_reader_stays_as_it_is() -> None:
    program = _program()
    again = Call(kernel=NORM, label="again", reads={"x": "filtered"}, writes={"y": "other"})
    program = replace(program, calls=(*program.calls[:-1], again))
    assert in_blocks(program) == program
