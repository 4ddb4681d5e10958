"""Every operation of the evaluator on saved programs, against definitions in NumPy."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mil import sampled, saved_program

from gfcompile.runtime.errors import BundleError
from gfcompile.targets.coreml.evaluate import OPERATIONS, Evaluator
from gfcompile.targets.coreml.program import read_program

Case = tuple[Callable[[Any, Any], Any], np.ndarray, Callable[[np.ndarray], Any]]

# Float32 sums of up to 100 terms, in another order: some 10 roundings of 6e-8, of values below 10.
TOLERANCE = 1e-5

TOKENS = sampled(2, 5, 6)
PICTURE = sampled(1, 4, 7, 8)
POSITIVE = np.abs(TOKENS) + 0.1
MATRIX = sampled(3, 6, seed=1)
BIAS = sampled(3, seed=2)
OTHER = sampled(1, 5, 6, seed=3)
KERNEL = sampled(6, 2, 3, 2, seed=4)
COUNTS = np.array([[3, -1, 7, 5], [2, 8, -6, 4]], np.int32)
INTEGERS = np.random.default_rng(5).integers(-127, 128, (3, 6)).astype(np.int8)
SCALES = (np.abs(sampled(3, seed=6)) / 100).astype(np.float32)

erf = np.vectorize(math.erf)


def convolved(x: np.ndarray) -> np.ndarray:
    """Pads (1, 2) rows and (0, 1) columns, strides 2 and 1, dilation 1 and 2, two groups."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 2), (0, 1)))
    rows, columns = (x.shape[2] - 3) // 2 + 1, x.shape[3] - 2
    y = np.zeros((1, 6, rows, columns))
    for o in range(6):
        for i in range(rows):
            for j in range(columns):
                group = o // 3 * 2
                window = x[0, group : group + 2, 2 * i : 2 * i + 3, j : j + 3 : 2]
                y[0, o, i, j] = (window * KERNEL[o]).sum()
    return y


def normalized(x: np.ndarray, axis: int) -> np.ndarray:
    centred = x - x.mean(axis, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis, keepdims=True) + 1e-3)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x.astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


def quantized(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x / np.float32(0.02)) + 3, -128, 127)


def dequantized() -> np.ndarray:
    return INTEGERS.astype(np.float64) * SCALES[:, None]


def weights_as(kind: str, **arguments: Any) -> Callable[[Any, Any], Any]:
    return lambda mb, x: mb.linear(x=x, weight=getattr(mb, kind)(**arguments))


CASES: dict[str, Case] = {
    "abs": (lambda mb, x: mb.abs(x=x), TOKENS, np.abs),
    "add": (lambda mb, x: mb.add(x=x, y=OTHER), TOKENS, lambda x: x + OTHER),
    "cast": (lambda mb, x: mb.cast(x=x, dtype="int32"), 9 * TOKENS, np.trunc),
    "concat": (
        lambda mb, x: mb.concat(values=[x, OTHER.repeat(2, 0), x], axis=1),
        TOKENS,
        lambda x: np.concatenate([x, OTHER.repeat(2, 0), x], 1),
    ),
    "constexpr_affine_dequantize": (
        weights_as(
            "constexpr_affine_dequantize",
            quantized_data=INTEGERS,
            scale=SCALES,
            zero_point=np.int8(0),
            axis=np.int32(0),
        ),
        TOKENS,
        lambda x: x @ dequantized().T,
    ),
    "constexpr_blockwise_shift_scale": (
        weights_as(
            "constexpr_blockwise_shift_scale",
            data=INTEGERS,
            scale=np.stack([SCALES, 2 * SCALES], axis=1),  # two blocks of three columns
        ),
        TOKENS,
        lambda x: x @ (dequantized() * [1, 1, 1, 2, 2, 2]).T,
    ),
    "conv": (
        lambda mb, x: mb.conv(
            x=x,
            weight=KERNEL,
            strides=[2, 1],
            pad_type="custom",
            pad=[1, 2, 0, 1],
            dilations=[1, 2],
            groups=2,
        ),
        PICTURE,
        convolved,
    ),
    "dequantize": (
        lambda mb, x: mb.dequantize(
            input=mb.quantize(
                input=x, scale=np.float32(0.02), zero_point=np.int8(3), output_dtype="int8"
            ),
            scale=np.float32(0.02),
            zero_point=np.int8(3),
        ),
        TOKENS,
        lambda x: (quantized(x) - 3) * 0.02,
    ),
    "erf": (lambda mb, x: mb.erf(x=x), TOKENS, erf),
    "exp": (lambda mb, x: mb.exp(x=x), TOKENS, np.exp),
    "gather": (
        lambda mb, x: mb.gather(x=x, indices=np.array([4, 0, 4], np.int32), axis=1),
        TOKENS,
        lambda x: x[:, [4, 0, 4]],
    ),
    "gelu": (
        lambda mb, x: mb.gelu(x=x, mode="EXACT"),
        TOKENS,
        lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    ),
    "identity": (lambda mb, x: mb.identity(x=x), TOKENS, lambda x: x),
    "layer_norm": (
        lambda mb, x: mb.layer_norm(
            x=x,
            axes=[1],
            gamma=OTHER[0, :4, 0].copy(),
            beta=OTHER[0, :4, 1].copy(),
            epsilon=np.float32(1e-3),
        ),
        PICTURE,
        lambda x: normalized(x, 1) * OTHER[0, :4, 0, None, None] + OTHER[0, :4, 1, None, None],
    ),
    "linear": (
        lambda mb, x: mb.linear(x=x, weight=MATRIX, bias=BIAS),
        TOKENS,
        lambda x: x @ MATRIX.T + BIAS,
    ),
    "matmul": (
        lambda mb, x: mb.matmul(x=x, y=OTHER, transpose_x=True),
        TOKENS,
        lambda x: x.transpose(0, 2, 1) @ OTHER,
    ),
    "mul": (lambda mb, x: mb.mul(x=x, y=OTHER), TOKENS, lambda x: x * OTHER),
    "quantize": (
        lambda mb, x: mb.cast(
            x=mb.quantize(
                input=x, scale=np.float32(0.02), zero_point=np.int8(3), output_dtype="int8"
            ),
            dtype="int32",
        ),
        TOKENS,
        quantized,
    ),
    "real_div": (lambda mb, x: mb.real_div(x=OTHER, y=x), POSITIVE, lambda x: OTHER / x),
    "reduce_max": (
        lambda mb, x: mb.reduce_max(x=x, axes=[0, 2], keep_dims=True),
        TOKENS,
        lambda x: x.max((0, 2), keepdims=True),
    ),
    "reduce_mean": (
        lambda mb, x: mb.reduce_mean(x=x, axes=[-2], keep_dims=False),
        TOKENS,
        lambda x: x.mean(1),
    ),
    "reduce_sum": (
        lambda mb, x: mb.reduce_sum(x=x, axes=[1, 2], keep_dims=False),
        TOKENS,
        lambda x: x.sum((1, 2)),
    ),
    "relu": (lambda mb, x: mb.relu(x=x), TOKENS, lambda x: np.maximum(x, 0)),
    "reshape": (
        lambda mb, x: mb.reshape(x=x, shape=[5, 4, 3]),
        TOKENS,
        lambda x: x.reshape(5, 4, 3),
    ),
    "sigmoid": (lambda mb, x: mb.sigmoid(x=x), TOKENS, lambda x: 1 / (1 + np.exp(-x))),
    "slice_by_index": (
        lambda mb, x: mb.slice_by_index(x=x, begin=[0, 1, 0], end=[2, 5, 6], stride=[1, 2, 3]),
        TOKENS,
        lambda x: x[:, 1:5:2, ::3],
    ),
    "softmax": (lambda mb, x: mb.softmax(x=x, axis=1), TOKENS, softmax),
    "split": (
        lambda mb, x: mb.split(x=x, split_sizes=[1, 3, 1], axis=1)[1],
        TOKENS,
        lambda x: x[:, 1:4],
    ),
    "sqrt": (lambda mb, x: mb.sqrt(x=x), POSITIVE, np.sqrt),
    "sub": (lambda mb, x: mb.sub(x=OTHER, y=x), TOKENS, lambda x: OTHER - x),
    "tanh": (lambda mb, x: mb.tanh(x=x), TOKENS, np.tanh),
    "tile": (lambda mb, x: mb.tile(x=x, reps=[1, 2, 3]), TOKENS, lambda x: np.tile(x, (1, 2, 3))),
    "topk": (
        lambda mb, x: mb.topk(x=x, k=2, axis=1, ascending=False)[1],
        COUNTS,
        lambda x: np.argsort(-x, axis=1)[:, :2],
    ),
    "transpose": (
        lambda mb, x: mb.transpose(x=x, perm=[2, 0, 1]),
        TOKENS,
        lambda x: x.transpose(2, 0, 1),
    ),
}


def evaluated(package: Path, x: np.ndarray, **options: Any) -> Any:
    (result,) = Evaluator(package, **options).run({"x": x}).values()
    return result


@pytest.mark.parametrize("kind", CASES)
def test_operation_is_what_numpy_says(kind: str, tmp_path: Path) -> None:
    build, x, define = CASES[kind]
    ios = 18 if kind == "constexpr_blockwise_shift_scale" else 17
    package = saved_program(tmp_path, build, x, ios=ios)
    assert kind in {op.kind for op in read_program(package).operations}
    expected = define(x)
    result = evaluated(package, x)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, atol=TOLERANCE)


def test_every_operation_has_a_definition_here() -> None:
    assert CASES.keys() | {"classify"} == OPERATIONS.keys()


def test_a_classifier_names_the_likeliest_class(tmp_path: Path) -> None:
    from mil import DESCRIPTION

    from gfcompile.targets.coreml.package import write_package
    from gfcompile.targets.coreml.tools import coremltools, quiet

    ct = coremltools()
    from coremltools.converters.mil import Builder

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 3))], opset_version=ct.target.iOS15)
    def program(x: Any) -> Any:
        return Builder.softmax(x=x, axis=-1, name="probabilities")

    package = tmp_path / "test.mlpackage"
    names = ["cat", "dog", "mat"]
    with quiet():
        write_package(
            program, package, ios=15, image_shape=None, classes=names, description=DESCRIPTION
        )
    result = Evaluator(package).run({"x": np.log([[0.2, 0.7, 0.1]]).astype(np.float32)})
    assert result["classLabel"] == "dog"
    assert result["classLabel_probs"] == pytest.approx({"cat": 0.2, "dog": 0.7, "mat": 0.1})


@pytest.mark.parametrize(("kind", "ios"), [("matmul", 15), ("split", 16)])
def test_older_opsets_read_the_same(kind: str, ios: int, tmp_path: Path) -> None:
    build, x, define = CASES[kind]
    result = evaluated(saved_program(tmp_path, build, x, ios=ios), x)
    np.testing.assert_allclose(result, define(x), atol=TOLERANCE)


def halves(mb: Any, x: Any) -> Any:
    x = mb.cast(x=x, dtype="fp16")
    x = mb.mul(x=x, y=np.float16(3.1))
    return mb.cast(x=mb.add(x=x, y=np.float16(0.3)), dtype="fp32")


def test_results_of_type_float16_are_rounded_to_it(tmp_path: Path) -> None:
    package = saved_program(tmp_path, halves, TOKENS)
    # NumPy rounds each result of float16 operands once, to nearest even.
    expected = TOKENS.astype(np.float16) * np.float16(3.1) + np.float16(0.3)
    np.testing.assert_array_equal(evaluated(package, TOKENS), expected.astype(np.float32))


def test_rounding_can_be_left_out(tmp_path: Path) -> None:
    package = saved_program(tmp_path, halves, TOKENS)
    x, factor, term = TOKENS, np.float16(3.1), np.float16(0.3)
    expected = x.astype(np.float16).astype(np.float64) * float(factor) + float(term)
    result = evaluated(package, TOKENS, round_half=False)
    np.testing.assert_allclose(result, expected, atol=TOLERANCE)


def test_four_bit_weights_are_unpacked(tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import types

    nibbles = (np.arange(18).reshape(3, 6) % 16 - 8).astype(np.int8)
    package = saved_program(
        tmp_path,
        weights_as(
            "constexpr_blockwise_shift_scale",
            data=nibbles.astype(types.nptype_from_builtin(types.int4)),
            scale=SCALES[:, None],
        ),
        TOKENS,
        ios=18,
    )
    expected = TOKENS @ (nibbles * SCALES[:, None]).T
    np.testing.assert_allclose(evaluated(package, TOKENS), expected, atol=TOLERANCE)


def test_large_constants_come_from_the_weights_file(tmp_path: Path) -> None:
    weight = sampled(64, 6, seed=7)
    package = saved_program(tmp_path, lambda mb, x: mb.linear(x=x, weight=weight), TOKENS)
    file = package / "Data/com.apple.CoreML/weights/weight.bin"
    assert file.stat().st_size > weight.nbytes
    np.testing.assert_allclose(evaluated(package, TOKENS), TOKENS @ weight.T, atol=TOLERANCE)
    damaged = bytearray(file.read_bytes())
    damaged[64:68] = bytes(4)  # the first record's sentinel
    file.write_bytes(damaged)
    with pytest.raises(BundleError, match="damaged"):
        read_program(package)
    file.write_bytes(bytes(damaged[:70]))
    with pytest.raises(BundleError, match="damaged program"):
        read_program(package)


def test_a_program_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    package = saved_program(tmp_path, lambda mb, x: mb.relu(x=x), TOKENS)
    program = read_program(package)
    (op,) = program.operations
    name, kind = op.outputs[0]
    for change, complaint in (
        ({"inputs": {"x": ["nothing"]}}, "relu cannot be evaluated: KeyError"),
        ({"inputs": {}}, "relu cannot be evaluated: KeyError"),
        ({"outputs": [(name, replace(kind, shape=(1,)))]}, "relu cannot be evaluated"),
        ({"outputs": [("other", kind)]}, f"the program computes no {name}"),
    ):
        damaged = replace(program, operations=[replace(op, **change)])  # type: ignore[arg-type]
        with pytest.raises(BundleError, match=complaint):
            Evaluator(damaged).run({"x": TOKENS})


def test_what_cannot_be_evaluated_is_named(tmp_path: Path) -> None:
    package = saved_program(tmp_path, lambda mb, x: mb.cumsum(x=x, axis=0), TOKENS)
    with pytest.raises(BundleError, match="cumsum"):
        Evaluator(package)


def test_an_input_of_another_shape_is_refused(tmp_path: Path) -> None:
    package = saved_program(tmp_path, CASES["relu"][0], TOKENS)
    with pytest.raises(BundleError, match=r"shape \(2, 5, 6\), got \(5, 6\)"):
        Evaluator(package).run({"x": TOKENS[0]})


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no \.mlpackage"):
        read_program(tmp_path)
