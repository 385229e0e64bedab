"""The figure of a table of sensitivity: a curve a group, by harm, and where a plan has cut."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from secateur.checkpoint.atomic import write_atomic
from secateur.errors import UsageError
from secateur.report import html
from secateur.report.curves import curves
from secateur.report.figures import Figure
from secateur.report.page import plotly_js
from secateur.report.paper import RUNS, draw
from secateur.report.plotly import specification

if TYPE_CHECKING:
    from secateur.compensation.sensitivity import Sensitivity
    from secateur.graph.plan import PruningPlan

SUFFIXES = (".html", ".htm", ".png", ".svg")


def figure(table: Sensitivity, plan: PruningPlan | None = None) -> Figure:
    """Draw the table; with a plan, the widths that it leaves are marked."""
    return curves(table, {name: len(gone) for name, gone in (plan.removed if plan else {}).items()})


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
