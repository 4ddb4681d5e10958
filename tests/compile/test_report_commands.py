"""`gfcompile report` and `gfcompile compare`, on a bundle of four small kernels."""

import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import report_cases as cases
from toy_bundle import Arch, build_toy, toy_object

from gfcompile.compile.cli import main
from gfcompile.runtime.results import manifest_sha256, write_result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    arch = cast(Arch, platform.machine())
    return build_toy(folder / "toy", toy_object(arch, folder), arch).folder


def result_for(bundle: Path, path: Path) -> Path:
    original = cases.result()
    identity = replace(original.bundle, name=bundle.name, manifest_sha256=manifest_sha256(bundle))
    path.parent.mkdir(exist_ok=True)
    write_result(replace(original, bundle=identity), path)
    return path


def test_a_report_without_a_measurement_says_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "page.html"
    assert main(["report", str(made), "--output", str(output)]) == 0
    assert "not measured" in capsys.readouterr().out
    assert "Not measured" in output.read_text(encoding="utf-8")
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_a_report_that_cannot_be_written_leaves_no_folder(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "page.html"
    assert main(["report", str(made), "--photo", "none.jpg", "--output", str(output)]) == 2
    assert not output.parent.exists()


def test_a_report_of_a_result_and_a_photo(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    photo = tmp_path / "cat.png"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(photo)
    result = result_for(made, tmp_path / "results" / "one.json")
    output = tmp_path / "page.html"
    arguments = [str(made), str(result), "--photo", str(photo), "--output", str(output)]
    assert main(["report", *arguments]) == 0
    assert ": measured" in capsys.readouterr().out
    text = output.read_text(encoding="utf-8")
    assert "Passed" in text
    assert "cat.png" in text
    assert "data:image/jpeg;base64," in text


def test_mistakes_are_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.json"
    write_result(cases.result(), foreign)
    for arguments, code, said in (
        ([str(made), str(foreign)], 2, "another bundle"),
        ([str(made), str(tmp_path / "none.json")], 2, "cannot read"),
        ([str(tmp_path)], 1, "not a bundle"),
        ([str(made), "--photo", str(tmp_path / "none.jpg")], 2, "no such image"),
    ):
        output = tmp_path / "never.html"
        assert main(["report", *arguments, "--output", str(output)]) == code
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
        assert not output.exists()


def test_compare_prints_a_table_and_writes_a_page(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_for(made, tmp_path / "one.json")
    page = tmp_path / "page.html"
    assert main(["compare", str(made), str(result), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "not measured" in out
    assert "Raspberry Pi 4" in out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert main(["compare", str(made), str(result), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| bundle |")
    assert main(["compare", str(made), str(result), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["median_us"] is None
    assert second["median_us"] > 0
