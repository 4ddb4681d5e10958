"""DFTs outside a filter against torch. Two float32 transforms of n values, each in its own order
of summation: 8 * n roundings of the largest output are plenty and far below any mistake."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from onnx_models import check_model, model_of, ops, run, sampled
from torch import Tensor, nn

from gfcompile.compile.passes.lower_lone_dfts import lower_lone_dfts
from gfcompile.compile.trace import trace

fft = torch.fft


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "rfft": lambda x: fft.rfft(x, dim=1, norm="ortho").abs(),
    "rfft, padded": lambda x: fft.rfft(x, n=11, dim=2).real,
    "rfft, cut": lambda x: fft.rfft(x, n=4, dim=2, norm="forward").imag,
    "rfft2": lambda x: torch.view_as_real(fft.rfft2(x, dim=(1, 2))),
    "fft of tokens and channels": lambda x: fft.fft(fft.fft(x, dim=-1), dim=-2).real,
    "fft2": lambda x: fft.fft2(x).real,
    "ifft": lambda x: fft.ifft(torch.complex(x, x + 1), dim=1).real,
    "irfft, odd": lambda x: fft.irfft(torch.complex(x, x + 1), n=9, dim=1),
    "irfft, even": lambda x: fft.irfft(torch.complex(x, x + 1), n=8, dim=1, norm="ortho"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_lone_transform_becomes_matrix_products(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 3)
    model, refusals = trace(Apply(CASES[name]), x), []
    transforms = ops(model)["DFT"]
    assert transforms
    assert lower_lone_dfts(model, set(), refusals.append)
    assert ops(model)["MatMul"] == transforms
    assert not refusals
    check_model(model)
    expected = CASES[name](x).numpy()
    bound = 8 * 11 * 2.0**-24 * np.abs(expected).max()
    assert np.abs(run(model, x.numpy()) - expected).max() <= bound


def test_an_axis_that_is_already_last_needs_no_transposes() -> None:
    model = trace(Apply(lambda x: fft.rfft(x, dim=1).real), torch.randn(2, 6))
    lower_lone_dfts(model, set(), print)
    assert ops(model)["Transpose"] == 0


SPECTRUM = """g (float[1,6,1] image) => (float[1,6,2] logits) {
    logits = DFT(image, , axis)
}"""


def test_what_is_kept_is_kept() -> None:
    model = model_of(SPECTRUM, axis=np.array(1))
    assert not lower_lone_dfts(model, set(model.graph), print)
    assert ops(model) == {"DFT": 1}


def test_a_transform_too_long_for_a_matrix_is_left_alone_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(lower_lone_dfts.__globals__, "_MAX_ELEMENTS", 4 * 6 * 6 - 1)
    model, refusals = model_of(SPECTRUM, axis=np.array(1)), []
    assert not lower_lone_dfts(model, set(), refusals.append)
    assert ops(model) == {"DFT": 1}
    assert refusals == ["logits: a DFT of length 6 is too long for a matrix product"]
    x = sampled(1, 6, 1)
    np.testing.assert_allclose(run(model, x)[0, :, 0], np.fft.fft(x[0, :, 0]).real, atol=1e-5)
