"""A program whose global filters read and write blocks of channels.

A filter's threads share its channels out, those of layer norms its pixels. With pixels one after
the other, channels of two threads are neighbours in memory; a core then fetches lines ahead, within
a page, that the other one writes, and both wait for them all the time. So what only a filter reads,
and what only layer norms read of it, lies block by block. Norms store and load whole lines of cache
either way.
"""

from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np

from gfcompile.targets.tvm.kernel import (
    CHANNEL_BLOCK,
    Array,
    DftFilter,
    LayerNorm,
    channel_blocks,
)
from gfcompile.targets.tvm.program import Call, Program


def in_blocks(program: Program) -> Program:
    """`program` with blocks of channels between layer norms and filters."""
    uses = Counter(name for call in program.calls for name in call.reads.values())
    writer = {name: call for call in program.calls for name in call.writes.values()}
    normed = {
        call.reads["x"]
        for call in program.calls
        if isinstance(call.kernel, LayerNorm) and call.kernel.leading == 0
    }
    kept = {*program.inputs, *program.outputs}

    def is_between(call: Call) -> bool:
        """Whether a filter has a layer norm before it and one behind it, and nothing else."""
        kernel, x, y = call.kernel, call.reads.get("x", ""), call.writes.get("y", "")
        return (
            isinstance(kernel, DftFilter)
            and kernel.x == "float32"
            and kernel.c % CHANNEL_BLOCK == 0
            and x in writer
            and isinstance(writer[x].kernel, LayerNorm)
            and uses[x] == uses[y] == 1
            and y in normed
            and not {x, y} & kept
        )

    filters = [call for call in program.calls if is_between(call)]
    blocked = {name for call in filters for name in (call.reads["x"], call.writes["y"])}

    def typed(call: Call) -> Call:
        kernel = call.kernel
        if isinstance(kernel, DftFilter):
            kernel = replace(kernel, in_blocks=call.reads["x"] in blocked)
        elif isinstance(kernel, LayerNorm):
            kernel = replace(
                kernel,
                x_in_blocks=call.reads["x"] in blocked,
                y_in_blocks=call.writes["y"] in blocked,
            )
        return replace(call, kernel=kernel)

    tensors = {
        name: replace(tensor, shape=channel_blocks(prod(tensor.shape[:-1]), tensor.shape[-1]))
        if name in blocked
        else tensor
        for name, tensor in program.tensors.items()
    }
    places = {name: (name, _places(program.tensors[name].shape)) for name in blocked}
    return replace(
        program,
        tensors=tensors,
        calls=tuple(typed(call) for call in program.calls),
        stored_in={**program.stored_in, **places},
    )


def _places(shape: tuple[int, ...]) -> Array:
    """Where each element of a tensor of `shape` is in its blocks, as flat indices."""
    blocks = channel_blocks(prod(shape[:-1]), shape[-1])
    return np.arange(prod(shape)).reshape(blocks).swapaxes(0, 1).reshape(shape)
