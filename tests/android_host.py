"""A program that loads libraries made for Android, under QEMU, with glibc in bionic's place."""

from pathlib import Path

from toy_bundle import RUNTIME, toy_cpu

from gfcompile.targets.tvm.bionic import SYMBOLS
from gfcompile.targets.tvm.link import zig_cc

_SHIM = Path(__file__).with_name("bionic_on_glibc.c")


def build_android_host(folder: Path) -> Path:
    """A gfbench for arm64 that has libc.so, libm.so and libdl.so as Android calls them.

    The libraries of these names hold what differs from glibc, which serves the rest.
    """
    cpu = toy_cpu("aarch64")
    empty = folder / "empty.c"
    empty.write_text("typedef int nothing;\n")
    for name in SYMBOLS:
        source = _SHIM if name == "libc.so" else empty
        zig_cc(
            cpu,
            *("-shared", "-fPIC", str(source), f"-Wl,-soname,{name}"),
            *("-o", str(folder / name), "-ldl"),
        )
    program = folder / "gfbench"
    zig_cc(
        cpu,
        *(*map(str, sorted(RUNTIME.glob("gfbench*.c"))), str(RUNTIME / "gfrt_cores.c")),
        "-Wl,--no-as-needed",
        *(str(folder / name) for name in SYMBOLS),
        *("-lpthread", "-lm", "-ldl", f"-Wl,-rpath,{folder}", "-o", str(program)),
    )
    return program
