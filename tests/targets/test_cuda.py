"""CUDA C, PTX and machine code of our kernels for each Jetson, by NVIDIA's own tools."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from run_gpu_kernel import GPUS, STORAGE, TX2
from tvm.script import tirx as T

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Gpu
from gfcompile.targets.tvm import cuda
from gfcompile.targets.tvm.cuda import compile_cuda, occupancy
from gfcompile.targets.tvm.kernel import (
    Dense,
    DftFilter,
    LayerNorm,
    Patchify,
    Scheduled,
    TokenMean,
)
from gfcompile.targets.tvm.schedules.gpu_dense import choose_tile, product_mode, schedule_dense
from gfcompile.targets.tvm.schedules.gpu_filter import schedule_dft_filter
from gfcompile.targets.tvm.schedules.gpu_norm import schedule_layer_norm
from gfcompile.targets.tvm.schedules.gpu_tokens import schedule_patchify, schedule_token_mean

# (tokens, dim, depth's grid): the isotropic models, then the stages of the pyramids.
ISOTROPIC = [(196, 256), (196, 384), (196, 512)]
STAGES = [(3136, 64), (784, 128), (196, 256), (49, 512)]
WIDE_STAGES = [(3136, 96), (784, 192), (196, 384), (49, 768)]


def funcs(named: dict[str, Scheduled]) -> dict[str, Any]:
    return {
        f"{name}_{number}": step.func
        for name, scheduled in named.items()
        for number, step in enumerate(scheduled.steps)
    }


def gfnet_xs_int8(gpu: Gpu) -> dict[str, Any]:
    """The kernels of gfnet_xs as --int8 has them."""
    patches = Patchify(
        batch=1, channels=3, grid_h=14, grid_w=14, patch_h=16, patch_w=16, out="int8"
    )
    embed = Dense(m=196, n=384, k=768, x="int8", residual_rows=196)
    wide = Dense(m=196, n=1536, k=384, x="int8", gelu=True, out="int8")
    narrow = Dense(m=196, n=384, k=1536, x="int8", residual_rows=196)
    head = Dense(m=1, n=1000, k=384, x="int8")
    norm = LayerNorm(rows=196, n=384, eps=1e-6)
    norm_int8 = dataclasses.replace(norm, out="int8")
    spectrum = DftFilter(batch=1, h=14, w=14, c=384, k_dtype="float16")
    mean = TokenMean(batch=1, tokens=196, n=384, out="int8")
    return funcs(
        {
            "patchify": schedule_patchify(patches, gpu, STORAGE),
            "embed": schedule_dense(embed, gpu, STORAGE),
            "wide": schedule_dense(wide, gpu, STORAGE),
            "narrow": schedule_dense(narrow, gpu, STORAGE),
            "head": schedule_dense(head, gpu, STORAGE),
            "norm": schedule_layer_norm(norm, gpu, STORAGE),
            "norm_int8": schedule_layer_norm(norm_int8, gpu, STORAGE),
            "filter": schedule_dft_filter(spectrum, gpu, STORAGE),
            "mean": schedule_token_mean(mean, gpu, STORAGE),
        }
    )


def zoo_products() -> Iterator[Dense]:
    """Every product of the zoo's models, float and int8."""
    for x in ("float32", "int8"):
        for m, dim in [*ISOTROPIC, *STAGES, *WIDE_STAGES]:
            yield Dense(m=m, n=4 * dim, k=dim, x=x, gelu=True, out=x)
            yield Dense(m=m, n=dim, k=4 * dim, x=x, residual_rows=m)
        for stages in (STAGES, WIDE_STAGES):
            for (_, before), (m, dim) in itertools.pairwise(stages):
                yield Dense(m=m, n=dim, k=4 * before, x=x)
        for dim in (256, 384, 512, 768):
            yield Dense(m=1, n=1000, k=dim, x=x)


@pytest.mark.parametrize("arch", GPUS)
def test_gfnet_xs_assembles_without_spills_and_stays_small(arch: str) -> None:
    module = compile_cuda(gfnet_xs_int8(GPUS[arch]), GPUS[arch])
    for kernel in module.kernels.values():
        assert kernel.spill_bytes == 0
        assert kernel.stack_bytes == 0
        assert kernel.shared_bytes <= 48 * 1024
        assert 0 < kernel.occupancy <= 1
    assert len(module.ptx) <= 250_000
    assert len(module.cubin) <= 200_000


def register_need(kernel: Dense, gpu: Gpu) -> tuple[object, ...]:
    """What decides how many registers a product needs: its tile, epilogue and guards."""
    epilogue = kernel.x, kernel.gelu, kernel.residual_rows > 0, kernel.out
    if kernel.m == 1:
        return epilogue
    tile = choose_tile(kernel, gpu, product_mode(kernel, gpu))
    return epilogue, tile, kernel.k > 1024, kernel.m % tile.rows > 0, kernel.n % tile.columns > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", GPUS)
def test_no_product_of_the_zoo_spills(arch: str) -> None:
    gpu = GPUS[arch]
    distinct = {register_need(kernel, gpu): kernel for kernel in zoo_products()}
    named = {
        f"dense{number}": schedule_dense(kernel, gpu, STORAGE)
        for number, kernel in enumerate(distinct.values())
    }
    kernels = compile_cuda(funcs(named), gpu).kernels.values()  # raises where one spills
    assert all(kernel.stack_bytes == 0 for kernel in kernels)


def test_a_small_ragged_product_does_not_spill() -> None:
    """ptxas once unrolled the few steps of such a sum and ran out of registers."""
    gpu = GPUS["sm_53"]
    named = {
        x: schedule_dense(Dense(m=5, n=10, k=45, x=x), gpu, STORAGE) for x in ("float32", "int8")
    }
    compile_cuda(funcs(named), gpu)  # raises where one spills


def test_ptx_is_of_the_version_that_the_board_s_driver_reads() -> None:
    for gpu in GPUS.values():
        ptx = compile_cuda(
            funcs({"norm": schedule_layer_norm(LayerNorm(rows=4, n=64, eps=1e-6), gpu, STORAGE)}),
            gpu,
        ).ptx.decode()
        assert ptx.startswith(f".version {gpu.ptx_isa}\n.target {gpu.arch}\n")
        assert "//" not in ptx
        assert "used_bytes_mask" not in ptx


def test_machine_code_is_for_the_real_architecture() -> None:
    for gpu in GPUS.values():
        named = {"norm": schedule_layer_norm(LayerNorm(rows=4, n=64, eps=1e-6), gpu, STORAGE)}
        cubin = compile_cuda(funcs(named), gpu).cubin
        major, minor = gpu.compute_capability
        assert cubin[:4] == b"\x7fELF"
        assert cubin[48] == 10 * major + minor


def test_the_same_functions_give_the_same_bytes() -> None:
    kernel = Dense(m=49, n=64, k=64, x="int8", gelu=True, out="int8")
    first, second = (
        compile_cuda(funcs({"product": schedule_dense(kernel, TX2, STORAGE)}), TX2)
        for _ in range(2)
    )
    assert first == second


def test_parameters_are_mapped_back_to_the_function_s_arguments() -> None:
    kernel = Dense(m=8, n=8, k=8, x="int8", residual_rows=8, out="int8")
    scheduled = schedule_dense(kernel, TX2, STORAGE)
    module = compile_cuda(funcs({"product": scheduled}), TX2)
    (compiled,) = module.kernels.values()
    signature = re.search(rf"{compiled.symbol}\(([^)]*)\)", module.source)
    assert signature
    declared = [part.split()[-1].removesuffix("_ptr") for part in signature[1].split(",")]
    assert [scheduled.steps[0].args[index] for index in compiled.args] == declared


def test_dimensions_come_from_the_function() -> None:
    norm = schedule_layer_norm(LayerNorm(rows=10, n=64, eps=1e-6), TX2, STORAGE)
    (kernel,) = compile_cuda(funcs({"norm": norm}), TX2).kernels.values()
    assert kernel.grid == (3, 1, 1)
    assert kernel.block == (32, 4, 1)


@pytest.mark.parametrize(
    ("block", "registers", "shared_bytes", "expected"),
    [
        # By the occupancy calculator for compute capability 6.2.
        ((256, 1, 1), 32, 0, 1.0),
        ((256, 1, 1), 33, 0, 0.75),  # 40 registers a thread: 6 blocks
        ((224, 1, 1), 128, 14464, 14 / 64),
        ((64, 1, 1), 32, 16384, 8 / 64),  # four blocks' shared memory
        ((32, 1, 1), 16, 0, 0.5),  # 32 blocks of one warp
    ],
)
def test_occupancy(
    block: tuple[int, int, int], registers: int, shared_bytes: int, expected: float
) -> None:
    assert occupancy(TX2, block, registers, shared_bytes) == pytest.approx(expected)


def unscheduled() -> Any:
    @T.prim_func(s_tir=True)
    def plain(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in range(64):
            y[i] = x[i]

    return plain


def test_a_function_without_threads_is_named() -> None:
    with pytest.raises(CompileError, match="kernel plain: "):
        compile_cuda({"plain": unscheduled()}, TX2)


def test_a_kernel_that_spills_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to 32 registers, a product has to spill."""
    tidy = cuda._tidy

    def squeezed(source: str) -> str:
        return re.sub(r"__launch_bounds__\((\d+), 1\)", r"__launch_bounds__(\1, 9)", tidy(source))

    monkeypatch.setattr(cuda, "_tidy", squeezed)
    named = {"product": schedule_dense(Dense(m=196, n=384, k=384), TX2, STORAGE)}
    with pytest.raises(CompileError, match=r"kernel product_0 spills \d+ bytes .* on sm_62"):
        compile_cuda(funcs(named), TX2)


def test_refused_cuda_code_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_tidy", lambda _: "this is no CUDA")
    named = {"norm": schedule_layer_norm(LayerNorm(rows=4, n=64, eps=1e-6), TX2, STORAGE)}
    with pytest.raises(CompileError, match=r"^NVRTC refuses the kernels for sm_62: .*error"):
        compile_cuda(funcs(named), TX2)
