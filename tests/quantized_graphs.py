"""Random QDQ graphs: integers that are moved about, multiplied, and quantized again."""

from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st
from onnx_models import model_of

Array = np.ndarray[Any, Any]
OUTPUT_SCALE = np.float32(0.05)


@st.composite
def quantized_graphs(draw: st.DrawFn) -> tuple[ir.Model, Array]:
    """A graph whose one rounding is that of its output, to `OUTPUT_SCALE`, and an input for it.

    All before the products is integers in other places, so an emitter may be off by one step of
    the output, where a sum lies on a rounding tie.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, tokens, width = (draw(st.integers(1, most)) for most in (2, 6, 6))
    x = 2 * rng.standard_normal((batch, tokens, width)).astype(np.float32)
    arrays: dict[str, Array] = {
        "xs": np.array(rng.uniform(0.02, 0.06), np.float32),
        "xz": np.array(rng.integers(-100, 100), np.int8),
        "ys": np.array(OUTPUT_SCALE),
        "yz": np.array(rng.integers(-20, 20), np.int8),
    }
    lines = ["q = QuantizeLinear (x, xs, xz)", "d = DequantizeLinear (q, xs, xz)"]
    current = "d"
    for number in range(draw(st.integers(0, 4))):
        name = f"v{number}"

        def ints(*values: int, name: str = name) -> str:
            key = f"{name}_{len(arrays)}"
            arrays[key] = np.array(values, np.int64)
            return key

        match draw(st.sampled_from(["turn", "join", "cut", "rows", "fold"])):
            case "turn":
                lines.append(f"{name} = Transpose <perm = [0, 2, 1]> ({current})")
                tokens, width = width, tokens
            case "join":
                lines.append(f"{name} = Concat <axis = 1> ({current}, {current})")
                tokens *= 2
            case "cut" if tokens > 1:
                lines.append(f"{name} = Slice ({current}, {ints(1)}, {ints(99)}, {ints(1)})")
                tokens -= 1
            case "rows":
                rows = ints(*(int(row) for row in rng.integers(0, tokens, 3)))
                lines.append(f"{name} = Gather <axis = 1> ({current}, {rows})")
                tokens = 3
            case "fold" if width % 2 == 0:
                shape = ints(batch, 2 * tokens, width // 2)
                lines.append(f"{name} = Reshape ({current}, {shape})")
                tokens, width = 2 * tokens, width // 2
            case _:
                continue
        current = name
    out = draw(st.integers(1, 5))
    per_channel = draw(st.booleans())
    scales = rng.uniform(0.002, 0.006, out if per_channel else ()).astype(np.float32)
    arrays["w"] = rng.integers(-127, 128, (width, out)).astype(np.int8)
    arrays["ws"] = scales
    lines += [
        f"wd = DequantizeLinear{' <axis = 1>' if per_channel else ''} (w, ws)",
        f"p = MatMul ({current}, wd)",
    ]
    if draw(st.booleans()):
        arrays["b"] = rng.integers(-3000, 3000, out).astype(np.int32)
        arrays["bs"] = (arrays["xs"] * scales).astype(np.float32)
        axis = " <axis = 0>" if per_channel else ""
        lines += [f"bd = DequantizeLinear{axis} (b, bs)", "s = Add (p, bd)"]
    else:
        lines.append("s = Identity (p)")
    lines += ["yq = QuantizeLinear (s, ys, yz)", "logits = DequantizeLinear (yq, ys, yz)"]
    shape = ", ".join(map(str, x.shape))
    body = "\n".join(lines)
    text = f"g (float[{shape}] x) => (float[{batch}, {tokens}, {out}] logits) {{ {body} }}"
    return model_of(text, **arrays), x
