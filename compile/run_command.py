"""`gfcompile run`: a bundle and images in, their classes and the time of one out."""

import argparse
import json
from pathlib import Path
from typing import Any

from gfcompile.compile.command_line import complain, count, positive_int, printable


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument(
        "--device",
        choices=("local", "qemu"),
        default="local",
        help="qemu runs an arm64 bundle here, to see what it computes and not how fast",
    )
    parser.add_argument(
        "--top", type=positive_int, default=5, metavar="N", help="classes to print (default: 5)"
    )
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--compute-units",
        choices=("all", "cpu", "cpu-gpu", "cpu-ane"),
        default="all",
        help="what Core ML may use, on a Mac (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_command(options: argparse.Namespace) -> None:
    """Prints the likeliest classes of each image, and what an inference takes."""
    from gfcompile.runtime.session import load

    results = []
    with load(
        options.bundle,
        device=options.device,
        threads=options.threads,
        compute_units=options.compute_units,
    ) as session:
        weights = session.manifest.weights
        if weights.startswith("random"):
            complain(f"note: weights are {weights}, the classes mean nothing")
        batch = session.batch
        for start in range(0, len(options.images), batch):
            photos = options.images[start : start + batch]
            tops = session.classify_all(photos, top=options.top)
            timed: dict[str, Any] = {}
            if session.stand_in:
                took = session.stand_in
                timed["stand_in"] = session.stand_in
            elif options.device == "qemu":
                took = "under qemu: what the device computes, not how fast"
            else:
                # The images' own values: what they are can matter to the time, as zeros do.
                latency = session.benchmark(session.encode(*photos))
                each = "" if batch == 1 else f" per image, {latency.median_ms:.2f} ms for {batch}"
                took = (
                    f"{latency.median_ms / batch:.2f} ms{each}, median of {latency.runs} runs "
                    f"on {count(options.threads, 'thread')}"
                )
                timed |= {
                    "median_ms": latency.median_ms,
                    "median_ms_per_image": latency.median_ms / batch,
                    "runs": latency.runs,
                }
            for image, top in zip(photos, tops, strict=True):
                results.append(
                    {
                        "image": str(image),
                        "weights": weights,
                        "device": options.device,
                        "batch": batch,
                        "top": [
                            {"index": i, "label": label, "probability": p} for i, label, p in top
                        ],
                        **timed,
                    }
                )
                if not options.json:
                    print(f"{image}: {took}")
                    for index, label, probability in top:
                        print(f"  {probability:6.1%}  {index:4d}  {printable(label)}")
    if options.json:
        print(json.dumps(results, indent=2))
