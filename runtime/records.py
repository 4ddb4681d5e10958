"""Frozen dataclasses as JSON and back, checked against their annotations.

A field is one of: str, int, float, bool, a Literal of strings, another such dataclass,
`tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]`, Any, or any of these `| None`.
"""

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar

Record = TypeVar("Record")

_PLAIN = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


def to_json(record: Any) -> dict[str, Any]:
    """What `json.dump(..., allow_nan=False)` takes; numbers that JSON lacks become null.

    So a field that may hold inf or NaN is annotated `float | None`.
    """
    values = _finite(asdict(record))
    assert isinstance(values, dict)
    return values


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def from_json(cls: type[Record], values: object, where: str = "") -> Record:
    """The `cls` that `values` describes; keys that it does not know are left out.

    Raises:
        ValueError: something is missing, or is of another type; the message says where.
    """
    name = where or cls.__name__
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} should be an object, not {_shown(values)}")
    hints = typing.get_type_hints(cls)
    found = {}
    for field in fields(cls):  # type: ignore[arg-type] # a TypeVar cannot be bound to dataclasses
        if field.name in values:
            place = f"{where}.{field.name}" if where else field.name
            found[field.name] = _decode(hints[field.name], values[field.name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} has no {field.name!r}")
    return cls(**found)


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (kind for kind in inner if kind is not type(None))
        return _decode(hint, value, where)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{where} should be one of {', '.join(inner)}, not {_shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} should be a list, not {_shown(value)}")
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ValueError(f"{where} should have {len(kinds)} items, not {len(value)}")
        return tuple(
            _decode(kind, item, f"{where}[{i}]")
            for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} should be an object, not {_shown(value)}")
        return {str(key): _decode(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return from_json(hint, value, where)
    assert hint in _PLAIN, f"{where}: {hint} is not among what a record may hold"
    if hint is float and type(value) in (int, float):
        return _number(value, where)
    if type(value) is not hint:  # exactly: True is an int for isinstance
        raise ValueError(f"{where} should be {_PLAIN[hint]}, not {_shown(value)}")
    return value


def _number(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} should be a number, not {_shown(value)}")
    return number


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
