"""The lowered ONNX graph as a list of kernel calls.

Each product, convolution, normalization, filter or mean takes along the cheap nodes that follow it
(bias, GELU, residual, quantization), so that element-wise work rides on a kernel that is there
anyway. What no schedule class covers goes through Relax, a run of neighbouring nodes at a time
(`generic.py`).

Views (Reshape and its kin) cost nothing: their output is another name for the same memory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.onnx_values import (
    VIEWS,
    constant,
    dtype_of,
    is_standard,
    module_path,
    quantization,
    scalar_quantization,
    shape_of,
)
from gfcompile.targets.tvm import generic
from gfcompile.targets.tvm.attention import layout, match_attention, match_selection
from gfcompile.targets.tvm.convolution import ConvMatch, channels_last_source, match_conv
from gfcompile.targets.tvm.kernel import (
    Act,
    Array,
    Attention,
    CircularFilter,
    Conv,
    Dense,
    Dequantize,
    DftFilter,
    GatherRows,
    Half,
    InversePermutation,
    Kernel,
    LayerNorm,
    Patchify,
    Quantize,
    SelectTokens,
    Softmax,
    TokenMean,
    quant_args,
)

_HEAVY = ("Conv", "MatMul", "Gemm")  # what takes time wherever it stands


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
        stored_in: int8 values of the graph that have no tensor of their layout: the tensor that
            holds them, and the place of each element in it, as flat indices.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    calls: tuple[Call, ...]
    stored_in: Mapping[str, tuple[str, Array]] = field(default_factory=dict)
    selections: tuple[Selection, ...] = ()
    unscheduled: tuple[str, ...] = ()


def partition(model: ir.Model) -> Program:
    """The kernel calls that compute `model`, in an order that respects their data flow.

    Args:
        model: a canonical lowered graph: static shapes, `MatMul` + `Add` for linear layers, filters
            as `gfcompile` functions, QDQ pairs around quantized products.

    Raises:
        CompileError: a node that neither a schedule class nor Relax can take.
    """
    return _Partitioner(model).run()


@dataclass
class _Product:
    """x @ w on the way to a Dense call: the nodes that it covers so far, and its operands."""

    covered: list[ir.Node]
    m: int
    n: int
    k: int
    act: Act
    constants: dict[str, Array]

    @property
    def result(self) -> ir.Value:
        return self.covered[-1].outputs[0]


class _Partitioner:
    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.nodes = [
            node for node in model.graph if any(constant(output) is None for output in node.outputs)
        ]
        self.claimed: set[ir.Node] = set()
        self.calls: dict[ir.Node, list[Call]] = {}  # at the last node that a call covers
        self.tensors: dict[str, Tensor] = {}
        self.stored_in: dict[str, tuple[str, Array]] = {}
        self.selections: list[Selection] = []
        self.unscheduled: set[str] = set()
        self.same: dict[ir.Value, ir.Value] = {}  # values that are other names for one memory
        self.channels_last: set[ir.Value] = set()  # images that the graph has with channels second
        # qkv products whose q, k and v are int8 with a scale of their own: name and `quant`.
        self.grouped: dict[ir.Value, tuple[str, Array]] = {}

    def run(self) -> Program:
        anchors: tuple[Callable[[ir.Node], None], ...] = (
            self.attention,
            self.selection,
            self.linear,
            self.convolution,
            self.layer_norm,
            self.token_mean,
            self.global_filter,
            self.softmax,
        )
        for anchor in (*anchors, self.quantize, self.dequantize):
            for node in self.nodes:
                if node not in self.claimed:
                    anchor(node)
        inputs = tuple(self.tensor(value) for value in self.graph.inputs)
        outputs = tuple(self.tensor(value) for value in self.graph.outputs)
        calls: list[Call] = []
        run: list[ir.Node] = []  # neighbours that no schedule class takes
        for node in self.nodes:
            if node not in self.claimed and not is_standard(node, *VIEWS):
                if any(self.is_view_into(run, value) for value in node.inputs):
                    calls += self.leftover(run)
                    run = []
                run.append(node)
            elif node in self.calls:
                calls += self.leftover(run)
                calls += self.calls[node]
                run = []
        calls += self.leftover(run)
        if any(tensor.dtype == "int8" for tensor in self.tensors.values()):
            calls = [_in_fixed_point(call) for call in calls]
        return Program(
            inputs=inputs,
            outputs=outputs,
            tensors=self.tensors,
            calls=_live(calls, outputs),
            stored_in=self.stored_in,
            selections=tuple(self.selections),
            unscheduled=tuple(sorted(self.unscheduled)),
        )

    # Values

    def root(self, value: ir.Value) -> ir.Value:
        """The value whose memory `value` is a view of."""
        node = value.producer()
        while value in self.same or (
            node is not None and is_standard(node, *VIEWS) and node not in self.claimed
        ):
            if value in self.same:
                value = self.same[value]
            else:
                assert node is not None
                value = _input(node, 0)
            node = value.producer()
        return value

    def tensor(self, value: ir.Value) -> str:
        """The name of the tensor that holds `value`, from now on part of the program."""
        value = self.root(value)
        name, shape = str(value.name), shape_of(value)
        if value in self.channels_last:  # a tensor of the graph's name has the graph's layout
            name, shape = f"{name}_channels_last", (shape[0], *shape[2:], shape[1])
        if name not in self.tensors:
            producer = value.producer()
            scale, zero_point = 0.0, 0
            if producer is not None and is_standard(producer, "QuantizeLinear"):
                scale, zero_point = scalar_quantization(producer)
            self.tensors[name] = Tensor(
                name=name,
                dtype=dtype_of(value),
                shape=shape,
                scale=scale,
                zero_point=zero_point,
            )
        return name

    def follower(self, value: ir.Value, *op_types: str) -> ir.Node | None:
        """The node that alone reads `value`, through views, if it is one of `op_types`."""
        while True:
            readers = value.consumers()
            if len(readers) != 1 or value.is_graph_output() or readers[0] in self.claimed:
                return None
            if is_standard(readers[0], *op_types):
                return readers[0]
            if not is_standard(readers[0], *VIEWS):
                return None
            value = readers[0].outputs[0]

    def other_input(self, node: ir.Node, value: ir.Value) -> ir.Value | None:
        """The operand of a binary node that is not (a view of) `value`."""
        others = [x for x in node.inputs if x is not None and self.root(x) is not self.root(value)]
        return others[0] if len(others) == 1 else None

    def dequantized(self, value: ir.Value) -> ir.Node | None:
        """The DequantizeLinear that `value` comes from, if that is an int8 activation."""
        node = self.root(value).producer()
        if node is None or not is_standard(node, "DequantizeLinear"):
            return None
        return node if dtype_of(_input(node, 0)) == "int8" else None

    def is_view_into(self, run: list[ir.Node], value: ir.Value | None) -> bool:
        return (
            value is not None
            and self.root(value) is not value
            and self.root(value).producer() in run
        )

    # Calls

    def add(
        self,
        covered: list[ir.Node],
        kernel_of: Callable[[Act], Kernel],
        reads: Mapping[str, str],
        constants: Mapping[str, Array],
        before: Call | None = None,
        grouped: tuple[str, Array] | None = None,
    ) -> None:
        """Adds a call that covers these nodes, and the QuantizeLinear after them if there is one.

        Args:
            covered: the nodes that the call stands for, in order.
            kernel_of: the kernel for a float32 or an int8 result.
            reads, constants: the call's arguments.
            before: a call that must come first.
            grouped: name and `quant` of an int8 result whose columns have several scales.
        """
        out: Act = "float32"
        quantize = self.follower(covered[-1].outputs[0], "QuantizeLinear")
        if grouped is not None:
            out = "int8"
            constants = {**constants, "quant": grouped[1]}
        elif quantize is not None:
            covered, out = [*covered, quantize], "int8"
            constants = {**constants, "quant": quant_args(*scalar_quantization(quantize))}
        self.claimed.update(covered)
        call = Call(
            kernel=kernel_of(out),
            label=_label(*covered),
            reads=reads,
            writes={"y": grouped[0] if grouped else self.tensor(covered[-1].outputs[0])},
            constants=constants,
        )
        self.calls[covered[-1]] = [call] if before is None else [before, call]

    def linear(self, node: ir.Node) -> None:
        """MatMul by a constant matrix, with bias, GELU and residual."""
        if not is_standard(node, "MatMul"):
            return
        x, w = _input(node, 0), _input(node, 1)
        weight = constant(w)
        if weight is None or weight.ndim != 2:
            return
        covered = [node]
        bias = None
        add = self.follower(node.outputs[0], "Add")
        if add is not None:
            operand = self.other_input(add, node.outputs[0])
            array = constant(operand)
            if array is not None and array.size == array.shape[-1] == weight.shape[1]:
                bias = operand
                covered.append(add)
        source = self.dequantized(x)
        product = self.product(covered, source, w, bias)
        if product.act == "int8":
            assert source is not None
            x = _input(source, 0)
        if not self.split(product, self.tensor(x)):
            self.dense(product, self.tensor(x))

    def split(self, product: _Product, x: str) -> bool:
        """Adds a call for each part that a Split makes of the columns of `product`, if one does.

        Else every part would be copied, as its rows are not contiguous.
        """
        gelu = self.follower(product.result, "Gelu")
        exact = gelu is not None and gelu.attributes.get_string("approximate", "none") == "none"
        node = self.follower(
            gelu.outputs[0] if gelu is not None and exact else product.result, "Split"
        )
        if node is None:
            return False
        sizes = [shape_of(part)[-1] for part in node.outputs]
        rank = len(shape_of(node.outputs[0]))
        if node.attributes.get_int("axis", 0) not in (-1, rank - 1) or sum(sizes) != product.n:
            return False
        covered = [*product.covered, *([gelu] if gelu is not None and exact else []), node]
        self.claimed.update(covered)
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        self.calls[node] = [
            Call(
                kernel=Dense(
                    m=product.m,
                    n=size,
                    k=product.k,
                    x=product.act,
                    gelu=exact,
                ),
                label=f"{_label(*covered)}/{i}",
                reads={"x": x},
                writes={"y": self.tensor(node.outputs[i])},
                constants={
                    name: np.ascontiguousarray(array[..., start : start + size])
                    for name, array in product.constants.items()
                },
            )
            for i, (size, start) in enumerate(zip(sizes, first, strict=True))
        ]
        return True

    def convolution(self, node: ir.Node) -> None:
        """A convolution, its image and its result with channels last."""
        match = match_conv(node)
        if match is None:
            return
        final = [view.outputs[0] for view in match.views if is_standard(view, "Transpose")]
        patches = match.kind == "patches"
        if patches and len(final) == len(match.result.consumers()) == 1:
            self.patch_conv(match, [node, *match.views])
            return
        # All that turns it to channels last is another name for the same memory.
        self.claimed.update(match.views)
        place = final[0] if final else match.result
        self.same.update((value, place) for value in (match.result, *final) if value is not place)
        self.channels_last.add(match.result)
        y = self.tensor(place)
        if patches:
            self.patch_conv(match, [node])
            return
        x, layout = self.image(_input(node, 0))
        weight = constant(node.inputs[1])
        assert weight is not None
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        (batch, c, h, w), n = shape_of(_input(node, 0)), weight.shape[0]
        stride_h, stride_w = node.attributes.get_ints("strides", (1, 1))
        pad_h, pad_w = node.attributes.get_ints("pads", (0, 0))[:2]
        covered = [node] if match.relu is None else [node, match.relu]
        self.claimed.update(covered)
        self.calls[covered[-1]] = [
            Call(
                kernel=Conv(
                    batch=batch,
                    h=h,
                    w=w,
                    c=c,
                    n=n,
                    kernel_h=weight.shape[2],
                    kernel_w=weight.shape[3],
                    stride_h=stride_h,
                    stride_w=stride_w,
                    pad_h=pad_h,
                    pad_w=pad_w,
                    depthwise=match.kind == "depthwise",
                    relu=match.relu is not None,
                    layout=layout,
                ),
                label=_label(node),
                reads={"x": x},
                writes={"y": y},
                constants={
                    "w": np.ascontiguousarray(
                        weight.transpose(2, 3, 1, 0).reshape(-1, n), np.float32
                    ),
                    "bias": np.zeros(n, np.float32)
                    if bias is None
                    else bias.reshape(-1).astype(np.float32),
                },
            )
        ]

    def image(self, value: ir.Value) -> tuple[str, Literal["nhwc", "nchw"]]:
        """The tensor that holds an image, (batch, c, h, w) in the graph, and how."""
        if value in self.channels_last:
            return self.tensor(value), "nhwc"
        source = channels_last_source(value)
        if source is None:
            return self.tensor(value), "nchw"
        to_first = value.producer()
        if to_first is not None and len(value.consumers()) == 1:
            self.claimed.add(to_first)
        return self.tensor(source), "nhwc"

    def patch_conv(self, match: ConvMatch, covered: list[ir.Node]) -> None:
        """A convolution whose patches do not overlap: patches as rows, then a product."""
        node = match.node
        x, w = _input(node, 0), _input(node, 1)
        source = self.dequantized(x)
        quantize = None if source is None else self.root(_input(source, 0)).producer()
        if quantize is None or not is_standard(quantize, "QuantizeLinear"):
            source = None  # integers, but not of an image that could be quantized as it is cut
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        product = self.product(covered, source, w, bias)

        quant: dict[str, Array] = {}
        name, scale, zero_point = f"{node.outputs[0].name}_patches", 0.0, 0
        if product.act == "int8":
            # Patches are cut and quantized in one go. They keep the name of the QuantizeLinear's
            # output, whose values they are, in another order.
            assert source is not None
            assert quantize is not None
            scale, zero_point = scalar_quantization(quantize)
            quant["quant"] = quant_args(scale, zero_point)
            x, name = _input(quantize, 0), str(quantize.outputs[0].name)
            if len(quantize.outputs[0].consumers()) == 1:
                self.claimed.update((quantize, source))
        image, layout = self.image(x)
        batch, c, height, width = shape_of(x)
        _, _, grid_h, grid_w = shape_of(node.outputs[0])
        patch_h, patch_w = height // grid_h, width // grid_w
        self.tensors[name] = Tensor(
            name=name,
            dtype=product.act,
            shape=(product.m, product.k),
            scale=scale,
            zero_point=zero_point,
        )
        # Pixel (b, c, y, x) lies in row (b, y // patch_h, x // patch_w) of patches.
        pixels = np.arange(product.m * product.k)
        if layout == "nchw":
            pixels = pixels.reshape(batch, grid_h, grid_w, c, patch_h, patch_w)
            pixels = pixels.transpose(0, 3, 1, 4, 2, 5)
        else:
            pixels = pixels.reshape(batch, grid_h, grid_w, patch_h, patch_w, c)
            pixels = pixels.transpose(0, 5, 1, 3, 2, 4)
            weights = product.constants["w"].reshape(c, patch_h, patch_w, product.n)
            product.constants["w"] = np.ascontiguousarray(
                weights.transpose(1, 2, 0, 3).reshape(product.k, product.n)
            )
        if product.act == "int8":
            self.stored_in[name] = name, pixels.reshape(batch, c, height, width)
        patches = Call(
            kernel=Patchify(
                batch=batch,
                # With channels last, a line of a patch is one run of all channels.
                channels=c if layout == "nchw" else 1,
                grid_h=grid_h,
                grid_w=grid_w,
                patch_h=patch_h,
                patch_w=patch_w if layout == "nchw" else patch_w * c,
                out=product.act,
            ),
            label=f"{_label(node)}/patches",
            reads={"x": image},
            writes={"y": name},
            constants=quant,
        )
        self.dense(product, name, before=patches)

    def product(
        self, covered: list[ir.Node], source: ir.Node | None, w: ir.Value, bias: ir.Value | None
    ) -> _Product:
        """x @ w + bias, in integers where x, w and bias are quantized, in float otherwise.

        Args:
            covered: the nodes that compute it.
            source: the DequantizeLinear behind x, if there is one.
            w: (k, n) or, of a convolution, (n, ...).
            bias: (n,) or None.
        """
        weight = constant(w)
        assert weight is not None
        matrix = weight if weight.ndim == 2 else weight.reshape(weight.shape[0], -1).T
        k, n = matrix.shape
        m = math.prod(shape_of(covered[-1].outputs[0])) // n
        integers = None if source is None else _integer_operands(source, w, bias)
        if integers is not None:
            return _Product(covered, m, n, k, "int8", integers)
        bias_array = constant(bias)
        constants: dict[str, Array] = {
            "w": np.ascontiguousarray(matrix, np.float32),
            "bias": np.zeros(n, np.float32)
            if bias_array is None
            else bias_array.reshape(-1).astype(np.float32),
        }
        return _Product(covered, m, n, k, "float32", constants)

    def dense(self, product: _Product, x: str, before: Call | None = None) -> None:
        """Adds the call of `product`, with the GELU and the residual that follow it."""
        m, n = product.m, product.n
        reads = {"x": x}
        gelu = self.gelu(product)
        residual_rows, residual_first = 0, False
        residual_dtype: Half = "float32"
        add = self.follower(product.result, "Add")
        operand = None if add is None else self.other_input(add, product.result)
        if add is not None and operand is not None:
            array = constant(operand)
            size = math.prod(shape_of(operand))
            whole = math.prod(shape_of(add.outputs[0])) == m * n and dtype_of(operand) == "float32"
            if whole and array is not None and shape_of(operand)[-1] == n and m % (size // n) == 0:
                residual_rows = size // n
                residual_dtype, product.constants["residual"] = _stored(
                    operand, array.reshape(-1, n)
                )
            elif whole and array is None and size in (m * n, n) and shape_of(operand)[-1] == n:
                residual_rows = size // n  # all rows, or one that is added to each
                reads["residual"] = self.tensor(operand)
            if residual_rows:
                product.covered.append(add)
                if not gelu:
                    gelu = residual_first = self.gelu(product)
        grouped = self.grouped.get(product.result)
        self.add(
            product.covered,
            lambda out: Dense(
                m=m,
                n=n,
                k=product.k,
                x=product.act,
                gelu=gelu,
                residual_rows=residual_rows,
                residual_dtype=residual_dtype,
                residual_first=residual_first,
                out=out,
                out_groups=3 if grouped else 1,
            ),
            reads,
            product.constants,
            before,
            grouped,
        )

    def gelu(self, product: _Product) -> bool:
        """Whether the GELU that follows `product` is now part of it."""
        node = self.follower(product.result, "Gelu")
        if node is None or node.attributes.get_string("approximate", "none") != "none":
            return False
        product.covered.append(node)
        return True

    def attention(self, node: ir.Node) -> None:
        """Softmax between two products of activations, with all the moves around them."""
        match = match_attention(node)
        if match is None:
            return
        s_scale, o_scale, zeros = match.scale, 1.0, [0, 0, 0]
        x = None
        if match.is_int8:
            pairs = []
            x = f"{match.q.source.name}_int8"
            for operand in (match.q, match.k, match.v):
                assert operand.quantize is not None
                pairs.append(scalar_quantization(operand.quantize))
                value = operand.quantize.outputs[0]
                self.stored_in[str(value.name)] = x, layout(value, operand.source)
            shape = (match.batch * match.tokens, 3 * match.heads * match.dim)
            self.tensors[x] = Tensor(name=x, dtype="int8", shape=shape)
            self.grouped[match.q.source] = x, np.stack([quant_args(*pair) for pair in pairs])
            s_scale *= pairs[0][0] * pairs[1][0]
            o_scale = pairs[2][0] / 256
            zeros = [zero_point for _, zero_point in pairs]
        act: Act = "int8" if match.is_int8 else "float32"
        self.claimed.update(match.covered)
        self.add(
            list(match.covered),
            lambda out: Attention(
                batch=match.batch,
                tokens=match.tokens,
                heads=match.heads,
                dim=match.dim,
                x=act,
                out=out,
            ),
            {"x": x or self.tensor(match.q.source)},
            {"params": np.array([s_scale, *zeros, o_scale], np.float32)},
        )

    def selection(self, node: ir.Node) -> None:
        """TopK, whatever moves its indices, and the Gather of the rows that they name."""
        match = match_selection(node)
        if match is None:
            self.indices(node)
            return
        gather = match.covered[-1]
        chosen = f"{node.outputs[1].name}_rows"
        kept = match.leading + match.kept
        self.tensors[chosen] = Tensor(name=chosen, dtype="int32", shape=(match.batch, kept))
        self.claimed.update(match.covered)
        self.selections.append(
            Selection(
                graph_value=str(node.outputs[1].name),
                tensor=chosen,
                leading=match.leading,
                offset=match.offset,
            )
        )
        select = Call(
            kernel=SelectTokens(
                batch=match.batch,
                tokens=match.tokens,
                kept=match.kept,
                offset=match.offset,
                leading=match.leading,
            ),
            label=_label(node),
            reads={"scores": self.tensor(match.scores)},
            writes={"y": chosen},
        )
        rows = Call(
            kernel=GatherRows(
                batch=match.batch,
                tokens=match.all_tokens,
                kept=kept,
                n=shape_of(match.rows)[-1],
            ),
            label=_label(gather),
            reads={"x": self.tensor(match.rows), "indices": chosen},
            writes={"y": self.tensor(gather.outputs[0])},
        )
        self.calls[gather] = [select, rows]

    def indices(self, node: ir.Node) -> None:
        """TopK whose indices go elsewhere than into one Gather of rows."""
        if not is_standard(node, "TopK") or node.outputs[0].consumers():
            return
        scores = _input(node, 0)
        shape = shape_of(scores)
        if self.is_inversion(node):
            self.claimed.add(node)
            self.calls[node] = [
                Call(
                    kernel=InversePermutation(batch=math.prod(shape[:-1]), n=shape[-1]),
                    label=_label(node),
                    reads={"x": self.tensor(scores)},
                    writes={"y": self.tensor(node.outputs[1])},
                )
            ]
            return
        last = node.attributes.get_int("axis", -1) in (-1, len(shape) - 1)
        if not last or node.attributes.get_int("largest", 1) != 1:
            return
        kept = shape_of(node.outputs[1])[-1]
        self.claimed.add(node)
        name = str(node.outputs[1].name)
        self.selections.append(Selection(graph_value=name, tensor=name, leading=0, offset=0))
        self.calls[node] = [
            Call(
                kernel=SelectTokens(
                    batch=math.prod(shape[:-1]), tokens=shape[-1], kept=kept, index="int64"
                ),
                label=_label(node),
                reads={"scores": self.tensor(scores)},
                writes={"y": self.tensor(node.outputs[1])},
            )
        ]

    def is_inversion(self, node: ir.Node) -> bool:
        """Whether a TopK puts all of another TopK's indices into order: their inverse."""
        order = _input(node, 0)
        source = order.producer()
        return (
            source is not None
            and is_standard(source, "TopK")
            and order is source.outputs[1]
            and shape_of(order) == shape_of(_input(source, 0)) == shape_of(node.outputs[1])
            and node.attributes.get_int("largest", 1) == 0
            and node.attributes.get_int("axis", -1) in (-1, len(shape_of(order)) - 1)
        )

    def softmax(self, node: ir.Node) -> None:
        if not is_standard(node, "Softmax"):
            return
        shape = shape_of(node.outputs[0])
        if node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
            return
        self.claimed.add(node)
        self.calls[node] = [
            Call(
                kernel=Softmax(rows=math.prod(shape[:-1]), n=shape[-1]),
                label=_label(node),
                reads={"x": self.tensor(_input(node, 0))},
                writes={"y": self.tensor(node.outputs[0])},
            )
        ]

    def layer_norm(self, node: ir.Node) -> None:
        if not is_standard(node, "LayerNormalization"):
            return
        x = _input(node, 0)
        shape = shape_of(x)
        gamma, beta = constant(node.inputs[1]), constant(node.inputs[2])
        last = node.attributes.get_int("axis", -1) in (-1, len(shape) - 1)
        if not last or gamma is None or beta is None:
            return
        eps = node.attributes.get_float("epsilon", 1e-5)
        rows, n = math.prod(shape[:-1]), shape[-1]
        images, leading = 1, 0
        cut = x.producer()
        if cut is not None and len(x.consumers()) == 1 and not x.is_graph_output():
            leading = _rows_cut_off(cut)
            if leading:
                self.claimed.add(cut)
                images, x = shape[0], _input(cut, 0)
        self.add(
            [node],
            lambda out: LayerNorm(rows=rows, n=n, eps=eps, out=out, images=images, leading=leading),
            {"x": self.tensor(x)},
            {"gamma": gamma.reshape(-1), "beta": beta.reshape(-1)},
        )

    def token_mean(self, node: ir.Node) -> None:
        if not is_standard(node, "ReduceMean"):
            return
        x = _input(node, 0)
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if (
            axes is None
            or axes.size != 1
            or int(axes.reshape(-1)[0]) not in (1, -2)
            or len(shape_of(x)) != 3
        ):
            return
        batch, tokens, n = shape_of(x)
        self.add(
            [node],
            lambda out: TokenMean(batch=batch, tokens=tokens, n=n, out=out),
            {"x": self.tensor(x)},
            {},
        )

    def global_filter(self, node: ir.Node) -> None:
        forms: dict[str, type[DftFilter | CircularFilter]] = {
            "GlobalFilterDft": DftFilter,
            "GlobalFilterCircular": CircularFilter,
        }
        kernel_class = forms.get(node.op_type.split("_")[0])
        if node.domain != "gfcompile" or kernel_class is None:
            return
        x = _input(node, 0)
        batch, h, w, c = shape_of(x)
        names = ("k_re", "k_im") if kernel_class is DftFilter else ("kernel",)
        dtypes: set[Half] = set()
        constants: dict[str, Array] = {}
        for name, value in zip(names, node.inputs[1:], strict=True):
            assert value is not None
            array = constant(value)
            if array is None:
                raise CompileError(f"{node.name}: the filter's weights must be constants")
            dtype, constants[name] = _stored(value, array)
            dtypes.add(dtype)
        (k_dtype,) = dtypes  # the passes store all of a filter alike
        kernel: DftFilter | CircularFilter
        kernel = kernel_class(batch=batch, h=h, w=w, c=c, k_dtype=k_dtype)
        source = self.dequantized(x)
        integers = None
        if source is not None and isinstance(kernel, CircularFilter):
            integers = _integer_filter(source, _input(node, 1))
        if source is not None and integers is not None and CircularFilter.exact_in_float(h, w):
            kernel = CircularFilter(batch=batch, h=h, w=w, c=c, x="int8")
            constants, x = integers, _input(source, 0)
        self.claimed.add(node)
        self.calls[node] = [
            Call(
                kernel=kernel,
                label=_label(node),
                reads={"x": self.tensor(x)},
                writes={"y": self.tensor(node.outputs[0])},
                constants=constants,
            )
        ]

    def quantize(self, node: ir.Node) -> None:
        if not is_standard(node, "QuantizeLinear"):
            return
        x = _input(node, 0)
        self.claimed.add(node)
        self.calls[node] = [
            Call(
                kernel=Quantize(size=math.prod(shape_of(x))),
                label=_label(node),
                reads={"x": self.tensor(x)},
                writes={"y": self.tensor(node.outputs[0])},
                constants={"quant": quant_args(*scalar_quantization(node))},
            )
        ]

    def dequantize(self, node: ir.Node) -> None:
        """A DequantizeLinear of an activation; dropped later if integer products read it alone."""
        if not is_standard(node, "DequantizeLinear"):
            return
        x = _input(node, 0)
        self.claimed.add(node)
        self.calls[node] = [
            Call(
                kernel=Dequantize(size=math.prod(shape_of(x))),
                label=_label(node),
                reads={"x": self.tensor(x)},
                writes={"y": self.tensor(node.outputs[0])},
                constants={"dequant": np.array(scalar_quantization(node), np.float32)},
            )
        ]

    def leftover(self, run: list[ir.Node]) -> list[Call]:
        """The calls for nodes that no schedule class takes, lowered by Relax."""
        calls = []
        self.unscheduled.update(node.op_type for node in run if is_standard(node, *_HEAVY))
        for lowered in generic.lower(run) if run else ():
            for name, (dtype, shape) in lowered.temporaries.items():
                self.tensors[name] = Tensor(name=name, dtype=dtype, shape=shape)

            def named(operands: Mapping[str, ir.Value | str]) -> dict[str, str]:
                return {
                    argument: value if isinstance(value, str) else self.tensor(value)
                    for argument, value in operands.items()
                }

            calls.append(
                Call(
                    kernel=lowered.kernel,
                    label=lowered.label,
                    reads=named(lowered.reads),
                    writes=named(lowered.writes),
                    constants=lowered.constants,
                )
            )
        return calls


def _integer_operands(
    source: ir.Node, w: ir.Value, bias: ir.Value | None
) -> dict[str, Array] | None:
    """w, scale and bias of an exact integer product; None where the graph does not allow one.

    The int32 bias of the result already holds minus the activation's zero point times the weight's
    column sums.
    """
    x_scale, x_zero_point = scalar_quantization(source)
    weight = w.producer()
    if weight is None or not is_standard(weight, "DequantizeLinear"):
        return None
    data = constant(_input(weight, 0))
    w_scale, w_zero_point, axis = quantization(weight)
    if data is None or data.dtype != np.int8 or w_zero_point.any():
        return None
    channel_axis = 1 if data.ndim == 2 else 0
    if w_scale.size > 1 and axis % data.ndim != channel_axis:
        return None
    matrix = data if data.ndim == 2 else data.reshape(data.shape[0], -1).T
    n = matrix.shape[1]
    scale = np.broadcast_to(np.float32(x_scale) * w_scale.reshape(-1), (n,))
    bias_data: Array | None = np.zeros(n, np.int32)
    if bias is not None:
        node = bias.producer()
        if node is None or not is_standard(node, "DequantizeLinear"):
            return None
        bias_data = constant(_input(node, 0))
        bias_scale = quantization(node)[0]
        if bias_data is None or bias_data.dtype != np.int32:
            return None
        if not np.allclose(bias_scale, scale, rtol=1e-6, atol=0):
            return None
    assert bias_data is not None
    sums = matrix.astype(np.int64).sum(axis=0)
    folded = bias_data.reshape(-1).astype(np.int64) - x_zero_point * sums
    return {
        "w": np.ascontiguousarray(matrix),
        "scale": np.ascontiguousarray(scale, np.float32),
        "bias": folded.astype(np.int32),
    }


def _integer_filter(source: ir.Node, kernel: ir.Value) -> dict[str, Array] | None:
    """The constants of a circular filter in integers; None where the graph has none."""
    x_scale, x_zero_point = scalar_quantization(source)
    weight = kernel.producer()
    if weight is None or not is_standard(weight, "DequantizeLinear"):
        return None
    data = constant(_input(weight, 0))
    scale, zero_point, axis = quantization(weight)
    if data is None or data.dtype != np.int8 or zero_point.any() or axis % data.ndim != 2:
        return None
    return {
        "kernel": data,
        "scale": np.asarray(np.float32(x_scale) * scale, np.float32),
        "zero_point": np.array([x_zero_point], np.float32),
    }


def _rows_cut_off(node: ir.Node) -> int:
    """How many rows a Slice takes off the front of each image's; 0 if it does not do just that."""
    if not is_standard(node, "Slice"):
        return 0
    bounds = [constant(value) for value in node.inputs[1:]]
    before, after = (shape_of(value) for value in (_input(node, 0), node.outputs[0]))
    if len(before) != 3 or len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds):
        return 0
    start, end, axis, *step = (int(b.reshape(-1)[0]) for b in bounds if b is not None)
    if axis not in (1, -2) or end < before[1] or step not in ([], [1]):
        return 0
    return before[1] - after[1] if start > 0 else 0


def _stored(value: ir.Value, array: Array) -> tuple[Half, Array]:
    """How a float constant is to be stored, and its bits: halves where the graph has halves."""
    cast = value.producer()
    halved = cast is not None and is_standard(cast, "Cast") and dtype_of(_input(cast, 0))
    if halved == "float16":
        return "float16", array.astype(np.float16).view(np.uint16)
    return "float32", array.astype(np.float32)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.name} lacks input {index}"
    return value


def _label(*nodes: ir.Node) -> str:
    """The torch module that these nodes came from, or the first node's name."""
    modules = filter(None, map(module_path, nodes))
    return next(modules, "") or nodes[0].name or str(nodes[0].outputs[0].name)


def _in_fixed_point(call: Call) -> Call:
    """A call beside int8 ones: who asked for these lets float products be as exact otherwise."""
    if not isinstance(call.kernel, Dense) or call.kernel.x != "float32":
        return call
    return replace(call, kernel=replace(call.kernel, fixed_point=True))


def _live(calls: list[Call], outputs: tuple[str, ...]) -> tuple[Call, ...]:
    """The calls whose results are used, in order."""
    needed = set(outputs)
    live = []
    for call in reversed(calls):
        if needed & set(call.writes.values()):
            needed.update(call.reads.values())
            live.append(call)
    return tuple(reversed(live))
