"""What stands in for AMX where a CPU lacks it, against NumPy; with AMX, AMX itself."""

import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from run_kernel import CPUS, emulator, host_cpu, zig

from gfcompile.targets.tvm.kernel import Array
from gfcompile.targets.tvm.schedules.amx_pipeline import tile_config

HARNESS = Path(__file__).with_name("run_tiles.c")
MEMORY, SIZE, CONFIG = 0x10000000, 4096, 4032  # the configuration is the last line of the memory
STORED = 2048
CONFIGURE = f"ldtilecfg {CONFIG}(%rdi);"

# Whether the left and the right factors are signed.
SIGNS = {
    "tdpbssd": (True, True),
    "tdpbsud": (True, False),
    "tdpbusd": (False, True),
    "tdpbuud": (False, False),
}
SUMS, LEFT, RIGHT = 0, 1280, 2560
PRODUCTS = {
    name: f"{CONFIGURE} tileloadd {SUMS}(%rdi,%rsi), %tmm5; tileloadd {LEFT}(%rdi,%rsi), %tmm0;"
    f"tileloadd {RIGHT}(%rdi,%rsi), %tmm7; {name} %tmm7, %tmm0, %tmm5;"
    f"tilestored %tmm5, {SUMS}(%rdi,%rsi); tilerelease"
    for name in SIGNS
}

# Where the first row lies, how far the next one, and the number that says so.
LOADS = {
    "tileloadd (%rdi,%rsi), %tmm3": (0, 64, 64),
    "tileloadd 64(%rdi,%rsi,2), %tmm3": (64, 48, 24),
    "tileloadd 512(%rdi,%rsi,4), %tmm3": (512, -32, -8),
    "lea 64(%rdi), %r13; mov %rsi, %r12; tileloadd -32(%r13,%r12,8), %tmm3": (32, 40, 5),
    "mov %rdi, %r13; mov %rsi, %r15; tileloadd (%r13,%r15), %tmm3": (0, 100, 100),
    "mov %rdi, %r12; tileloadd (%r12,%rsi), %tmm3": (0, 33, 33),
    "tileloadd 48(%rdi), %tmm3": (48, 0, 7),
    f"tileloadd {MEMORY + 256}(,%rsi,2), %tmm3": (256, 30, 15),
}
STORES = {
    "tilestored %tmm3, 2048(%rdi,%rsi)": (2048, 64, 64),
    "lea 2080(%rdi), %r13; mov %rsi, %r12; tilestored %tmm3, -32(%r13,%r12,4)": (2048, 48, 12),
    # On the stack, and back from there.
    "sub $2048, %rsp; tilestored %tmm3, 128(%rsp,%rsi); lea 128(%rsp), %rbx;"
    "tilezero %tmm3; tileloadd (%rbx,%rsi), %tmm3; add $2048, %rsp;"
    "tilestored %tmm3, 2048(%rdi,%rsi)": (2048, 40, 40),
}
CONFIGURES = {
    CONFIGURE: 0,
    "mov %rsi, %r12; ldtilecfg (%r12)": MEMORY + CONFIG,
    "ldtilecfg -64(%rdi,%rsi,8)": (CONFIG + 64) // 8,
    "mov %rsi, %r13; ldtilecfg 8(%r13)": MEMORY + CONFIG - 8,
}
LOAD, STORE = next(iter(LOADS)), next(iter(STORES))
CLEAR = f"{CONFIGURE} {LOAD}; tilezero %tmm3; {STORE}"

# What AMX refuses too. Tiles 4 and 5 are 3 rows of 12 bytes, 3 has 2 rows, 2 has rows of 8, 6 none.
ILLEGAL = {
    "no instruction": "ud2",
    "no configuration": "tilezero %tmm3",
    "released": f"{CONFIGURE} tilerelease; tilezero %tmm3",
    "no such tile to clear": f"{CONFIGURE} tilezero %tmm6",
    "no such tile to load": f"{CONFIGURE} tileloadd (%rdi,%rsi), %tmm6",
    "no such tile to store": f"{CONFIGURE} tilestored %tmm6, (%rdi,%rsi)",
    "no such factor": f"{CONFIGURE} tdpbusd %tmm4, %tmm6, %tmm3",
    "rows that differ": f"{CONFIGURE} tdpbusd %tmm4, %tmm5, %tmm3",
    "depths that differ": f"{CONFIGURE} tdpbusd %tmm3, %tmm5, %tmm4",
    "columns that differ": f"{CONFIGURE} tdpbusd %tmm2, %tmm5, %tmm4",
    "one tile twice": f"{CONFIGURE} .byte 0xc4, 0xe2, 0x59, 0x5e, 0xe5",  # tmm4, tmm5, tmm4
    "an operand too many": f"{CONFIGURE} .byte 0xc4, 0xe2, 0x73, 0x49, 0xd8",  # tilezero tmm3
}
REFUSED = {
    "a palette that is none": (0, 2),
    "something reserved": (2, 1),
    "a row of 65 bytes": (16 + 2 * 3, 65),
    "bytes without rows": (16 + 2 * 6, 4),
    "17 rows": (48 + 3, 17),
    "a ninth tile": (48 + 8, 1),
}
# Of AMX, but in none of our kernels.
UNKNOWN = [
    "sttilecfg (%rdi)",
    f"{CONFIGURE} tileloaddt1 (%rdi,%rsi), %tmm3",
    f"{CONFIGURE} tdpbf16ps %tmm1, %tmm4, %tmm5",
]
CODES = [
    *PRODUCTS.values(),
    *(f"{CONFIGURE} {load}; mov $64, %rsi; {STORE}" for load in LOADS),
    *(f"{CONFIGURE} tileloadd (%rdi,%rsi), %tmm3; {store}" for store in STORES),
    *(f"{configure}; mov $64, %rsi; {LOAD}; {STORE}" for configure in CONFIGURES),
    *ILLEGAL.values(),
    *UNKNOWN,
    CLEAR,
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    before = emulator(CPUS["avx512_amx"])
    path = tmp_path_factory.mktemp("tiles") / "program"
    texts = (text.replace("%", "%%") for text in CODES)
    codes = " ".join(f'CODE({number}, "{text}")' for number, text in enumerate(texts))
    zig("x86_64", "-O1", f"-DMEMORY={MEMORY}", f"-DCODES={codes}", str(HARNESS), "-o", str(path))
    return [*before, str(path)]


def run(program: list[str], code: str, memory: Array, number: int = 64) -> tuple[int, Array]:
    """How it ended, and the memory after it if it ended well."""
    command = [*program, str(CODES.index(code)), str(number)]
    done = subprocess.run(command, input=memory.tobytes(), capture_output=True, check=False)
    assert done.returncode <= 0, done.stderr
    return done.returncode, np.frombuffer(done.stdout, np.uint8)


def random_memory(tiles: dict[int, tuple[int, int]], seed: int = 0) -> Array:
    """Every byte of it random, but the configuration: of tiles by number, rows and bytes."""
    memory = np.random.default_rng(seed).integers(0, 256, SIZE).astype(np.uint8)
    memory[CONFIG:] = tile_config([tiles.get(number, (0, 0)) for number in range(8)])
    return memory


def rows_at(memory: Array, first: int, stride: int, rows: int, row_bytes: int) -> Array:
    """The rows of a tile as they lie in memory, (rows, row_bytes), to be written to."""
    return np.lib.stride_tricks.as_strided(memory[first:], (rows, row_bytes), (stride, 1))


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(16, 16, 16), (1, 1, 1), (5, 16, 16), (16, 3, 16), (16, 16, 7), (11, 9, 13)],
)
def test_products_are_those_of_integers(
    program: list[str], name: str, rows: int, depth: int, columns: int
) -> None:
    shapes = {5: (rows, 4 * columns), 0: (rows, 4 * depth), 7: (depth, 4 * columns)}
    memory, stride = random_memory(shapes, seed=rows), 76
    sums = rows_at(memory, SUMS, stride, *shapes[5])
    sums[0] = np.frombuffer(np.full(columns, 2**31 - 1, np.int32).tobytes(), np.uint8)
    left, right = (
        np.array(rows_at(memory, at, stride, *shapes[tile]))
        .view(np.int8 if signed else np.uint8)
        .astype(np.int64)
        for at, tile, signed in zip((LEFT, RIGHT), (0, 7), SIGNS[name], strict=True)
    )
    # Four rows of the right factor lie in one of its tile.
    right = right.reshape(depth, columns, 4).transpose(0, 2, 1).reshape(4 * depth, columns)
    before = np.array(sums).view(np.int32)
    _, after = run(program, PRODUCTS[name], memory, stride)
    # Sums that are too large for int32 wrap around.
    sums[:] = (before + left @ right).astype(np.int32).view(np.uint8)
    np.testing.assert_array_equal(after, memory)


@pytest.mark.parametrize("load", LOADS)
def test_rows_are_loaded_from_where_the_operand_says(program: list[str], load: str) -> None:
    shape = (11, 28)
    memory = random_memory({3: shape})
    first, stride, number = LOADS[load]
    code = f"{CONFIGURE} {load}; mov $64, %rsi; {STORE}"
    _, after = run(program, code, memory, number)
    rows_at(memory, STORED, 64, *shape)[:] = rows_at(memory, first, stride, *shape)
    np.testing.assert_array_equal(after, memory)


@pytest.mark.parametrize("store", STORES)
def test_rows_are_stored_to_where_the_operand_says(program: list[str], store: str) -> None:
    shape = (11, 28)
    memory = random_memory({3: shape})
    first, stride, number = STORES[store]
    _, after = run(program, f"{CONFIGURE} tileloadd (%rdi,%rsi), %tmm3; {store}", memory, number)
    rows_at(memory, first, stride, *shape)[:] = rows_at(memory, 0, number, *shape)
    np.testing.assert_array_equal(after, memory)


@pytest.mark.parametrize("configure", CONFIGURES)
def test_the_configuration_is_read_from_where_the_operand_says(
    program: list[str], configure: str
) -> None:
    shape = (3, 8)
    memory = random_memory({3: shape})
    code = f"{configure}; mov $64, %rsi; {LOAD}; {STORE}"
    _, after = run(program, code, memory, CONFIGURES[configure])
    rows_at(memory, STORED, 64, *shape)[:] = rows_at(memory, 0, 64, *shape)
    np.testing.assert_array_equal(after, memory)


def test_a_tile_that_is_cleared_holds_zeros(program: list[str]) -> None:
    memory = random_memory({3: (16, 64)})
    _, after = run(program, CLEAR, memory)
    rows_at(memory, STORED, 64, 16, 64)[:] = 0
    np.testing.assert_array_equal(after, memory)


def test_a_row_beyond_the_memory_is_a_fault(program: list[str]) -> None:
    code = f"{CONFIGURE} {LOAD}; mov $64, %rsi; {STORE}"
    memory = random_memory({3: (2, 64)})
    assert run(program, code, memory, SIZE - 64)[0] == 0
    assert run(program, code, memory, SIZE - 63)[0] == -signal.SIGSEGV


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_is_illegal_still_kills(program: list[str], name: str) -> None:
    memory = random_memory({2: (3, 8), 3: (2, 12), 4: (3, 12), 5: (3, 12)})
    assert run(program, ILLEGAL[name], memory)[0] == -signal.SIGILL


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_that_amx_refuses_kills(program: list[str], name: str) -> None:
    memory = random_memory({3: (2, 12)})
    assert run(program, CLEAR, memory)[0] == 0
    at, value = REFUSED[name]
    memory[CONFIG + at] = value
    assert run(program, CLEAR, memory)[0] in (-signal.SIGILL, -signal.SIGSEGV)


@pytest.mark.parametrize("code", UNKNOWN)
def test_what_software_does_not_know_kills(program: list[str], code: str) -> None:
    if host_cpu().amx:
        pytest.skip("AMX knows it")
    memory = random_memory({1: (3, 12), 3: (2, 12), 4: (3, 12), 5: (3, 12)})
    assert run(program, code, memory)[0] == -signal.SIGILL
