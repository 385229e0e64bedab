"""The rows of ``bench.accuracy`` as tables: right after the cut, and after training."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable

from bench import accuracy_figure
from bench.accuracy_arms import SCRATCH, SEEN, UNPRUNED
from bench.accuracy_cells import peaks, store
from bench.accuracy_peers import KIRIGAMI, ONE_SHOT, SPARSE
from bench.rows import Row
from bench.sections import Figure, Section

STORE = store()
Column = tuple[float, int, bool]
"""Fraction of the MACs, epochs, distilled."""


def spread(values: list[float]) -> str:
    """Return a mean with the standard deviation over seeds."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def whose(arm: str) -> str:
    """Return whose arm it is."""
    if arm in ONE_SHOT or arm == SPARSE:
        return "Torch-Pruning"
    return "torch-kirigami" if arm in KIRIGAMI else "" if arm in (SCRATCH, UNPRUNED, "random") else "Secateur"


def counted(rows: Iterable[Row]) -> list[Row]:
    """Leave out what was trained from another peak than its arm's best."""
    rows = list(rows)
    best = peaks(rows)
    kept = []
    for row in rows:
        trial = (row["network"], row["layers"], row["arm"], row["images"], row["distilled"])
        if "accuracy" in row and (not row["epochs"] or row["peak"] == best.get(trial)):
            kept.append(row)
    return kept


def table(rows: list[Row], columns: list[Column], names: list[str]) -> list[str]:
    """Return a table of arms, the best at the column nearest to half of the MACs first."""
    cells: dict[tuple[str, Column], list[float]] = {}
    for row in rows:
        cells.setdefault((row["arm"], (row["fraction"], row["epochs"], row["distilled"])), []).append(row["accuracy"])
    main = min(columns, key=lambda c: (abs(c[0] - 0.5), -c[1], not c[2]))
    arms = dict.fromkeys(row["arm"] for row in rows)
    order = sorted(arms, key=lambda arm: (-statistics.mean(cells.get((arm, main), [0.0])), arm))
    lines = ["| arm | whose | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(columns)]
    for arm in order:
        values = [spread(cells[arm, column]) if (arm, column) in cells else "" for column in columns]
        lines.append(f"| {arm} | {whose(arm)} | " + " | ".join(values) + " |")
    return lines


def _after_cut(rows: list[Row]) -> list[str]:
    own = [row for row in rows if not row["epochs"] and row["arm"] != UNPRUNED]
    if not own:
        return []
    columns: list[Column] = [(fraction, 0, False) for fraction in sorted({row["fraction"] for row in own})]
    lines = table(own, columns, [f"{fraction:.0%}" for fraction, _, _ in columns])
    return ["Right after the cut, by the fraction of the MACs removed:", "", *lines, ""]


def _after_training(rows: list[Row]) -> list[str]:
    lines = []
    for images in sorted({row["images"] for row in rows if row["epochs"]}, reverse=True):
        own = [row for row in rows if row["epochs"] and row["images"] == images]
        found = {(row["fraction"], row["epochs"], row["distilled"]) for row in own}
        columns = sorted(found, key=lambda column: (not column[2], column[0], column[1]))
        names = [f"{f:.0%}, {n} epoch{'s' if n > 1 else ''}{'' if d else ', undistilled'}" for f, n, d in columns]
        told = Counter(
            f"{peak:g}" for _, peak, distilled in {(r["arm"], r["peak"], r["distilled"]) for r in own} if distilled
        )
        lines += [f"After training, epochs of {images:,} images, distilled where nothing else is said:", ""]
        lines += [*table(own, columns, names), ""]
        if told:
            lines += [f"Peaks chosen: {', '.join(f'{peak} by {n} arms' for peak, n in sorted(told.items()))}.", ""]
    return lines


def _not_possible(rows: Iterable[Row]) -> list[str]:
    reasons: dict[str, set[str]] = {}
    for row in rows:
        if "failed" in row:
            reasons.setdefault(row["failed"], set()).add(row["arm"])
    return [f"- not measured, {reason}: {', '.join(sorted(arms))}" for reason, arms in sorted(reasons.items())]


def render() -> str:
    """Return the section as Markdown."""
    everything = STORE.read()
    lines = [
        "## Accuracy at equal MACs, images and training",
        "",
        (
            "Test accuracy in per cent, CIFAR-10, 10,000 images, last epoch; mean ± standard deviation where a cell "
            f"has more than one seed. Every arm sees the same {SEEN} training images before the cut, loses at least "
            "the fraction of the MACs that is asked for (Torch-Pruning's steps may end 1 point short), counted by one "
            "counter for all, and trains by the same code on the same images: SGD, momentum 0.9, weight decay 1e-4, "
            "batches of 128, cropped and flipped, a cosine to 0. The peak of the rate is the best of three on the "
            "5,000 training images held out, after one epoch, for each arm, of equal ones the larger: the published "
            "weights were trained on those images, which favours small rates. *TP* is Torch-Pruning 1.6.1: all its "
            "one-shot importances are measured right after the cut, and the two that do best there, on the test set "
            "itself, are trained, where not all are. *uniform*, *global* and *sensitivity* are allocations, "
            "*normalized* where none is named. *From scratch* has the widths of `l1 uniform` and fresh weights. "
            "Written by `python -m bench.accuracy`."
        ),
        "",
        f"![Accuracy against the MACs removed, right after the cut and after training, by arm]({FIGURE.file})",
        "",
    ]
    for network, layers in sorted({(row["network"], row["layers"]) for row in everything}):
        own = [row for row in everything if (row["network"], row["layers"]) == (network, layers)]
        shown = counted(own)
        unpruned = next((f" Unpruned: {row['accuracy']:.2f}." for row in shown if row["arm"] == UNPRUNED), "")
        what = "the first filters of each block" if layers == "inner" else "all groups"
        lines += [f"### {network}, {what}", "", f"CPU hours so far: {_hours(own):.1f}.{unpruned}", ""]
        lines += [*_after_cut(shown), *_after_training(shown), *_not_possible(own), ""]
    return "\n".join(lines).strip()


def _hours(rows: Iterable[Row]) -> float:
    return sum(float(row.get("seconds", 0)) for row in rows) / 3600


def draw() -> str:
    """Return the figure as SVG."""
    return accuracy_figure.draw(counted(STORE.read()))


SECTION = Section("benchmarks.md", "accuracy", render)
FIGURE = Figure("accuracy.svg", draw)
