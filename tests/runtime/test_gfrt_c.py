"""The C runtime under sanitizers: its whole API, and thousands of damaged plans."""

import random
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from toy_bundle import KERNELS, RUNTIME, Toy

from gfcompile.targets.tvm import plan as plans
from gfcompile.targets.tvm.link import kernel_table
from tools import need

HERE = Path(__file__).parent
SOURCES = sorted(RUNTIME.glob("gfrt*.c"))
Build = Callable[..., Path]
WRAPPED = ",".join(f"--wrap={name}" for name in ("malloc", "calloc", "aligned_alloc", "mmap"))


@pytest.fixture(scope="module")
def build(toy: Toy, toy_kernels_x86: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a C program of the tests together with the runtime and the toy's kernels."""
    gcc = need("gcc")
    folder = tmp_path_factory.mktemp("sanitized")
    table = folder / "table.c"
    table.write_text(kernel_table(KERNELS, library_id=toy.plan.library_id, cuda=True))

    def compile_program(source: Path, sanitize: str, *options: str) -> Path:
        program = folder / f"{source.stem}-{sanitize.replace(',', '-')}"
        command = [
            *(gcc, "-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror"),
            *(f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", f"-I{RUNTIME}"),
            *map(str, [source, table, *SOURCES, toy_kernels_x86]),
            *("-lm", "-lpthread", "-ldl", "-rdynamic", *options, "-o", str(program)),
        ]
        subprocess.run(command, check=True)
        return program

    return compile_program


def run_silently(command: Sequence[Path | str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in result.stderr:
        # ThreadSanitizer's fixed shadow memory and newer kernels' address randomization collide.
        command = [need("setarch"), "--addr-no-randomize", *command]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_the_whole_api_under_sanitizers(
    build: Build, toy: Toy, other_toy: Toy, sanitize: str
) -> None:
    program = build(HERE / "api_check.c", sanitize, f"-Wl,{WRAPPED}")
    run_silently([program, toy.folder, other_toy.folder])


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_loops_run_every_task_once_and_idle_threads_sleep(build: Build, sanitize: str) -> None:
    run_silently([build(HERE / "pool_check.c", sanitize)])


@pytest.fixture(scope="module")
def application(build: Build) -> Path:
    # AddressSanitizer's allocator has a lock that a fork may find taken, for good.
    return build(HERE / "app_check.c", "undefined")


@pytest.mark.parametrize("what", ["forks", "signals", "floats", "observer"])
def test_an_application_keeps_what_is_its_own(
    application: Path, toy: Toy, tmp_path: Path, what: str
) -> None:
    first, *others = toy.plan.steps
    twofold = replace(first, outputs=(*first.outputs, first.args[0]))
    toy = toy.with_plan(tmp_path / "toy", steps=(twofold, *others))
    run_silently([application, toy.folder, what])


def open_all(program: Path, toy: Toy, data: Sequence[bytes]) -> list[tuple[int, str]]:
    """Status and message for each plan, from a process that must survive them all."""
    result = subprocess.run(
        [program, toy.folder, toy.folder / "plan.bin"],
        input=b"".join(struct.pack("<I", len(plan)) + plan for plan in data),
        capture_output=True,
        check=False,
        # Plans ask for absurd amounts of memory: refusing it is not the finding.
        env={"ASAN_OPTIONS": "allocator_may_return_null=1"},
    )
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    lines = result.stdout.decode(errors="replace").splitlines()
    assert len(lines) == len(data)
    return [(int(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in lines]


@pytest.fixture(scope="module")
def opener(build: Build) -> Path:
    return build(HERE / "open_plans.c", "address,undefined")


def with_groups(toy: Toy) -> plans.Plan:
    """The toy's plan if its last 64 weights had four bits and factors; its files fit that."""
    file = toy.folder / "weights.bin"
    file.write_bytes(file.read_bytes()[:-32])
    plain = toy.plan.weights_bytes - 64
    grouped = plans.PlanGrouped(
        offset=plain, size_bytes=64, factors=plain - 8, row_bytes=8, rows=4, shared=3, run=4
    )
    return replace(toy.plan, packed_bytes=64, grouped=(grouped,))


@pytest.mark.slow
def test_no_damaged_plan_crashes_the_runtime(opener: Path, toy: Toy, tmp_path: Path) -> None:
    """Flips, insertions, extreme values and cuts; the hash is made to fit for most of them."""
    toy = toy.copy(tmp_path / "toy")
    plan_with_groups = with_groups(toy)
    good = plans.serialize(plan_with_groups)
    rng = random.Random(0)
    extremes = [0, 1, 63, 64, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(good)]
    data = [good, plans.serialize(replace(plan_with_groups, cpu_features=("popcnt",)))]
    # Every 32-bit word of header and records, set to each extreme.
    for at in range(0, len(good) - 3, 4):
        for value in rng.sample(extremes, 2):
            data.append(plans.seal(good[:at] + struct.pack("<I", value) + good[at + 4 :]))
    for _ in range(800):
        plan = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            plan[rng.randrange(len(plan))] ^= 1 << rng.randrange(8)
        data.append(plans.seal(bytes(plan)))
    for _ in range(300):
        end = rng.randrange(len(good))
        data.append(good[:end])
        if end >= 64:  # a cut that knows its own length and hash
            data.append(plans.seal(good[:16] + struct.pack("<Q", end) + good[24:end]))
    results = open_all(opener, toy, data)
    assert [status for status, _ in results[:2]] == [0, 0]
    assert all(message for status, message in results if status)
    statuses = {status for status, _ in results}
    assert statuses <= {0, 2, 3, 4, 5, 6}, statuses
    assert sum(status != 0 for status, _ in results) > len(results) // 2


def field(plan: bytes, at: int, layout: str, *values: object) -> bytes:
    """`plan` with other values at one place, sealed."""
    changed = bytearray(plan)
    struct.pack_into(layout, changed, at, *values)
    return plans.seal(bytes(changed))


def test_each_fault_of_a_plan_is_named(opener: Path, toy: Toy, tmp_path: Path) -> None:
    toy = toy.copy(tmp_path / "toy")
    good = plans.serialize(toy.plan)
    tensors = 368
    steps = tensors + 88 * len(toy.plan.tensors)
    args = steps + 48 * len(toy.plan.steps)
    arg_count = sum(len(step.args) for step in toy.plan.steps)
    inputs = args + 8 * arg_count + 8 * 4
    cases = [
        (b"", 3, "it is not a plan"),
        (good[:100], 3, "it is not a plan"),
        (good[:-8], 3, f"{len(good) - 8} bytes instead of {len(good)}"),
        (good[:400] + b"!" + good[401:], 3, "its hash differs"),
        (plans.serialize(toy.plan, format_version=3), 4, "written by a newer gfcompile"),
        (field(good, 120, "<I", 9), 3, "its header"),
        (field(good, 96, "<Q", 2**39), 3, "its packed weights"),
        (field(good, 132, "<I", 1), 5, "the bundle is for aarch64, this machine is x86_64"),
        (field(good, 208, "<4s", b"../x"), 3, "the name of its library"),
        (field(good, 328, "<I", 2**31), 3, "its counts"),
        (field(good, 328, "<I", 9), 3, "its sections"),
        (field(good, tensors, "<I", 2**20), 3, "the name of tensor 0"),
        (field(good, tensors + 4, "<I", 99), 3, "the type of tensor 0"),
        (field(good, tensors + 16, "<q", -1), 3, "the shape of tensor 0"),
        (field(good, tensors + 16, "<2q", 2**39, 2**39), 3, "the shape of tensor 0"),
        (field(good, tensors + 64, "<Q", 8), 3, "the place of tensor 0"),
        (field(good, tensors + 64, "<Q", 2**64 - 64), 3, "the place of tensor 0"),
        (field(good, tensors + 72, "<f", float("nan")), 3, "the scale of tensor 0"),
        (field(good, steps, "<I", 4), 3, "the kernel of step 0"),
        (field(good, steps + 8, "<2I", 0xFFFFFFFF, 2), 3, "the arguments of step 0"),
        (field(good, steps + 12, "<I", 33), 3, "the arguments of step 0"),
        (field(good, args, "<I", 8), 3, "argument 0 of step 0"),
        (field(good, args + 12, "<I", 1), 3, "step 0 writes to a weight"),
        (field(good, inputs + 4, "<I", 2), 3, "input 0 is a weight"),
        (field(good, inputs + 4, "<I", 1), 3, "input 0 is no RGB image"),
        (field(good, inputs + 24, "<f", 0.0), 3, "the normalization of input 0"),
        (plans.seal(good.replace(b"toy_mix", b"toy\nmix")), 3, "has no kernel toy mix"),
        (good[:-1] + b"x", 3, "its hash differs"),
        (plans.seal(good[:-1] + b"x"), 3, "its strings"),
    ]
    results = open_all(opener, toy, [plan for plan, _, _ in cases])
    for (status, message), (_, want_status, want_message) in zip(results, cases, strict=True):
        assert status == want_status, (message, want_message)
        assert want_message in message


def test_each_fault_of_grouped_weights_is_named(opener: Path, toy: Toy, tmp_path: Path) -> None:
    toy = toy.copy(tmp_path / "toy")
    plan = with_groups(toy)
    good = plans.serialize(plan)
    record = struct.pack("<3Q4I", *astuple(plan.grouped[0]))
    at = good.index(record)
    cases = [
        (field(good, at, "<Q", 0), "the place of grouped weights 0"),
        (field(good, at + 8, "<Q", 2**63), "the place of grouped weights 0"),
        (field(good, at + 16, "<Q", plan.grouped[0].factors + 1), "the factors of grouped weights"),
        (field(good, at + 16, "<Q", 2**64 - 1), "the factors of grouped weights 0"),
        (field(good, at + 24, "<I", 0), "the shape of grouped weights 0"),
        (field(good, at + 24, "<2I", 2**31, 2**31), "the shape of grouped weights 0"),
        (field(good, at + 28, "<I", 3), "the shape of grouped weights 0"),
        (field(good, at + 32, "<I", 0), "the shape of grouped weights 0"),
        (field(good, at + 32, "<I", 1), "the factors of grouped weights 0"),
        (field(good, at + 36, "<I", 0), "the shape of grouped weights 0"),
        (field(good, at + 36, "<I", 3), "the shape of grouped weights 0"),
    ]
    twice = replace(plan, grouped=(plan.grouped[0],) * 2)
    cases.append((plans.serialize(twice), "its grouped weights"))
    results = open_all(opener, toy, [good, *(damaged for damaged, _ in cases)])
    assert results[0][0] == 0
    for (status, message), (_, wanted) in zip(results[1:], cases, strict=True):
        assert status == 3
        assert wanted in message


def test_a_launch_beyond_every_gpu_is_refused(opener: Path, toy: Toy, tmp_path: Path) -> None:
    toy = toy.copy(tmp_path / "toy")
    changes = [{"block": (1024, 2, 1)}, {"grid": (1, 65536, 1)}, {"block": (1, 1, 65)}]
    data = [
        plans.serialize(
            replace(
                toy.plan,
                device="cuda",
                steps=(replace(toy.plan.steps[0], **change),),  # type: ignore[arg-type]
            )
        )
        for change in changes
    ]
    for status, message in open_all(opener, toy, data):
        assert status == 3
        assert "the launch of step 0" in message
