import logging
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_models import model_of, ops
from torch import Tensor, nn

from gfcompile.compile import trace as tracing
from gfcompile.compile.trace import rounding_tolerance, save, session, trace
from gfcompile.runtime.errors import CompileError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.weight = nn.Parameter(torch.randn(3, 3, 8, 2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).permute(0, 2, 3, 1))
        spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.weight)
        x = torch.fft.irfft2(spectrum, s=(3, 4), dim=(1, 2), norm="ortho")
        return self.head(nn.functional.gelu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


IMAGE = torch.linspace(-2, 2, 3 * 12 * 16).reshape(1, 3, 12, 16)


@pytest.fixture(scope="module")
def traced(small: nn.Module) -> ir.Model:
    return trace(small, IMAGE)


def test_the_graph_has_the_agreed_names_opset_and_static_types(traced: ir.Model) -> None:
    assert traced.opset_imports[""] >= 20
    assert [value.name for value in traced.graph.inputs] == ["image"]
    assert [value.name for value in traced.graph.outputs] == ["logits"]
    for node in traced.graph:
        for value in node.outputs:
            assert value.dtype is not None
            assert value.shape is not None
            assert all(isinstance(dim, int) for dim in value.shape)


def test_spectra_and_gelu_stay_single_operators(traced: ir.Model) -> None:
    assert ops(traced)["DFT"] == 4
    assert ops(traced)["Gelu"] == ops(traced)["LayerNormalization"] == 1


@pytest.mark.parametrize("optimize", [False, True])
def test_onnx_runtime_computes_what_torch_does(
    small: nn.Module, traced: ir.Model, optimize: bool
) -> None:
    with torch.no_grad():
        expected = small(IMAGE).numpy()
    (actual,) = session(traced, optimize=optimize, threads=1).run(None, {"image": IMAGE.numpy()})
    tolerance = rounding_tolerance(traced) * np.abs(expected).max()
    assert tolerance < 1e-4  # tight enough to mean something
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_a_saved_model_is_one_file_that_computes_the_same(traced: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "traced.onnx"
    save(traced, path)
    assert [p.name for p in path.parent.iterdir()] == ["traced.onnx"]
    feeds = {"image": IMAGE.numpy()}
    outputs = [session(model).run(None, feeds)[0] for model in (traced, ir.load(path))]
    np.testing.assert_array_equal(*outputs)


def test_equal_modules_give_equal_bytes_free_of_this_machines_paths(small: nn.Module) -> None:
    models = [trace(small, IMAGE) for _ in range(2)]
    files = [ir.to_proto(model).SerializeToString(deterministic=True) for model in models]
    assert files[0] == files[1]
    assert b"/tests/" not in files[0]
    assert b"forward" not in files[0]


def test_tracing_says_nothing(
    small: nn.Module, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(small, IMAGE)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]
    assert logging.root.manager.disable == 0  # and logging works again


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_module_that_cannot_be_exported_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CompileError, match=r"cannot trace DataDependent: .+") as caught:
        trace(DataDependent(), IMAGE)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2


def test_a_module_with_two_outputs_is_refused() -> None:
    with pytest.raises(CompileError, match="TwoOutputs: it must return one tensor"):
        trace(TwoOutputs(), IMAGE)


def test_an_export_that_computes_something_else_is_refused(
    small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    strip = tracing._strip_origins

    def spoil(model: ir.Model) -> None:
        strip(model)
        bias = model.graph.initializers["head.bias"]
        bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.01))  # type: ignore[union-attr]

    monkeypatch.setattr(tracing, "_strip_origins", spoil)
    with pytest.raises(CompileError, match=r"differs from torch by 0\.01"):
        trace(small, IMAGE)


def test_a_quantized_graph_may_differ_from_torch_as_its_own_ties_make_it() -> None:
    """Every pixel is a tie, and torch may round each to either side: 11 dB, yet nobody's fault."""
    model = model_of(
        """g (float[1,1,64,64] image) => (float[1,1,64,64] logits) {
            q = QuantizeLinear(image, step, zero)
            logits = DequantizeLinear(q, step, zero)
        }""",
        step=np.array(0.125, np.float32),
        zero=np.array(0, np.int8),
    )
    image = np.full((1, 1, 64, 64), 2.5 * 0.125, np.float32)
    either = np.random.default_rng(9).choice((2, 3), image.shape).astype(np.float32) * 0.125
    tracing._check(model, image, either, "Ties")
    with pytest.raises(CompileError, match="differs from torch"):
        tracing._check(model, image, 2 * either, "Ties")
    with pytest.raises(CompileError, match="differs from torch"):
        tracing._check(model, image, either * np.float32("nan"), "Ties")
