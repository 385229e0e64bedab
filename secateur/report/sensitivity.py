"""The figure of a table of sensitivity: a curve a group, by harm, and where a plan has cut."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from secateur.checkpoint.atomic import write_atomic
from secateur.errors import UsageError
from secateur.report import html
from secateur.report.figures import Figure, Series, Tone, significant
from secateur.report.page import plotly_js
from secateur.report.paper import RUNS, draw
from secateur.report.plotly import specification

if TYPE_CHECKING:
    from secateur.compensation.sensitivity import Sensitivity
    from secateur.graph.plan import PruningPlan

MEASURES = {
    "kl": "KL divergence of the outputs",
    "squared error": "squared error of the outputs",
    "loss": "rise of the loss",
}
SUFFIXES = (".html", ".htm", ".png", ".svg")


def figure(table: Sensitivity, plan: PruningPlan | None = None) -> Figure:
    """Draw what each group loses over the fraction of its channels that goes, the most harmful group first.

    Args:
        table: The table.
        plan: A plan whose widths are marked; on a curve, where it lies between two measured widths.
    """
    order = sorted(table.damage, key=lambda name: -max(table.damage[name].values(), default=0.0))
    series = []
    for place, name in enumerate(order):
        size, own = table.sizes[name], sorted(table.damage[name].items())
        # A logarithmic axis has no place for a damage of zero, or for a loss that has fallen.
        heights = [damage if damage > 0 else None for _, damage in own]
        labels = [f"{name}: {size - count} of {size} channels left" for count, _ in own]
        series.append(Series(name, [count / size for count, _ in own], heights, "line", Tone.RUN, labels, place=place))
    chosen = {n: len(gone) for n, gone in (plan.removed if plan else {}).items() if gone and table.damage.get(n)}
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


def plotly_figure(table: Sensitivity, plan: PruningPlan | None = None) -> Any:
    """Return the figure as one of Plotly, for a notebook."""
    import plotly.graph_objects as go

    drawn: dict[str, Any] = _painted(specification(figure(table, plan)))
    return go.Figure(data=drawn["data"], layout=drawn["layout"])


def _painted(value: Any) -> Any:
    """Replace the names of colours, which a page has for each theme, by those of a print."""
    if isinstance(value, str) and value.startswith("$"):
        return RUNS[int(value.removeprefix("$run"))] if value.startswith("$run") else "#8a6a1f"
    if isinstance(value, dict):
        return {key: _painted(inner) for key, inner in value.items()}
    return [_painted(inner) for inner in value] if isinstance(value, list) else value


def require_drawable(path: Path) -> None:
    """Refuse a file that is no page and no picture.

    Raises:
        UsageError: If its name ends otherwise.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: the figure is a page or a picture; end its name in {', '.join(SUFFIXES)}.")


def draw_sensitivity(
    table: Sensitivity, path: Path, plan: PruningPlan | None = None, title: str = "Sensitivity"
) -> None:
    """Write the figure: an HTML page that needs no network, or a picture, drawn without a browser.

    Args:
        table: The table.
        path: ``.html``, ``.png`` or ``.svg``.
        plan: A plan whose widths are marked.
        title: Heading of the page.

    Raises:
        UsageError: If the file's name ends otherwise, or a picture is asked for without matplotlib.
    """
    require_drawable(path)
    drawn = figure(table, plan)
    if path.suffix in {".png", ".svg"}:
        with tempfile.TemporaryDirectory() as folder:
            made = {file.suffix: file.read_bytes() for file in draw([drawn], [], Path(folder))}
        write_atomic(path, made[path.suffix])
        return
    page = html.page(
        "sensitivity.html.j2",
        title=title,
        figure=drawn,
        css=html.asset("page.css"),
        js=html.asset("frame.js", "page.js"),
        plotly_js=Markup(plotly_js()),
        figures_json=html.script_json({"figures": {f"table-{drawn.id}": specification(drawn)}, "heat": {}}),
    )
    write_atomic(path, page.encode())
