"""Kernels and the C runtime become one shared library for a device's own libc.

Zig's C compiler brings headers and stub libraries of every glibc for every architecture, so
nothing but a pip package is needed; for Android, whose libc it has not, see `bionic`. It keeps its
own cache of compiled objects: the runtime is compiled once per architecture, a further link takes
some 20 ms.
"""

import re
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import gfcompile.runtime.device
from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.bionic import PAGE_BYTES, link_for_android
from gfcompile.targets.tvm.cortex_a53 import has_erratum_843419
from gfcompile.targets.tvm.zig import zig

_RUNTIME = Path(gfcompile.runtime.device.__file__).parent
_RUNTIME_SOURCES = (
    "gfrt.c",
    "gfrt_cores.c",
    "gfrt_cpu.c",
    "gfrt_features.c",
    "gfrt_kernels.c",
    "gfrt_plan.c",
    "gfrt_pool.c",
    "gfrt_sha256.c",
    "gfrt_thread.c",
)
_CUDA_SOURCES = ("gfrt_cuda.c",)
_BENCH_SOURCES = ("gfbench.c", "gfbench_print.c", "gfbench_time.c")
_BENCH_SHARES = ("gfrt_cores.c",)  # with the runtime

WARNINGS = ("-Wall", "-Wextra", "-Werror")
# No contraction: a * b + c rounds twice everywhere, so that every architecture agrees.
LANGUAGE = ("-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off")
_LINK_FLAGS = (
    "-s",
    "-Wl,-z,noexecstack",
    "-Wl,-z,relro",
    "-Wl,-z,now",
    "-Wl,--gc-sections",
)

# What our kernels may make LLVM use, by LLVM's name and by Linux's.
LINUX_FEATURES = {
    "x86_64": {
        "ssse3": "ssse3",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
        "popcnt": "popcnt",
        "movbe": "movbe",
        "lzcnt": "abm",
        "bmi": "bmi1",
        "bmi2": "bmi2",
        "avx": "avx",
        "avx2": "avx2",
        "fma": "fma",
        "f16c": "f16c",
        "gfni": "gfni",
        "avxvnni": "avx_vnni",
        "avx512f": "avx512f",
        "avx512bw": "avx512bw",
        "avx512cd": "avx512cd",
        "avx512dq": "avx512dq",
        "avx512vl": "avx512vl",
        "avx512ifma": "avx512ifma",
        "avx512vbmi": "avx512vbmi",
        "avx512vbmi2": "avx512_vbmi2",
        "avx512vnni": "avx512_vnni",
        "avx512bitalg": "avx512_bitalg",
        "avx512vpopcntdq": "avx512_vpopcntdq",
        "avx512bf16": "avx512_bf16",
        "avx512fp16": "avx512_fp16",
        "amx-tile": "amx_tile",
        "amx-int8": "amx_int8",
    },
    "aarch64": {
        "neon": "asimd",
        "crc": "crc32",
        "lse": "atomics",
        "rdm": "asimdrdm",
        "rcpc": "lrcpc",
        "fullfp16": "asimdhp",
        "fp16fml": "asimdfhm",
        "dotprod": "asimddp",
        "i8mm": "i8mm",
        "bf16": "bf16",
    },
}


def cpu_features(cpu: Cpu) -> tuple[str, ...]:
    """What code generated for `cpu` may use, as /proc/cpuinfo spells it: `Plan.cpu_features`."""
    import tvm

    target = tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": cpu.llvm_triple,
            "mcpu": cpu.mcpu,
            "mattr": list(cpu.features),
        }
    )
    known = LINUX_FEATURES[cpu.arch]
    have = {str(name) for name in tvm.target.codegen.llvm_get_cpu_features(target)}
    have |= {name[1:] for name in cpu.features if name.startswith("+")}
    have -= {name[1:] for name in cpu.features if name.startswith("-")}
    return tuple(linux for llvm, linux in known.items() if llvm in have)


def link_library(
    objects: Sequence[Path],
    kernels: Sequence[str],
    cpu: Cpu,
    output: Path,
    *,
    library_id: str,
    cuda: bool = False,
) -> None:
    """Writes the shared library `output`: `kernels`, found in `objects`, and the runtime.

    It exports gfrt.h and the table of its kernels, nothing else, and needs the device's libc alone.

    Args:
        kernels: names without TVM's prefix: `objects` define `__tvm_ffi_<name>`.
        library_id: hexadecimal, 16 to 64 digits; the plan carries the same one.
        cuda: whether it can open bundles whose kernels run on an NVIDIA GPU.

    Raises:
        CompileError: the compiler or linker refuses.
    """
    sources = _RUNTIME_SOURCES + (_CUDA_SOURCES if cuda else ())
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.c"
        table.write_text(kernel_table(kernels, library_id=library_id, cuda=cuda))
        exports = Path(folder) / "exports.map"
        exports.write_text("{ global: gfrt_*; local: *; };\n")
        if cpu.android_api is not None:
            link_for_android(
                [*(_RUNTIME / name for name in sources), table],
                objects,
                output,
                cpu=cpu,
                flags=_compile_flags(),
                headers=_RUNTIME / "bionic",
                exports=exports,
                folder=Path(folder),
            )
            return
        _link(
            cpu,
            output,
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            f"-Wl,-soname,{output.name}",
            f"-Wl,--version-script={exports}",
            "-Wl,-z,defs",
            *(str(_RUNTIME / name) for name in sources),
            str(table),
            *(str(path) for path in objects),
            *("-lm", "-lpthread", "-ldl"),
        )


def link_bench(cpu: Cpu, output: Path) -> None:
    """Writes the executable gfbench, which loads the library of the bundle it is given."""
    output.write_bytes(_bench(cpu))
    output.chmod(0o755)


@cache
def _bench(cpu: Cpu) -> bytes:
    """gfbench: who tunes needs hundreds of them, all the same."""
    sources = (str(_RUNTIME / name) for name in _BENCH_SOURCES + _BENCH_SHARES)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "gfbench"
        _link(cpu, output, "-fPIE", "-pie", *sources, "-lm", "-ldl")
        return output.read_bytes()


def link_static_bench(
    objects: Sequence[Path], kernels: Sequence[str], cpu: Cpu, output: Path, *, library_id: str
) -> None:
    """Writes a gfbench that needs no loader and no libc: it runs the bundle of `library_id` alone.

    On an Android device it runs from a shell; elsewhere QEMU runs it without a system image. See
    `link_library` for the arguments and for what is raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.c"
        table.write_text(kernel_table(kernels, library_id=library_id, cuda=False))
        _link(
            cpu,
            output,
            "-static",
            "-DGFBENCH_STATIC",
            f"-Wl,-z,max-page-size={PAGE_BYTES},-z,common-page-size={PAGE_BYTES}",
            *(str(_RUNTIME / name) for name in _RUNTIME_SOURCES + _BENCH_SOURCES),
            str(table),
            *(str(path) for path in objects),
        )


def kernel_table(kernels: Sequence[str], *, library_id: str, cuda: bool) -> str:
    """C source of the table through which the runtime finds `kernels` by name."""
    assert re.fullmatch(r"[0-9a-f]{16,64}", library_id), library_id
    assert all(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in kernels), kernels
    names = sorted(set(kernels))
    declare = "".join(
        f"int32_t __tvm_ffi_{name}(void *, const gfi_any *, int32_t, gfi_any *);\n"
        for name in names
    )
    entries = "".join(f'    {{"{name}", __tvm_ffi_{name}}},\n' for name in names)
    device = "&gfi_cuda_device" if cuda else "NULL"
    return f"""#include "gfrt_internal.h"

{declare}
static const gfi_entry entries[] = {{
{entries}    {{NULL, NULL}},
}};
const gfi_table gfrt_kernel_table = {{
    GFI_TABLE_ABI, {len(names)}, "{library_id}", entries, gfi_call, gfi_call_task,
}};
const gfi_device *const gfi_cuda = {device};
"""


def _link(cpu: Cpu, output: Path, *arguments: str) -> None:
    """Links `output`; for a Cortex-A53 so that its erratum 843419 cannot strike."""
    with tempfile.TemporaryDirectory() as folder:
        for shift in range(16):
            padding = Path(folder) / f"padding{shift}.c"
            # First in the order of linking, so that all other code moves on by 16 bytes.
            padding.write_text(
                f'__asm__(".section .text.padding,\\"axR\\"\\n.space {16 * shift}\\n.previous");\n'
            )
            first = [str(padding)] if shift else []
            zig_cc(cpu, *first, *arguments, *_LINK_FLAGS, "-o", str(output))
            if cpu.mcpu != "cortex-a53" or not has_erratum_843419(output.read_bytes()):
                return
    raise CompileError("no layout of the code avoids erratum 843419 of the Cortex-A53")


def zig_cc(cpu: Cpu, *arguments: str) -> None:
    """Runs the C compiler for `cpu` and a libc that zig brings, warnings as errors.

    That is the device's glibc; for Android, which has another libc, musl to be linked statically.

    Raises:
        CompileError: it refuses; the first error is in the message.
    """
    libc = f"gnu.{cpu.glibc}" if cpu.android_api is None else "musl"
    zig("cc", "-target", f"{cpu.arch}-linux-{libc}", *_compile_flags(), *arguments)


def _compile_flags() -> tuple[str, ...]:
    return ("-O2", *LANGUAGE, *WARNINGS, f"-I{_RUNTIME}")
