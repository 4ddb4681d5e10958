"""Erratum 843419 of the Cortex-A53: found in machine code, and laid out around."""

import struct
from pathlib import Path

import pytest
from toy_bundle import toy_cpu

from gfcompile.targets.tvm.cortex_a53 import has_erratum_843419
from gfcompile.targets.tvm.link import link_library

ADRP_X0 = 0x90000000
STR_X1_X2 = 0xF9000041  # str x1, [x2]
ADD = 0x8B010022  # add x2, x1, x1
LDR_X3_X0 = 0xF9400003  # ldr x3, [x0]
LDR_X3_X4 = 0xF9400083  # ldr x3, [x4]
NOP = 0xD503201F


def elf(code: list[int], offset: int) -> bytes:
    """An ELF file whose code has `code` at `offset` within a page, no-ops elsewhere."""
    words = [NOP] * 3072
    words[1024 + offset // 4 : 1024 + offset // 4 + len(code)] = code
    text = struct.pack(f"<{len(words)}I", *words)
    header = bytearray(64)
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<2H", header, 54, 56, 1)
    program = struct.pack("<2I6Q", 1, 5, 120, 0x10000, 0x10000, len(text), len(text), 4096)
    return bytes(header) + program + text


@pytest.mark.parametrize(
    ("code", "offset", "found"),
    [
        ([ADRP_X0, STR_X1_X2, LDR_X3_X0], 0xFF8, True),
        ([ADRP_X0, STR_X1_X2, LDR_X3_X0], 0xFFC, True),
        ([ADRP_X0, STR_X1_X2, ADD, LDR_X3_X0], 0xFF8, True),
        ([ADRP_X0, STR_X1_X2, LDR_X3_X0], 0xFF4, False),
        ([ADRP_X0, STR_X1_X2, LDR_X3_X0], 0x000, False),
        ([ADRP_X0, ADD, LDR_X3_X0], 0xFF8, False),  # no load or store comes second
        ([ADRP_X0, STR_X1_X2, LDR_X3_X4], 0xFF8, False),  # another base
        ([ADRP_X0, STR_X1_X2, ADD, ADD, LDR_X3_X0], 0xFF8, False),  # too late
    ],
)
def test_the_sequence_is_found_where_it_can_strike(
    code: list[int], offset: int, found: bool
) -> None:
    assert has_erratum_843419(elf(code, offset)) == found


def risky_kernel(folder: Path, start: int) -> Path:
    """A kernel with the sequence once in 32 bytes, after `start` bytes of something else."""
    block = "nop; nop; adrp x0, target; str x1, [x2]; ldr x3, [x0]; nop; nop; nop;"
    source = folder / f"risky{start}.c"
    source.write_text(
        f"""__asm__(".section .text.risky,\\"ax\\"; .p2align 4; .space {start};"
    ".globl __tvm_ffi_risky; __tvm_ffi_risky: .rept 256; {block} .endr; ret;"
    ".section .data.target,\\"aw\\"; .hidden target; .globl target; target: .quad 0; .previous");
"""
    )
    return source


def test_code_is_laid_out_around_it(tmp_path: Path) -> None:
    """With one start or the other, the plain layout has the sequence at the end of a page."""
    a57 = toy_cpu("aarch64")
    a53 = type(a57)(**{**vars(a57), "mcpu": "cortex-a53"})
    struck = []
    for start in (0, 16):
        kernel = risky_kernel(tmp_path, start)
        for cpu in (a57, a53):
            # One name for all: it lies in the file before the code, and so moves it.
            library = tmp_path / "lib.so"
            link_library([kernel], ["risky"], cpu, library, library_id="0" * 16)
            if has_erratum_843419(library.read_bytes()):
                struck.append(cpu.mcpu)
    assert struck == ["cortex-a57"]
