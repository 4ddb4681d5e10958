"""Runtimes that are made for phones and run here as well: ExecuTorch, MNN and ncnn.

    python mobile_peers.py PACKAGE MODEL PRECISION FOLDER

Each is a way from a model to a file, and from the file to a function from an image to logits. The
converters crash, or write what cannot be loaded and exit with 0: so `converted` runs this file as
a program, which converts, loads and computes once, and says in one line what went wrong.
"""

import argparse
import contextlib
import importlib.util
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from mobile_sessions import Array, Run, mnn, ncnn

from gfcompile.compile.models import load_model
from gfcompile.runtime.images import preprocess, stand_in_photos

Precision = Literal["float32", "bfloat16", "int8"]

_CONVERSION_LIMIT_S = 900.0


class Runtime(ABC):
    """One runtime.

    Class attributes:
        package: what is imported.
        label: by precision, what the tables call it; it has no other precisions.
    """

    package: ClassVar[str]
    label: ClassVar[Mapping[Precision, str]]

    @abstractmethod
    def convert(self, model: str, precision: Precision, folder: Path) -> None:
        """Writes to `folder` what `open` reads. `folder` has the float32 model as `graph.onnx`."""

    @abstractmethod
    def open(self, precision: Precision, folder: Path, threads: int) -> Run:
        """A function from an image, (1, 3, H, W), to logits."""


class ExecuTorch(Runtime):
    """XNNPACK by way of torch.export; its own quantizer, as it takes no other's scales."""

    package = "executorch"
    label: ClassVar[Mapping[Precision, str]] = {"float32": "ExecuTorch", "int8": "ExecuTorch"}

    def convert(self, model: str, precision: Precision, folder: Path) -> None:
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        module, images = _torch_module(model)
        program = torch.export.export(module, (images[0],))
        if precision == "int8":
            program = torch.export.export(_quantized(program, images), (images[0],))
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        (folder / "model.pte").write_bytes(edge.to_executorch().buffer)

    def open(self, precision: Precision, folder: Path, threads: int) -> Run:  # noqa: ARG002
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Loader

        portable_lib._unsafe_reset_threadpool(threads)
        program = Loader.get().load_program(folder / "model.pte")
        method = program.load_method("forward")
        assert method is not None

        # The method reads what the program holds.
        def run(image: Array, program: Any = program) -> Array:  # noqa: ARG001
            return np.array(method.execute([torch.from_numpy(image)])[0])

        return run


class Mnn(Runtime):
    """From the lowered ONNX graph; int8 is weights by channel and activations as they come.

    Of a graph with our scales it converts the patch convolution to what it then cannot compute.
    """

    package = "MNN"
    label: ClassVar[Mapping[Precision, str]] = {"float32": "MNN", "int8": "MNN, dynamic int8"}

    def convert(self, model: str, precision: Precision, folder: Path) -> None:  # noqa: ARG002
        import MNN  # noqa: F401 - brings _tools
        from _tools import mnnconvert  # mnnconvert.py installs packages, and reports to its vendor

        options = ["-f", "ONNX", "--modelFile", str(folder / "graph.onnx")]
        options += ["--MNNModel", str(folder / "model.mnn"), "--bizCode", "none"]
        options += ["--weightQuantBits", "8"] if precision == "int8" else []
        mnnconvert(["mnnconvert", *options])

    def open(self, precision: Precision, folder: Path, threads: int) -> Run:
        return mnn(folder, threads, int8=precision == "int8")


class Ncnn(Runtime):
    """By pnnx; its Python package has no quantizer."""

    package = "ncnn"
    label: ClassVar[Mapping[Precision, str]] = {"float32": "ncnn", "bfloat16": "ncnn, bfloat16"}

    def convert(self, model: str, precision: Precision, folder: Path) -> None:  # noqa: ARG002
        import pnnx
        import torch

        module, images = _torch_module(model)
        # Exported first: shapes are numbers then, on which the choice of tokens depends.
        exported = torch.export.export(module, (images[0],)).module()
        traced = torch.jit.trace(exported, images[0])  # type: ignore[no-untyped-call]
        traced.save(str(folder / "model.pt"))
        shape = str(list(images[0].shape)).replace(" ", "")
        command = [pnnx.EXEC_PATH, "model.pt", f"inputshape={shape}", "fp16=0"]
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)

    def open(self, precision: Precision, folder: Path, threads: int) -> Run:
        return ncnn(folder, threads, bfloat16=precision == "bfloat16")


RUNTIMES: tuple[Runtime, ...] = (ExecuTorch(), Mnn(), Ncnn())


def converted(runtime: Runtime, model: str, precision: Precision, folder: Path) -> str:
    """Converts in a process of its own; why it failed, or nothing."""
    if importlib.util.find_spec(runtime.package) is None:
        return "not installed"
    command = [sys.executable, __file__, runtime.package, model, precision, str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_CONVERSION_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not converted within {_CONVERSION_LIMIT_S:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1].strip()[:160] if lines else "no message"
    return f"exit status {done.returncode}: {reason}"


def _torch_module(model: str) -> tuple[Any, list[Any]]:
    """The module with filters as products, and images to calibrate on."""
    import torch
    from peer_filters import MatrixFilter, with_filters

    from gfcompile.compile.prune import freeze

    loaded = load_model(model)
    module = with_filters(freeze(loaded.module), MatrixFilter).requires_grad_(False).eval()
    images = [preprocess(photo, loaded.transform) for photo in stand_in_photos()]
    return module, [torch.from_numpy(image) for image in images]


def _quantized(program: Any, images: list[Any]) -> Any:
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e import quantize_pt2e

    class OfFloats(xnnpack_quantizer.XNNPACKQuantizer):  # type: ignore[misc]
        """Leaves indices alone, which it would turn into floats and quantize."""

        def transform_for_annotation(self, model: Any) -> Any:
            return model  # the other one makes float tensors of the numbers that are added

        def annotate(self, model: Any) -> Any:
            for node in super().annotate(model).graph.nodes:
                value = node.meta.get("val")
                if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
                    node.meta.pop("quantization_annotation", None)
            return model

    quantizer = OfFloats()
    quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    prepared = quantize_pt2e.prepare_pt2e(program.module(), quantizer)
    for image in images:
        prepared(image)
    return quantize_pt2e.convert_pt2e(prepared)


def main() -> None:
    options = _parse()
    (runtime,) = (runtime for runtime in RUNTIMES if runtime.package == options.package)
    asked: Precision = next(p for p in runtime.label if p == options.precision)
    with contextlib.redirect_stdout(sys.stderr):  # their progress
        runtime.convert(options.model, asked, options.folder)
        run = runtime.open(asked, options.folder, 1)
        logits = run(preprocess(stand_in_photos()[0], load_model(options.model).transform))
    if not np.isfinite(logits).all():
        sys.exit("its logits are not finite")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", choices=[runtime.package for runtime in RUNTIMES])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("precision", choices=get_args(Precision))
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    main()
