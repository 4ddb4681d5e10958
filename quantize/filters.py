"""Global filters in an exported graph, and their kernels in int8."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gfcompile.quantize.scheme import FILTER_KERNEL

__all__ = ["Filter", "FilterFakeQuant", "find_filters"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Filter:
    """irfft2(rfft2(x) * K) in an exported graph, K a constant."""

    forward: fx.Node
    product: fx.Node
    inverse: fx.Node

    @property
    def name(self) -> str:
        """The filter's name in the module, from that of its parameter."""
        return self.parameter.rpartition(".")[0] or self.forward.name

    @property
    def parameter(self) -> str:
        """The name of the parameter that K is made of."""
        source: Any = self.spectrum
        while isinstance(source, fx.Node) and source.op.startswith("call_"):
            source = source.args[0]
        assert isinstance(source, fx.Node), self.product
        return str(source.target)

    @property
    def constant_index(self) -> int:
        """Which operand of the product is K."""
        return 1 if self.product.args[0] is self.forward else 0

    @property
    def spectrum(self) -> fx.Node:
        """K."""
        node = self.product.args[self.constant_index]
        assert isinstance(node, fx.Node), self.product
        return node

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, columns and channels."""
        shape = list(self.inverse.meta["val"].shape)
        rank = len(shape)
        axes = [axis % rank for axis in self._transformed]
        others = [int(size) for axis, size in enumerate(shape) if axis not in (0, *axes)]
        h, w = (int(shape[axis]) for axis in axes)
        return h, w, math.prod(others)

    @property
    def _transformed(self) -> list[int]:
        axes: list[int] = _argument(self.forward, 2, [-2, -1])
        return axes

    @property
    def is_rewritable(self) -> bool:
        """Whether K is a parameter: complex, or its real and imaginary parts."""
        node = self.spectrum
        if node.target == aten.view_as_complex.default:
            (node,) = node.all_input_nodes
        return node.op == "get_attr"

    def rounding(self) -> "FilterFakeQuant":
        """What rounds K."""
        rank = self.forward.meta["val"].ndim
        # Axes of the product, which has a batch, as axes of the constant.
        dims = [axis % rank - rank for axis in self._transformed]
        sides = _argument(self.inverse, 1, None)
        return FilterFakeQuant(None if sides is None else list(sides), dims)

    def rounded_parameter(self, module: nn.Module) -> Tensor:
        """The parameter that K is made of, such that K is rounded."""
        parameter = operator.attrgetter(self.parameter)(module).detach()
        if parameter.is_complex():
            return self.rounding().forward(parameter)
        rounded = self.rounding().forward(torch.view_as_complex(parameter))
        return torch.view_as_real(rounded).contiguous()


def find_filters(graph: fx.Graph) -> Iterator[Filter]:
    """Every global filter whose transforms are used for nothing else."""
    for node in graph.nodes:
        if node.target != aten.fft_rfft2.default or len(node.users) != 1:
            continue
        (product,) = node.users
        if product.target != aten.mul.Tensor or len(product.users) != 1:
            continue
        (inverse,) = product.users
        found = Filter(forward=node, product=product, inverse=inverse)
        if inverse.target == aten.fft_irfft2.default and _is_constant(
            product.args[found.constant_index]
        ):
            yield found


class FilterFakeQuant(nn.Module):
    """Rounds K such that its circular kernel is of integers, a scale for each channel.

    Rounding is the identity to gradients. What is rounded already stays as it is, but for the
    rounding of the transforms, whose norm does not matter.
    """

    def __init__(self, sides: list[int] | None, dims: list[int]) -> None:
        super().__init__()
        self.sides, self.dims = sides, dims

    def forward(self, spectrum: Tensor) -> Tensor:
        """K, rounded."""
        kernel = torch.fft.irfft2(spectrum, s=self.sides, dim=self.dims)
        largest = kernel.detach().abs().amax(dim=self.dims, keepdim=True).clamp(min=2.0**-60)
        step = largest / FILTER_KERNEL.high
        rounded = kernel + ((kernel / step).round() * step - kernel).detach()
        result: Tensor = torch.fft.rfft2(rounded, dim=self.dims)
        return result


def _is_constant(value: Any) -> bool:
    """Whether the value is computed from parameters alone."""
    if not isinstance(value, fx.Node):
        return False
    return value.op == "get_attr" or (
        value.op == "call_function" and all(map(_is_constant, value.all_input_nodes))
    )


def _argument(node: fx.Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default
