"""What an ELF file (64 bits, little-endian) asks of the loader that is to map it."""

import struct
from dataclasses import dataclass

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_TLS, PT_GNU_RELRO = 1, 2, 3, 7, 0x6474E552
EXECUTE, WRITE, READ = 1, 2, 4

_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_TEXTREL, _DT_FLAGS = 1, 4, 5, 6, 22, 30
_DT_VERNEED = 0x6FFFFFFE
_DF_TEXTREL, _DF_STATIC_TLS = 4, 16


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One program header; `flags` are those of EXECUTE, WRITE and READ."""

    kind: int
    flags: int
    offset: int
    address: int
    file_bytes: int
    memory_bytes: int
    align: int


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """What the dynamic section of a shared library says.

    Attributes:
        needed: the libraries that it needs, in order.
        undefined: the symbols that these have to define.
        has_versions: whether it asks for versions of symbols.
        has_text_relocations: whether code must be written to while it is loaded.
        has_static_tls: whether it takes part of the memory that a process has for thread-locals.
    """

    needed: tuple[str, ...]
    undefined: tuple[str, ...]
    has_versions: bool
    has_text_relocations: bool
    has_static_tls: bool


def read_segments(image: bytes) -> tuple[Segment, ...]:
    """The program headers of the ELF file `image`, in order."""
    (table,) = struct.unpack_from("<Q", image, 32)
    entry_bytes, count = struct.unpack_from("<2H", image, 54)
    segments = []
    for i in range(count):
        kind, flags, offset, address, _, file_bytes, memory_bytes, align = struct.unpack_from(
            "<2I6Q", image, table + i * entry_bytes
        )
        segments.append(
            Segment(
                kind=kind,
                flags=flags,
                offset=offset,
                address=address,
                file_bytes=file_bytes,
                memory_bytes=memory_bytes,
                align=align,
            )
        )
    return tuple(segments)


def read_dynamic(image: bytes) -> Dynamic:
    """The dynamic section of the shared library `image`, which has a DT_HASH table."""
    segments = read_segments(image)
    (dynamic,) = (segment for segment in segments if segment.kind == PT_DYNAMIC)
    tags = list(
        struct.iter_unpack("<2Q", image[dynamic.offset : dynamic.offset + dynamic.file_bytes])
    )
    value = dict(tags)
    strings = _offset(segments, value[_DT_STRTAB])
    symbols = _offset(segments, value[_DT_SYMTAB])
    # Only the hash table knows how many symbols there are.
    (count,) = struct.unpack_from("<I", image, _offset(segments, value[_DT_HASH]) + 4)
    undefined = []
    for i in range(1, count):
        name, _, _, section = struct.unpack_from("<I2BH", image, symbols + 24 * i)
        if section == 0:
            undefined.append(_string(image, strings + name))
    flags = value.get(_DT_FLAGS, 0)
    return Dynamic(
        needed=tuple(_string(image, strings + entry) for tag, entry in tags if tag == _DT_NEEDED),
        undefined=tuple(undefined),
        has_versions=_DT_VERNEED in value,
        has_text_relocations=_DT_TEXTREL in value or bool(flags & _DF_TEXTREL),
        has_static_tls=bool(flags & _DF_STATIC_TLS),
    )


def _offset(segments: tuple[Segment, ...], address: int) -> int:
    """Where in the file the byte at `address` lies."""
    for segment in segments:
        at = address - segment.address
        if segment.kind == PT_LOAD and 0 <= at < segment.file_bytes:
            return segment.offset + at
    raise AssertionError(f"no segment holds the address {address:#x}")


def _string(image: bytes, offset: int) -> str:
    return image[offset : image.index(b"\0", offset)].decode()
