"""MNN and ncnn as functions from an image to logits, at their best settings.

Nothing of gfcompile is imported: arm_peer.py has this file in a Python that has little else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Run = Callable[[Array], Array]


def mnn(folder: Path, threads: int, *, int8: bool = False) -> Run:
    """MNN on the model.mnn in `folder`; float32 throughout, or with activations quantized."""
    import MNN

    manager = MNN.nn.create_runtime_manager(
        (
            {
                "backend": "CPU",
                "numThread": threads,
                # "low" is float16 on ARM. On x86 it gives the same bits, no faster.
                "precision": "high",
                "memory": "low" if int8 else "normal",
            },
        )
    )
    net = MNN.nn.load_module_from_file(
        str(folder / "model.mnn"), ["image"], ["logits"], runtime_manager=manager
    )

    def run(image: Array) -> Array:
        given = MNN.expr.const(image, list(image.shape), MNN.expr.NCHW)
        return np.array(net.forward(MNN.expr.convert(given, MNN.expr.NC4HW4)).read())

    return run


def ncnn(folder: Path, threads: int, *, bfloat16: bool = False) -> Run:
    """ncnn on what pnnx wrote into `folder`.

    Raises:
        RuntimeError: it cannot load that, or compute it.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_bf16_storage = bfloat16
    # By default it computes in float16 on ARM cores that can.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    for load, name in (
        (net.load_param, "model.ncnn.param"),
        (net.load_model, "model.ncnn.bin"),
    ):
        if load(str(folder / name)):
            raise RuntimeError(f"ncnn cannot load the {name} that pnnx wrote")

    def run(image: Array) -> Array:
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(image[0]))
            status, logits = extractor.extract("out0")
            if status:
                raise RuntimeError(f"ncnn fails with status {status}")
            return np.array(logits)[np.newaxis]

    return run
