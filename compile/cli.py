"""The `gfcompile` command: arguments in; the command that they name is run, or one clear line out.

Beside it, `*_command` and `*_commands` have what each command takes, does and prints, and
`command_line` what they share. Whichever is asked for, all of them are imported: what is heavy
(torch, TVM, ONNX) they import when they run.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from gfcompile import __version__
from gfcompile.compile import interruption
from gfcompile.compile.command_line import complain, one_line
from gfcompile.compile.compile_command import compile_arguments, compile_command
from gfcompile.compile.device_commands import (
    profile_arguments,
    profile_command,
    validate_arguments,
    validate_command,
)
from gfcompile.compile.list_commands import list_arguments, models_command, targets_command
from gfcompile.compile.report_commands import (
    compare_arguments,
    compare_command,
    report_arguments,
    report_command,
)
from gfcompile.compile.run_command import run_arguments, run_command
from gfcompile.compile.training_commands import (
    finetune_arguments,
    finetune_command,
    quantize_arguments,
    quantize_command,
)
from gfcompile.compile.tune_command import tune_arguments, tune_command
from gfcompile.runtime.errors import GfcompileError, UserError

_EPILOG = """\
examples:
  gfcompile --model gfnet_xs --target jetson-tx2 --int8
  gfcompile --model gfnet_xs --target host --checkpoint gfnet-xs.pth --output classifier
  gfcompile run classifier photo.jpg
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    0 done, 1 it could not be done or a demand was missed, 2 it was asked for wrongly, 3 a device
    could not be asked, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with interruption.ending_by_signal():
            options = _parse(arguments)
            code: int | None = options.command(options)
            sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt as interrupt:
        return _interrupted(str(interrupt))
    except GfcompileError as error:
        _raise_again_if(debug)
        complain(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough; Python must not complain again while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:
        _raise_again_if(debug)
        complain(f"error: {_system_failure(error)}")
        return 1
    except Exception as error:
        _raise_again_if(debug)
        if interruption.came():  # a library has made an error of it
            return _interrupted("")
        complain(
            f"internal error: {type(error).__name__}: {one_line(str(error))} "
            "(--debug shows where; please report it)"
        )
        return 1


def _interrupted(what_is_left: str) -> int:
    """Says so, and returns the exit code."""
    complain(f"interrupted; {what_is_left or 'nothing was written'}")
    return 128 + (interruption.came() or signal.SIGINT)


class _Parser(argparse.ArgumentParser):
    """One line per mistake, by the same way out as every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)}; see {self.prog} --help")


class _Command(NamedTuple):
    """What it says of itself, takes and does; what it returns is the exit code, None is 0."""

    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    function: Callable[[argparse.Namespace], int | None]


_COMMANDS = {
    "compile": _Command(
        "compile a model to a bundle (what is done if no command is named)",
        compile_arguments,
        compile_command,
    ),
    "quantize": _Command(
        "train a model for int8, and write a quantized checkpoint",
        quantize_arguments,
        quantize_command,
    ),
    "finetune": _Command(
        "train a model to drop patches, from its parent's weights",
        finetune_arguments,
        finetune_command,
    ),
    "tune": _Command(
        "search for faster kernels on a device, into a tuning database",
        tune_arguments,
        tune_command,
    ),
    "run": _Command("classify images with a bundle", run_arguments, run_command),
    "validate": _Command(
        "measure a bundle on a device, against a budget", validate_arguments, validate_command
    ),
    "profile": _Command(
        "time each kernel of a bundle on a device", profile_arguments, profile_command
    ),
    "report": _Command(
        "write a page about a bundle, measured or estimated", report_arguments, report_command
    ),
    "compare": _Command("put bundles and results side by side", compare_arguments, compare_command),
    "models": _Command("list the models", list_arguments, models_command),
    "targets": _Command(
        "list the targets, and what int8 means there", list_arguments, targets_command
    ),
}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="gfcompile",
        description="Compiles spectral and token-pruned vision models for edge devices.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gfcompile {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (text, add_arguments, function) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(command=function)
        add_arguments(command)
    if not arguments:
        arguments = ["--help"]
    elif arguments[0] not in (*_COMMANDS, "--version", "-h", "--help"):
        # `gfcompile --model ...` is the main use and goes without a command; but a lone word was
        # meant as one.
        if not arguments[0].startswith("-"):
            raise UserError(_unknown_command(arguments[0]))
        arguments = ["compile", *arguments]
    return parser.parse_args(arguments)


def _unknown_command(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, _COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown command {word!r}{hint} (known: {', '.join(_COMMANDS)})"


def _system_failure(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; nothing was written"
    # Of a copy or a rename the second one is where it was to go, and what is full or in the way.
    name = error.filename if error.filename2 is None else error.filename2
    where = f": {name}" if name is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; nothing was written"
    return f"{error.strerror or one_line(str(error))}{where}"


def _raise_again_if(debug: bool) -> None:
    if debug:
        raise
