"""TFLite Metadata: what Android's tools want to know of a model beside its operators.

The tables are those of the public `metadata_schema.fbs` (file identifier M001), of which few
fields are needed here; they are written by their numbers. Labels travel as a zip archive behind
the model, which loaders of models do not see.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers

METADATA_NAME = "TFLITE_METADATA"
LABELS_NAME = "labels.txt"

_IDENTIFIER = b"M001"
_MIN_PARSER_VERSION = "1.0.0"
_RGB = 1
_FEATURE_PROPERTIES, _IMAGE_PROPERTIES = 1, 2  # members of the union of contents
_NORMALIZATION = 1  # of the union of process units
_TENSOR_AXIS_LABELS = 2


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is told of a classifier of images.

    Attributes:
        mean, std: (pixel - mean) / std, pixels being 0 to 255, is what the input takes.
        low, high: smallest and largest value of the input.
        labels: class names, in order; empty if unknown.
    """

    name: str
    description: str
    version: str
    mean: Sequence[float]
    std: Sequence[float]
    low: float
    high: float
    labels: Sequence[str] = ()


def model_metadata(info: ModelInfo) -> bytes:
    """The block of metadata, for `METADATA_NAME`."""
    write = _Writer()
    normalization = write.table((0, write.floats(info.mean)), (1, write.floats(info.std)))
    unit = write.table((0, _Byte(_NORMALIZATION)), (1, normalization))
    image = write.table((0, _Byte(_RGB)))
    content = write.table((0, _Byte(_IMAGE_PROPERTIES)), (1, image))
    stats = write.table((0, write.floats([info.high])), (1, write.floats([info.low])))
    source = write.table(
        (0, write.text("image")),
        (1, write.text("The image to classify, (N, height, width, RGB).")),
        (3, content),
        (4, write.tables([unit])),
        (5, stats),
    )
    feature = write.table()
    content = write.table((0, _Byte(_FEATURE_PROPERTIES)), (1, feature))
    fields = [
        (0, write.text("logits")),
        (1, write.text("One number per class; the largest is the likeliest.")),
        (3, content),
    ]
    if info.labels:
        labels = write.table(
            (0, write.text(LABELS_NAME)),
            (1, write.text("Names of the classes, one per line.")),
            (2, _Byte(_TENSOR_AXIS_LABELS)),
        )
        fields.append((6, write.tables([labels])))
    result = write.table(*fields)
    graph = write.table((2, write.tables([source])), (3, write.tables([result])))
    model = write.table(
        (0, write.text(info.name)),
        (1, write.text(info.description)),
        (2, write.text(info.version)),
        (3, write.tables([graph])),
        (7, write.text(_MIN_PARSER_VERSION)),
    )
    return write.finish(model)


def append_labels(content: bytes, labels: Sequence[str]) -> bytes:
    """A model file with its labels behind it; the same labels give the same bytes."""
    stream = io.BytesIO(content)
    stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo(LABELS_NAME)  # dated 1980, whatever the clock says
        entry.external_attr = 0o644 << 16
        archive.writestr(entry, "\n".join(labels) + "\n")
    return stream.getvalue()


@dataclass(frozen=True)
class _Byte:
    value: int


class _Writer:
    """Tables by field number; what a table refers to is written before it."""

    def __init__(self) -> None:
        self._builder = flatbuffers.Builder(1024)

    def text(self, text: str) -> int:
        return int(self._builder.CreateString(text))

    def floats(self, values: Sequence[float]) -> int:
        self._builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            self._builder.PrependFloat32(value)
        return int(self._builder.EndVector())

    def tables(self, offsets: Sequence[int]) -> int:
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return int(self._builder.EndVector())

    def table(self, *fields: tuple[int, Any]) -> int:
        self._builder.StartObject(1 + max((number for number, _ in fields), default=-1))
        for number, value in fields:
            if isinstance(value, _Byte):
                self._builder.PrependUint8Slot(number, value.value, 0)
            else:
                self._builder.PrependUOffsetTRelativeSlot(number, value, 0)
        return int(self._builder.EndObject())

    def finish(self, root: int) -> bytes:
        self._builder.Finish(root, _IDENTIFIER)
        return bytes(self._builder.Output())
