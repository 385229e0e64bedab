"""The report of a sweep: its front, what its values matter, its trials and the runs behind them."""

from __future__ import annotations

import json
import shlex
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from secateur.checkpoint.atomic import write_atomic, write_json
from secateur.errors import DataError, RunError, UsageError
from secateur.report import html
from secateur.report.figures import Figure, Format, Series, Table, Tone, percent
from secateur.report.naming import drawn as drawn_of
from secateur.report.page import plotly_js
from secateur.report.paper import draw
from secateur.report.plotly import specification
from secateur.report.reading import read_run
from secateur.runfile import space, trials
from secateur.runfile.search import SearchConfig
from secateur.runfile.trials import SWEEP_FILE, Trial, Trials

NAMES = {"accuracy": "validation accuracy", "macs": "MACs", "parameters": "parameters", "latency": "time left"}
"""Objective -> its name in figures."""
_FORMATS: dict[str, Format] = {
    "accuracy": "percent", "macs": "quantity", "parameters": "quantity", "latency": "percent"
}  # fmt: skip
LEAST = 4
"""Importances are told from so many complete trials on."""


@dataclass(frozen=True)
class SweepFiles:
    """What :func:`write_sweep_report` has written."""

    html: Path
    json: Path
    figures: list[Path]
    found: Trials


def write_sweep_report(folder: Path, output: Path | None = None, figures: Path | None = None) -> SweepFiles:
    """Write the report of a sweep, finished or not; nothing that its runs name is run.

    Args:
        folder: Of the sweep.
        output: The HTML file, ``report.html`` in the folder unless given; the JSON of the same numbers goes beside it.
        figures: Folder for every figure as PNG and SVG; default none.

    Raises:
        UsageError: If a file can't be written, or is no HTML.
        RunError: If no trial has been completed yet.
        DataError: If the sweep's files are damaged.
    """
    page_file = output or folder / "report.html"
    if page_file.suffix not in {".html", ".htm"}:
        raise UsageError(f"{page_file}: the report is an HTML file; end its name in .html.")
    run, found = space.load(folder / SWEEP_FILE), trials.read(folder)
    search = space.section(run, folder / SWEEP_FILE)
    if not found.of("complete"):
        raise RunError(f"{folder}: no trial of the sweep has been completed yet; there is nothing to draw.")
    weights = importances(search, found)
    drawn = [*fronts(found), *([importance_figure(weights)] if weights else [])]
    tables = {"front": front_table(found, folder), "trials": trials_table(found)}
    behind = " ".join(shlex.quote(str(folder / trial.run)) for trial in found.front)
    command = f"secateur report {behind}" + (
        f" --out {shlex.quote(str(folder / 'front.html'))}" if len(found.front) > 1 else ""
    )
    written = html.page(
        "sweep.html.j2",
        title=found.study,
        lead=sentence(found),
        figures=drawn,
        tables=tables,
        command=command,
        css=html.asset("page.css"),
        js=html.asset("frame.js", "page.js"),
        plotly_js=Markup(plotly_js()),
        figures_json=html.script_json({"figures": {f"sweep-{f.id}": specification(f) for f in drawn}, "heat": {}}),
    )
    numbers = {
        "format": 1,
        "sentence": sentence(found),
        **found.model_dump(mode="json"),
        "front": [trial.number for trial in found.front],
        "importances": weights,
        "figures": [asdict(figure) for figure in drawn],
        "tables": {name: asdict(table) for name, table in tables.items()},
    }
    write_atomic(page_file, written.encode())
    write_json(page_file.with_suffix(".json"), json.loads(json.dumps(html.finite(numbers))))
    return SweepFiles(page_file, page_file.with_suffix(".json"), _pictures(drawn, figures), found)


def _pictures(drawn: list[Figure], folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    with tempfile.TemporaryDirectory() as part:
        made = draw(drawn, [], Path(part))
        for file in made:
            write_atomic(folder / file.name, file.read_bytes())
    return [folder / file.name for file in made]


def sentence(found: Trials) -> str:
    """Say in a sentence what came of a sweep."""
    states = ("complete", "pruned", "failed", "running", "waiting")
    counts = [f"{count} {state}" for state in states if (count := len(found.of(state)))]
    front = found.front
    said = f"{len(found.trials)} of {found.total} trials: {', '.join(counts)}. "
    if len(found.objectives) == 1:
        best = front[0].values or (0.0,)
        value = Table(["value"], [[best[0]]], formats={"value": _FORMATS[found.objectives[0]]})
        return f"{said}The best is {front[0].run}, with {value.text([best[0]], 0)} {NAMES[found.objectives[0]]}."
    return f"{said}{len(front)} on the Pareto front: no other beats them in every objective."


def fronts(found: Trials) -> list[Figure]:
    """Draw the front: the first objective over each other one; of a single objective, its course over the trials."""
    if len(found.objectives) == 1:
        return [_course(found)]
    upright = "accuracy" if "accuracy" in found.objectives else found.objectives[0]
    best = {trial.number for trial in found.front}
    drawn = []
    for other in found.objectives:
        if other == upright:
            continue
        parts: dict[str, list[Trial]] = {"front": [], "beaten": []}
        for trial in found.of("complete"):
            parts["front" if trial.number in best else "beaten"].append(trial)
        series = []
        for name, own in parts.items():
            own.sort(key=lambda trial: _value(found, trial, other))
            if own:
                # Of three objectives, a front is a surface, along which no line leads.
                line = name == "front" and len(found.objectives) == 2
                series.append(
                    Series(
                        name,
                        [_value(found, trial, other) for trial in own],
                        [_value(found, trial, upright) for trial in own],
                        "line" if line else "points",
                        Tone.AFTER if name == "front" else Tone.BEFORE,
                        [_described(trial) for trial in own],
                    )
                )
        drawn.append(
            Figure(
                id=f"front-{other}",
                title=f"{NAMES[upright].capitalize()} against {NAMES[other]}",
                summary=f"{len(parts['front'])} of {len(found.of('complete'))} complete trials are beaten by no other.",
                x_label=NAMES[other],
                y_label=NAMES[upright],
                series=series,
                x_format=_FORMATS[other],
                y_format=_FORMATS[upright],
            )
        )
    return drawn


def _course(found: Trials) -> Figure:
    objective, own = found.objectives[0], found.of("complete")
    values = [_value(found, trial, objective) for trial in own]
    pick = max if objective == "accuracy" else min
    numbers = [trial.number for trial in own]
    return Figure(
        id="course",
        title=f"{NAMES[objective].capitalize()} over the trials",
        summary=f"{len(own)} complete trials; the best is that of {found.front[0].run}.",
        x_label="trial",
        y_label=NAMES[objective],
        series=[
            Series("a trial", numbers, values, "points", Tone.BEFORE, [_described(trial) for trial in own]),
            Series("best so far", numbers, [pick(values[: i + 1]) for i in range(len(values))], "line", Tone.AFTER),
        ],
        x_format="integer",
        y_format=_FORMATS[objective],
    )


def importances(search: SearchConfig, found: Trials) -> dict[str, dict[str, float]]:
    """Tell what part of each objective's variance each value explains, by Optuna's fANOVA.

    Returns:
        Objective -> key -> share, the largest first; empty where trials are fewer than :data:`LEAST`, or all alike.

    Raises:
        UsageError: If Optuna is not installed.
        DataError: If a trial is none of the space.
    """
    from secateur.runfile.storage import require

    require()
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import FrozenTrial

    own, kinds = found.of("complete"), space.distributions(search)
    if len(own) < LEAST:
        return {}
    weights: dict[str, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(directions=["minimize"] * len(found.objectives))
        for trial in own:
            try:
                made = optuna.create_trial(params=trial.parameters, distributions=dict(kinds), values=trial.values)
            except ValueError as error:
                raise DataError(f"trial {trial.number}: is none of the sweep's space: {error}") from error
            study.add_trial(made)
        for place, name in enumerate(found.objectives):
            if len({(trial.values or ())[place] for trial in own}) > 1:

                def value(trial: FrozenTrial, at: int = place) -> float:
                    return float(trial.values[at])

                explained = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0), target=value)
                weights[name] = {key: float(value) for key, value in explained.items()}
    return weights


def importance_figure(weights: dict[str, dict[str, float]]) -> Figure:
    """Draw importances: a row of bars a value, a bar an objective."""
    first = next(iter(weights.values()))
    keys = list(first)
    return Figure(
        id="importances",
        title="What matters",
        summary="; ".join(
            f"{NAMES[name]} hangs most on {next(iter(own))}, {percent(next(iter(own.values())), 0)} of its variance"
            for name, own in weights.items()
        )
        + ".",
        x_label="value",
        y_label="share of the variance explained",
        series=[
            Series(NAMES[name], keys, [own.get(key) for key in keys], "bar", Tone.RUN, place=place)
            for place, (name, own) in enumerate(weights.items())
        ],
        x_scale="category",
        y_format="percent",
        source="Hutter et al. 2014, fANOVA",
    )


def front_table(found: Trials, folder: Path) -> Table:
    """Tabulate the trials of the front, with what the runs behind them say where their folders are here."""
    names = [NAMES[name] for name in found.objectives]
    rows: list[list[Any]] = []
    for trial in found.front:
        behind: list[Any] = [None, None, None]
        if (folder / trial.run / "result.json").is_file():
            run = read_run(folder / trial.run)
            before, after = run.result.baseline, run.result.final
            behind = [
                after.macs / before.macs if before.macs else None,
                after.parameters / before.parameters if before.parameters else None,
                100 * (after.validation - before.validation)
                if after.validation is not None and before.validation is not None
                else None,
            ]
        rows.append([trial.run, *(trial.values or ()), *behind, drawn_of(trial.parameters)])
    formats = {NAMES[name]: _FORMATS[name] for name in found.objectives}
    return Table(
        ["Run", *names, "MACs left", "Parameters left", "Points gained", "Values"],
        rows,
        "The trials of the Pareto front and their runs",
        {**formats, "MACs left": "percent", "Parameters left": "percent"},
    )


def trials_table(found: Trials) -> Table:
    """Tabulate all trials."""
    keys = list(dict.fromkeys(key for trial in found.trials for key in trial.parameters))
    best = {trial.number for trial in found.front}
    none: list[Any] = [None] * len(found.objectives)
    rows: list[list[Any]] = [
        [
            trial.run,
            "on the front" if trial.number in best else trial.state,
            *(trial.values or none),
            *(_cell(trial.parameters.get(key)) for key in keys),
            trial.attempts,
            trial.seconds,
            trial.error or "",
        ]
        for trial in found.trials
    ]
    names = [NAMES[name] for name in found.objectives]
    return Table(
        ["Run", "State", *names, *keys, "Attempts", "Seconds", "Note"],
        rows,
        "All trials",
        {NAMES[name]: _FORMATS[name] for name in found.objectives},
    )


def _value(found: Trials, trial: Trial, objective: str) -> float:
    values: Sequence[float] = trial.values or ()
    return values[found.objectives.index(objective)]  # type: ignore[arg-type]


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, (bool, list, dict)) else value


def _described(trial: Trial) -> str:
    return f"{trial.run}: {drawn_of(trial.parameters)}"
