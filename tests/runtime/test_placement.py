"""Which unit runs each operation: the lines, and what LiteRT and a Mac's stand-in say."""

from pathlib import Path

import numpy as np
from onnx_models import model_of, sampled

from gfcompile.runtime.placement import Placement, placement_lines
from gfcompile.runtime.tflite import TfliteInterpreter
from gfcompile.targets.tflite.emit import emit

UNITS = (
    Placement(kind="conv", name="c", unit="Neural Engine", share=0.75),
    Placement(kind="gelu", name="g", unit="Neural Engine", share=0.2),
    Placement(kind="softmax", name="s", unit="CPU"),
)


def test_each_operation_has_a_line_where_shares_are_known() -> None:
    assert placement_lines(UNITS) == [
        "Neural Engine: 2 operations, 95.0% of the time that is estimated",
        "CPU: 1 operation",
        "  conv     Neural Engine   75.0%  c",
        "  gelu     Neural Engine   20.0%  g",
        "  softmax  CPU                    s",
    ]


def test_without_shares_those_of_the_largest_unit_are_only_counted() -> None:
    plain = [Placement(kind=p.kind, name=p.name, unit=p.unit) for p in UNITS]
    assert placement_lines(plain) == [
        "Neural Engine: 2 operations",
        "CPU: 1 operation",
        "  softmax  CPU                    s",
    ]
    assert placement_lines(plain[:2]) == ["Neural Engine: 2 operations"]
    assert placement_lines([]) == []


def test_litert_says_what_xnnpack_took(tmp_path: Path) -> None:
    model = model_of(
        "g (float[1,9] x) => (float[1,4] y) {"
        " v, where = TopK<axis=-1>(x, k)  s = Add(v, v)  y = MatMul(s, w) }",
        k=np.array([4]),
        w=sampled(4, 4),
    )
    file = tmp_path / "model.tflite"
    file.write_bytes(emit(model).content)
    interpreter = TfliteInterpreter(file)
    placed = [(p.kind, p.unit) for p in interpreter.placements()]
    assert placed == [
        ("TOPK_V2", "interpreter"),
        ("ADD", "XNNPACK"),
        ("FULLY_CONNECTED", "XNNPACK"),
    ]
    delegation = interpreter.delegation()
    assert (delegation.left, delegation.partitions) == ({"TOPK_V2": 1}, 1)
    assert delegation.share == 1 - 1 / 3
