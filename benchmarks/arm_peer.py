"""A peer in a process of its own, on the CPU that it is to be counted on: see arm.py.

    python arm_peer.py litert|onnxruntime|mnn|ncnn MODEL IMAGE INFERENCES

Reads one image, float32 as the model takes it, and writes the logits into the current folder. The
model of MNN and of ncnn is the folder that mobile_peers.py converted into.
Nothing of gfcompile is imported: this runs in a Python that has the peers and NumPy alone.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import mobile_sessions
import numpy as np
from mobile_sessions import Array, Run


def main() -> None:
    options = _parse()
    run = PEERS[options.peer](options.model)
    pixels = np.fromfile(options.image, np.float32)
    for _ in range(options.inferences):
        logits = run(pixels)
    logits.astype(np.float32).tofile("logits.f32")


def litert(model: str) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=model, num_threads=1)
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(pixels: Array) -> Array:
        interpreter.set_tensor(source["index"], pixels.reshape(source["shape"]))
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(result["index"]))

    return run


def onnx_runtime(model: str) -> Run:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 3
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()

    def run(pixels: Array) -> Array:
        return np.asarray(session.run(None, {source.name: pixels.reshape(source.shape)})[0])

    return run


def mnn(folder: str) -> Run:
    run = mobile_sessions.mnn(Path(folder), 1)
    return lambda pixels: run(_nchw(pixels))


def ncnn(folder: str) -> Run:
    run = mobile_sessions.ncnn(Path(folder), 1)
    return lambda pixels: run(_nchw(pixels))


def _nchw(pixels: Array) -> Array:
    side = math.isqrt(pixels.size // 3)
    return pixels.reshape(1, 3, side, side)


PEERS: dict[str, Callable[[str], Run]] = {
    "litert": litert,
    "onnxruntime": onnx_runtime,
    "mnn": mnn,
    "ncnn": ncnn,
}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("inferences", type=int, metavar="INFERENCES")
    return parser.parse_args()


if __name__ == "__main__":
    main()
