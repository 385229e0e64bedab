"""A table of sensitivity as a figure: a curve a group, by harm, and a mark where channels were cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from secateur.report.figures import Figure, Series, Tone, significant

if TYPE_CHECKING:
    from secateur.compensation.sensitivity import Sensitivity

MEASURES = {
    "kl": "KL divergence of the outputs",
    "squared error": "squared error of the outputs",
    "loss": "rise of the loss",
}


def curves(table: Sensitivity, removed: Mapping[str, int]) -> Figure:
    """Draw what each group loses over the fraction of its channels that goes, the most harmful group first.

    Args:
        table: The table.
        removed: How many channels of each group were cut, which is marked; on a curve, where it lies between two
            measured widths.
    """
    order = sorted(table.damage, key=lambda name: -max(table.damage[name].values(), default=0.0))
    series = []
    for place, name in enumerate(order):
        size, own = table.sizes[name], sorted(table.damage[name].items())
        # A logarithmic axis has no place for a damage of zero, or for a loss that has fallen.
        heights = [damage if damage > 0 else None for _, damage in own]
        labels = [f"{name}: {size - count} of {size} channels left" for count, _ in own]
        series.append(Series(name, [count / size for count, _ in own], heights, "line", Tone.RUN, labels, place=place))
    chosen = {name: count for name, count in removed.items() if count > 0 and table.damage.get(name)}
    if chosen:
        marks = [_damage(table, name, count) for name, count in chosen.items()]
        labels = [
            f"{name}: {table.sizes[name] - count} of {table.sizes[name]} channels left"
            for name, count in chosen.items()
        ]
        at = [count / table.sizes[name] for name, count in chosen.items()]
        series.append(Series("chosen", at, marks, "points", Tone.LIMIT, labels))
    return Figure(
        id="sensitivity",
        title="What each group loses",
        summary=_summary(table, order),
        x_label="channels removed",
        y_label=MEASURES.get(table.measure, table.measure),
        series=series,
        y_scale="log",
        x_format="percent",
    )


def _damage(table: Sensitivity, name: str, count: int) -> float | None:
    own = {0: 0.0} | table.damage[name]
    at = sorted(own)
    found = float(np.interp(count, at, [own[n] for n in at]))
    return found if found > 0 else None


def _summary(table: Sensitivity, order: list[str]) -> str:
    if not order or not table.damage[order[0]]:
        return "No group has channels that can go."
    worst, mildest = (max(table.damage[name].values(), default=0.0) for name in (order[0], order[-1]))
    return (
        f"Measured on {table.images} images, each group cut alone and its readers refitted. At its narrowest, "
        f"{order[0]} does most harm, {significant(worst)}, and {order[-1]} least, {significant(mildest)}."
    )
