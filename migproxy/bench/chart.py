"""The results as a picture: bars of throughput and of CPU per GiB, as SVG without further tools."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from migproxy.bench.contestants import DIRECT, LIMIT, MIGPROXY
from migproxy.bench.results import STREAM, SYSTEM, Cell, Results

_BAR, _GAP, _LABEL, _WIDTH, _HEAD = 18, 6, 130, 330, 58
_COLOURS = {LIMIT: "#9aa0a6", MIGPROXY: "#0b7285"}
_OURS, _PEER = "#4dabb8", "#d0a85c"
_PANELS = (("rate", 1e-9, "GB/s, more is better", 2), ("cpu_per_gib", 1, "CPU seconds per GiB, less is better", 2))


def svg(results: Results) -> str:
    """Draws the cells of streams, one row of two panels for each; a whole document."""
    rows = [cell for cell in results.values if cell.kind == STREAM]
    heights = [_height(results, cell) for cell in rows]
    width, height = 2 * (_LABEL + _WIDTH) + 40, sum(heights) + 20
    body = []
    top = 10
    for cell, tall in zip(rows, heights, strict=True):
        body.append(_text(10, top + 18, _title(cell), 'font-weight="bold"'))
        for number, panel in enumerate(_PANELS):
            body += _panel(results, cell, panel, 10 + number * (_LABEL + _WIDTH + 20), top + 40)
        top += tall
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        + "".join(body)
        + "</svg>\n"
    )


def _title(cell: Cell) -> str:
    system = ", congestion control as each chooses it by default" if cell.congestion == SYSTEM else ""
    streams = f"{cell.connections} stream{'s' if cell.connections > 1 else ''}"
    return f"{streams}, writes of {cell.chunk >> 10} KiB, {cell.network}{system}"


def _names(results: Results, cell: Cell) -> list[str]:
    return [name for name in results.values[cell] if name != DIRECT]


def _height(results: Results, cell: Cell) -> int:
    return _HEAD + len(_names(results, cell)) * (_BAR + _GAP)


def _panel(results: Results, cell: Cell, panel: tuple[str, float, str, int], left: int, top: int) -> Sequence[str]:
    metric, factor, unit, decimals = panel
    bars = [
        (name, value * factor)
        for name in _names(results, cell)
        if (value := results.median(cell, name, metric)) is not None
    ]
    most = max(value for _, value in bars)
    drawn = [_text(left + _LABEL, top - 6, unit, 'fill="#666" font-size="11"')]
    for number, (name, value) in enumerate(bars):
        y = top + number * (_BAR + _GAP)
        colour = _COLOURS.get(name, _OURS if name.startswith(MIGPROXY) else _PEER)
        long = round(value / most * (_WIDTH - 50), 1)
        drawn.append(_text(left + _LABEL - 8, y + 14, name, 'text-anchor="end"'))
        drawn.append(f'<rect x="{left + _LABEL}" y="{y}" width="{long}" height="{_BAR}" fill="{colour}"/>')
        drawn.append(_text(left + _LABEL + long + 6, y + 14, f"{value:.{decimals}f}"))
    return drawn


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(text)}</text>'
