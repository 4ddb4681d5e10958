"""Every model in full size, for whichever targets: does it compile, how long, how exact, how large?

    python benchmarks/zoo.py [--models NAME ...] [--bundles tflite:int8 coreml:fp16] [--json FILE]

Each bundle is made by the `gfcompile` command in a process of its own, with seeded weights, and
checked as every bundle is; it is removed when its row is written. The whole zoo takes hours: FILE
is written after each bundle, and what stands in it is not made again. Exits with 1 if a model was
refused, or did not compute what it should.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpu import PACKAGES, describe_machine, versions

from gfcompile.compile import command_line
from gfcompile.compile.models import model_names, model_spec
from gfcompile.quantize.files import write_atomically
from gfcompile.runtime.bundle import read_manifest

BUNDLES = ("tflite:int8", "coreml:fp16")
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A model compiled for a target.

    Attributes:
        bundle: as the command line has it, TARGET:PRECISION.
        seconds: from the command to the bundle, with its check.
        size_bytes: of the library or model file.
        ledger: how exact the artifact is; None if there is none.
        delegated_share: of the operators, those that XNNPACK takes; None for other formats.
        error: the command's last line, where it failed.
    """

    model: str
    bundle: str
    macs: int
    seconds: float
    size_bytes: int = 0
    ledger: dict[str, Any] | None = None
    delegated_share: float | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    results = _read(options.json) if options.json else []
    made = {(result.model, result.bundle) for result in results}
    models = options.models or sorted(model_names(), key=lambda name: model_spec(name).macs)
    if options.quick:
        models = list({model_spec(name).family: name for name in reversed(models)}.values())
    for model in models:
        with tempfile.TemporaryDirectory() as folder:  # with a cache: its graphs serve all targets
            for bundle in options.bundles:
                if (model, bundle) in made:
                    continue
                results.append(compiled(model, bundle, Path(folder)))
                print(f"{model} {bundle}: {results[-1].seconds:.0f} s", file=sys.stderr)
                if options.json:
                    _write(options.json, results)
    print_table(results)
    return int(any(result.error for result in results))


def compiled(model: str, bundle: str, folder: Path) -> Result:
    """By the command line, with a cache in `folder`."""
    target, precision = bundle.split(":")
    command = [sys.executable, "-m", "gfcompile", "--model", model, "--target", target]
    more = [f"--{precision}", "--output", str(folder / bundle.replace(":", "-"))]
    environment = os.environ | {"GFCOMPILE_CACHE": str(folder / "cache")}
    start = time.monotonic()
    run = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - start
    macs = model_spec(model).macs
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        return Result(model=model, bundle=bundle, macs=macs, seconds=seconds, error=last)
    manifest = read_manifest(Path(more[-1]))
    (ledger,) = (entry for entry in manifest.ledger if entry["stage"] == "artifact")
    files = [file for name, file in manifest.files.items() if name.startswith(manifest.library)]
    return Result(
        model=model,
        bundle=bundle,
        macs=macs,
        seconds=seconds,
        size_bytes=sum(file.size_bytes for file in files),
        ledger=dict(ledger),
        delegated_share=manifest.extra.get("delegated_share"),
    )


def print_table(results: Sequence[Result]) -> None:
    header = ("model", "bundle", "GMAC", "s", "MB", "SQNR dB", "top-1", "equal", "delegated")
    rows = []
    for r in results:
        exact = r.ledger or {}
        int8 = exact.get("int8")
        rows.append(
            (
                r.model,
                r.bundle,
                f"{r.macs / 1e9:.2f}",
                f"{r.seconds:.0f}",
                f"{r.size_bytes / 1e6:.2f}" if exact else "",
                f"{exact['sqnr_db']:.1f}" if exact else "",
                f"{exact['top1_agreement']:.0%}" if exact else "",
                f"{int8['equal']:.2%}" if int8 else "",
                "" if r.delegated_share is None else f"{r.delegated_share:.0%}",
            )
        )
    command_line.print_table(header, rows, right=set(range(2, len(header))))
    for r in results:
        if r.error:
            print(f"failed: {r.model} {r.bundle}: {r.error}")


def _read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    return [Result(**result) for result in json.loads(path.read_text(encoding="utf-8"))["results"]]


def _write(path: Path, results: Sequence[Result]) -> None:
    report = {
        "benchmark": "zoo",
        "machine": describe_machine(),
        "versions": versions(PACKAGES),
        "results": [asdict(result) for result in results],
    }
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8"))


def _bundle(text: str) -> str:
    target, _, precision = text.partition(":")
    if not target or precision not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"{text!r}: give TARGET:{{{','.join(PRECISIONS)}}}")
    return text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", metavar="NAME", choices=model_names())
    parser.add_argument(
        "--bundles", nargs="+", type=_bundle, default=BUNDLES, metavar="TARGET:PRECISION"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the figures go, and are continued from"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest model of each family")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
