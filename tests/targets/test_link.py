"""The device library: what it exports, what it needs, how large it is."""

import re
import subprocess
from pathlib import Path

import pytest
from toy_bundle import KERNELS, RUNTIME, Arch, toy_cpu, toy_object

from gfcompile.runtime.errors import CompileError
from gfcompile.targets.target import Cpu
from gfcompile.targets.tvm.link import cpu_features, kernel_table, link_bench, link_library
from tools import need

ID = "0123456789abcdef"
API = set(re.findall(r"\b(gfrt_\w+)\(", (RUNTIME / "gfrt.h").read_text()))
ARCHES: tuple[Arch, ...] = ("x86_64", "aarch64")


@pytest.fixture(scope="module", params=ARCHES)
def arch(request: pytest.FixtureRequest) -> Arch:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def kernels(arch: Arch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_object(arch, tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def library(arch: Arch, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "libtoy.so"
    link_library([kernels], KERNELS, toy_cpu(arch), path, library_id=ID, cuda=True)
    return path


def readelf(path: Path, *options: str) -> str:
    command = [need("readelf"), "--wide", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(path: Path) -> set[str]:
    return set(re.findall(r"NEEDED.*\[(.*)\]", readelf(path, "--dynamic")))


def newest_glibc(path: Path) -> tuple[int, ...]:
    versions = re.findall(r"GLIBC_(\d+(?:\.\d+)+)", readelf(path, "--version-info"))
    return max(tuple(map(int, version.split("."))) for version in versions)


LIBC = {
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"),
    # Of the same package: __tls_get_addr lives in the loader.
    *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}


def test_it_needs_the_c_library_of_2018_alone(library: Path) -> None:
    assert needed(library) <= LIBC
    assert newest_glibc(library) <= (2, 27)


def test_it_exports_the_api_and_nothing_else(library: Path) -> None:
    symbols = [line.split() for line in readelf(library, "--dyn-syms").splitlines()]
    exported = {
        row[7].split("@")[0]
        for row in symbols
        if len(row) >= 8 and row[4] in ("GLOBAL", "WEAK") and row[6] != "UND"
    }
    assert {"gfrt_open", "gfrt_run", "gfrt_last_error"} < API
    assert exported == API | {"gfrt_kernel_table"}


def test_it_is_hardened_and_stripped(library: Path) -> None:
    segments = readelf(library, "--segments")
    assert "GNU_RELRO" in segments
    (stack,) = (line.split() for line in segments.splitlines() if "GNU_STACK" in line)
    assert "E" not in stack[-2], stack
    assert "BIND_NOW" in readelf(library, "--dynamic")
    assert "TEXTREL" not in readelf(library, "--dynamic")
    sections = readelf(library, "--sections")
    assert ".symtab" not in sections
    assert ".debug" not in sections


def test_the_runtime_is_small(arch: Arch, tmp_path: Path) -> None:
    """With CUDA and without a kernel: what every bundle carries."""
    link_library([], [], toy_cpu(arch), tmp_path / "lib.so", library_id=ID, cuda=True)
    assert (tmp_path / "lib.so").stat().st_size < 64 << 10
    link_bench(toy_cpu(arch), tmp_path / "gfbench")
    assert (tmp_path / "gfbench").stat().st_size < 32 << 10
    assert needed(tmp_path / "gfbench") <= {"libc.so.6", "libdl.so.2", "libm.so.6"}


def test_the_same_library_comes_out_each_time(
    arch: Arch, kernels: Path, library: Path, tmp_path: Path
) -> None:
    again = tmp_path / "libtoy.so"
    link_library([kernels], KERNELS[::-1], toy_cpu(arch), again, library_id=ID, cuda=True)
    assert again.read_bytes() == library.read_bytes()


def test_a_kernel_that_is_not_there_is_named(arch: Arch, kernels: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="undefined symbol: __tvm_ffi_toy_lost") as caught:
        link_library([kernels], ["toy_lost"], toy_cpu(arch), tmp_path / "lib.so", library_id=ID)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "lib.so").exists()


def test_a_function_beyond_the_c_library_is_named(arch: Arch, tmp_path: Path) -> None:
    source = tmp_path / "needy.c"
    source.write_text("int cblas_sgemm(void); int __tvm_ffi_k(void) { return cblas_sgemm(); }")
    with pytest.raises(CompileError, match="undefined symbol: cblas_sgemm"):
        link_library([source], ["k"], toy_cpu(arch), tmp_path / "lib.so", library_id=ID)


def test_the_table_is_sorted_and_quoted() -> None:
    table = kernel_table(["b", "a", "b"], library_id=ID, cuda=False)
    assert table.index('{"a", __tvm_ffi_a}') < table.index('{"b", __tvm_ffi_b}')
    assert table.count('"b"') == 1
    with pytest.raises(AssertionError):
        kernel_table(['x"); system("'], library_id=ID, cuda=False)


def cpu_like(arch: Arch, mcpu: str, *features: str) -> Cpu:
    base = toy_cpu(arch)
    return Cpu(**{**vars(base), "mcpu": mcpu, "features": features})


def test_the_features_that_code_may_use_are_named_as_linux_does() -> None:
    assert cpu_features(cpu_like("x86_64", "x86-64")) == ()
    v3 = cpu_features(cpu_like("x86_64", "x86-64-v3"))
    assert {"avx2", "fma", "f16c", "bmi1", "abm"} <= set(v3)
    assert not any("512" in name for name in v3)
    vnni = cpu_features(cpu_like("x86_64", "x86-64-v4", "+avx512vnni"))
    assert {"avx512f", "avx512_vnni", "avx512vl"} <= set(vnni)
    assert "f16c" not in cpu_features(cpu_like("x86_64", "x86-64-v3", "-f16c"))
    assert cpu_features(cpu_like("aarch64", "cortex-a53")) == ("asimd", "crc32")
    assert "asimddp" in cpu_features(cpu_like("aarch64", "cortex-a76"))


def test_every_feature_is_one_that_the_runtime_knows() -> None:
    """A name that gfrt_features.c does not know would refuse every CPU."""
    from gfcompile.targets.tvm.link import LINUX_FEATURES

    known = re.findall(r'\{"(\w+)", ', (RUNTIME / "gfrt_features.c").read_text())
    for names in LINUX_FEATURES.values():
        assert set(names.values()) <= set(known)
