"""A program: kernel calls over named tensors, which the partitioner makes of a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gfcompile.targets.tvm.kernel import Array, Kernel


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor that a call reads or writes; int8 ones carry their scale and zero point."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: float = 0.0
    zero_point: int = 0


@dataclass(frozen=True, kw_only=True)
class Call:
    """One kernel and what it is applied to.

    Attributes:
        kernel: what is computed.
        label: the node that it stands for, for profiles.
        reads, writes: argument name -> tensor name.
        constants: argument name -> raw constant.
    """

    kernel: Kernel
    label: str
    reads: Mapping[str, str]
    writes: Mapping[str, str]
    constants: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Where the indices of a TopK are: `tensor` (batch, leading + k), each plus `offset`."""

    graph_value: str
    tensor: str
    leading: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Program:
    """A straight line of kernel calls over named tensors.

    Attributes:
        unscheduled: kinds of products and convolutions that no schedule of ours covers.
        selections: which tokens each TopK of the graph chose.
        stored_in: values of the graph that have no tensor of their layout: the tensor that
            holds them, and the place of each element in it, as flat indices.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    calls: tuple[Call, ...]
    stored_in: Mapping[str, tuple[str, Array]] = field(default_factory=dict)
    selections: tuple[Selection, ...] = ()
    unscheduled: tuple[str, ...] = ()
