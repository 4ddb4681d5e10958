"""`gfcompile models` and `gfcompile targets`: what there is to name."""

import argparse
import json
from typing import TYPE_CHECKING

from gfcompile.compile.command_line import complain, print_table
from gfcompile.runtime.errors import UserError

if TYPE_CHECKING:
    from gfcompile.targets.target import AnyTarget, Target


def list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def models_command(options: argparse.Namespace) -> None:
    from gfcompile.compile.models import model_names, model_spec

    specs = [model_spec(name) for name in model_names()]
    if options.json:
        sizes = ("name", "image_size", "num_classes", "parameters", "macs", "top1_percent")
        keys = (*sizes, "keep_ratios", "kept_patches", "parent")
        rows = [{key: getattr(s, key) for key in keys} | {"paper": str(s.paper)} for s in specs]
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ("model", "size", "parameters", "MACs", "patches kept", "top-1 as published"),
        [
            (
                spec.name,
                str(spec.image_size),
                f"{spec.parameters / 1e6:.2f} M",
                f"{spec.macs / 1e9:.2f} G",
                " ".join(map(str, spec.kept_patches)) or "all",
                "-" if spec.top1_percent is None else f"{spec.top1_percent:.1f}%",
            )
            for spec in specs
        ],
        right={1, 2, 3, 4, 5},
    )
    for paper in dict.fromkeys(str(spec.paper) for spec in specs):
        print(f"\n{paper}")


def targets_command(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from gfcompile.targets.target import AnyTarget, all_targets, find_target

    targets: list[AnyTarget] = list(all_targets())
    try:
        targets.insert(0, find_target("host"))
    except UserError as error:  # not a machine that we compile for; the others are listed
        complain(f"note: {error}")
    if options.json:
        print(json.dumps([asdict(target) for target in targets], indent=2))
        return
    for target in targets:
        print(_describe_target(target))


def _describe_target(target: "AnyTarget") -> str:
    from gfcompile.targets.target import Target

    machine = f"    {_describe_machine(target)}\n" if isinstance(target, Target) else ""
    return (
        f"{target.name}\n"
        f"    {target.description}\n"
        f"{machine}"
        f"    --int8: {target.int8_compute};\n"
        f"            {target.int8_note}"
    )


def _describe_machine(target: "Target") -> str:
    cpu, gpu = target.cpu, target.gpu
    isa = " ".join([cpu.arch, cpu.mcpu, *(f for f in cpu.features if f.startswith("+"))])
    if gpu is not None:
        isa = f"{gpu.arch}, PTX {gpu.ptx_isa}; {isa}"
        peaks = (
            f"{gpu.sms} SM at {gpu.clock_ghz:.2f} GHz: fp32 {gpu.fp32_tflops:.2f} TFLOP/s, "
            f"int8 {gpu.int8_tops:.2f} TOP/s"
        )
    else:
        peaks = (
            f"{cpu.cores} cores at {cpu.clock_ghz:.2f} GHz: fp32 {cpu.fp32_gflops:.0f} GFLOP/s, "
            f"int8 {cpu.int8_gops:.0f} GOP/s each"
        )
    return f"{isa}\n    {peaks}; memory {target.bandwidth_gb_s:.1f} GB/s"
