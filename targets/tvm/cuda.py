"""Scheduled TIR to NVIDIA machine code, without a GPU or a CUDA toolkit on this machine.

TVM writes CUDA C; NVRTC turns it into PTX for the board's compute capability; the PTX is retagged
to the ISA version that the board's driver accepts, and ptxas assembles it for the real
architecture, which also tells registers, shared memory and spills of every kernel.
"""

import ctypes
import functools
import importlib
import importlib.util
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Gpu

WARP = 32
MAX_THREADS = 1024
SHARED_BYTES = 48 * 1024  # what a block may have without opting in to more, on every Jetson

# TVM's own prelude wants cuda_fp16.h and more; the kernels need only these names.
_PRELUDE = """\
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned char uchar;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
"""
_HALF_PRELUDE = "#include <cuda_fp16.h>\n"

Dim3 = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class CudaKernel:
    """One kernel of a module: how to launch it, and what ptxas says of it.

    Attributes:
        symbol: its name in the module.
        args: kernel parameter i is argument args[i] of the PrimFunc; TVM sorts them by name.
        grid, block: launch dimensions; all shared memory is static.
        registers, shared_bytes, stack_bytes, spill_bytes: per thread, shared per block.
        occupancy: resident warps over the most that a multiprocessor holds.
    """

    symbol: str
    args: tuple[int, ...]
    grid: Dim3
    block: Dim3
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    occupancy: float


@dataclass(frozen=True, kw_only=True)
class CudaModule:
    """Compiled kernels, by the name of the PrimFunc that each came from.

    `source` is the CUDA C without its prelude: what the stand-in driver compiles for the CPU.
    """

    source: str
    ptx: bytes
    cubin: bytes
    kernels: Mapping[str, CudaKernel]


@dataclass(frozen=True, kw_only=True)
class _Launch:
    symbol: str
    args: tuple[int, ...]
    grid: Dim3
    block: Dim3


@dataclass(frozen=True, kw_only=True)
class _Usage:
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def compile_cuda(funcs: Mapping[str, Any], gpu: Gpu) -> CudaModule:
    """The PrimFuncs of `funcs` as PTX and machine code for `gpu`; the same input, the same bytes.

    Each function must have all its loops bound to blocks and threads of one launch.

    Raises:
        CompileError: a function is no single launch, a kernel spills registers, or NVIDIA's
            compiler refuses one.
    """
    source, launches = cuda_source(funcs, gpu)
    ptx = _retag(_nvrtc(source, gpu), gpu)
    cubin, usages = _assemble(ptx, gpu)
    kernels = {}
    for name, launch in launches.items():
        usage = usages[launch.symbol]
        if usage.spill_bytes:
            raise CompileError(
                f"kernel {name} spills {usage.spill_bytes} bytes of registers on {gpu.arch}; "
                "its schedule needs a smaller tile"
            )
        kernels[name] = CudaKernel(
            symbol=launch.symbol,
            args=launch.args,
            grid=launch.grid,
            block=launch.block,
            registers=usage.registers,
            shared_bytes=usage.shared_bytes,
            stack_bytes=usage.stack_bytes,
            spill_bytes=usage.spill_bytes,
            occupancy=occupancy(gpu, launch.block, usage.registers, usage.shared_bytes),
        )
    return CudaModule(source=source, ptx=ptx.encode(), cubin=cubin, kernels=kernels)


def occupancy(gpu: Gpu, block: Dim3, registers: int, shared_bytes: int) -> float:
    """Resident warps over the most that a multiprocessor of `gpu` holds."""
    warps = -(-block[0] * block[1] * block[2] // WARP)
    # Registers go to a warp in units of 256, shared memory to a block in units of 256 bytes.
    registers_per_warp = -(-max(registers, 1) * WARP // 256) * 256
    blocks = min(
        gpu.blocks_per_sm,
        gpu.threads_per_sm // (warps * WARP),
        gpu.registers_per_sm // (registers_per_warp * warps),
    )
    if shared_bytes:
        blocks = min(blocks, gpu.shared_bytes_per_sm // (-(-shared_bytes // 256) * 256))
    return blocks * warps / (gpu.threads_per_sm // WARP)


# --- TIR to CUDA C


def cuda_source(funcs: Mapping[str, Any], gpu: Gpu) -> tuple[str, dict[str, _Launch]]:
    """CUDA C of every function, and how each is launched."""
    import tvm

    tvm_build = importlib.import_module("tvm.tirx.build")  # its name is shadowed by the function
    target = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": gpu.arch,
            "max_shared_memory_per_block": SHARED_BYTES,
            "max_threads_per_block": MAX_THREADS,
            "thread_warp_size": WARP,
            "host": {"kind": "c"},  # the host half is dropped: the C runtime launches
        }
    )
    module = tvm.IRModule(
        {name: funcs[name].with_attr("global_symbol", name) for name in sorted(funcs)}
    )
    module = tvm.tirx.transform.BindTarget(target)(module)
    pipeline, _, finalize_device = tvm.tirx.get_default_tir_pipeline(target)
    _, device_modules = tvm_build.split_host_device_mods(pipeline(module))
    device = finalize_device()(next(iter(device_modules.values()), tvm.IRModule({})))
    device_funcs = {var.name_hint: func for var, func in device.functions.items()}
    launches = {name: _launch_of(name, funcs[name], device_funcs) for name in sorted(funcs)}
    symbols = {launch.symbol for launch in launches.values()}
    for extra in sorted(set(device_funcs) - symbols):
        raise CompileError(f"kernel {extra}: a scheduled function must be exactly one GPU launch")
    generated = tvm_build.codegen_build(device, target).inspect_source("cuda")
    start = generated.index('extern "C" __global__')
    return _tidy(generated[start:]), launches


def _launch_of(name: str, func: Any, device_funcs: Mapping[str, Any]) -> _Launch:
    symbol = f"{name}_kernel"
    if symbol not in device_funcs:
        raise CompileError(f"kernel {name}: its loops are not bound to GPU blocks and threads")
    device_func = device_funcs[symbol]
    # Buffer x of the function becomes pointer x_ptr of the kernel.
    order = {f"{param.name}_ptr": index for index, param in enumerate(func.params)}
    extents = dict(_thread_extents(device_func))
    return _Launch(
        symbol=symbol,
        args=tuple(order[param.name] for param in device_func.params),
        grid=_dim3(extents, "blockIdx"),
        block=_dim3(extents, "threadIdx"),
    )


def _thread_extents(func: Any) -> Iterator[tuple[str, int]]:
    import tvm_ffi
    from tvm import tirx

    found: list[tuple[str, int]] = []

    def visit(node: Any) -> None:
        if node.attr_key == "thread_extent":
            found.append((str(node.node.thread_tag), int(node.value)))

    tvm_ffi.structural_walk(func.body, (tirx.AttrStmt, visit))
    return iter(found)


def _dim3(extents: Mapping[str, int], prefix: str) -> Dim3:
    return (
        extents.get(f"{prefix}.x", 1),
        extents.get(f"{prefix}.y", 1),
        extents.get(f"{prefix}.z", 1),
    )


def _tidy(source: str) -> str:
    """The source less TVM's forward declarations, which only repeat each signature."""
    source = re.sub(r'^extern "C" __global__ [^{;]*;\n', "", source, flags=re.MULTILINE)
    # Told only the size of a block, ptxas spills a few registers to fit one block more on a
    # multiprocessor; content with one resident block, it gives each thread what it needs.
    return re.sub(r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)", source)


# --- CUDA C to PTX


def _nvrtc(source: str, gpu: Gpu) -> str:
    """PTX of CUDA C, by NVRTC of the nvidia-cuda-nvrtc-cu12 wheel."""
    library = _nvrtc_library()
    major, minor = gpu.compute_capability
    options = [f"--gpu-architecture=compute_{major}{minor}", "--std=c++17", "-default-device"]
    prelude = _PRELUDE
    if re.search(r"\b(half|__half)\d?\b", source):
        prelude = _HALF_PRELUDE + "typedef unsigned char uchar;\n"
        options.append(f"-I{_wheel('cuda_runtime') / 'include'}")
    program = ctypes.c_void_p()
    text = (prelude + source).encode()
    _check(
        library,
        library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None),
    )
    try:
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = library.nvrtcCompileProgram(program, len(options), array)
        if status:
            log = _nvrtc_text(library, program, "ProgramLog")
            raise CompileError(f"NVRTC refuses the kernels for {gpu.arch}: {_first_error(log)}")
        return _nvrtc_text(library, program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, text))
    return text.value.decode()


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line] or log.splitlines() or ["?"]
    return lines[0].strip()


@functools.cache
def _nvrtc_library() -> ctypes.CDLL:
    folder = _wheel("cuda_nvrtc") / "lib"
    # NVRTC opens its builtins by name alone, so they must be in the process already.
    for builtins in sorted(folder.glob("libnvrtc-builtins.so*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


def _wheel(name: str) -> Path:
    """The folder of one of NVIDIA's wheels.

    Raises:
        CompileError: it is not installed; NVIDIA publishes the ones for these GPUs for x86-64.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(root) / name).is_dir():
            return folder
    package = {"cuda_nvcc": "nvidia-cuda-nvcc-cu12", "cuda_nvrtc": "nvidia-cuda-nvrtc-cu12"}
    raise CompileError(
        f"{package.get(name, 'nvidia-cuda-runtime-cu12')} is not installed, and Jetson kernels "
        f"need it (compile on x86-64; this machine is {platform.machine()})"
    )


def _retag(ptx: str, gpu: Gpu) -> str:
    """PTX for the ISA version of the board's driver, without comments and blank lines."""
    ptx = re.sub(r"^\.version .*$", f".version {gpu.ptx_isa}", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\.target .*$", f".target {gpu.arch}", ptx, flags=re.MULTILINE)
    # A hint that NVRTC 12 writes and older ISAs do not know; dropping it changes nothing.
    ptx = re.sub(r'^\s*\.pragma "used_bytes_mask[^\n]*\n', "", ptx, flags=re.MULTILINE)
    lines = (re.sub(r"\s*//.*$", "", line).strip() for line in ptx.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


# --- PTX to machine code


def _assemble(ptx: str, gpu: Gpu) -> tuple[bytes, dict[str, _Usage]]:
    """Machine code of `ptx`, and what each kernel uses, by ptxas of nvidia-cuda-nvcc-cu12."""
    ptxas = _wheel("cuda_nvcc") / "bin" / "ptxas"
    with tempfile.TemporaryDirectory(prefix="gfcompile-") as folder:
        source, output = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(ptx)
        done = subprocess.run(
            [ptxas, "-v", "--gpu-name", gpu.arch, source, "-o", output],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            message = _first_error(done.stderr + done.stdout)
            raise CompileError(f"ptxas refuses the kernels for {gpu.arch}: {message}")
        return output.read_bytes(), _parse_usage(done.stdout + done.stderr)


def _parse_usage(log: str) -> dict[str, _Usage]:
    usages = {}
    for entry in log.split("Compiling entry function")[1:]:
        symbol = entry.split("'")[1]

        def number(pattern: str, entry: str = entry) -> int:
            found = re.search(pattern, entry)
            return int(found[1]) if found else 0

        usages[symbol] = _Usage(
            registers=number(r"Used (\d+) registers"),
            shared_bytes=number(r"(\d+) bytes smem"),
            stack_bytes=number(r"(\d+) bytes stack frame"),
            spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        )
    return usages
