"""Cortex-A53's erratum 843419: machine code that this CPU may compute a wrong address in.

After an ADRP in one of the last two words of a 4 KiB page, then a load or store, a load or store
that takes its base from the ADRP within the next two instructions may use a wrong one (Arm's
notice SDEN-859338). Linkers know a repair (--fix-cortex-a53-843419), but zig's does not pass it
on, so `link` looks for the pattern and moves the code.
"""

import struct

from gfcompile.targets.tvm.elf import EXECUTE, PT_LOAD, read_segments

_PAGE = 4096


def has_erratum_843419(image: bytes) -> bool:
    """Whether executable code of the ELF file `image` may hit the erratum.

    Says yes rather too often: which loads and stores come second is not told apart.
    """
    for segment in read_segments(image):
        if segment.kind != PT_LOAD or not segment.flags & EXECUTE:
            continue
        address = segment.address
        code = image[segment.offset : segment.offset + segment.file_bytes]
        words = struct.unpack(f"<{len(code) // 4}I", code[: len(code) // 4 * 4])
        first_page = address // _PAGE * _PAGE
        for page in range(first_page, address + len(code), _PAGE):
            for last in (page + _PAGE - 8, page + _PAGE - 4):
                at = (last - address) // 4
                if at >= 0 and _is_sequence(words[at : at + 4]):
                    return True
    return False


def _is_sequence(words: tuple[int, ...]) -> bool:
    if len(words) < 3 or words[0] & 0x9F000000 != 0x90000000:  # ADRP
        return False
    register = words[0] & 31
    if words[1] & 0x0A000000 != 0x08000000:  # any load or store
        return False
    return any(
        # LDR or STR with an unsigned immediate, of a general or vector register
        word & 0x3B000000 == 0x39000000 and word >> 5 & 31 == register
        for word in words[2:]
    )
