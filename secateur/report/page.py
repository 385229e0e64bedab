"""Runs as one HTML page that holds everything it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from secateur.errors import UsageError
from secateur.report import html
from secateur.report.charts import comparison, pareto_front, score, share_left
from secateur.report.figures import Figure, HeatMap, Table
from secateur.report.plotly import heat_map_data, specification
from secateur.report.reading import Run, Swept
from secateur.report.summary import (
    Headline,
    details,
    exactness,
    headline,
    refusals,
    rounds,
    sentence,
    settings,
    side_by_side,
    speeds,
    widths,
)


@dataclass(frozen=True)
class _Section:
    """A table under a heading."""

    id: str
    title: str
    table: Table
    lead: str = ""
    command: str = ""


@dataclass(frozen=True)
class _RunView:
    """One run as the template shows it."""

    id: str
    name: str
    eyebrow: str
    sentence: str
    exact: str
    exact_class: str
    badges: list[str]
    headline: list[Headline]
    figures: list[Figure]
    heat_maps: list[HeatMap]
    heat_table: Table
    wide: set[str]
    """Figures that take a whole row of the page."""
    tables: list[_Section]

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Anchors and labels for the page's navigation."""
        return [(f"{self.id}-figures", "Figures"), *((s.id, s.title) for s in self.tables)]


def render(
    runs: Sequence[Run],
    figures: Sequence[Sequence[Figure]],
    heat_maps: Sequence[Sequence[HeatMap]],
    sweeps: Sequence[Swept] = (),
) -> str:
    """Write the page.

    Args:
        runs: The runs, at least one, or trials of a sweep.
        figures: The figures of each run.
        heat_maps: The heat maps of each run.
        sweeps: Sweeps whose trials stand beside the runs, without details of their own.

    Returns:
        HTML with its style, its scripts and its numbers inside; it loads nothing from the internet.

    Raises:
        UsageError: If Plotly, whose JavaScript the page carries, is not installed.
    """
    views = [
        _view(i, run, list(fs), list(maps))
        for i, (run, fs, maps) in enumerate(zip(runs, figures, heat_maps, strict=True))
    ]
    everything = [*runs, *(run for sweep in sweeps for run in sweep.runs)]
    several = len(runs) > 1 or bool(sweeps)
    compared = comparison(runs, sweeps) if several else []
    store = {
        "figures": {
            **{f"compare-{f.id}": specification(f) for f in compared},
            **{f"{view.id}-{f.id}": specification(f) for view in views for f in view.figures},
        },
        "heat": {view.id: [heat_map_data(m) for m in view.heat_maps] for view in views},
    }
    return html.page(
        "page.html.j2",
        title=_side_by_side(runs, sweeps) if several else runs[0].name,
        runs=views,
        several=several,
        comparison={"table": side_by_side(everything), "figures": compared, "lead": _lead(everything, sweeps)},
        css=html.asset("page.css"),
        js=html.asset("frame.js", "page.js"),
        plotly_js=Markup(plotly_js()),
        figures_json=html.script_json(store),
    )


def _view(index: int, run: Run, figures: list[Figure], heat_maps: list[HeatMap]) -> _RunView:
    prefix = f"run{index}"
    text, good = exactness(run)
    accepted = sum(e.accepted for e in run.history)
    badges = [f"{accepted} round{'s' if accepted != 1 else ''} accepted, {len(run.history) - accepted} reverted"]
    if isinstance(run.config.get("seed"), int):
        badges.append(f"seed {run.config['seed']}")
    seconds = sum(e.seconds or 0 for e in run.history)
    if seconds:
        badges.append(f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s")
    refused = refusals(run)
    tables = [_Section(f"{prefix}-widths", "Widths", widths(run))]
    measured = speeds(run)
    if measured is not None:
        tables.insert(0, _Section(f"{prefix}-speed", "Speed", measured, "Theoretical is the ratio of MACs."))
    detailed = details(run)
    if detailed is not None:
        tables.insert(0, _Section(f"{prefix}-details", "In detail", detailed))
    tables += [
        _Section(f"{prefix}-rounds", "Rounds", rounds(run)),
        _Section(
            f"{prefix}-refused",
            "Left alone",
            refused,
            "Parts of the network whose channels cannot be removed exactly are refused, not guessed at."
            if refused.rows
            else "Nothing was refused: every channel of the network could be pruned.",
        ),
        _Section(f"{prefix}-settings", "To reproduce", settings(run), command=_command(run)),
    ]
    return _RunView(
        id=prefix,
        name=run.name,
        eyebrow=_eyebrow(run),
        sentence=sentence(run),
        exact=text,
        exact_class={True: "good", False: "bad", None: ""}[good],
        badges=badges,
        headline=headline(run),
        figures=sorted(figures, key=_many_layers),
        heat_maps=heat_maps,
        heat_table=_heat_table(heat_maps),
        wide=_wide(figures),
        tables=tables,
    )


def _wide(figures: Sequence[Figure]) -> set[str]:
    """Figures of many layers, and the first of the others where their number is odd."""
    wide = {f.id for f in figures if _many_layers(f)}
    narrow = [f.id for f in figures if f.id not in wide]
    return wide | set(narrow[:1] if len(narrow) % 2 else [])


def _many_layers(figure: Figure) -> bool:
    return len(figure.series) > 12 or (figure.x_scale == "category" and len(figure.series[0].x) > 12)


def _command(run: Run) -> str:
    """The command that repeats the run, where a command started it."""
    file = run.path / "run.yaml"
    return (
        f"secateur compress --config {file} --run-dir NEW_DIR" if file.is_file() else str(run.config.get("command", ""))
    )


def _eyebrow(run: Run) -> str:
    data = run.config.get("data")
    return f"Pruning report · {data}" if isinstance(data, str) else "Pruning report"


def _heat_table(heat_maps: Sequence[HeatMap]) -> Table:
    columns = ["Layer", "Filters before", "Filters after", "Largest |ρ| before", "Largest |ρ| after"]
    rows = [[m.module, m.filters_before, m.filters_after, m.max_before, m.max_after] for m in heat_maps]
    return Table(columns, rows, "Correlation of the filters of every layer")


def _side_by_side(runs: Sequence[Run], sweeps: Sequence[Swept]) -> str:
    """Count what is compared."""
    counts = (len(runs), "run"), (len(sweeps), "sweep")
    words = [f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts if count]
    return f"{' and '.join(words)} side by side"


def _lead(runs: Sequence[Run], sweeps: Sequence[Swept]) -> str:
    """Say how many are on the front, and which trials are not in the comparison."""
    front = pareto_front([(share_left(run), score(run.result.final)) for run in runs])
    if len(front) == len(runs):
        said = "No run beats another: each keeps more of the metric or removes more MACs."
    else:
        said = f"{len(front)} of {len(runs)} on the Pareto front: no run beats them both in metric and in MACs removed."
    for sweep in sweeps:
        if sweep.away:
            said += f" Of {sweep.name}, {sweep.away} complete trials are left out, whose runs are not in its folder."
    return said


def plotly_js() -> str:
    """Return Plotly's own script, as it can stand inside a script element.

    Raises:
        UsageError: If Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UsageError("The HTML report needs Plotly: pip install plotly.") from error
    # A literal end tag inside a string of the script would close the element.
    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")
