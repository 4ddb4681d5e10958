"""HTML and figures as text. What is no `Html` is escaped: bundles and results are not trusted."""

import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from typing import Any

MAX_TEXT = 2000  # characters of one text from a bundle
MAX_RECORDS = 5000  # entries of one list from a bundle

_VOID = frozenset({"meta", "img", "br", "wbr", "rect", "line", "path", "circle", "image", "use"})
# Controls, which HTML does not allow, and marks that turn the direction of the text around them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | Iterable["Content"] | None


def el(name: str, /, *content: Content, **attributes: str | float | bool | None) -> Html:
    """An element; attributes that are None or False are left out, `class_` is class.

    An underscore in an attribute's name stands for a hyphen.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        if isinstance(value, float):
            shown = coordinate(value)
        else:  # a drawing of ours may be long
            shown = value if isinstance(value, Html) else clean(str(value))
        parts.append(f" {key}" if value is True else f' {key}="{escape(shown)}"')
    if name in _VOID:
        return Html("".join(parts) + ("/>" if name in _SVG_VOID else ">"))
    return Html("".join(parts) + ">" + join(*content) + f"</{name}>")


_SVG_VOID = _VOID - {"meta", "img", "br", "wbr"}


def join(*content: Content) -> Html:
    """The pieces one after the other, those that are no Html escaped."""
    pieces = []
    for piece in content:
        if piece is None:
            continue
        if isinstance(piece, Html):
            pieces.append(piece)
        elif isinstance(piece, str):
            pieces.append(Html(escape(clean(piece))))
        elif isinstance(piece, Mapping) or not isinstance(piece, Iterable):
            pieces.append(Html(escape(clean(str(piece)))))  # not what a bundle should hold there
        else:
            pieces.append(join(*piece))
    return Html("".join(pieces))


def clean(text: str) -> str:
    """Printable text of bounded length."""
    text = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def breakable(name: str) -> Html:
    """A name in which a line may break after each underscore, dot and slash."""
    pieces = re.split(r"(?<=[_./])(?=.)", clean(name))
    return Html("<wbr>".join(escape(piece) for piece in pieces))


# ---- what a bundle says, checked


def figure(value: object) -> float | None:
    """The finite number in a JSON value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def mapping(value: object) -> Mapping[str, Any]:
    """The object in a JSON value, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def records(value: object) -> list[Mapping[str, Any]]:
    """The objects of a list in a JSON value."""
    if not isinstance(value, list | tuple):
        return []
    return [mapping(item) for item in value[:MAX_RECORDS] if isinstance(item, Mapping)]


# ---- figures as text

NBSP = "\N{NO-BREAK SPACE}"
NONE = "–"


def coordinate(value: float) -> str:
    """A number in a drawing: short, and the same on every machine."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def significant(value: float, digits: int = 3) -> str:
    """The number to so many significant digits, never in scientific notation from 1e-4 to 1e6."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -5 < magnitude < 7:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - magnitude)
    return f"{value:,.{places}f}"


def duration(us: float | None) -> str:
    """A time, in the unit that suits it."""
    if us is None:
        return NONE
    if abs(us) < 100:
        return f"{significant(us)}{NBSP}µs"
    if abs(us) < 10e6:
        return f"{significant(us / 1e3)}{NBSP}ms"
    return f"{significant(us / 1e6)}{NBSP}s"


def size(number: float | None) -> str:
    """A number of bytes, in powers of ten."""
    if number is None or not math.isfinite(number):
        return NONE
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= one:
            return f"{significant(number / one)}{NBSP}{unit}"
    return f"{number:.0f}{NBSP}B"


def milliseconds(value: float | None) -> str:
    """A time that is given in milliseconds, in the unit that suits it."""
    return duration(None if value is None else 1e3 * value)


def megabytes(value: float | None) -> str:
    """A size that is given in megabytes, in the unit that suits it."""
    return size(None if value is None else 1e6 * value)


def number(value: float | None) -> str:
    """A number: whole ones in full, others to three digits."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else significant(value)


def percent(share: float | None, places: int = 0) -> str:
    """A share; one that is not whole is never shown as 100%."""
    if share is None or not math.isfinite(share):
        return NONE
    shown = f"{100 * share:.{places}f}"
    least = 10.0**-places
    if 0 < 100 * share < least / 2:
        return f"<{least:g}%"
    if share < 1 and float(shown) == 100:
        shown = (
            f"{math.floor(100 * share * 10 ** (places + 1)) / 10 ** (places + 1):.{places + 1}f}"
        )
    return f"{shown}%"


def moment(text: str) -> str:
    """A time of ISO 8601 for people, in UTC."""
    try:
        when = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return text
    return f"{when:%Y-%m-%d %H:%M} UTC"


def decibel(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}{NBSP}dB"


def plural(number: int, what: str) -> str:
    return f"{number:,}{NBSP}{what}" if number == 1 else f"{number:,}{NBSP}{what}s"
