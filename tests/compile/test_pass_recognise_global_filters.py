"""Global filters, however they are written, against NumPy's FFT in float64.

Tolerance: a transform along n values rounds like sqrt(n) float32 roundings, four of them in a
row; 4 * 2^-24 * (h + w) of the filter's largest gain times the largest input is above four
standard deviations of that.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import Array, check_model, model_of, ops, run, sampled
from torch import Tensor, nn

from gfcompile.compile.passes import FftForm
from gfcompile.compile.passes.filter_functions import (
    DOMAIN,
    FilterForm,
    filter_function,
    function_name,
    parse_function_name,
)
from gfcompile.compile.passes.recognise_global_filters import (
    GlobalFilter,
    recognise_global_filters,
)
from gfcompile.compile.passes.remove_dead_code import remove_dead_code
from gfcompile.compile.trace import trace

FORMS: tuple[FilterForm, ...] = ("dft", "circular")
H, W, C = 5, 6, 3
HALF = W // 2 + 1
fft = torch.fft


def filter_numpy(x: Array, k: Array) -> npt.NDArray[np.float64]:
    """irfft2(rfft2(x) * k) over the middle axes of (B, h, w, C), in float64."""
    spectrum = np.fft.rfft2(x.astype(np.float64), axes=(1, 2), norm="ortho") * k
    return np.fft.irfft2(spectrum, s=x.shape[1:3], axes=(1, 2), norm="ortho")


def assert_close(actual: Array, expected: Array, x: Array, k: Array, h: int, w: int) -> None:
    bound = 4 * 2.0**-24 * (h + w) * np.abs(k).max() * np.abs(x).max()
    assert np.abs(actual - expected).max() <= bound


def rewrite(
    model: ir.Model, form: FftForm = "dft"
) -> tuple[list[GlobalFilter], list[str], set[ir.Node]]:
    refusals: list[str] = []
    found, native = recognise_global_filters(model, lambda *_: form, refusals.append)
    remove_dead_code(model)
    check_model(model)
    return found, refusals, native


# -- the chain as the exporter writes it --------------------------------------------------------


def chain_model(h: int, w: int, c: int, k: Array) -> ir.Model:
    """rfft2, product, irfft2 as in the traced graph, orthonormal; k is complex (h, half, c)."""
    x = f"float[1,{h},{w},{c}]"
    text = f"""
        g ({x} image) => ({x} logits) {{
            u = Unsqueeze(image, last)
            us = Div(u, root)
            a = DFT <onesided=1> (us, , two)
            z = DFT (a, , one)
            re = Slice(z, start, mid, last)
            im = Slice(z, mid, end, last)
            rr = Mul(re, k_re)
            ii = Mul(im, k_im)
            ri = Mul(re, k_im)
            ir = Mul(im, k_re)
            pre = Sub(rr, ii)
            pim = Add(ri, ir)
            p = Concat <axis=-1> (pre, pim)
            b = DFT <inverse=1> (p, , one)
            s = DFT <inverse=1, onesided=1> (b, width, two)
            t = Mul(s, root)
            r = Slice(t, start, mid, last)
            logits = Squeeze(r, last)
        }}"""
    return model_of(
        text,
        last=np.array([-1]),
        start=np.array([0]),
        mid=np.array([1]),
        end=np.array([2]),
        one=np.array(1),
        two=np.array(2),
        width=np.array(w),
        root=np.array(np.sqrt(h * w), np.float32),
        k_re=k.real[..., None].astype(np.float32),
        k_im=k.imag[..., None].astype(np.float32),
    )


def complex_weight(h: int, w: int, c: int) -> npt.NDArray[np.complex64]:
    """Not Hermitian in its first and last column, as learned filters are."""
    parts = sampled(2, h, w // 2 + 1, c, seed=h * 1000 + w)
    return (parts[0] + 1j * parts[1]).astype(np.complex64)


@pytest.mark.parametrize("form", FORMS)
@given(st.integers(1, 17), st.integers(1, 17))
@settings(deadline=None, max_examples=25)
def test_every_grid_becomes_one_call_that_equals_numpy(form: FilterForm, h: int, w: int) -> None:
    k, x = complex_weight(h, w, C), sampled(1, h, w, C, seed=1)
    model = chain_model(h, w, C, k)
    found, refusals, _ = rewrite(model, form)
    assert not refusals
    assert [(f.h, f.w, f.c, f.form) for f in found] == [(h, w, C, form)]
    assert ops(model) == {function_name(form, h, w): 1}
    assert_close(run(model, x), filter_numpy(x, k), x, k, h, w)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("h", "w"), [(56, 56), (28, 28), (24, 24), (14, 14), (7, 7)])
def test_the_grids_of_the_zoo_are_exact_to_rounding(form: FilterForm, h: int, w: int) -> None:
    k, x = complex_weight(h, w, 4), sampled(1, h, w, 4, seed=1)
    model = chain_model(h, w, 4, k)
    rewrite(model, form)
    assert_close(run(model, x), filter_numpy(x, k), x, k, h, w)


def test_the_spectrum_is_extracted_to_the_last_bit_and_hermitian() -> None:
    h, w = 6, 8
    k = complex_weight(h, w, C)
    model = chain_model(h, w, C, k)
    rewrite(model, "dft")
    (call,) = model.graph
    k_re, k_im = (value.const_value.numpy() for value in call.inputs[1:])  # type: ignore[union-attr]
    assert k_re.dtype == k_im.dtype == np.float32
    inner = slice(1, w // 2)
    # Computed in float64 and rounded once; the root in the graph is a float32 itself.
    np.testing.assert_allclose(k_re[:, inner] + 1j * k_im[:, inner], k[:, inner], rtol=3e-7)
    for column in (0, w // 2):
        z = k_re[:, column] + 1j * k_im[:, column]
        np.testing.assert_array_equal(z, z[-np.arange(h) % h].conj())


def test_native_leaves_the_nodes_and_reports_the_filter() -> None:
    k, x = complex_weight(H, W, C), sampled(1, H, W, C, seed=1)
    model = chain_model(H, W, C, k)
    before = ops(model)
    found, refusals, native = rewrite(model, "native")
    assert ops(model) == before
    assert [f.form for f in found] == ["native"]
    assert {node.op_type for node in native} == {"DFT"}
    assert len(native) == 4
    assert not refusals
    # ONNX Runtime evaluates a DFT term by term: n roundings instead of sqrt(n).
    assert_close(run(model, x), filter_numpy(x, k), x, 4 * k, H, W)


# -- the functions ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_function_serves_any_batch_and_width(form: FilterForm) -> None:
    kernel = sampled(H, W, 4, seed=2).astype(np.float64)
    k = np.fft.rfft2(kernel, axes=(0, 1))
    constants = {"k_re": k.real, "k_im": k.imag} if form == "dft" else {"kernel": kernel}
    for batch in (1, 3):
        x = sampled(batch, H, W, 4)
        image = ir.val("image", dtype=ir.DataType.FLOAT, shape=x.shape)
        operands = [
            ir.val(name, const_value=ir.tensor(a.astype(np.float32), name=name))
            for name, a in constants.items()
        ]
        attributes = {"channels": 4} if form == "circular" else {}
        y = ir.val("y", dtype=ir.DataType.FLOAT, shape=x.shape)
        node = ir.node(
            function_name(form, H, W), [image, *operands], attributes, domain=DOMAIN, outputs=[y]
        )
        opsets = {"": 20, DOMAIN: 1}
        graph = ir.Graph(
            [image], [y], nodes=[node], initializers=operands, opset_imports=opsets, name="g"
        )
        model = ir.Model(graph, ir_version=10, functions=[filter_function(form, H, W, 20)])
        check_model(model)
        for optimize in (False, True):
            actual = run(model, x, optimize=optimize)
            assert_close(actual, filter_numpy(x, k), x, k, H, W)


def test_a_functions_name_says_form_and_grid() -> None:
    for form in FORMS:
        assert parse_function_name(function_name(form, 14, 8)) == (form, 14, 8)
    for other in ("GlobalFilterDft", "GlobalFilterDft_14", "Gelu", "GlobalFilterDft_1x2_3"):
        assert parse_function_name(other) is None


# -- written by hand in torch -------------------------------------------------------------------


class User(nn.Module):
    """A module of a user: one function of the input and of parameters."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


@dataclass
class Written:
    """A way to write a filter: the function, the weights' shapes, the input's, the grid found."""

    function: Callable[..., Tensor]
    weights: list[tuple[int, ...]]
    shape: tuple[int, ...] = (1, H, W, C)
    grid: tuple[int, int, int] = (H, W, C)
    extra: dict[str, int] = field(default_factory=dict)  # what stays beside the call


def _product_by_hand(x: Tensor, k: Tensor) -> Tensor:
    z = fft.rfft2(x, dim=(1, 2))
    re = z.real * k[..., 0] - z.imag * k[..., 1]
    im = z.real * k[..., 1] + z.imag * k[..., 0]
    return fft.irfft2(torch.complex(re, im), s=(H, W), dim=(1, 2))


def _flattened(x: Tensor, k: Tensor) -> Tensor:
    z = fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(1, H * HALF, C)
    z = (z * torch.view_as_complex(k)).reshape(1, H, HALF, C)
    return fft.irfft2(z, s=(H, W), dim=(1, 2), norm="ortho")


def _norm(norm: str) -> Callable[[Tensor, Tensor], Tensor]:
    def function(x: Tensor, k: Tensor) -> Tensor:
        z = fft.rfft2(x, dim=(1, 2), norm=norm) * torch.view_as_complex(k)
        return fft.irfft2(z, s=(H, W), dim=(1, 2), norm=norm)

    return function


as_complex = torch.view_as_complex
NHWC, NCHW = [(H, HALF, C, 2)], [(C, H, HALF, 2)]
AROUND = {"Transpose": 2}

WRITTEN = {
    "norm ortho": Written(_norm("ortho"), NHWC),
    "norm backward": Written(_norm("backward"), NHWC),
    "norm forward": Written(_norm("forward"), NHWC),
    "norms that differ": Written(
        lambda x, k: fft.irfft2(fft.rfft2(x, dim=(1, 2)) * as_complex(k), dim=(1, 2), norm="ortho"),
        NHWC,
    ),
    "NCHW": Written(
        lambda x, k: fft.irfft2(fft.rfft2(x) * as_complex(k), s=(H, W)),
        NCHW,
        shape=(1, C, H, W),
        extra=AROUND,
    ),
    "rfftn": Written(
        lambda x, k: fft.irfftn(fft.rfftn(x, dim=(2, 3)) * as_complex(k), s=(H, W), dim=(2, 3)),
        NCHW,
        shape=(1, C, H, W),
        extra=AROUND,
    ),
    "fft2, real part": Written(
        lambda x, k: fft.ifft2(fft.fft2(x, dim=(1, 2)) * as_complex(k), dim=(1, 2)).real,
        [(H, W, C, 2)],
    ),
    "fft2 of complex": Written(
        lambda x, k: fft.ifft2(fft.fft2(x.to(torch.complex64)) * as_complex(k)).real,
        [(C, H, W, 2)],
        shape=(1, C, H, W),
        extra=AROUND,
    ),
    "torch.complex": Written(
        lambda x, a, b: fft.irfft2(
            fft.rfft2(x, dim=(1, 2)) * torch.complex(a, b), s=(H, W), dim=(1, 2)
        ),
        [(H, HALF, C), (H, HALF, C)],
    ),
    "conjugated, on the left": Written(
        lambda x, k: fft.irfft2(
            as_complex(k).conj() * fft.rfft2(x, dim=(1, 2)), s=(H, W), dim=(1, 2)
        ),
        NHWC,
    ),
    "real filter": Written(
        lambda x, k: fft.irfft2(fft.rfft2(x, dim=(1, 2)) * k, s=(H, W), dim=(1, 2)),
        [(H, HALF, C)],
    ),
    "axis after axis": Written(
        lambda x, k: fft.irfft(
            fft.ifft(fft.fft(fft.rfft(x, dim=2), dim=1) * as_complex(k), dim=1), n=W, dim=2
        ),
        NHWC,
    ),
    "product by hand": Written(_product_by_hand, NHWC),
    "flattened spectrum": Written(_flattened, [(H * HALF, C, 2)]),
    "one axis": Written(
        lambda x, k: fft.irfft(fft.rfft(x, dim=1) * as_complex(k), n=W, dim=1),
        [(HALF, C, 2)],
        shape=(2, W, C),
        grid=(1, W, C),
        extra={"Reshape": 2},
    ),
    "two filters in a row": Written(
        lambda x, k: _norm("ortho")(_norm("ortho")(x, k), k), NHWC, grid=(H, W, C)
    ),
    "batch": Written(_norm("ortho"), NHWC, shape=(3, H, W, C)),
    "no batch": Written(
        lambda x, k: fft.irfft2(fft.rfft2(x) * as_complex(k), s=(H, W)),
        NCHW,
        shape=(C, H, W),
        extra={**AROUND, "Reshape": 2},
    ),
    "channels in two axes": Written(
        lambda x, k: _norm("ortho")(x.reshape(1, H, W, 2, 3), k).reshape(1, H, W, 6),
        [(H, HALF, 2, 3, 2)],
        shape=(1, H, W, 6),
        grid=(H, W, 6),
        extra={"Reshape": 2},
    ),
    "beside a skip connection": Written(
        lambda x, k: x + _norm("ortho")(x, k), NHWC, extra={"Add": 1}
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_filter_written_by_hand_becomes_one_call(name: str) -> None:
    written = WRITTEN[name]
    module = User(written.function, *written.weights).eval()
    x = torch.from_numpy(sampled(*written.shape, seed=3))
    model = trace(module, x)
    found, refusals, _ = rewrite(model)
    assert not refusals
    assert {(f.h, f.w, f.c) for f in found} == {written.grid}
    left = dict(ops(model))
    assert left.pop(function_name("dft", *written.grid[:2])) == len(found)
    assert left == written.extra
    with torch.no_grad():
        expected = module(x).numpy()
    # torch rounds, too, and the largest output may be well below the largest gain.
    bound = 16 * 2.0**-24 * (H + W) * np.abs(expected).max()
    assert np.abs(run(model, x.numpy()) - expected).max() <= bound


def test_filters_that_share_their_spectrum_are_both_found() -> None:
    def both(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        z = fft.rfft2(x, dim=(1, 2))
        y = [fft.irfft2(z * as_complex(k), s=(H, W), dim=(1, 2)) for k in (a, b)]
        return y[0] * y[1]

    module, x = User(both, *NHWC, *NHWC), torch.from_numpy(sampled(1, H, W, C))
    model = trace(module, x)
    found, refusals, _ = rewrite(model)
    assert (len(found), refusals) == (2, [])
    assert ops(model) == {function_name("dft", H, W): 2, "Mul": 1}
    assert len(model.functions) == 1


def test_a_filter_that_stays_native_does_not_hide_the_next() -> None:
    def two(x: Tensor, k: Tensor, m: Tensor) -> Tensor:
        return _norm("ortho")(_norm("ortho")(x, k) @ m + 1, k)

    module, x = User(two, *NHWC, (C, C)), torch.from_numpy(sampled(1, H, W, C))
    model = trace(module, x)
    forms: Iterator[FftForm] = iter(("native", "dft"))
    refusals: list[str] = []
    found, native = recognise_global_filters(model, lambda *_: next(forms), refusals.append)
    assert not refusals
    assert [f.form for f in found] == ["native", "dft"]
    remove_dead_code(model)
    assert {node for node in model.graph if node.op_type == "DFT"} == native


def test_a_filter_is_named_after_its_module() -> None:
    model = trace(nn.Sequential(User(_norm("ortho"), *NHWC)), torch.zeros(1, H, W, C) + 1)
    found, _, _ = rewrite(model)
    assert [f.name for f in found] == ["0"]


# -- what is no filter stays ---------------------------------------------------------------------

NO_FILTER: dict[str, tuple[Callable[..., Tensor], list[Any], str]] = {
    "a constant added": (
        lambda x, k: fft.irfft2(fft.rfft2(x, dim=(1, 2)) * as_complex(k) + 1, s=(H, W), dim=(1, 2)),
        NHWC,
        "adds a constant",
    ),
    "a product of spectra": (
        lambda x: fft.irfft2(
            fft.rfft2(x, dim=(1, 2)) * fft.rfft2(x + 1, dim=(1, 2)), s=(H, W), dim=(1, 2)
        ),
        [],
        "both depend on the input",
    ),
    "another grid": (
        lambda x: fft.irfft2(fft.rfft2(x, dim=(1, 2)), s=(H, W + 1), dim=(1, 2)),
        [],
        "it turns (1, 5, 6, 3) into (1, 5, 7, 3)",
    ),
    "a gate": (
        lambda x: fft.irfft2(
            torch.complex(torch.relu(fft.rfft2(x, dim=(1, 2)).real), x[:, :, :HALF]),
            s=(H, W),
            dim=(1, 2),
        ),
        [],
        "is not real",
    ),
    "channels mixed": (
        lambda x, m: fft.irfft(
            torch.view_as_complex(
                (torch.view_as_real(fft.rfft(x, dim=1)).transpose(2, 3) @ m)
                .transpose(2, 3)
                .contiguous()
            ),
            n=W,
            dim=1,
        ),
        [(C, C)],
        "no circular convolution",
    ),
    "only an inverse": (
        lambda x: fft.irfft(torch.complex(x, 2 * x), n=2 * (W - 1), dim=1),
        [],
        "is not real",
    ),
    "turned around": (
        lambda x: fft.irfft2(fft.rfft2(x, dim=(1, 2)).conj(), s=(H, W), dim=(1, 2)),
        [],
        "no circular convolution",
    ),
}


@pytest.mark.parametrize("name", NO_FILTER)
def test_what_is_no_filter_is_left_alone_and_said(name: str) -> None:
    function, weights, reason = NO_FILTER[name]
    shape = (1, W, C) if name in ("channels mixed", "only an inverse") else (1, H, W, C)
    module, x = User(function, *weights), torch.from_numpy(sampled(*shape, seed=4))
    model = trace(module, x)
    before = ops(model)
    found, refusals, _ = rewrite(model)
    assert not found
    assert ops(model) == before
    assert refusals
    assert reason in refusals[0]


def test_a_form_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = filter_function("dft", H, W, 20)
    swapped = wrong.inputs[1], wrong.inputs[2]
    for node in wrong:
        for index, value in enumerate(node.inputs):
            if value in swapped:
                node.replace_input_with(index, swapped[1 - swapped.index(value)])
    name = recognise_global_filters.__module__
    monkeypatch.setattr(sys.modules[name], "filter_function", lambda *_: wrong)
    k, x = complex_weight(H, W, C), sampled(1, H, W, C, seed=1)
    model = chain_model(H, W, C, k)
    before, expected = ops(model), run(model, x)
    found, refusals, _ = rewrite(model)
    assert not found
    assert "the dft form differs by" in refusals[0]
    assert ops(model) == before
    assert not model.functions
    np.testing.assert_array_equal(run(model, x), expected)
