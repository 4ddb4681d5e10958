"""Schedules: for each kernel class, how it is computed on CPUs and on CUDA GPUs."""

from collections.abc import Callable

from gfcompile.targets.target import Cpu, Gpu, Target
from gfcompile.targets.tvm.choices import Choice
from gfcompile.targets.tvm.kernel import (
    ActStorage,
    Attention,
    CircularFilter,
    Conv,
    Dense,
    Dequantize,
    DftFilter,
    GatherRows,
    Generic,
    InversePermutation,
    Kernel,
    LayerNorm,
    Patchify,
    Quantize,
    Scheduled,
    SelectTokens,
    Softmax,
    TokenMean,
)
from gfcompile.targets.tvm.schedules import (
    cpu_amx,
    cpu_amx_attention,
    cpu_amx_float,
    cpu_attention,
    cpu_conv,
    cpu_dense,
    cpu_filter,
    cpu_in_order,
    cpu_norm,
    cpu_quant,
    cpu_select,
    cpu_tokens,
    gpu_attention,
    gpu_conv,
    gpu_dense,
    gpu_filter,
    gpu_norm,
    gpu_quant,
    gpu_select,
    gpu_tokens,
)
from gfcompile.targets.tvm.schedules.generic import schedule_generic_cpu, schedule_generic_gpu


def _dense_cpu(
    kernel: Dense, cpu: Cpu, storage: ActStorage, choice: cpu_dense.DenseChoice | None = None
) -> Scheduled:
    if cpu.amx and cpu_amx.takes(kernel):
        return cpu_amx.schedule_dense(kernel, cpu, storage)
    if cpu.amx and cpu_amx_float.takes(kernel):
        return cpu_amx_float.schedule_dense(kernel, cpu, storage)
    if cpu_in_order.takes(kernel, cpu):
        return cpu_in_order.schedule_dense(kernel, cpu, storage)
    return cpu_dense.schedule_dense(kernel, cpu, storage, choice)


def _attention_cpu(
    kernel: Attention,
    cpu: Cpu,
    storage: ActStorage,
    choice: cpu_attention.AttentionChoice | None = None,
) -> Scheduled:
    if cpu.amx and cpu_amx_attention.takes(kernel):
        return cpu_amx_attention.schedule_attention(kernel, cpu, storage)
    return cpu_attention.schedule_attention(kernel, cpu, storage, choice)


# Kernel class -> its schedule on a CPU, its schedule on a GPU.
_SCHEDULES: dict[type, tuple[Callable[..., Scheduled], Callable[..., Scheduled]]] = {
    Dense: (_dense_cpu, gpu_dense.schedule_dense),
    Conv: (cpu_conv.schedule_conv, gpu_conv.schedule_conv),
    LayerNorm: (cpu_norm.schedule_layer_norm, gpu_norm.schedule_layer_norm),
    DftFilter: (cpu_filter.schedule_dft_filter, gpu_filter.schedule_dft_filter),
    CircularFilter: (cpu_filter.schedule_circular_filter, gpu_filter.schedule_circular_filter),
    Patchify: (cpu_tokens.schedule_patchify, gpu_tokens.schedule_patchify),
    TokenMean: (cpu_tokens.schedule_token_mean, gpu_tokens.schedule_token_mean),
    Attention: (_attention_cpu, gpu_attention.schedule_attention),
    SelectTokens: (cpu_select.schedule_select_tokens, gpu_select.schedule_select_tokens),
    InversePermutation: (
        cpu_select.schedule_inverse_permutation,
        gpu_select.schedule_inverse_permutation,
    ),
    GatherRows: (cpu_select.schedule_gather_rows, gpu_select.schedule_gather_rows),
    Softmax: (cpu_attention.schedule_softmax, gpu_attention.schedule_softmax),
    Quantize: (cpu_quant.schedule_quantize, gpu_quant.schedule_quantize),
    Dequantize: (cpu_quant.schedule_dequantize, gpu_quant.schedule_dequantize),
}


def _one(device: Cpu | Gpu | Target) -> Cpu | Gpu:
    """The processor that kernels are for: of a target its GPU, or its least CPU."""
    return (device.gpu or device.cpu) if isinstance(device, Target) else device


def act_storage(device: Cpu | Gpu | Target) -> ActStorage:
    """How int8 activations lie in memory on `device`, of a target its least one."""
    device = _one(device)
    return ActStorage() if isinstance(device, Gpu) else cpu_dense.act_storage(device)


def schedule(
    kernel: Kernel, device: Cpu | Gpu | Target, storage: ActStorage, choice: Choice | None = None
) -> Scheduled:
    """The functions that compute `kernel` on `device`.

    Args:
        choice: of the kernel's design space, see `choices`; by default the schedule's own rule.
    """
    device = _one(device)
    chosen = () if choice is None else (choice,)
    if isinstance(kernel, Generic):
        if isinstance(device, Gpu):
            return schedule_generic_gpu(kernel, device)
        return schedule_generic_cpu(kernel, device, *chosen)
    on_cpu, on_gpu = _SCHEDULES[type(kernel)]
    return (on_gpu if isinstance(device, Gpu) else on_cpu)(kernel, device, storage, *chosen)
