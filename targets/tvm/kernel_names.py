"""What kernels are called in a library, a plan, a profile and a tuning database."""

import re

from gfcompile.targets.tvm.kernel import (
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
    SelectTokens,
    Softmax,
    TokenMean,
)


def kernel_name(kernel: Kernel) -> str:
    """A C identifier that says what the kernel computes; equal kernels have equal names."""
    out = getattr(kernel, "out", "float32")
    suffix = "" if out == "float32" else f"_{_short(out)}"
    match kernel:
        case Dense():
            operands = _short(kernel.x)
            if kernel.w == "float16":
                operands = "f16" if kernel.x == "float16" else f"{operands}xf16"
            parts = [f"dense_{kernel.m}x{kernel.n}x{kernel.k}", operands]
            parts += ["fixed"] * kernel.fixed_point
            added = f"add{kernel.residual_rows}_{_short(kernel.residual_dtype)}"
            epilogue = ["gelu"] * kernel.gelu + [added] * bool(kernel.residual_rows)
            parts += reversed(epilogue) if kernel.residual_first else epilogue
            suffix += f"x{kernel.out_groups}" if kernel.out_groups > 1 else ""
            return "_".join(parts) + suffix
        case Conv():
            size = f"{kernel.kernel_h}x{kernel.kernel_w}"
            if (strides := (kernel.stride_h, kernel.stride_w)) != (1, 1):
                size += "_stride{}x{}".format(*strides)
            if (pads := (kernel.pad_h, kernel.pad_w)) != (0, 0):
                size += "_pad{}x{}".format(*pads)
            shape = f"{kernel.batch}x{kernel.h}x{kernel.w}x{kernel.c}_{kernel.layout}"
            form = "depthwise" if kernel.depthwise else f"conv{kernel.n}"
            return f"{form}_{shape}_{size}" + "_relu" * kernel.relu
        case LayerNorm():
            # Layers that differ in eps alone are rare, but must not share a name.
            eps = re.sub(r"\W", "_", f"{kernel.eps:.6g}")
            skips = f"_skips{kernel.leading}of{kernel.images}" if kernel.leading else ""
            blocks = "_from_blocks" * kernel.x_in_blocks + "_to_blocks" * kernel.y_in_blocks
            return f"layer_norm_{kernel.rows}x{kernel.n}_eps{eps}{skips}{blocks}{suffix}"
        case DftFilter() | CircularFilter():
            form = "dft" if isinstance(kernel, DftFilter) else "circular"
            shape = f"{kernel.batch}x{kernel.h}x{kernel.w}x{kernel.c}"
            operands = _short(kernel.k_dtype) if kernel.x != "int8" else "i8"
            operands += "_x16" if kernel.x == "float16" else ""
            operands += "_blocks" * (isinstance(kernel, DftFilter) and kernel.in_blocks)
            return f"{form}_filter_{shape}_{operands}"
        case Patchify():
            grid = f"{kernel.batch}x{kernel.grid_h}x{kernel.grid_w}"
            patch = f"{kernel.channels}x{kernel.patch_h}x{kernel.patch_w}"
            return f"patchify_{grid}_{patch}{suffix}"
        case TokenMean():
            return f"token_mean_{kernel.batch}x{kernel.tokens}x{kernel.n}{suffix}"
        case Attention():
            shape = f"{kernel.batch}x{kernel.tokens}x{kernel.heads}x{kernel.dim}"
            return f"attention_{shape}_{_short(kernel.x)}{suffix}"
        case SelectTokens():
            # Leading rows and their offset are part of what is computed.
            extra = f"{kernel.leading}_{kernel.offset}_{kernel.index}"
            return f"select_{kernel.batch}x{kernel.tokens}to{kernel.kept}_{extra}"
        case InversePermutation():
            return f"inverse_permutation_{kernel.batch}x{kernel.n}"
        case GatherRows():
            return f"gather_{kernel.batch}x{kernel.tokens}to{kernel.kept}x{kernel.n}"
        case Softmax():
            return f"softmax_{kernel.rows}x{kernel.n}"
        case Quantize():
            return f"quantize_{kernel.size}"
        case Dequantize():
            return f"dequantize_{kernel.size}"
        case Generic():
            return f"{re.sub(r'[^0-9A-Za-z_]', '_', kernel.name)}_{kernel.key}"


def _short(dtype: str) -> str:
    return {"float32": "f32", "float16": "f16", "int8": "i8"}[dtype]
