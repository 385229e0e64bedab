"""Accuracy against the MACs removed, drawn from rows as SVG: right after the cut, and after the longest training.

Trained networks are those of the distilled cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from html import escape

from bench.accuracy_arms import AUTO, RANDOM, SCRATCH, UNIFORM, UNPRUNED
from bench.accuracy_peers import ONE_SHOT
from bench.rows import Row

WIDTH, HEIGHT, LEFT, TOP, GAP = 340, 250, 64, 64, 96
BEST = "best of Torch-Pruning"
STYLES = {
    AUTO: ("#b3261e", ""),
    BEST: ("#1d5fa8", ""),
    UNIFORM: ("#4d7c2a", ""),
    RANDOM: ("#7a7a7a", "4 3"),
    SCRATCH: ("#8a5a00", "2 3"),
}
"""Line -> colour and dashes."""
Points = list[tuple[float, float]]
"""Fraction of the MACs removed, and accuracy."""


def lines(rows: Iterable[Row]) -> dict[str, Points]:
    """Return the points of each line; of Torch-Pruning the best mean of each fraction."""
    cells: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        name = BEST if row["arm"] in ONE_SHOT else row["arm"]
        if name in STYLES:
            cells.setdefault((name, row["arm"], row["fraction"]), []).append(row)
    means: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for (name, _, fraction), own in cells.items():
        accuracy = statistics.mean(row["accuracy"] for row in own)
        means.setdefault((name, fraction), []).append((accuracy, statistics.mean(row["removed"] for row in own)))
    found: dict[str, Points] = {}
    for name, fraction in sorted(means):
        accuracy, removed = max(means[name, fraction])
        found.setdefault(name, []).append((removed, accuracy))
    return {name: sorted(found[name]) for name in STYLES if name in found}


def panels(rows: list[Row]) -> list[tuple[str, dict[str, Points], float | None]]:
    """Return title, lines and the unpruned accuracy of each panel that has a point."""
    found = []
    for network, layers in sorted({(row["network"], row["layers"]) for row in rows}):
        own = [row for row in rows if (row["network"], row["layers"]) == (network, layers)]
        unpruned = next((row["accuracy"] for row in own if row["arm"] == UNPRUNED), None)
        what = f"{network}, {'inner filters' if layers == 'inner' else 'all groups'}"
        longest = max(((row["images"], row["epochs"]) for row in own if row["distilled"]), default=(0, 0))
        for images, epochs in dict.fromkeys(((0, 0), longest)):
            shown = lines(
                row for row in own if (row["images"], row["epochs"], row["distilled"]) == (images, epochs, epochs > 0)
            )
            if shown:
                when = f"{epochs} × {images:,} images" if epochs else "right after the cut"
                found.append((f"{what}: {when}", shown, unpruned))
    return found


def draw(rows: list[Row]) -> str:
    """Return the figure: two panels a line, the names of the lines above them."""
    shown = panels(rows)
    width = 2 * (LEFT + WIDTH) + GAP
    height = TOP + max(1, math.ceil(len(shown) / 2)) * (HEIGHT + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        '<g font-family="system-ui, sans-serif" font-size="13" fill="#1b2733" role="img" aria-labelledby="title">',
        '<title id="title">Test accuracy against the fraction of the MACs removed</title>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    x = LEFT
    for name, (colour, dashes) in STYLES.items():
        out.append(f'<path d="M{x} 20h26" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/>')
        out.append(f'<text x="{x + 32}" y="24">{escape(name)}</text>')
        x += 64 + 8 * len(name)
    for place, (title, points, unpruned) in enumerate(shown):
        x, y = LEFT + place % 2 * (WIDTH + GAP), TOP + place // 2 * (HEIGHT + GAP)
        out += [f'<g transform="translate({x} {y})">', *_panel(title, points, unpruned), "</g>"]
    return "\n".join([*out, "</g>", "</svg>", ""])


def _panel(title: str, points: dict[str, Points], unpruned: float | None) -> list[str]:
    values = [accuracy for line in points.values() for _, accuracy in line] + ([] if unpruned is None else [unpruned])
    across = [removed for line in points.values() for removed, _ in line]
    ticks, (left, right) = _ticks(min(values), max(values)), (min(across) - 0.03, max(across) + 0.03)

    def at(removed: float, accuracy: float) -> tuple[float, float]:
        share = (accuracy - ticks[0]) / (ticks[-1] - ticks[0])
        return round((removed - left) / (right - left) * WIDTH, 1), round(HEIGHT - share * HEIGHT, 1)

    out = [f'<text x="0" y="-10" font-weight="600">{escape(title)}</text>']
    for tick in ticks:
        _, y = at(left, tick)
        out.append(f'<path d="M0 {y}H{WIDTH}" stroke="#dde3e8"/>')
        out.append(f'<text x="-8" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for hundredth in range(math.ceil(left * 10) * 10, math.floor(right * 10) * 10 + 1, 10):
        x, _ = at(hundredth / 100, ticks[0])
        out.append(f'<text x="{x}" y="{HEIGHT + 18}" text-anchor="middle">{hundredth}%</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 38}" text-anchor="middle">MACs removed</text>')
    if unpruned is not None:
        _, y = at(left, unpruned)
        out.append(f'<path d="M0 {y}H{WIDTH}" stroke="#1b2733" stroke-dasharray="1 3"/>')
        out.append(f'<text x="{WIDTH}" y="{y - 4}" text-anchor="end" font-size="11">unpruned</text>')
    for name, line in points.items():
        colour, dashes = STYLES[name]
        places = [at(removed, accuracy) for removed, accuracy in line]
        path = "L".join(f"{x} {y}" for x, y in places)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>')
        out += [f'<circle cx="{x}" cy="{y}" r="3.2" fill="{colour}"/>' for x, y in places]
    return out


def _ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers, from below the lowest value to above the highest."""
    span = max(high - low, 0.5)
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if span / s <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * n, 1) for n in range(first, max(last, first + 1) + 1)]
