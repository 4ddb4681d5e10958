"""A tuning database and `gfcompile tune`, seen from the outside: what is compiled, what is said."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pruning_cases import DEIT
from small_models import SPEC, build

import gfcompile.runtime
from gfcompile.compile import cli, models, tuning
from gfcompile.compile.bundle import Bundle
from gfcompile.compile.pipeline import CompileConfig, compile_model
from gfcompile.compile.tune_command import tune_config
from gfcompile.compile.tuning_config import TuneConfig
from gfcompile.runtime.errors import UserError
from gfcompile.targets.target import Target, find_target
from gfcompile.targets.tvm.choices import choices, device_key, kernel_key, space_of, to_json
from gfcompile.targets.tvm.kernel import Dense, Kernel
from gfcompile.targets.tvm.kernel_names import kernel_name
from gfcompile.targets.tvm.tuning import tuner
from gfcompile.targets.tvm.tuning.database import Database, Entry, load, shipped
from gfcompile.targets.tvm.tuning.tasks import Task
from tools import need, need_arm64_sysroot


def compiled(folder: Path, name: str, tuning_db: object, target: str = "host") -> Bundle:
    config = CompileConfig(
        model=SPEC.name,
        target=target,
        image_size=SPEC.image_size,
        output=folder / name,
        cache=False,
        tuning_db=tuning_db,  # type: ignore[arg-type]
    )
    return compile_model(config, module=build(SPEC))


def tuned_database(path: Path, kernel: Dense, place: int) -> object:
    target = find_target("host")
    assert isinstance(target, Target)
    choice = choices(kernel, target.cpu)[place]
    space = space_of(kernel, target.cpu)
    assert space is not None
    entry = Entry(
        kernel=kernel_key(kernel),
        target=device_key(target.cpu),
        schedule=space.schedule,
        choice=to_json(choice),
        how="static",
        unit="cycles",
        cost=1.0,
        default_cost=2.0,
        trials=1,
        device="a test",
    )
    Database([entry]).save(path)
    return to_json(choice)


def test_a_tuned_kernel_is_in_the_manifest_and_computes_the_same(tmp_path: Path) -> None:
    plain = compiled(tmp_path, "plain", "none")
    assert plain.manifest.extra["tuned_kernels"] == {}
    head = Dense(m=1, n=SPEC.num_classes, k=SPEC.dims[-1])
    assert kernel_name(head) in {kernel["name"] for kernel in plain.manifest.kernels}
    choice = tuned_database(tmp_path / "db.json", head, place=-1)
    tuned = compiled(tmp_path, "tuned", tmp_path / "db.json")
    record = next(k for k in tuned.manifest.kernels if k["name"] == kernel_name(head))
    assert (record["tuned"], record["choice"]) == ("static", choice)
    assert tuned.manifest.extra["tuned_kernels"]["static"] == 1
    image = np.random.default_rng(0).standard_normal(plain.manifest.inputs[0].shape, np.float32)
    logits = []
    for bundle in (plain, tuned):
        with gfcompile.runtime.load(bundle.path) as session:
            logits.append(session.run(image))
    np.testing.assert_array_equal(*logits)


def test_entries_that_cannot_be_used_are_told_in_one_line_and_not_in_the_manifest(
    tmp_path: Path,
) -> None:
    head = Dense(m=1, n=SPEC.num_classes, k=SPEC.dims[-1])
    path = tmp_path / "db.json"
    tuned_database(path, head, place=-1)
    (entry,) = load(path).entries
    edited = dataclasses.replace(entry, choice={**entry.choice, "rows": 10**6})
    Database([edited, dataclasses.replace(entry, schedule="cpu_dense/0")]).save(path)
    bundle = compiled(tmp_path, "bundle", path)
    notes = [note for note in bundle.manifest.notes if "db.json" in note]
    assert len(notes) == 1
    assert (
        "left out: 1 for another version of the kernel's schedule, 1 with a choice outside the "
        "kernel's design space; their"
    ) in notes[0]
    assert bundle.manifest.extra["tuned_kernels"] == {}
    record = next(k for k in bundle.manifest.kernels if k["name"] == kernel_name(head))
    assert "tuned" not in record


def test_a_hostile_database_stops_the_compilation_before_anything_is_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "db.json"
    path.write_text('{"entries": "all"}')
    with pytest.raises(UserError, match="is not a tuning database"):
        compiled(tmp_path, "bundle", path)
    with pytest.raises(UserError, match="no such file"):
        compiled(tmp_path, "bundle", tmp_path / "other.json")
    with pytest.raises(UserError, match="no kernels of ours"):
        compiled(tmp_path, "bundle", path, target="tflite")
    assert not (tmp_path / "bundle").exists()


def test_the_cache_tells_databases_apart(tmp_path: Path) -> None:
    from gfcompile.compile.cache import digest

    path = tmp_path / "db.json"
    keys = [digest({"tuning_db": value}) for value in ("shipped", "none")]
    for place in (0, 1):
        tuned_database(path, Dense(m=1, n=10, k=48), place)
        keys.append(digest({"tuning_db": path}))
    assert len(set(keys)) == 4


def test_every_shipped_entry_is_in_the_space_of_a_kernel_of_today() -> None:
    """Entries for kernels of a class that is gone, or outside its space, would be dead weight."""
    for entry in shipped().entries:
        kernel = eval_kernel(entry.kernel)
        names = ("x86-64", "x86-64-v3", "x86-64-v4", "raspberry-pi-3", "raspberry-pi-4",
                 "raspberry-pi-5", "jetson-nano-cpu", "jetson-orin-cpu", "jetson-xavier-cpu",
                 "jetson-nano", "jetson-tx2", "jetson-xavier", "jetson-orin")  # fmt: skip
        targets = [t for t in map(find_target, names) if isinstance(t, Target)]
        devices = [device for t in targets for device in (t.gpu or t.cpu, *t.levels)]
        (device, *_) = [device for device in devices if device_key(device) == entry.target]
        assert Database([entry]).tuned([kernel], device), entry


def eval_kernel(text: str) -> Kernel:
    from gfcompile.targets.tvm import kernel

    name, _, fields = text.rstrip(")").partition("(")
    values: dict[str, object] = {}
    for field in fields.split(", "):
        key, _, value = field.partition("=")
        values[key] = {"True": True}.get(value, int(value) if value.isdigit() else value)
    made: Kernel = getattr(kernel, name)(**values)
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tflite"], "chooses its own kernels"),
        (["--target", "host", "--trials", "0"], "not at least 1"),
        (["--target", "host", "--minutes", "nan"], "not above 0"),
        (["--target", "host", "--device", "ftp://x"], "unknown device"),
        (["--target", "jetson-tx2", "--device", "qemu:cortex-a57"], "stands in for arm64 CPUs"),
        (["--target", "host", "--keep-ratio", "0.7"], "gfnet_xs takes no keep ratio: its global"),
        (["--target", "host", "--keep-ratio", "x"], "is no number"),
        (["--target", "host", "--int8", "--fp16"], "not allowed with argument --int8"),
    ],
)
def test_tune_answers_mistakes_in_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", "--model", "gfnet_xs", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["raspberry-pi-4", "x86-64", "jetson-tx2"])
def test_tune_refuses_float16_as_a_compilation_does(
    target: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = []
    for command in ("compile", "tune"):
        assert cli.main([command, "--model", "gfnet_xs", "--target", target, "--fp16"]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert "--fp16: " in said[0]


@pytest.mark.slow
def test_a_keep_ratio_changes_the_kernels_that_are_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()

    def ask(tasks: Sequence[Task], *_arguments: object, **_options: object) -> None:
        asked.update(task.kernel.m for task in tasks if isinstance(task.kernel, Dense))
        raise UserError("enough")

    monkeypatch.setitem(models._SPECS, DEIT.name, DEIT)
    monkeypatch.setattr(tuner, "Tuner", ask)
    config = TuneConfig(
        model=DEIT.name, target="jetson-tx2", keep_ratio=0.5, database=tmp_path / "db.json"
    )
    with pytest.raises(UserError, match="enough"):
        tuning.tune_model(config)
    # Of 36 patches 18, 9 and 4 are kept, and a class token; as published, 25, 17 and 12.
    assert asked >= {37, 19, 10, 5}
    assert not asked & {26, 13}


@pytest.mark.slow
def test_what_tuning_found_for_float16_serves_a_compilation_in_float16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("qemu-aarch64")
    need_arm64_sysroot()
    monkeypatch.setitem(models._SPECS, SPEC.name, SPEC)
    path = tmp_path / "db.json"
    search = TuneConfig(
        model=SPEC.name,
        target="arm64",
        precision="float16",
        device="qemu:cortex-a76",
        trials=8,
        database=path,
    )
    found = tuning.tune_model(search)
    assert (found.how, found.device) == ("static", "cortex-a76 under QEMU, instructions")
    entries = load(path).entries
    assert entries
    for entry in entries:
        assert "w=float16" in entry.kernel
        assert entry.target == "aarch64 cortex-a55 -dotprod -rcpc"
    config = CompileConfig(
        model=SPEC.name,
        target="arm64",
        precision="float16",
        tuning_db=path,
        output=tmp_path / "bundle",
        cache=False,
    )
    bundle = compile_model(config)
    assert bundle.manifest.extra["tuned_kernels"]["static"] >= len(entries)
    assert not any(str(path) in note for note in bundle.manifest.notes)


def test_tune_is_asked_for_the_kernels_that_its_next_command_compiles() -> None:
    arguments = ["--model", "dynamicvit_deit_s", "--target", "raspberry-pi-4", "--int8"]
    arguments += ["--image-size", "192", "--num-classes", "10", "--batch", "2"]
    for ratio, given in (("0.8", 0.8), ("0.9,0.7,0.5", (0.9, 0.7, 0.5))):
        sizes = [*arguments, "--keep-ratio", ratio]
        config = tune_config(cli._parse(["tune", *sizes, "--tuning-db", "my db.json"]))
        assert config.keep_ratio == given
        asked = cli._parse(["compile", *shlex.split(config.next_command)[1:]])
        compiled = cli._parse(["compile", *sizes, "--tuning-db", "my db.json"])
        assert vars(asked) == vars(compiled)
    plain = TuneConfig(model="gfnet_xs", target="host")
    assert plain.next_command == (
        "gfcompile --model gfnet_xs --target host --tuning-db tuning-host.json"
    )


@pytest.mark.parametrize(
    ("database", "message"),
    [(None, "nothing better was found"), ("t.json", "t.json has what was found")],
)
def test_an_interrupted_tune_says_what_is_left(
    database: str | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_arguments: object) -> None:
        if database:
            Database().save(Path(database))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "tune_model", interrupted)
    arguments = ["tune", "--model", "gfnet_xs", "--target", "host", "--tuning-db", "t.json"]
    assert cli.main(arguments) == 130
    assert f"interrupted; {message}; the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_tune_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["tune", "--model", "gfnet_ti", "--target", "jetson-tx2", "--image-size", "64"]
    assert cli.main([*arguments, "--trials", "4"]) == 0
    printed = capsys.readouterr().out
    assert "static: an estimate, nothing was measured" in printed
    assert "dense_4x" in printed or "dense_" in printed
    load(tmp_path / "tuning-jetson-tx2.json")
