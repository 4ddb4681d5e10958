"""What every operator's emission shares: names, constants, arrangements, the layout asked for."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.coreml.options import CoremlOptions
from gfcompile.targets.coreml.values import Arranger, Array, Template, UnfitError, Value, natural
from gfcompile.targets.onnx_values import OTHER_TARGET, constant, shape_of


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """normalized = pixel * scale + shift, per channel (3,), for pixels of 0 to 255."""

    scale: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]


class Emitter:
    """A MIL program in the making.

    Attributes:
        options: what was asked for.
        is_compact: whether size counts more than a few operations, as it does where weights are
            int8.
        group_size: how many weights of four bits share a factor; None where none do.
        float_type: NumPy's dtype of all that is computed in floating point.
        values: the tensors that have been emitted, by the graph's values.
        covered: nodes that an earlier one took along.
        normalizations: convolutions that read pixels, and what their weights must take along.
    """

    def __init__(
        self,
        options: CoremlOptions,
        *,
        half: bool,
        is_compact: bool = False,
        group_size: int | None = None,
    ) -> None:
        self.options = options
        self.group_size = group_size
        self.is_compact = is_compact
        self.float_type: type[np.floating[Any]] = np.float16 if half else np.float32
        self.values: dict[ir.Value, Value] = {}
        self.covered: set[ir.Node] = set()
        self.normalizations: dict[ir.Node, Normalization] = {}
        self.arranger = Arranger(self.op)
        self._names: set[str] = set()
        self._shared: dict[tuple[object, ...], Any] = {}

    @property
    def float_name(self) -> str:
        return "fp16" if self.float_type is np.float16 else "fp32"

    @property
    def is_channels_first(self) -> bool:
        return self.options.layout == "ane"

    # MIL

    def op(self, kind: str, name: str, **arguments: Any) -> Any:
        """A MIL operation; floating-point arrays become constants of the program's precision."""
        from coremltools.converters.mil import Builder

        converted = {key: self._argument(value) for key, value in arguments.items()}
        return getattr(Builder, kind)(name=self.unique(name), **converted)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return self.rounded(value)
        if isinstance(value, np.ndarray) and value.dtype == np.int64:
            return value.astype(np.int32)
        return value

    def stored(self, array: Array) -> Array:
        """A constant of the graph as the program has it: integers are int32."""
        return array.astype(np.int32) if array.dtype.kind in "iu" else self.rounded(array)

    def rounded(self, array: Array) -> Array:
        """`array` in the program's precision.

        Raises:
            UnfitError: it does not fit.
        """
        with np.errstate(over="ignore"):
            result = array.astype(self.float_type)
        if not np.isfinite(result).all():
            raise UnfitError(
                f"a constant of {np.abs(array).max():.3g} does not fit float16, whose largest "
                "value is 65504",
                "compile with --fp32",
            )
        return result

    def unique(self, name: str) -> str:
        """A MIL identifier like `name` that no other operation has."""
        base = re.sub(r"\W+", "_", name).strip("_") or "value"
        if base[0].isdigit():
            base = f"_{base}"
        candidate, count = base, 1
        while candidate in self._names:
            candidate, count = f"{base}_{count}", count + 1
        self._names.add(candidate)
        return candidate

    def shared(self, key: tuple[object, ...], make: Callable[[], Array], name: str) -> Any:
        """A constant that several operations read, stored once."""
        if key not in self._shared:
            self._shared[key] = self.op("const", name, val=self.rounded(make()))
        return self._shared[key]

    # Values of the graph

    def value(self, value: ir.Value | None) -> Value:
        """The emitted tensor of a value that is not constant."""
        assert value is not None
        return self.values[value]

    def operand(self, value: ir.Value | None) -> Value:
        """The emitted tensor of any value; constants become one."""
        assert value is not None
        if value in self.values:
            return self.values[value]
        array = constant(value)
        assert array is not None, value.name
        array = self.stored(array)
        var = self.op("const", str(value.name), val=array)
        self.values[value] = Value(var, array.shape, natural(array.shape))
        return self.values[value]

    def lay_out(self, value: Value, template: Template) -> Any:
        return self.arranger.lay_out(value, template)

    def define(self, value: ir.Value, var: Any, order: tuple[int, ...]) -> Value:
        """Makes `var` the tensor of `value`."""
        dims = shape_of(value)
        self.values[value] = Value(var, dims, tuple(a for a in order if dims[a] > 1))
        return self.values[value]

    def preferred(self, dims: tuple[int, ...]) -> Template:
        """The arrangement that the layout wants for tokens of this shape."""
        if not self.is_channels_first or len(dims) < 2 or len(dims) > 4:
            return tuple(range(len(dims)))
        return {2: (None, 1, None, 0), 3: (0, 2, None, 1), 4: (0, 3, 1, 2)}[len(dims)]

    def arrangement(self, value: Value) -> Template:
        """An arrangement of `value` in which every axis of the graph has a place, cheap to get."""
        template = value.template()
        if template is not None and len(value.order) == len(value.dims):
            return template
        # Axes of one element have no place of their own yet.
        missing = [axis for axis, size in enumerate(value.dims) if size == 1]
        if template is not None and template.count(None) >= len(missing):
            names = iter(missing)
            return tuple(next(names, None) if axis is None else axis for axis in template)
        if value.order == natural(value.dims):
            return tuple(range(len(value.dims)))
        preferred = self.preferred(value.dims)
        kept = tuple(a for a in preferred if a is not None and value.dims[a] > 1)
        return preferred if kept == value.order else (*missing, *value.order)


def refuse(node: ir.Node, why: str, remedy: str = OTHER_TARGET) -> CompileError:
    """The error for a node that has no equivalent."""
    return CompileError(
        f"Core ML: {node.op_type} (node {node.name or node.outputs[0].name}): {why}; {remedy}"
    )
