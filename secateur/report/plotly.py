"""A figure as a Plotly specification whose colours are names, so that the page can paint it light or dark."""

from __future__ import annotations

import base64
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from secateur.report.figures import Figure, Format, HeatMap, Series, Tone, write

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot")
LEGEND = 40
"""Characters of a line of a legend, which a phone has room for."""
RUN_COLOURS = 6
"""Number of colours the page has for runs; a seventh run takes the first colour and another marker."""

_TONES = {
    Tone.BEFORE: "$before",
    Tone.AFTER: "$after",
    Tone.BEFORE_COMPUTED: "$before",
    Tone.AFTER_COMPUTED: "$after",
    Tone.REVERTED: "$bad",
    Tone.LIMIT: "$limit",
}
_TICKS: dict[Format, dict[str, Any]] = {
    "percent": {"tickformat": ",.2~%"},
    "metric": {"tickformat": ",.1%"},
    "quantity": {"tickformat": ".3~s"},
    "bytes": {"tickformat": ".3~s", "ticksuffix": "B"},
    "decimal": {},
    "integer": {},
    "text": {},
}


def specification(figure: Figure) -> dict[str, Any]:
    """Describe a figure to plotly.js.

    Colours are tokens (``$before``, ``$after``, ``$run0`` …) that the page replaces by those of its theme. The
    texts of tooltips are written here, by the same function that writes the tables.

    Args:
        figure: The figure.

    Returns:
        ``{"data": [...], "layout": {...}}``.
    """
    layout: dict[str, Any] = {
        "xaxis": _axis(figure.x_label, figure.x_scale, figure.x_format, _numbers([s.x for s in figure.series])),
        "yaxis": _axis(figure.y_label, figure.y_scale, figure.y_format, _numbers([s.y for s in figure.series])),
        "barmode": "group",
        "bargap": 0.28,
        "bargroupgap": 0.06,
        "showlegend": len(figure.series) > 1,
    }
    if figure.x_scale == "category":
        layout["xaxis"]["title"] = {"text": ""}
    if figure.x_range is not None:
        layout["xaxis"]["range"] = list(figure.x_range)
    if figure.y_range is not None:
        # A bar that ends at the axis's end keeps a little room.
        layout["yaxis"]["range"] = [
            figure.y_range[0],
            figure.y_range[1] * (1.02 if figure.x_scale == "category" else 1),
        ]
    return {"data": [_trace(figure, series) for series in figure.series], "layout": layout}


def _numbers(columns: Sequence[Sequence[Any]]) -> list[float]:
    return [float(v) for column in columns for v in column if isinstance(v, int | float) and v > 0]


def heat_map_data(heat_map: HeatMap) -> dict[str, Any]:
    """Pack a heat map for the page: |ρ| in hundredths, one byte each, in base64."""
    return {
        "module": heat_map.module,
        "summary": heat_map.summary,
        "cell": heat_map.cell,
        "before": _packed(heat_map.before),
        "after": _packed(heat_map.after) if heat_map.after is not None else None,
    }


def _packed(rows: list[list[float]]) -> dict[str, Any]:
    values = bytes(round(100 * value) for row in rows for value in row)
    return {"side": len(rows), "values": base64.b64encode(values).decode("ascii")}


def _axis(label: str, scale: str, form: Format, values: list[float]) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": label}, "type": scale, "automargin": True, **_TICKS[form]}
    if scale == "log" and values:
        ticks = sorted(set(values)) if form == "integer" else _round_numbers(min(values), max(values))
        axis |= {"tickmode": "array", "tickvals": ticks, "ticktext": [_tick(tick, form) for tick in ticks]}
    return axis


def _tick(value: float, form: Format) -> str:
    """Write a round number as tersely as an axis wants it: ``5 MB``, not ``5.00 MB``."""
    number, _, unit = write(value, form).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}".rstrip()


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten that span a range; over three decades the powers alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps]


def _trace(figure: Figure, series: Series) -> dict[str, Any]:
    colour = _TONES.get(series.tone, f"$run{series.place % RUN_COLOURS}")
    computed = series.tone in (Tone.BEFORE_COMPUTED, Tone.AFTER_COMPUTED)
    trace: dict[str, Any] = {
        "name": "<br>".join(textwrap.wrap(series.name, LEGEND)) or series.name,
        "x": series.x,
        "y": series.y,
        "customdata": _tooltips(figure, series),
        "hovertemplate": "%{customdata}<extra></extra>",
        "type": "bar" if series.kind == "bar" else "scatter",
    }
    if series.kind == "bar":
        trace["marker"] = {"color": colour}
        return trace
    symbol = SYMBOLS[series.place % len(SYMBOLS)]
    if series.tone is Tone.REVERTED:
        symbol = "x"
    elif computed or series.tone is Tone.TRIAL or (series.tone is Tone.BEFORE and series.kind == "points"):
        symbol += "-open"
    trace["mode"] = {"line": "lines+markers", "points": "markers", "rule": "lines"}[series.kind]
    trace["marker"] = {"color": colour, "size": 11 if series.tone is Tone.RUN else 8, "symbol": symbol}
    dash = "dot" if computed else "dash" if series.kind == "rule" else DASHES[series.place % len(DASHES)]
    trace["line"] = {"color": colour, "width": 1.5 if series.kind == "rule" or computed else 2.5, "dash": dash}
    if series.error:
        trace["error_y"] = {"type": "data", "array": series.error, "color": colour, "thickness": 1, "width": 3}
    return trace


def _tooltips(figure: Figure, series: Series) -> list[str]:
    texts = []
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        where = series.labels[i] if series.labels else x if figure.x_scale == "category" else ""
        lines = [f"<b>{_plain(str(where))}</b>"] if where else []
        if series.name != where:
            lines.append(_plain(series.name))
        if figure.x_scale != "category":
            lines.append(f"{figure.x_label}: {write(x, figure.x_format)}")
        error = f" ± {write(series.error[i], figure.y_format)}" if series.error else ""
        lines.append(f"{figure.y_label}: {write(y, figure.y_format)}{error}")
        texts.append("<br>".join(lines))
    return texts


def _plain(text: str) -> str:
    """Keep a name from being read as markup in a tooltip."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
