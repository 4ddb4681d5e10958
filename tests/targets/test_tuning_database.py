"""The tuning database as a file: what goes in comes out, and nothing else gets in."""

import dataclasses
import json
from pathlib import Path

import pytest
from tvm import te

from gfcompile.runtime.errors import UserError
from gfcompile.targets.target import Cpu, Target, find_target
from gfcompile.targets.tvm import choices as spaces
from gfcompile.targets.tvm.choices import choices, device_key, kernel_key, space_of, to_json
from gfcompile.targets.tvm.kernel import Dense, Generic
from gfcompile.targets.tvm.tuning.database import Database, Entry, load, shipped

KERNEL = Dense(m=196, n=384, k=1536)


def cpu(name: str) -> Cpu:
    target = find_target(name)
    assert isinstance(target, Target)
    return target.cpu


def pi4() -> Cpu:
    return cpu("raspberry-pi-4")


def schedule(on: Cpu) -> str:
    space = space_of(KERNEL, on)
    assert space is not None
    return space.schedule


def entry(**changes: object) -> Entry:
    found = Entry(
        kernel=kernel_key(KERNEL),
        target=device_key(pi4()),
        schedule=schedule(pi4()),
        choice=to_json(choices(KERNEL, pi4())[3]),
        how="static",
        unit="instructions",
        cost=90.0,
        default_cost=100.0,
        trials=12,
        device="cortex-a72 under QEMU",
    )
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def test_entries_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "made" / "db.json"
    Database([entry()]).save(path)
    again = load(path)
    assert again.entries == (entry(),)
    tuned = again.tuned([KERNEL, Dense(m=1, n=2, k=3)], pi4())
    assert {kernel: (t.choice, t.how) for kernel, t in tuned.items()} == {
        KERNEL: (choices(KERNEL, pi4())[3], "static")
    }
    Database([entry(cost=80.0)]).save(path)
    assert load(path).entries[0].cost == 80.0
    assert [file.name for file in path.parent.iterdir()] == ["db.json"]


@pytest.mark.parametrize("other", ["kernel", "target", "schedule"])
def test_an_entry_for_something_else_changes_nothing(other: str) -> None:
    database = Database([entry(**{other: "cpu_dense/0"})])
    assert database.tuned([KERNEL], pi4()) == {}


def test_a_float16_kernel_and_the_same_in_float32_never_take_each_others_choice() -> None:
    pi5 = cpu("raspberry-pi-5")
    half = dataclasses.replace(KERNEL, x="float16", w="float16", out="float16")
    weights_alone = dataclasses.replace(KERNEL, w="float16")
    for owner in (KERNEL, half, weights_alone):
        choice = to_json(choices(owner, pi5)[1])
        found = entry(kernel=kernel_key(owner), target=device_key(pi5), choice=choice)
        tuned = Database([found]).tuned([KERNEL, half, weights_alone], pi5)
        assert list(tuned) == [owner]


def test_a_new_version_for_one_architecture_leaves_the_entries_of_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    v3 = cpu("x86-64-v3")
    values = to_json(choices(KERNEL, v3)[3])
    elsewhere = entry(target=device_key(v3), schedule=schedule(v3), choice=values)
    database = Database([entry(), elsewhere])
    assert database.find(KERNEL, pi4()) == entry()
    newer = spaces._cpu_spaces(dense=10**6, dft_filter=1, attention=1, generic=1)
    monkeypatch.setattr(spaces, "_ON_CPU", {**spaces._ON_CPU, "aarch64": newer})
    assert database.find(KERNEL, pi4()) is None
    assert database.find(KERNEL, v3) == elsewhere


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "db.json"
    Database([entry()]).save(path)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        Database().save(path)
    assert load(path).entries == (entry(),)
    assert [file.name for file in tmp_path.iterdir()] == ["db.json"]


def document(**changes: object) -> str:
    good = dataclasses.asdict(entry())
    return json.dumps(
        {"format": "gfcompile tuning", "version": 1, "entries": [{**good, **changes}]}
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[" * 100_000,
        '{"format": "gfcompile tuning", "version": 2, "entries": []}',
        '{"format": "gfcompile tuning", "version": 1, "entries": {}}',
        '{"format": "gfcompile tuning", "version": 1, "entries": [1]}',
        '{"format": "gfcompile tuning", "version": 1, "entries": [{}]}',
        document(more=1),
        document(how="guessed"),
        document(unit="parsecs"),
        document(cost="fast"),
        document(cost=-1),
        document(cost=True),
        document(choice=[]),
        document(kernel=3),
        document(device="x" * 10_000),
        document(cost=float("nan")),
        document(cost=10**400),
        document(how=["static"]),
    ],
)
def test_what_is_no_database_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "db.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"db\.json is not a tuning database"):
        load(path)


def test_bytes_that_are_no_text_and_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "db.json"
    with pytest.raises(UserError, match="No such file"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load(path)


@pytest.mark.parametrize(
    "choice", [{"rows": 10**6}, {"rows": 7, "vectors": 3, "unroll": 64, "order": "columns"}, {}]
)
def test_a_choice_outside_the_design_space_is_left_out_and_told(choice: dict[str, object]) -> None:
    database = Database([entry(choice=choice)], "db.json")
    assert database.tuned([KERNEL], pi4()) == {}
    left_out = database.left_out([KERNEL], pi4())
    assert database.describe(left_out) == (
        "db.json: entries left out: 1 with a choice outside the kernel's design space; their "
        "kernels are compiled as if there were none; tune again"
    )
    assert database.left_out([Dense(m=1, n=2, k=3)], pi4()) == {}  # another model's
    assert database.left_out([KERNEL], cpu("raspberry-pi-5")) == {}  # another CPU's


def test_an_entry_for_another_version_of_the_schedule_is_told_unless_one_for_this_is_used() -> None:
    older = entry(schedule="cpu_dense/0")
    database = Database([older, entry(schedule="cpu_dense/1")], "db.json")
    left_out = database.left_out([KERNEL], pi4())
    assert "left out: 2 for another version of" in database.describe(left_out)
    database.add(entry())
    assert database.left_out([KERNEL], pi4()) == {}
    assert older in database.entries


def test_a_trace_that_does_not_fit_its_function_is_left_out() -> None:
    func = te.create_prim_func([te.placeholder((4,), name="x")])
    kernel = Generic(name="copy", key="0", func=func)
    space = space_of(kernel, pi4())
    assert space is not None
    trace = '[[["GetSBlock", [], ["nowhere", "main"], ["b0"]]], []]'
    found = entry(kernel=kernel_key(kernel), schedule=space.schedule, choice={"trace": trace})
    assert Database([found]).tuned([kernel], pi4()) == {}
    assert list(Database([found]).left_out([kernel], pi4())) == [found.key]


def test_what_is_left_out_is_dropped_when_its_kernel_is_tuned_again() -> None:
    other = entry(kernel="Dense(m=1, n=2, k=3)", choice={})
    database = Database([entry(choice={}), entry(schedule="cpu_dense/0"), other])
    database.drop_left_out(KERNEL, pi4())
    assert database.entries == (other,)


def test_what_is_shipped_is_small_and_marked() -> None:
    entries = shipped().entries
    assert len({entry.key for entry in entries}) == len(entries)
    for found in entries:
        assert found.cost < found.default_cost
        assert found.how == "static" or found.unit == "ms"
