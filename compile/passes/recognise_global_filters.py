"""Finds every rfft - product with a constant - irfft, and makes one function call of it.

    x -> Unsqueeze -> DFT -> DFT -> Slice, Mul, Sub, Add, Concat -> DFT -> DFT -> Squeeze -> y

becomes

    x -> gfcompile.GlobalFilterDft_{h}x{w}(k_re, k_im) -> y      or
    x -> gfcompile.GlobalFilterCircular_{h}x{w}(kernel) -> y

Not by matching that chain, which changes with the way the filter was written, but by what it
computes. Between the real tensor that the first transform reads and the real tensor that comes
out of the last one, every node must be linear. A linear map is a global filter exactly if it is
a circular convolution, per channel; its response to an impulse is the filter's kernel, and its
response to a random signal shows whether it is one. Norms, the order of transforms, real or
complex filters, one or two axes then need no cases of their own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from gfcompile.compile.passes.dft import project_hermitian
from gfcompile.compile.passes.filter_functions import DOMAIN, filter_function, function_name
from gfcompile.compile.passes.graph import (
    Array,
    Builder,
    before_reshapes,
    constant,
    replace,
    shape_of,
)
from gfcompile.compile.passes.linear import (
    NotLinearError,
    Signal,
    dft_settings,
    evaluate,
    may_be_linear,
    signal_inputs,
)
from gfcompile.compile.trace import session
from gfcompile.targets.onnx_values import NAME_SCOPES, module_path

FftForm = Literal["native", "dft", "circular"]

# Of float64 evaluations of the chain and of the convolution, relative to the largest value: both
# sum some thousand terms, so a true filter is within 1e-13.
_SAME_MAP = 1e-10
_ROUNDING = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class GlobalFilter:
    """A global filter of the model: y = irfft2(rfft2(x) * K) over an (h, w) grid, C channels.

    `name` is the path of the torch module it was written in, where that is known. A filter along
    one axis has h = 1.
    """

    name: str
    h: int
    w: int
    c: int
    form: FftForm


class _RefusedError(Exception):
    """Why a chain of nodes is not a global filter, or not one that can be replaced."""


@dataclass(frozen=True)
class _Chain:
    """The nodes between a real input and a real output, some DFTs among them, all linear."""

    x: ir.Value  # has a last axis of size 1, where a complex tensor keeps its two parts
    y: ir.Value  # as many elements, in any shape
    nodes: tuple[ir.Node, ...]
    grid: tuple[int, ...]  # the axes of x that are transformed

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the real tensor that x is."""
        return shape_of(self.x)[:-1]

    def run(self, signal: Signal) -> Signal:
        """y for a real input of `shape`, in that shape."""
        return evaluate(self.nodes, self.x, signal[..., None], self.y).reshape(self.shape)


@dataclass(frozen=True)
class _Layout:
    """How x becomes (batch, h, w, channels): transposed by `perm`, then reshaped."""

    perm: tuple[int, ...]
    shape: tuple[int, int, int, int]

    def apply(self, x: Array) -> Array:
        return x.transpose(self.perm).reshape(self.shape)


def recognise_global_filters(
    model: ir.Model,
    choose_form: Callable[[int, int, int], FftForm],
    refuse: Callable[[str], None],
) -> tuple[list[GlobalFilter], set[ir.Node]]:
    """Replaces every global filter of `model` by a call of the form that `choose_form` wants.

    Args:
        choose_form: form of a filter of (h, w, channels).
        refuse: told, in a sentence, of every chain that ends in an inverse DFT and still is not
            replaced.

    Returns:
        The filters in order, and the DFT nodes of those that stay native.
    """
    filters: list[GlobalFilter] = []
    native: set[ir.Node] = set()
    ends: set[ir.Value] = set()  # of the chains that stay
    for y in list(_candidates(model.graph)):
        name = _name_of(y)
        try:
            chain = _chain_to(y, model.graph, ends)
            kernel, layout = _kernel_of(chain)
            form = choose_form(*layout.shape[1:])
            _, h, w, c = layout.shape
            if form == "native":
                native.update(node for node in chain.nodes if node.op_type == "DFT")
                ends.add(y)
            else:
                _replace(model, chain, kernel, layout, form)
        except (_RefusedError, NotLinearError) as reason:
            refuse(f"{name}: not one global filter: {reason}")
            continue
        filters.append(GlobalFilter(name=name, h=h, w=w, c=c, form=form))
    return filters, native


def _candidates(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every real value that follows a last inverse DFT, in the order of the graph.

    ONNX keeps the real and imaginary parts on a last axis; the value after the one that drops
    this axis is what the model goes on with.
    """
    pending: dict[ir.Value, int] = {}  # spectra behind an inverse DFT, and their rank
    for node in graph:
        ranks = [pending[value] for value in node.inputs if value in pending]
        if node.op_type == "DFT":
            _, _, inverse, _ = dft_settings(node)
            if inverse:
                pending[node.outputs[0]] = len(shape_of(node.outputs[0]))
        elif ranks and may_be_linear(node):
            for value in node.outputs:
                if len(shape_of(value)) < ranks[0]:
                    yield value
                else:
                    pending[value] = ranks[0]


def _chain_to(y: ir.Value, graph: ir.Graph, ends: set[ir.Value]) -> _Chain:
    """The chain that ends in `y` and reaches back to no other chain, which end in `ends`.

    Raises:
        _RefusedError, NotLinearError: there is none, because of the reason given.
    """
    spectral = _spectral_values(graph, ends)
    nodes: set[ir.Node] = set()
    sources: set[ir.Value] = set()
    pending = [y]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value not in spectral:
            sources.add(_real_source(value, nodes))
        elif node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(signal_inputs(node))
    if len(sources) != 1:
        raise _RefusedError(f"it reads {len(sources)} inputs")
    (x,) = sources
    # The inverse may count axes otherwise, if they were permuted in between.
    transforms = [dft_settings(node) for node in nodes if node.op_type == "DFT"]
    grid = tuple(sorted({axis for axis, _, inverse, _ in transforms if not inverse}))
    if not grid:
        raise _RefusedError("there is no forward transform before the inverse one")
    if len(grid) > 2:
        raise _RefusedError(f"it transforms {len(grid)} axes")
    if math.prod(shape_of(x)) != math.prod(shape_of(y)):
        raise _RefusedError(f"it turns {shape_of(x)[:-1]} into {shape_of(y)}")
    return _Chain(x, y, tuple(node for node in graph if node in nodes), grid)


def _spectral_values(graph: ir.Graph, ends: set[ir.Value]) -> set[ir.Value]:
    """What depends on a DFT through nodes that may be linear, and not by way of `ends`."""
    found: set[ir.Value] = set()
    for node in graph:
        follows = any(value in found for value in node.inputs)
        if node.op_type == "DFT" or (follows and may_be_linear(node)):
            found.update(value for value in node.outputs if value not in ends)
    return found


def _real_source(value: ir.Value, nodes: set[ir.Node]) -> ir.Value:
    """The real tensor that `value`, a transform's input, was made of; adds the nodes between.

    The exporter appends the axis of real and imaginary parts, fills the imaginary part with
    zeros, and scales for the norm, in any order.
    """
    shape = shape_of(value)
    while shape_of(value)[-1] != 1 or _is_scaled(value):
        node = value.producer()
        inputs = signal_inputs(node) if node is not None and may_be_linear(node) else []
        if node is None or len(inputs) != 1 or shape_of(inputs[0])[:-1] != shape[:-1]:
            raise _RefusedError(f"its input {value.name} is not real")
        nodes.add(node)
        (value,) = inputs
    return value


def _is_scaled(value: ir.Value) -> bool:
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return False
    return any(array is not None and array.size == 1 for array in map(constant, node.inputs))


def _kernel_of(chain: _Chain) -> tuple[Signal, _Layout]:
    """The kernel (h, w, C) that `chain` convolves with, and how x is laid out.

    Raises:
        _RefusedError: the chain is no circular convolution per channel.
    """
    shape = chain.shape
    impulse = np.zeros(shape)
    impulse[tuple(0 if axis in chain.grid else slice(None) for axis in range(len(shape)))] = 1
    response = chain.run(impulse)
    rest = [axis for axis in range(len(shape)) if axis not in chain.grid]
    # The first axis is the batch, unless there is another filter for each of its entries.
    same = _SAME_MAP * np.abs(response).max()
    batch = [a for a in rest[:1] if a == 0 and np.ptp(response, axis=a).max() <= same]
    channels = rest[len(batch) :]
    grid = [shape[axis] for axis in chain.grid]
    h, w = (1, *grid)[-2:]
    batches = int(np.prod([shape[axis] for axis in batch]))
    c = int(np.prod([shape[axis] for axis in channels]))
    layout = _Layout((*batch, *chain.grid, *channels), (batches, h, w, c))
    kernel = layout.apply(response)[0]

    signal = np.random.default_rng(0).standard_normal(shape)
    actual = layout.apply(chain.run(signal))
    spectrum = np.fft.rfft2(layout.apply(signal), axes=(1, 2)) * np.fft.rfft2(kernel, axes=(0, 1))
    expected = np.fft.irfft2(spectrum, s=(h, w), axes=(1, 2))
    if np.abs(actual - expected).max() > _SAME_MAP * np.abs(actual).max():
        raise _RefusedError("it is linear, but no circular convolution per channel")
    return kernel, layout


def _replace(
    model: ir.Model, chain: _Chain, kernel: Signal, layout: _Layout, form: FftForm
) -> None:
    """Puts a call in the place of `chain`, if it computes the same in ONNX Runtime."""
    assert form != "native"
    _, h, w, c = layout.shape
    last = chain.y.producer()
    assert last is not None
    stem = f"{chain.y.name}_filter"
    opset = model.opset_imports[""]
    identifier = (DOMAIN, function_name(form, h, w), "")
    if identifier not in model.functions:
        model.functions[identifier] = filter_function(form, h, w, opset)
    model.opset_imports.setdefault(DOMAIN, 1)

    build = Builder(last)
    real = build.reshape(chain.x, chain.shape, stem=f"{stem}_real")
    x = build.transpose(real, layout.perm, stem=f"{stem}_in")
    x = build.reshape(x, layout.shape, stem=f"{stem}_grid")
    spectrum = project_hermitian(np.fft.rfft2(kernel, axes=(0, 1)), w)
    if form == "dft":
        constants = {"k_re": spectrum.real, "k_im": spectrum.imag}
        settings: dict[str, Any] = {}
    else:
        constants = {"kernel": kernel}
        settings = {"channels": c}
    operands = [
        build.constant(f"{chain.y.name}.{name}", array.astype(np.float32))
        for name, array in constants.items()
    ]
    name = function_name(form, h, w)
    y = build.node(name, [x, *operands], layout.shape, stem=stem, domain=DOMAIN, **settings)
    permuted = tuple(chain.shape[axis] for axis in layout.perm)
    y = build.reshape(y, permuted, stem=f"{stem}_flat")
    back = tuple(int(axis) for axis in np.argsort(layout.perm))
    y = build.transpose(y, back, stem=f"{stem}_out")
    y = build.reshape(y, shape_of(chain.y), stem=f"{stem}_y")
    _carry_scope(chain.y, y)

    source = before_reshapes(chain.x)
    difference = _difference(_part(model, source, chain.y), _part(model, source, y))
    # Per axis both forms sum at most as many terms as the axis is long, forth and back; with
    # orthonormal transforms no value on the way exceeds the filter's largest gain.
    gain = float(np.abs(spectrum).max())
    bound = 8 * _ROUNDING * (h + w) * gain
    if difference > bound:
        raise _RefusedError(f"the {form} form differs by {difference:.2g}, more than {bound:.2g}")
    replace(chain.y, y)


def _part(model: ir.Model, x: ir.Value, y: ir.Value) -> ir.Model:
    """The part of `model` that computes `y` from `x`, as a model."""
    part = ir.Model(
        ir.convenience.extract(model.graph, [x], [y]),
        ir_version=model.ir_version,
        functions=[function.clone() for function in model.functions.values()],
    )
    part.opset_imports.update(model.opset_imports)
    return part


def _difference(original: ir.Model, rewritten: ir.Model) -> float:
    """The largest difference on a random input, relative to the largest input."""
    shape = shape_of(original.graph.inputs[0])
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    outputs = [_run(model, x) for model in (original, rewritten)]
    return float(np.abs(outputs[0] - outputs[1]).max() / np.abs(x).max())


def _run(model: ir.Model, x: Array) -> Array:
    (name,) = (value.name for value in model.graph.inputs)
    (y,) = session(model, threads=1).run(None, {name: x})
    assert isinstance(y, np.ndarray)
    return y


def _carry_scope(old: ir.Value, new: ir.Value) -> None:
    source, target = old.producer(), new.producer()
    if source is not None and target is not None and NAME_SCOPES in source.metadata_props:
        target.metadata_props[NAME_SCOPES] = source.metadata_props[NAME_SCOPES]


def _name_of(y: ir.Value) -> str:
    """The path of the torch module that `y` comes from, or its own name."""
    node = y.producer()
    return (module_path(node) if node is not None else "") or str(y.name)
