"""Tensors that are alive together never share a byte of the arena."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gfcompile.targets.tvm.memory import ALIGNMENT, Lifetime, align, plan_arena


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    result = []
    for i in range(draw(st.integers(0, 12))):
        first = draw(st.integers(0, 10))
        result.append(
            Lifetime(
                name=f"t{i}",
                size_bytes=draw(st.integers(1, 1000)),
                first=first,
                last=draw(st.integers(first, 10)),
            )
        )
    return result


@given(lifetimes())
def test_tensors_alive_together_do_not_overlap(tensors: list[Lifetime]) -> None:
    arena = plan_arena(tensors)
    for a, b in itertools.combinations(tensors, 2):
        if a.overlaps(b):
            first, second = sorted((a, b), key=lambda t: arena.offsets[t.name])
            end = arena.offsets[first.name] + first.size_bytes
            assert end <= arena.offsets[second.name]
    for tensor in tensors:
        assert arena.offsets[tensor.name] % ALIGNMENT == 0
        assert arena.offsets[tensor.name] + tensor.size_bytes <= arena.size_bytes
    assert arena.lower_bound_bytes <= arena.size_bytes


@given(lifetimes())
def test_the_plan_depends_on_nothing_but_the_lifetimes(tensors: list[Lifetime]) -> None:
    assert plan_arena(tensors) == plan_arena(list(reversed(tensors)))


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime(name=f"t{i}", size_bytes=640, first=i, last=i + 1) for i in range(9)]
    arena = plan_arena(chain)
    assert arena.size_bytes == arena.lower_bound_bytes == 2 * align(640)
