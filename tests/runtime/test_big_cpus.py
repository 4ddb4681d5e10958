"""Which CPUs threads stay on where some are LITTLE, from a tree of files as Linux has it."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from toy_bundle import RUNTIME

from tools import need

CAPACITY, CLOCK = "cpu_capacity", "cpufreq/cpuinfo_max_freq"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("big_cpus") / "big_cpus"
    options = ["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME}"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [Path(__file__).with_name("big_cpus.c"), RUNTIME / "gfrt_cores.c"]
    command = [need("gcc"), *options, *sanitize, *map(str, sources), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


def big(program: Path, root: Path, count: int) -> list[int]:
    done = subprocess.run([program, root, str(count)], capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def write(root: Path, file: str, values: Sequence[int | str]) -> None:
    for cpu, value in enumerate(values):
        path = root / f"cpu{cpu}" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        (CAPACITY, [1024] * 4, [0, 1, 2, 3]),  # a Raspberry Pi
        (CAPACITY, [485] * 4 + [1024] * 2, [4, 5]),  # RK3399
        (CAPACITY, [400] * 4 + [871] * 3 + [1024], [4, 5, 6, 7]),  # Snapdragon 855: a prime core
        (CAPACITY, [160] * 4 + [620] * 2 + [1024] * 2, [4, 5, 6, 7]),
        (CLOCK, [1785600] * 4 + [2419200] * 3 + [2841600], [4, 5, 6, 7]),
        (CLOCK, [1416000] * 4 + [1800000] * 2, [4, 5]),
        (CLOCK, [5200000, 5200000, 5400000, 3900000], [0, 1, 2]),
    ],
)
def test_the_big_cpus_stay(
    program: Path, tmp_path: Path, file: str, values: list[int], expected: list[int]
) -> None:
    write(tmp_path, file, values)
    assert big(program, tmp_path, len(values)) == expected


def test_capacity_counts_rather_than_the_clock(program: Path, tmp_path: Path) -> None:
    write(tmp_path, CLOCK, [2000000] * 4)
    write(tmp_path, CAPACITY, [400, 400, 1024, 1024])
    assert big(program, tmp_path, 4) == [2, 3]


def test_cpus_that_may_not_be_used_do_not_count(program: Path, tmp_path: Path) -> None:
    write(tmp_path, CAPACITY, [400, 400, 1024, 1024])
    assert big(program, tmp_path, 2) == [0, 1]


@pytest.mark.parametrize("values", [[], [1024, 400], [1024, "", "x", 400]])
def test_all_stay_where_the_system_does_not_say(
    program: Path, tmp_path: Path, values: list[int | str]
) -> None:
    write(tmp_path, CAPACITY, values)
    assert big(program, tmp_path, 4) == [0, 1, 2, 3]
