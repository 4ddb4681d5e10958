"""Shared libraries for Android's libc, bionic, without the NDK.

The runtime is compiled against declarations of its own (runtime/device/bionic), and linked against
stub libraries that say where each symbol is to be found on a device. Every symbol here is in
bionic since API level 21 (libc.map.txt, libm.map.txt and libdl.map.txt of platform/bionic), so
that a library loads on Android 5 and later. References carry no version: bionic's loader then
takes the one definition that there is.
"""

from collections.abc import Sequence
from pathlib import Path

import ziglang

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm import elf
from gfcompile.targets.tvm.zig import zig

# Android 15 and later may have pages of 16 KiB; a library with smaller segments is refused there.
PAGE_BYTES = 16384

_LIBC = """
    __errno __sched_cpucount abort calloc clock_gettime close fclose fdopen fopen fread free fseek
    ftell getauxval getpid lseek madvise malloc memchr memcmp memcpy memmove memset mmap mprotect
    munmap open posix_memalign pthread_cond_broadcast pthread_cond_destroy pthread_cond_init
    pthread_cond_signal pthread_cond_wait pthread_create pthread_getspecific pthread_join
    pthread_key_create pthread_key_delete pthread_mutex_destroy pthread_mutex_init
    pthread_mutex_lock pthread_mutex_unlock pthread_setspecific pthread_sigmask sched_getaffinity
    sched_setaffinity sched_yield sigdelset sigfillset snprintf strchr strcmp strcspn strdup
    strerror strlen strspn vsnprintf
"""
# What LLVM may turn the operators of a graph into; the runtime needs none of them.
_LIBM = """
    acosf acoshf asinf asinhf atan2f atanf atanhf cbrtf cosf coshf erfcf erff exp exp2f expf expm1f
    fmodf hypotf ldexpf log log10f log1pf log2f logf pow powf sinf sinhf sqrtf tanf tanhf
"""
_LIBDL = "dlclose dlerror dlopen dlsym"
SYMBOLS = {
    "libc.so": frozenset(_LIBC.split()),
    "libm.so": frozenset(_LIBM.split()),
    "libdl.so": frozenset(_LIBDL.split()),
}


def link_for_android(
    sources: Sequence[Path],
    objects: Sequence[Path],
    output: Path,
    *,
    cpu: Cpu,
    flags: Sequence[str],
    headers: Path,
    exports: Path,
    folder: Path,
) -> None:
    """Writes the shared library `output` from C sources and objects.

    Args:
        cpu: what it is for.
        flags: of the C compiler.
        headers: those of bionic.
        exports: a version script that says which symbols others may see.
        folder: what is made along the way lies there.

    Raises:
        CompileError: compiler or linker refuses, or Android's loader would.
    """
    # Compiler and linker themselves: `zig cc` would look for a bionic of its own, and has none.
    zig(
        *("clang", "--no-default-config", "-target", cpu.llvm_triple),
        *("-nostdinc", "-isystem", str(headers), "-isystem", str(_compiler_headers())),
        # Atomics inline: the helpers that would choose better ones when they run are not bionic's.
        *("-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-mno-outline-atomics"),
        *(*flags, "-c", *map(str, sources)),
        folder=folder,
    )
    compiled = [folder / f"{source.stem}.o" for source in sources]
    zig(
        *("ld.lld", "-m", "aarch64linux", "-shared", "-o", str(output), "-soname", output.name),
        *("--version-script", str(exports), "-z", "defs", "-z", "noexecstack", "-z", "relro"),
        *("-z", "now", "-z", f"max-page-size={PAGE_BYTES}"),
        # So that what is read-only after relocation ends where a page of either size does.
        *("-z", f"common-page-size={PAGE_BYTES}"),
        # Loaders before Android 6 know the older kind of hash table alone.
        *(
            "--hash-style=both",
            "--eh-frame-hdr",
            "--gc-sections",
            "--strip-all",
            "--fix-cortex-a53-843419",
        ),
        *map(str, [*compiled, *objects]),
        # All three, used or not, so that no library depends on what another one has loaded.
        *("--no-as-needed", *(str(_stub_library(name, folder)) for name in SYMBOLS)),
    )
    complaint = loader_complaint(output.read_bytes())
    if complaint:
        output.unlink()
        raise CompileError(f"{output.name} would not load on Android: {complaint}")


def loader_complaint(image: bytes) -> str:
    """Why Android's loader would refuse the shared library `image`; "" if it takes it."""
    segments = elf.read_segments(image)
    dynamic = elf.read_dynamic(image)
    loaded = [segment for segment in segments if segment.kind == elf.PT_LOAD]
    relro = [segment for segment in segments if segment.kind == elf.PT_GNU_RELRO]
    known = {name for names in SYMBOLS.values() for name in names}
    unknown = sorted(set(dynamic.undefined) - known)
    if set(dynamic.needed) != set(SYMBOLS):
        return f"it needs {', '.join(dynamic.needed)} instead of {', '.join(SYMBOLS)}"
    if unknown:
        return f"no library of Android is known to define {', '.join(unknown)}"
    for segment in loaded:
        if segment.align % PAGE_BYTES or (segment.address - segment.offset) % PAGE_BYTES:
            return f"a segment is aligned to {segment.align} bytes instead of {PAGE_BYTES}"
        if segment.flags & elf.WRITE and segment.flags & elf.EXECUTE:
            return "a segment can be written to and executed"
    if len(relro) != 1 or (relro[0].address + relro[0].memory_bytes) % PAGE_BYTES:
        return "what is read-only after relocation does not end with a page"
    if any(segment.kind == elf.PT_TLS for segment in segments) or dynamic.has_static_tls:
        return "it has thread-local variables, which loaders before Android 10 do not know"
    if dynamic.has_versions or dynamic.has_text_relocations:
        return "it asks for versions of symbols, or has relocations in its code"
    return ""


def _compiler_headers() -> Path:
    """Where stdint.h and the like are, which belong to the compiler and not to libc."""
    assert ziglang.__file__ is not None
    return Path(ziglang.__file__).parent / "lib" / "include"


def _stub_library(name: str, folder: Path) -> Path:
    """A library that defines the symbols of `name` and nothing else, for the linker alone."""
    source, path = folder / f"{name}.s", folder / name
    source.write_text("".join(f".globl {symbol}\n{symbol}:\n" for symbol in sorted(SYMBOLS[name])))
    zig(
        *("cc", "-target", "aarch64-linux-android", "-nostdlib", "-shared"),
        *(f"-Wl,-soname,{name}", str(source), "-o", str(path)),
    )
    return path
