"""The sensitivity analysis as a picture: SVG, written out by hand."""

import math
from collections.abc import Sequence
from html import escape

from gfcompile.quantize.sensitivity import Sensitivity

__all__ = ["plot"]

_ROW, _BAR, _LEFT, _WIDTH, _TOP = 20, 13, 250, 420, 44
_COLOURS = {
    "linear": "#3b6ea5",
    "patch_conv2d": "#5b9f7d",
    "filter as circular int8": "#c9a23f",
    "filter on int8 spectra": "#b5483f",
}


def plot(results: Sequence[Sensitivity], *, title: str, kept: Sequence[str] = ()) -> str:
    """A bar for each result, as long as its loss, on a logarithmic scale; `kept` ones are bold."""
    losses = [max(result.loss, 1e-9) for result in results]
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))
    high = max(high, low + 1)
    bottom = _TOP + _ROW * len(results)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 110}" '
        f'height="{bottom + 50}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        x = _LEFT + _WIDTH * (power - low) / (high - low)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{_TOP - 11}" text-anchor="middle">1e{power}</text>'
        )
    for row, (result, loss) in enumerate(zip(results, losses, strict=True)):
        y = _TOP + _ROW * row
        length = max(1.0, _WIDTH * (math.log10(loss) - low) / (high - low))
        weight = ' font-weight="bold"' if result.name in kept else ""
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 11}" text-anchor="end"{weight}>'
            f"{escape(result.name)}</text>"
            f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" '
            f'fill="{_COLOURS[result.kind]}"><title>{result.kind}</title></rect>'
            f'<text x="{_LEFT + length + 6:.1f}" y="{y + 11}">{result.sqnr_db:.1f} dB</text>'
        )
    for i, kind in enumerate(dict.fromkeys(result.kind for result in results)):
        x = 10 + 170 * i
        parts.append(
            f'<rect x="{x}" y="{bottom + 20}" width="12" height="12" fill="{_COLOURS[kind]}"/>'
            f'<text x="{x + 18}" y="{bottom + 30}">{kind}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
