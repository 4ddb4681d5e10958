"""Bundles and results side by side."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import report_cases as cases
from html_reader import Reader

from gfcompile.runtime.bundle import MANIFEST_NAME
from gfcompile.runtime.compare import (
    HEADER,
    Contender,
    contender,
    markdown,
    render_comparison,
    rows,
    to_json,
)
from gfcompile.runtime.errors import BundleError, UserError
from gfcompile.runtime.report.html import NONE
from gfcompile.runtime.results import manifest_sha256, write_result


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle's manifest; a comparison looks at nothing else."""
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(json.dumps(cases.manifest().to_dict()), encoding="utf-8")
    return folder


def kept_result(bundle: Path, name: str = "20261121T113000.000000Z-ssh.json") -> Path:
    made = cases.result()
    identity = replace(made.bundle, name=bundle.name, manifest_sha256=manifest_sha256(bundle))
    folder = bundle.with_name(f"{bundle.name}-results")
    folder.mkdir(exist_ok=True)
    write_result(replace(made, bundle=identity), folder / name)
    return folder / name


def test_a_bundle_that_was_never_measured_has_an_estimate_and_no_latency(bundle: Path) -> None:
    found = contender(bundle)
    assert found.median_us is None
    assert found.device == ""
    assert found.estimate_us is not None
    assert found.estimate_us > 12 * 8000  # its products alone
    assert found.sqnr_db == 36.3
    assert found.size_bytes == 17_190_528 + (bundle / MANIFEST_NAME).stat().st_size
    (row,) = rows([found])
    assert row[HEADER.index("device")] == "not measured"
    assert row[HEADER.index("median")] == NONE


def test_a_bundle_is_taken_with_the_newest_result_beside_it(bundle: Path) -> None:
    path = kept_result(bundle)
    times = cases.result().latencies
    assert times is not None
    for found in (contender(bundle), contender(path)):
        assert found.median_us == times.median_us
        assert found.device == "Raspberry Pi 4"
        assert found.estimate_us is not None


def test_a_result_of_an_older_compilation_is_not_the_bundles(bundle: Path) -> None:
    path = kept_result(bundle)
    text = (bundle / MANIFEST_NAME).read_text(encoding="utf-8")
    (bundle / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    assert contender(bundle).median_us is None
    alone = contender(path)
    assert alone.median_us is not None
    assert alone.estimate_us is None


def test_a_result_may_come_without_its_bundle(bundle: Path, tmp_path: Path) -> None:
    path = kept_result(bundle)
    away = tmp_path / "far" / "elsewhere" / "result.json"
    away.parent.mkdir(parents=True)
    shutil.copy(path, away)
    found = contender(away)
    assert found.model == "gfnet_xs"
    assert found.estimate_us is None


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        contender(tmp_path)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="no result"):
        contender(tmp_path / "other.json")
    with pytest.raises(UserError, match="folder"):
        contender(tmp_path / MANIFEST_NAME)


def one(**changes: object) -> Contender:
    values = {"name": "b", "model": "m", "precision": "int8", "target": "host"}
    return Contender(**{**values, **changes})  # type: ignore[arg-type]


def test_estimates_are_not_divided_by_measurements() -> None:
    first = one(median_us=100.0, estimate_us=80.0)
    table = rows([first, one(median_us=150.0), one(estimate_us=40.0)])
    times = [row[HEADER.index("times")] for row in table]
    assert times == ["1.00×", "1.50×", NONE]
    assert rows([one(estimate_us=10.0), one(estimate_us=5.0)])[1][HEADER.index("times")] == "0.50×"


def test_batches_are_compared_image_by_image() -> None:
    table = rows([one(median_us=100.0), one(median_us=300.0, batch=4)])
    assert [row[HEADER.index("batch")] for row in table] == ["1", "4"]
    assert table[1][HEADER.index("times")] == "0.75×"


def test_markdown_leaves_out_empty_columns_and_escapes() -> None:
    text = markdown([one(name="a|b_c", size_bytes=17.7e6)])
    header, rule, row = text.splitlines()
    assert "median" not in header
    assert rule.count("---") == header.count("|") - 1 == row.replace("\\|", "").count("|") - 1
    assert "a\\|b\\_c" in row
    assert "17.7 MB" in row


def test_json_has_plain_numbers() -> None:
    (values,) = json.loads(json.dumps(to_json([one(median_us=1234.5)])))
    assert values["median_us"] == 1234.5
    assert values["p90_us"] is None


def test_the_page_is_well_formed_and_escapes() -> None:
    page = render_comparison(
        [one(name="<script>x</script>", median_us=10.0, p90_us=12.0), one(estimate_us=5.0), one()]
    )
    reader = Reader(page)
    assert "script" not in reader.names()
    assert "<script>x</script>" in reader.text
    assert "≈" in reader.text  # the estimate
    assert page == render_comparison(
        [one(name="<script>x</script>", median_us=10.0, p90_us=12.0), one(estimate_us=5.0), one()]
    )
