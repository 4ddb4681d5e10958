"""What the READMEs tell to type is what the programs take."""

import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest

from gfcompile.compile import cli
from gfcompile.compile.models import model_spec
from gfcompile.targets.target import find_target

ROOT = Path(__file__).resolve().parent.parent
READMES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(ROOT.glob("examples/*/README.md")),
]
# Of torchrun and pip.
FOREIGN = {"--nnodes", "--nproc-per-node"}

_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def commands(readme: Path) -> list[list[str]]:
    """The words of each indented command line that runs gfcompile, without its name."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for line in re.findall(r"^    (.*\bgfcompile .*)$", text, re.M):
        words = shlex.split(line, comments=True)
        if "gfcompile" in words and (words[0] in ("gfcompile", "torchrun")):
            found.append(words[words.index("gfcompile") + 1 :])
    return found


def parsed(words: list[str]) -> Namespace:
    return cli._parse(words)


@pytest.mark.parametrize("readme", READMES, ids=names(READMES))
def test_every_command_of_a_readme_can_be_typed(readme: Path) -> None:
    for words in commands(readme):
        options = parsed(words)
        if hasattr(options, "model"):
            model_spec(options.model, options.keep_ratio)
        if hasattr(options, "target"):
            find_target(options.target)


def test_the_readme_has_commands_of_every_kind() -> None:
    first = {words[0] for words in commands(ROOT / "README.md")}
    assert first >= {*cli._COMMANDS, "--model"} - {"compile"}


@pytest.mark.parametrize("readme", READMES, ids=names(READMES))
def test_every_option_of_a_readme_is_one(readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = set(FOREIGN)
    for command in cli._COMMANDS:
        with pytest.raises(SystemExit):
            parsed([command, "--help"])
        known |= set(_OPTION.findall(capsys.readouterr().out))
    sources = [ROOT / "runtime" / "device" / "gfbench.c", *ROOT.glob("benchmarks/*.py")]
    for source in sources:
        known |= set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source.read_text(encoding="utf-8")))
    told = set(_OPTION.findall(readme.read_text(encoding="utf-8")))
    assert told <= known, told - known


@pytest.mark.parametrize("readme", READMES, ids=names(READMES))
def test_every_file_that_a_readme_links_to_is_there(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r'\]\(([^)#]+)\)|(?:src|srcset)="([^"]+)"', text)
    for link in (one or other for one, other in links):
        assert "://" in link or (readme.parent / link).exists(), link
