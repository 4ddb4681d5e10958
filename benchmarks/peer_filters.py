"""GFNet's filter written so that converters which refuse rfft2 take it, each in its best form."""

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gfcompile.compile.models.gfnet import GlobalFilter
from gfcompile.targets.spectral import dft_matrices, irfft_matrices, rfft_matrices

# Up to 14x14 the transform of a whole grid is one product, which is what LiteRT runs fastest.
_DENSE_TOKENS = 196


def with_filters(module: nn.Module, kind: Callable[[GlobalFilter], nn.Module]) -> nn.Module:
    """A copy of `module` whose filters are those that `kind` makes of them."""
    replaced = copy.deepcopy(module).eval()
    for name, child in list(replaced.named_modules()):
        if isinstance(child, GlobalFilter):
            replaced.set_submodule(name, kind(child))
    return replaced


class MatrixFilter(nn.Module):
    """The filter as products with constant matrices on the right, for litert-torch.

    A spectrum is (B, C, 2, w', h): real and imaginary parts of the half that a real image has.
    """

    def __init__(self, source: GlobalFilter) -> None:
        super().__init__()
        self.h, self.w = h, w = source.h, source.w
        self.dense = h * w <= _DENSE_TOKENS
        self.gain: Tensor
        weight = source.complex_weight.detach().permute(3, 2, 1, 0)  # (2, C, w', h)
        self.register_buffer("gain", weight.contiguous())
        if self.dense:
            spectra = np.fft.rfft2(np.eye(h * w).reshape(-1, h, w), norm="ortho")
            forward = _parts(spectra.transpose(0, 2, 1))  # (h*w, 2, w', h)
            units = np.eye(forward[0].size).reshape(-1, *forward.shape[1:])
            halves = (units[:, 0] + 1j * units[:, 1]).transpose(0, 2, 1)
            inverse = np.fft.irfft2(halves, s=(h, w), norm="ortho")
            steps = [forward.reshape(h * w, -1), inverse.reshape(-1, h * w)]
        else:
            re, im = dft_matrices(h)
            to_h, from_h = np.block([[re, im], [-im, re]]), np.block([[re, -im], [im, re]])
            steps = [np.hstack(rfft_matrices(w)), to_h, from_h, np.vstack(irfft_matrices(w))]
        self.steps = len(steps)
        for number, matrix in enumerate(steps):
            self.register_buffer(f"step{number}", torch.from_numpy(matrix).float().contiguous())

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        b, n, c = x.shape
        h = self.h
        steps = [self.get_buffer(f"step{number}") for number in range(self.steps)]
        channels = x.transpose(1, 2)  # (B, C, N)
        if self.dense:
            filtered = self._product((channels @ steps[0]).reshape(b, c, 2, -1))
            return (filtered.reshape(b, c, -1) @ steps[1]).transpose(1, 2)
        lines = (channels.reshape(b, c, h, self.w) @ steps[0]).reshape(b, c, h, 2, -1)
        lines = lines.permute(0, 1, 4, 3, 2).reshape(b, c, -1, 2 * h)  # (B, C, w', 2h)
        spectrum = (lines @ steps[1]).reshape(b, c, -1, 2, h).permute(0, 1, 3, 2, 4)
        filtered = self._product(spectrum.reshape(b, c, 2, -1)).reshape(b, c, 2, -1, h)
        lines = filtered.permute(0, 1, 3, 2, 4).reshape(b, c, -1, 2 * h) @ steps[2]
        lines = lines.reshape(b, c, -1, 2, h).permute(0, 1, 4, 3, 2).reshape(b, c, h, -1)
        return (lines @ steps[3]).reshape(b, c, n).transpose(1, 2)

    def _product(self, spectrum: Tensor) -> Tensor:  # (B, C, 2, w' * h), with K
        re, im = spectrum[:, :, 0], spectrum[:, :, 1]
        k_re, k_im = self.gain[0].flatten(1), self.gain[1].flatten(1)
        return torch.stack([re * k_re - im * k_im, re * k_im + im * k_re], 2)


def _parts(spectrum: npt.NDArray[np.complex128]) -> npt.NDArray[np.float64]:
    """Real and imaginary parts, after the first axis."""
    return np.stack([spectrum.real, spectrum.imag], axis=1)


class RfftnFilter(nn.Module):
    """The filter as coremltools' converter takes it: it has rfftn, no rfft2, no complex product."""

    def __init__(self, source: GlobalFilter) -> None:
        super().__init__()
        self.h, self.w = source.h, source.w
        weight = source.complex_weight.detach()
        self.re: Tensor
        self.im: Tensor
        self.register_buffer("re", weight[..., 0].contiguous())
        self.register_buffer("im", weight[..., 1].contiguous())

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        grid = x.reshape(x.shape[0], self.h, self.w, x.shape[2])
        spectrum = torch.fft.rfftn(grid, dim=(1, 2), norm="ortho")
        re, im = spectrum.real, spectrum.imag
        spectrum = torch.complex(re * self.re - im * self.im, re * self.im + im * self.re)
        y: Tensor = torch.fft.irfftn(spectrum, s=(self.h, self.w), dim=(1, 2), norm="ortho")
        return y.reshape(x.shape)
