"""Counts of operations and bytes, on programs whose figures can be worked out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
from mil import sampled, saved_program

from gfcompile.targets.coreml.program import TensorType, read_program
from gfcompile.targets.coreml.statistics import aligned_bytes, measure


def test_results_live_until_they_were_read_last(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> Any:
        kept = mb.relu(x=x)  # 400 bytes, alive until the end
        wide = mb.tile(x=kept, reps=[1, 3])  # 1200 bytes
        mean = mb.reduce_mean(x=wide, axes=[1], keep_dims=True)  # 40 bytes
        return mb.add(x=kept, y=mean)  # 400 bytes

    statistics = measure(read_program(saved_program(tmp_path, build, sampled(10, 10))))
    assert statistics.operations == {"add": 1, "reduce_mean": 1, "relu": 1, "tile": 1}
    assert statistics.count == 4
    assert statistics.written_bytes == 400 + 1200 + 40 + 400
    # The input is gone after relu; tile's result is the largest beside kept and mean.
    assert statistics.peak_bytes == 400 + 1200 + 40


def test_integers_count_as_they_are_stored(tmp_path: Path) -> None:
    weight = np.ones((32, 10), np.int8)

    def build(mb: Any, x: Any) -> Any:
        dequantized = mb.constexpr_affine_dequantize(
            quantized_data=weight,
            scale=np.ones(32, np.float32),
            zero_point=np.int8(0),
            axis=np.int32(0),
        )
        return mb.linear(x=x, weight=dequantized)

    statistics = measure(read_program(saved_program(tmp_path, build, sampled(4, 10))))
    assert statistics.operations == {"linear": 1}
    # Weights, a scale per row and the bias that the format demands; zero point and axis.
    assert weight.nbytes + 2 * 4 * 32 <= statistics.weights_bytes <= weight.nbytes + 2 * 4 * 32 + 8


def test_a_last_axis_of_one_costs_thirty_two_times_its_size() -> None:
    column = TensorType(dtype="float16", shape=(1, 384, 196, 1))
    row = TensorType(dtype="float16", shape=(1, 384, 1, 196))
    assert aligned_bytes(column) == 32 * column.size_bytes
    assert aligned_bytes(row) == 384 * 448  # 392 bytes, aligned to 64
