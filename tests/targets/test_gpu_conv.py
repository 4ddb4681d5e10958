"""CUDA convolutions against torch in float64, behind the stand-in driver."""

import numpy as np
import pytest
import torch
from reference_kernels import convolution
from run_gpu_kernel import GPUS, STORAGE, TX2, run_cases

from gfcompile.targets.tvm.cuda import compile_cuda
from gfcompile.targets.tvm.kernel import Array, Conv
from gfcompile.targets.tvm.schedules.gpu_conv import schedule_conv

EPS = 2.0**-24
LVVIT_FIRST = Conv(
    batch=1,
    h=224,
    w=224,
    c=3,
    n=64,
    kernel_h=7,
    kernel_w=7,
    stride_h=2,
    stride_w=2,
    pad_h=3,
    pad_w=3,
    relu=True,
    layout="nchw",
)
LVVIT_SECOND = Conv(
    batch=1, h=112, w=112, c=64, n=64, kernel_h=3, kernel_w=3, pad_h=1, pad_w=1, relu=True
)
CONVNEXT = [
    Conv(
        batch=1,
        h=size,
        w=size,
        c=channels,
        n=channels,
        kernel_h=7,
        kernel_w=7,
        pad_h=3,
        pad_w=3,
        depthwise=True,
    )
    for size, channels in ((56, 96), (28, 192), (14, 384), (7, 768))
]
SMALL = [
    Conv(
        batch=2,
        h=13,
        w=18,
        c=3,
        n=21,
        kernel_h=7,
        kernel_w=7,
        stride_h=2,
        stride_w=2,
        pad_h=3,
        pad_w=3,
        relu=True,
        layout="nchw",
    ),
    Conv(batch=1, h=9, w=7, c=8, n=16, kernel_h=3, kernel_w=3, pad_h=1, pad_w=1, relu=True),
    Conv(batch=2, h=5, w=9, c=5, n=7, kernel_h=2, kernel_w=3, stride_w=3),
    Conv(batch=2, h=7, w=10, c=40, n=40, kernel_h=7, kernel_w=7, pad_h=3, pad_w=3, depthwise=True),
    Conv(
        batch=1,
        h=6,
        w=31,
        c=5,
        n=5,
        kernel_h=2,
        kernel_w=5,
        stride_h=2,
        stride_w=2,
        pad_w=1,
        depthwise=True,
        relu=True,
    ),
]


def test_convolutions_agree_with_torch() -> None:
    rng = np.random.default_rng(0)
    cases, bounds = [], []
    for kernel in SMALL:
        last = kernel.layout == "nhwc"
        size = (kernel.h, kernel.w, kernel.c) if last else (kernel.c, kernel.h, kernel.w)
        taps = kernel.kernel_h * kernel.kernel_w * (1 if kernel.depthwise else kernel.c)
        args: dict[str, Array] = {
            "x": rng.standard_normal((kernel.batch, *size), np.float32),
            "w": rng.standard_normal((taps, kernel.n), np.float32),
            "bias": rng.standard_normal(kernel.n, np.float32),
        }
        expected = convolution(kernel, args, torch.float64)
        positive = {name: np.abs(array) for name, array in args.items()}
        # A sum of `taps` products and the bias, in any order (Higham's gamma).
        bounds.append((taps + 1) * EPS * convolution(kernel, positive, torch.float64))
        cases.append((schedule_conv(kernel, TX2, STORAGE), args, expected))
    for (_, _, expected), bound, y in zip(cases, bounds, run_cases(cases, TX2), strict=True):
        assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("arch", ["sm_62", "sm_87"])
def test_layers_of_the_zoo_assemble_without_spills(arch: str) -> None:
    gpu = GPUS[arch]
    kernels = [LVVIT_FIRST, LVVIT_SECOND, *CONVNEXT]
    module = compile_cuda(
        {f"k{i}": schedule_conv(k, gpu, STORAGE).steps[0].func for i, k in enumerate(kernels)}, gpu
    )
    for kernel in module.kernels.values():
        assert kernel.spill_bytes == 0
        assert kernel.registers <= 168
