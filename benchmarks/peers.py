"""Other runtimes at their best settings, each as a function from an image to logits."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from mobile_peers import RUNTIMES, converted
from mobile_peers import Precision as MobilePrecision
from onnx import inliner, numpy_helper

import gfcompile
from gfcompile.compile.models import load_model
from gfcompile.runtime.errors import GfcompileError
from gfcompile.runtime.tflite import TfliteInterpreter

Array = npt.NDArray[Any]
Precision = Literal["float32", "int8"]

SAME_GRAPH = "ONNX Runtime, same graph"
UNSIGNED = "ONNX Runtime, unsigned"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that computes the logits of one image."""

    name: str
    run: Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A peer that cannot take part, and why."""

    name: str
    reason: str


def peers(
    model: str, precision: Precision, graph: onnx.ModelProto, threads: int, folder: Path
) -> Iterator[Contender | Absent]:
    """Every peer that is installed and takes the model, at its best setting.

    Args:
        graph: what our kernels were compiled from; its integers and scales are the peers', too.
        folder: for their files.
    """
    yield onnx_runtime(SAME_GRAPH, graph, threads)
    if precision == "int8":
        yield onnx_runtime(UNSIGNED, unsigned(graph), threads)
    yield litert(model, precision, threads, folder / "litert")
    yield from openvino(precision, graph, threads)
    if precision == "float32":
        yield torch_compile(model, threads)
    yield from mobile(model, precision, graph, threads, folder)


def onnx_runtime(name: str, graph: onnx.ModelProto, threads: int) -> Contender:
    """ONNX Runtime as a user would run it: all optimizations on."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    session = ort.InferenceSession(
        graph.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return Contender(
        name=name, run=lambda image: np.asarray(session.run(None, {"image": image})[0])
    )


def unsigned(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same QDQ graph with activations in uint8: every zero point moved by 128."""
    moved = onnx.ModelProto()
    moved.CopyFrom(graph)
    initializers = {tensor.name: tensor for tensor in moved.graph.initializer}
    quantized = {n.output[0] for n in moved.graph.node if n.op_type == "QuantizeLinear"}
    for node in moved.graph.node:
        if node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] in quantized
        ):
            signed = numpy_helper.to_array(initializers[node.input[2]])
            # A weight may share the signed one, so that one stays.
            name = f"{node.input[2]}_unsigned"
            if name not in initializers:
                value = (signed.astype(np.int16) + 128).astype(np.uint8)
                initializers[name] = moved.graph.initializer.add()
                initializers[name].CopyFrom(numpy_helper.from_array(value, name))
            node.input[2] = name
    del moved.graph.value_info[:]  # inferred anew, with the new types
    return moved


def litert(model: str, precision: Precision, threads: int, folder: Path) -> Contender | Absent:
    """LiteRT with XNNPACK, on our .tflite: the same scales, filters as products."""
    name = "LiteRT, our scales" if precision == "int8" else "LiteRT"
    try:
        interpreter = TfliteInterpreter(_tflite(model, precision, folder), threads=threads)
    except GfcompileError as error:
        return Absent(name=name, reason=str(error))

    def run(image: Array) -> Array:
        (logits,) = interpreter.run(np.ascontiguousarray(image.transpose(0, 2, 3, 1))).values()
        return logits

    return Contender(name=name, run=run)


@cache
def _tflite(model: str, precision: Precision, folder: Path) -> Path:
    """Our .tflite, which serves every number of threads."""
    bundle = gfcompile.compile_model(
        gfcompile.CompileConfig(
            model=model, target="tflite-xnnpack", precision=precision, output=folder
        )
    )
    return bundle.path / bundle.manifest.library


def openvino(
    precision: Precision, graph: onnx.ModelProto, threads: int
) -> Iterator[Contender | Absent]:
    """OpenVINO for latency: on the same graph, and in float also as bfloat16, by AMX."""
    if importlib.util.find_spec("openvino") is None:
        yield Absent(name="OpenVINO", reason="not installed")
        return
    import openvino as ov

    core = ov.Core()
    model = core.read_model(inliner.inline_local_functions(graph).SerializeToString())
    hints = {"OpenVINO": "f32"}
    if precision == "float32":
        hints["OpenVINO, bfloat16"] = "bf16"
    for name, hint in hints.items():
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": hint,
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def run(image: Array, request: Any = request) -> Array:
            return np.array(request.infer([image], share_inputs=True)[0])

        yield Contender(name=name, run=run)


def torch_compile(model: str, threads: int) -> Contender | Absent:
    """torch.compile with weights frozen, of the module as the papers have it."""
    import torch
    from torch._inductor import config

    from gfcompile.compile.prune import freeze

    torch.set_num_threads(threads)
    config.freezing = True
    module = freeze(load_model(model).module).eval()
    compiled = torch.compile(module)

    def run(image: Array) -> Array:
        with torch.inference_mode():
            return np.asarray(compiled(torch.from_numpy(image)).numpy())

    try:
        run(np.zeros((1, 3, 224, 224), np.float32))
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        return Absent(name="torch.compile", reason=str(error).splitlines()[0][:80])
    return Contender(name="torch.compile", run=run)


def mobile(
    model: str, precision: Precision, graph: onnx.ModelProto, threads: int, folder: Path
) -> Iterator[Contender | Absent]:
    """ExecuTorch, MNN and ncnn, and beside float32 also bfloat16 of those that have it."""
    wanted: tuple[MobilePrecision, ...] = ("float32", "bfloat16")
    for runtime in RUNTIMES:
        for kind in wanted if precision == "float32" else (precision,):
            if kind not in runtime.label:
                if kind == "int8":
                    yield Absent(name=runtime.package, reason="its package cannot quantize")
                continue
            name = runtime.label[kind]
            place = folder / f"{runtime.package}-{kind}"
            # Another number of threads is another session, not another file.
            if not place.exists():
                place.mkdir(parents=True)
                onnx.save(inliner.inline_local_functions(graph), place / "graph.onnx")
                reason = converted(runtime, model, kind, place)
                (place / "failed").write_text(reason, encoding="utf-8")
            if reason := (place / "failed").read_text(encoding="utf-8"):
                yield Absent(name=name, reason=reason)
            else:
                yield Contender(name=name, run=runtime.open(kind, place, threads))


def quiet() -> None:
    """Libraries' greetings off."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
