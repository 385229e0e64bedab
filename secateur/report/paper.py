"""The figures of a report as PNG and SVG, sized for a paper's column, drawn without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import UsageError, install
from secateur.report.figures import Figure, HeatMap, Series, Tone, byte_size, percent, quantity, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMN = 3.4
"""Width of a column of a two-column paper, inches."""
LEGEND = 24
"""Most names in a column of a legend; a legend of more than half as many stands beside the figure."""

_COLOURS = {
    Tone.BEFORE: "#94a39a",
    Tone.AFTER: "#15803d",
    Tone.BEFORE_COMPUTED: "#94a39a",
    Tone.AFTER_COMPUTED: "#15803d",
    Tone.REVERTED: "#c2410c",
    Tone.LIMIT: "#8a6a1f",
}
RUNS = ("#15803d", "#2563ad", "#b4540a", "#7c3aad", "#0e7c86", "#b0275e")
_MARKERS = ("o", "s", "D", "^", "P", "*")
_DASHES = ("-", "--", ":", "-.")


def draw(figures: list[Figure], heat_maps: list[HeatMap], folder: Path) -> list[Path]:
    """Draw every figure as PNG (300 dpi) and SVG.

    Args:
        figures: Charts.
        heat_maps: Heat maps of |ρ|, one file a layer.
        folder: Where to write; it exists.

    Returns:
        The files written.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UsageError(f"Figures for papers need matplotlib: {install('figures')}.") from error
    style: dict[Any, Any] = {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "secateur",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e3e7e3",
        "legend.frameon": False,
    }
    written = []
    with rc_context(style):
        for figure in figures:
            many = figure.x_scale == "category" and len(figure.series[0].x) > 12
            beside = -(-len(figure.series) // LEGEND) if len(figure.series) > LEGEND // 2 else 0
            size = (COLUMN * (2.1 if many or beside else 1) + max(0, beside - 1), 3.6 if beside else 2.4)
            canvas = Canvas(figsize=size, layout="constrained")
            FigureCanvasAgg(canvas)
            _chart(figure, canvas.add_subplot(), beside)
            written += _saved(canvas, folder, figure.id, figure.title)
        for heat_map in heat_maps:
            sides = [heat_map.before] + ([heat_map.after] if heat_map.after is not None else [])
            canvas = Canvas(figsize=(COLUMN * 0.9 * len(sides), 2.6), layout="constrained")
            FigureCanvasAgg(canvas)
            image, axes = None, canvas.subplots(1, len(sides), squeeze=False)[0]
            for axis, side, title in zip(axes, sides, ("original", "pruned"), strict=False):
                extent = (0, len(side) * heat_map.cell, len(side) * heat_map.cell, 0)
                image = axis.imshow(side, vmin=0, vmax=1, cmap="Greens", extent=extent, interpolation="nearest")
                axis.set(title=title, xlabel="filter", ylabel="filter")
                axis.grid(visible=False)
            if image is not None:
                canvas.colorbar(image, ax=list(axes), label="|ρ|", shrink=0.8)
            written += _saved(canvas, folder, f"correlation-{heat_map.module.replace('/', '_')}", heat_map.summary)
    return written


def _saved(canvas: Any, folder: Path, name: str, title: str) -> list[Path]:
    files = [folder / f"{name}.svg", folder / f"{name}.png"]
    canvas.savefig(files[0], metadata={"Date": None, "Title": title})
    canvas.savefig(files[1], dpi=300, metadata={"Title": title})
    return files


def _chart(figure: Figure, axes: Axes, beside: int) -> None:
    """Draw a figure; its legend stands beside it, in so many columns, or inside where that is 0."""
    if figure.x_scale == "category":
        _bars(figure, axes)
    else:
        axes.set_xscale(figure.x_scale)
        for series in figure.series:
            _points(series, axes)
        axes.set_xlabel(figure.x_label)
        writers = {"percent": lambda x, _: percent(x, 0), "integer": lambda x, _: f"{x:g}"}
        if figure.x_format in writers:
            axes.xaxis.set_major_formatter(writers[figure.x_format])
        if figure.x_scale == "log":
            axes.set_xticks(sorted({float(x) for s in figure.series for x in s.x}), minor=False)
            axes.set_xticks([], minor=True)
    axes.set_yscale(figure.y_scale)
    axes.set_ylabel(figure.y_label)
    if figure.x_range is not None:
        axes.set_xlim(*figure.x_range)
    if figure.y_range is not None:
        axes.set_ylim(*figure.y_range)
    write: dict[str, Any] = {
        "percent": lambda y, _: f"{significant(100 * y)}%",
        "metric": lambda y, _: percent(y),
        "quantity": lambda y, _: quantity(y),
        "bytes": lambda y, _: byte_size(y),
    }
    if figure.y_format in write:
        axes.yaxis.set_major_formatter(write[figure.y_format])
    if beside:
        axes.legend(fontsize=5, ncols=beside, loc="upper left", bbox_to_anchor=(1, 1))
    elif len(figure.series) > 1:
        axes.legend(fontsize=6.5)


def _bars(figure: Figure, axes: Axes) -> None:
    names = [str(x) for x in figure.series[0].x]
    width = 0.8 / len(figure.series)
    for i, series in enumerate(figure.series):
        heights = [0.0 if y is None else y for y in series.y]
        places = [j - 0.4 + (i + 0.5) * width for j in range(len(names))]
        axes.bar(places, heights, width * 0.94, label=series.name, color=_colour(series))
    axes.set_xticks(
        range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=5 if len(names) > 30 else 7
    )
    axes.grid(visible=False, axis="x")


def _points(series: Series, axes: Axes) -> None:
    x, y = [float(v) for v in series.x], [float("nan") if v is None else float(v) for v in series.y]
    computed = series.tone in (Tone.BEFORE_COMPUTED, Tone.AFTER_COMPUTED)
    marker = "x" if series.tone is Tone.REVERTED else _MARKERS[series.place % len(_MARKERS)]
    line = ":" if computed else "--" if series.kind == "rule" else _DASHES[series.place % len(_DASHES)]
    axes.errorbar(
        x,
        y,
        yerr=series.error or None,
        label=series.name,
        color=_colour(series),
        linestyle="none" if series.kind == "points" else line,
        marker="" if series.kind == "rule" else marker,
        markersize=4,
        linewidth=1.2,
        fillstyle="none" if computed or series.tone is Tone.TRIAL else "full",
    )


def _colour(series: Series) -> str:
    return _COLOURS.get(series.tone, RUNS[series.place % len(RUNS)])
