"""What Android's tools read of a .tflite file, read back by a parser of the test's own."""

import io
import struct
import zipfile
from typing import Any

from ai_edge_litert import schema_py_generated as schema
from onnx_models import model_of, sampled
from tflite_models import run_tflite

from gfcompile.targets.tflite.emit import emit
from gfcompile.targets.tflite.metadata import METADATA_NAME, ModelInfo, model_metadata

INFO = ModelInfo(
    name="gfnet_xs",
    description="a classifier",
    version="1.2.3",
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    low=-2.1,
    high=2.6,
    labels=("cat", "dog"),
)


class Table:
    """A table of a flatbuffer, by the format's own rules and the schema's field numbers."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    @classmethod
    def root(cls, data: bytes) -> "Table":
        return cls(data, struct.unpack_from("<I", data)[0])

    def place(self, field: int) -> int | None:
        table = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        (size,) = struct.unpack_from("<H", self.data, table)
        if 4 + 2 * field >= size:
            return None
        (offset,) = struct.unpack_from("<H", self.data, table + 4 + 2 * field)
        return self.at + offset if offset else None

    def follow(self, field: int) -> int:
        at = self.place(field)
        assert at is not None, f"field {field} is missing"
        return int(at + struct.unpack_from("<I", self.data, at)[0])

    def byte(self, field: int) -> int:
        at = self.place(field)
        assert at is not None
        return self.data[at]

    def text(self, field: int) -> str:
        at = self.follow(field)
        (size,) = struct.unpack_from("<I", self.data, at)
        return self.data[at + 4 : at + 4 + size].decode()

    def floats(self, field: int) -> tuple[float, ...]:
        at = self.follow(field)
        (count,) = struct.unpack_from("<I", self.data, at)
        return struct.unpack_from(f"<{count}f", self.data, at + 4)

    def table(self, field: int) -> "Table":
        return Table(self.data, self.follow(field))

    def tables(self, field: int) -> list["Table"]:
        at = self.follow(field)
        (count,) = struct.unpack_from("<I", self.data, at)
        places = range(at + 4, at + 4 + 4 * count, 4)
        return [Table(self.data, p + struct.unpack_from("<I", self.data, p)[0]) for p in places]


def rounded(values: Any) -> list[float]:
    return [round(value, 3) for value in values]


def test_metadata_says_how_to_normalize_and_where_the_labels_are() -> None:
    data = model_metadata(INFO)
    assert data[4:8] == b"M001"
    model = Table.root(data)
    assert (model.text(0), model.text(1), model.text(2)) == ("gfnet_xs", "a classifier", "1.2.3")
    (graph,) = model.tables(3)
    (image,), (logits,) = graph.tables(2), graph.tables(3)
    assert image.text(0) == "image"
    assert image.table(3).byte(0) == 2  # ImageProperties
    assert image.table(3).table(1).byte(0) == 1  # RGB
    (unit,) = image.tables(4)
    assert unit.byte(0) == 1  # NormalizationOptions
    assert rounded(unit.table(1).floats(0)) == rounded(INFO.mean)
    assert rounded(unit.table(1).floats(1)) == rounded(INFO.std)
    assert rounded(image.table(5).floats(0) + image.table(5).floats(1)) == [2.6, -2.1]
    assert logits.text(0) == "logits"
    assert logits.table(3).byte(0) == 1  # FeatureProperties
    (labels,) = logits.tables(6)
    assert labels.text(0) == "labels.txt"
    assert labels.byte(2) == 2  # TENSOR_AXIS_LABELS


def test_file_carries_metadata_labels_and_a_signature_and_still_runs() -> None:
    model = model_of(
        "g (float[1,8] image) => (float[1,2] logits) { logits = MatMul(image, w) }", w=sampled(8, 2)
    )
    first, second = (emit(model, info=INFO) for _ in range(2))
    assert first.content == second.content
    with zipfile.ZipFile(io.BytesIO(first.content)) as archive:
        assert archive.read("labels.txt") == b"cat\ndog\n"
        assert archive.getinfo("labels.txt").compress_type == zipfile.ZIP_STORED
    packed = schema.ModelT.InitFromPackedBuf(first.content)
    blocks = {block.name.decode(): block.buffer for block in packed.metadata}
    assert bytes(packed.buffers[blocks[METADATA_NAME]].data) == model_metadata(INFO)
    (signature,) = packed.signatureDefs
    assert signature.signatureKey == b"serving_default"
    assert [value.name for value in signature.inputs] == [b"image"]
    assert [value.name for value in signature.outputs] == [b"logits"]
    assert run_tflite(first, sampled(1, 8))[0].shape == (1, 2)


def test_constants_are_aligned_for_vector_loads() -> None:
    w = sampled(33, 7)
    made = emit(
        model_of("g (float[1,33] x) => (float[1,7] y) { y = MatMul(x, w) }", w=w), info=INFO
    )
    assert made.content.index(w.T.tobytes()) % 16 == 0
