"""Libraries for Android: what they ask of its loader, and that they run.

readelf is the independent reader of what the linker wrote; the ABI is held against musl's headers,
which follow the same kernel; a library runs with glibc behind bionic's names.
"""

import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from android_host import build_android_host
from toy_bundle import KERNELS, RUNTIME, Toy, build_toy, toy_images, toy_object, toy_reference

from gfcompile.runtime import load
from gfcompile.runtime.errors import CompileError
from gfcompile.targets.android import ANDROID_ARM64, ANDROID_ARM64_DOTPROD
from gfcompile.targets.tvm.bionic import PAGE_BYTES, SYMBOLS, loader_complaint
from gfcompile.targets.tvm.cortex_a53 import has_erratum_843419
from gfcompile.targets.tvm.elf import PT_GNU_RELRO, PT_LOAD, read_segments
from gfcompile.targets.tvm.link import cpu_features, link_library, zig_cc
from tools import need, qemu_aarch64

API = set(re.findall(r"\b(gfrt_\w+)\(", (RUNTIME / "gfrt.h").read_text()))
HEADERS = sorted((RUNTIME / "bionic").rglob("*.h"))

ARMV8 = ANDROID_ARM64.cpu


@pytest.fixture(scope="module")
def android_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    objects = tmp_path_factory.mktemp("android")
    kernels = toy_object("aarch64", objects, ARMV8)
    return build_toy(objects / "toy", kernels, "aarch64", cpu=ARMV8)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_android_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def glibc_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glibc")
    source = folder / "hashed.c"
    source.write_text('#include <stdio.h>\nvoid shout(void); void shout(void) { puts("!"); }')
    cpu = replace(ARMV8, android_api=None)
    path = folder / "lib.so"
    zig_cc(cpu, "-shared", "-fPIC", str(source), "-Wl,--hash-style=both", "-o", str(path))
    return path


def readelf(path: Path, *options: str) -> list[str]:
    command = [need("readelf"), "--wide", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def loads(path: Path) -> list[list[str]]:
    """The rows of the segments that are mapped."""
    return [line.split() for line in readelf(path, "--segments") if line.startswith("  LOAD ")]


# ---- what the loader sees ----


def test_it_needs_three_libraries_of_android_and_no_version(android_toy: Toy) -> None:
    dynamic = "\n".join(readelf(android_toy.library, "--dynamic"))
    assert re.findall(r"NEEDED.*\[(.*)\]", dynamic) == ["libc.so", "libm.so", "libdl.so"]
    assert re.findall(r"SONAME.*\[(.*)\]", dynamic) == ["libtoy.so"]
    assert "TEXTREL" not in dynamic
    assert "STATIC_TLS" not in dynamic
    assert "BIND_NOW" in dynamic
    # Loaders before Android 6 read DT_HASH alone.
    assert re.search(r"\(HASH\)", dynamic)
    assert any("No version information" in line for line in readelf(android_toy.library, "-V"))


def test_pages_of_16_kib_suit_it(android_toy: Toy) -> None:
    for path in (android_toy.library, android_toy.folder / "gfbench"):
        rows = loads(path)
        assert len(rows) >= 3
        for row in rows:
            offset, address, align = int(row[1], 16), int(row[2], 16), int(row[-1], 16)
            assert align == PAGE_BYTES
            assert offset % PAGE_BYTES == address % PAGE_BYTES
        (relro,) = (line.split() for line in readelf(path, "--segments") if "GNU_RELRO" in line)
        assert (int(relro[2], 16) + int(relro[5], 16)) % PAGE_BYTES == 0
        assert not any("RWE" in "".join(row) for row in rows)


def test_it_exports_the_api_and_takes_what_stubs_name(android_toy: Toy) -> None:
    rows = [line.split() for line in readelf(android_toy.library, "--dyn-syms")]
    symbols = [row for row in rows if len(row) == 8 and row[0].rstrip(":").isdigit()]
    exported = {row[7] for row in symbols if row[6] != "UND"}
    taken = {row[7] for row in symbols if row[6] == "UND"}
    assert exported == API | {"gfrt_kernel_table"}
    assert taken <= set().union(*SYMBOLS.values())
    assert "__errno" in taken  # what glibc and musl call __errno_location
    assert not any("TLS" in row for row in symbols)


def test_the_runner_needs_no_loader(android_toy: Toy) -> None:
    segments = "\n".join(readelf(android_toy.folder / "gfbench", "--segments"))
    assert "INTERP" not in segments
    assert "DYNAMIC" not in segments


def test_the_same_library_comes_out_each_time(android_toy: Toy, tmp_path: Path) -> None:
    again = tmp_path / "libtoy.so"
    kernels = android_toy.folder.parent / "toy-aarch64.o"
    link_library([kernels], KERNELS[::-1], ARMV8, again, library_id=android_toy.plan.library_id)
    assert again.read_bytes() == android_toy.library.read_bytes()


def test_a_function_beyond_android_is_named(tmp_path: Path) -> None:
    source, kernel = tmp_path / "needy.c", tmp_path / "needy.o"
    # glibc and musl have it, bionic has not.
    source.write_text("double exp10(double); double __tvm_ffi_k(double x) { return exp10(x); }")
    zig_cc(ARMV8, "-fno-builtin", "-fPIC", "-c", str(source), "-o", str(kernel))
    with pytest.raises(CompileError, match="undefined symbol: exp10"):
        link_library([kernel], ["k"], ARMV8, tmp_path / "lib.so", library_id="0" * 16)
    assert not (tmp_path / "lib.so").exists()


def test_a_library_for_glibc_is_refused(glibc_library: Path) -> None:
    assert loader_complaint(glibc_library.read_bytes()).startswith("it needs libc.so.6 instead of")


def test_each_thing_that_the_loader_refuses_is_said(android_toy: Toy) -> None:
    image = android_toy.library.read_bytes()
    assert loader_complaint(image) == ""
    for kind, field, value, words in [
        (PT_LOAD, 48, 4096, "aligned to 4096 bytes instead of 16384"),
        (PT_LOAD, 4, 7, "written to and executed"),
        (PT_GNU_RELRO, 40, 4096, "does not end with a page"),
        (PT_GNU_RELRO, 0, 7, "does not end with a page"),
        (0x6474E551, 0, 7, "thread-local variables"),  # the header of the stack, made PT_TLS
    ]:
        kinds = [segment.kind for segment in read_segments(image)]
        (table,) = struct.unpack_from("<Q", image, 32)
        at = table + 56 * kinds.index(kind)
        changed = bytearray(image)
        struct.pack_into("<I" if field in (0, 4) else "<Q", changed, at + field, value)
        assert words in loader_complaint(bytes(changed))
    renamed = image.replace(b"\0getauxval\0", b"\0getauxvax\0")
    assert "is known to define getauxvax" in loader_complaint(renamed)
    renamed = image.replace(b"\0libdl.so\0", b"\0libgl.so\0")
    assert "it needs libc.so, libm.so, libgl.so instead of" in loader_complaint(renamed)


# ---- the ABI ----


def test_what_headers_declare_is_what_stubs_define() -> None:
    declared = set()
    for header in HEADERS:
        text = re.sub(r"/\*.*?\*/|^#.*?$", "", header.read_text(), flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"__attribute__\(\(.*\)\)|\(\*\w+\)\([^)]*\)", "", text)
        declared |= set(re.findall(r"\b(\w+)\([^;{]*\)\s*;", text))
    declared.discard("sizeof")
    # Compilers write calls of memmove themselves.
    assert declared | {"memmove"} == {*SYMBOLS["libc.so"], *SYMBOLS["libdl.so"], "_Static_assert"}


def test_constants_and_sizes_are_those_of_linux_on_arm64(tmp_path: Path) -> None:
    """What bionic's headers share with musl's, as both are the kernel's."""
    includes, checks = [], []
    for header in HEADERS:
        includes.append(f"#include <{header.relative_to(RUNTIME / 'bionic')}>")
        for name, value in re.findall(r"^#define (\w+) (\S.*)$", header.read_text(), re.MULTILINE):
            value = re.sub(r"/\*.*?\*/", "", value).strip()
            if name not in ("errno", "GFRT_BIONIC") and not name.startswith("GFRT_BIONIC"):
                checks.append(f'_Static_assert((long){name} == (long){value}, "{name}");')
    assert len(checks) >= 15
    sizes = {"cpu_set_t": 128, "struct timespec": 16, "pthread_t": 8, "pthread_key_t": 4}
    checks += [f'_Static_assert(sizeof({t}) == {n}, "{t}");' for t, n in sizes.items()]
    source = tmp_path / "check.c"
    source.write_text("\n".join([*includes, *checks]))
    zig_cc(ARMV8, "-c", str(source), "-o", str(tmp_path / "check.o"))
    ours = tmp_path / "ours.c"
    ours.write_text("\n".join([*includes, *checks[-len(sizes) :]]))
    zig_cc(
        ARMV8, f"-I{RUNTIME / 'bionic'}", "-nostdlibinc", "-c", str(ours), "-o", str(tmp_path / "o")
    )


def test_kernels_leave_the_register_alone_that_android_keeps() -> None:
    """x18: with LLVM's triple for other Linuxes this function takes it."""
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def busy(x: T.Buffer((64,), "int64"), y: T.Buffer((64,), "int64")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "busy"})
        held = T.alloc_buffer((32,), "int64", scope="local")
        for i in T.unroll(32):
            held[i] = x[i] * x[i + 32]
        for i in T.unroll(32):
            y[i] = held[i] * held[(i * 7 + 3) % 32]
            y[i + 32] = held[i] // (held[(i * 5 + 1) % 32] + T.int64(1))

    takes = {}
    for triple in ("aarch64-linux-gnu", ANDROID_ARM64.cpu.llvm_triple):
        target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": "generic"})
        code = tvm.compile(tvm.IRModule({"busy": busy}), target).mod.inspect_source("asm")
        takes[triple] = bool(re.search(r"\b[xw]18\b", code))
    assert list(takes.values()) == [True, False]


@pytest.mark.parametrize("start", [0, 16])
def test_the_linker_repairs_erratum_843419(tmp_path: Path, start: int) -> None:
    block = "nop; nop; adrp x0, target; str x1, [x2]; ldr x3, [x0]; nop; nop; nop;"
    source, kernel = tmp_path / "risky.c", tmp_path / "risky.o"
    source.write_text(
        f"""__asm__(".section .text.risky,\\"ax\\"; .p2align 4; .space {start};"
    ".globl __tvm_ffi_risky; __tvm_ffi_risky: .rept 256; {block} .endr; ret;"
    ".section .data.target,\\"aw\\"; .hidden target; .globl target; target: .quad 0; .previous");
"""
    )
    zig_cc(ARMV8, "-c", str(source), "-o", str(kernel))
    library = tmp_path / "lib.so"
    link_library([kernel], ["risky"], ARMV8, library, library_id="0" * 16)
    assert not has_erratum_843419(library.read_bytes())


# ---- it runs ----


@pytest.mark.parametrize("threads", [1, 3])
def test_the_library_computes_as_its_reference(
    android_toy: Toy, host: Path, tmp_path: Path, threads: int
) -> None:
    images = toy_images(2)
    source, result = tmp_path / "in", tmp_path / "out"
    source.write_bytes(images.tobytes())
    done = subprocess.run(
        [
            *(*qemu_aarch64("cortex-a53"), host, android_toy.folder, "--verify"),
            *("--input", source, "--output", result, "--threads", str(threads)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    logits = np.fromfile(result, np.float32).reshape(2, 16)
    for image, got in zip(images, logits, strict=True):
        # A code next to a rounding tie may be one step off in each of 24 rows.
        np.testing.assert_allclose(got, toy_reference(image)["logits"][0], atol=2 / 16, rtol=0)
    with load(android_toy.folder, device="qemu", threads=threads) as session:
        np.testing.assert_array_equal(session.run(images), logits)


def test_the_library_says_what_libc_said(android_toy: Toy, host: Path, tmp_path: Path) -> None:
    """errno and strerror, through bionic's names for them."""
    toy = android_toy.copy(tmp_path / "toy")
    (toy.folder / "weights.bin").unlink()
    done = subprocess.run(
        [*qemu_aarch64("cortex-a53"), host, toy.folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.endswith("weights.bin: No such file or directory; copy the bundle again\n")


def test_the_baseline_asks_for_nothing_that_a_phone_may_lack() -> None:
    assert cpu_features(ARMV8) == ("asimd",)
    # Armv8.1-A made these mandatory, and the dot product came with Armv8.2-A.
    always = {"asimd", "crc32", "atomics", "asimdrdm"}
    assert set(cpu_features(ANDROID_ARM64_DOTPROD.cpu)) == always | {"asimddp"}


def test_a_core_without_sdot_is_refused_before_it_meets_one(
    android_toy: Toy, tmp_path: Path
) -> None:
    toy = android_toy.with_plan(tmp_path / "toy", cpu_features=("asimd", "asimddp"))
    done = subprocess.run(
        [need("qemu-aarch64"), "-cpu", "cortex-a53", toy.folder / "gfbench", toy.folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "this CPU lacks asimddp" in done.stderr
