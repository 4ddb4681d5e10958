"""What litert-torch makes of a torch program; run by the Python of litert-torch's own environment.

    python litert_torch_convert.py PROGRAM.pt2 IMAGES.npy FOLDER

Writes float32.tflite, and in int8 pt2e.tflite (litert-torch's quantizer, static, calibrated on the
images) and dynamic.tflite (weights alone, by ai-edge-quantizer, as its guide says). Prints a JSON
object: for each file its seconds of CPU time, `convert` from the program (which holds its scales
already, where it has any) to the file, `all` with quantization; or why it could not be made.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Seconds = dict[str, float]


def float32(program: Any, images: list[torch.Tensor], file: Path) -> Seconds:
    start = time.process_time()
    _model(program.module(), images).export(str(file))
    took = time.process_time() - start
    return {"convert": took, "all": took}


def pt2e(program: Any, images: list[torch.Tensor], file: Path) -> Seconds:
    from litert_torch.quantize import pt2e_quantizer, quant_config
    from torchao.quantization.pt2e import quantize_pt2e

    start = time.process_time()
    config = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = pt2e_quantizer.PT2EQuantizer().set_global(config)
    prepared = quantize_pt2e.prepare_pt2e(program.module(), quantizer)
    for image in images:
        prepared(image)
    quantized = quantize_pt2e.convert_pt2e(prepared, fold_quantize=False)
    ready = time.process_time()
    made = _model(
        quantized, images, quant_config=quant_config.QuantConfig(pt2e_quantizer=quantizer)
    )
    made.export(str(file))
    end = time.process_time()
    return {"convert": end - ready, "all": end - start}


def dynamic(program: Any, images: list[torch.Tensor], file: Path) -> Seconds:
    from ai_edge_quantizer import quantizer, recipe

    start = time.process_time()
    plain = file.with_name("plain.tflite")
    _model(program.module(), images).export(str(plain))
    made = quantizer.Quantizer(str(plain))
    made.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    made.quantize().export_model(str(file), overwrite=True)
    took = time.process_time() - start
    return {"convert": took, "all": took}


def _model(module: Any, images: list[torch.Tensor], **options: Any) -> Any:
    """As a .tflite file likes its images: channels last, which costs no transpose then."""
    import litert_torch

    last = litert_torch.to_channel_last_io(module, args=[0])
    return litert_torch.convert(last, (images[0].permute(0, 2, 3, 1),), **options)


WAYS: dict[str, Callable[[Any, list[torch.Tensor], Path], Seconds]] = {
    "float32": float32,
    "pt2e": pt2e,
    "dynamic": dynamic,
}


def main() -> None:
    options = _parse()
    import litert_torch  # noqa: F401 - now, and in no way's time

    images = [torch.from_numpy(image[np.newaxis]) for image in np.load(options.images)]
    results: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):  # its progress
        for name, way in WAYS.items():
            try:
                program = torch.export.load(options.program)
                results[name] = way(program, images, options.folder / f"{name}.tflite")
            except Exception as error:  # whatever a converter raises is its result
                results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("program", type=Path, metavar="PROGRAM.pt2")
    parser.add_argument("images", type=Path, metavar="IMAGES.npy")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    main()
