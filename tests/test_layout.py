"""The checkout itself: four folders at the root are one package by links."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["compile", "quantize", "targets", "runtime"])
def test_stage_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / "src" / "gfcompile" / name
    assert link.resolve() == ROOT / name, (
        f"{link} is no link to {name}/: this checkout was made without symbolic links. "
        "Run: git config core.symlinks true && git checkout -- src"
    )


def test_tests_run_against_this_checkout() -> None:
    import gfcompile

    assert Path(gfcompile.__file__).resolve().parent == ROOT / "src" / "gfcompile"
