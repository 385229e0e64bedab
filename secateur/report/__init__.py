"""The report of a run: one HTML page that carries everything, its numbers as JSON, its figures for a paper.

:func:`draw_graph` draws the coupling of a network's channels as such a page, :func:`draw_sensitivity` a table of what
each group loses, :func:`write_sweep_report` the front of a sweep.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.report.charts import charts, comparison
from secateur.report.correlation import heat_maps
from secateur.report.figures import Figure, HeatMap
from secateur.report.graph_page import draw_graph
from secateur.report.html import finite
from secateur.report.page import render
from secateur.report.reading import Run, Swept, named_apart, read_run, read_trials
from secateur.report.sensitivity import draw_sensitivity
from secateur.report.summary import (
    details,
    headline,
    refusals,
    rounds,
    sentence,
    settings,
    side_by_side,
    speeds,
    widths,
)
from secateur.report.sweep import write_sweep_report
from secateur.runfile.trials import SWEEP_FILE

__all__ = ["ReportFiles", "draw_graph", "draw_sensitivity", "read_run", "write_report", "write_sweep_report"]

HEAT_MAPS = 24
"""The most heat maps a page carries, over all its runs, which keeps the file under 6 MB."""


@dataclass(frozen=True)
class ReportFiles:
    """What :func:`write_report` has written."""

    html: Path
    json: Path
    figures: list[Path] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    sweeps: list[Swept] = field(default_factory=list)


def write_report(
    run_dirs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    figures: str | Path | None = None,
    layers: list[str] | None = None,
) -> ReportFiles:
    """Write the report of one run, or of several side by side, trials of sweeps among them.

    Args:
        run_dirs: Directory of a finished run, or several; those of sweeps add all their trials to the comparison. What
            is named twice, or is a trial of a sweep that is named, too, is in it once.
        output: The HTML file; the JSON of the same numbers goes beside it, and a missing folder is made. Default
            ``report.html`` in the directory of a single run, or in the working directory for several.
        figures: Folder for every figure as PNG and SVG; default none.
        layers: Layers whose correlation heat maps to draw; default all, or 24 spread over the depth.

    Returns:
        The files, and the runs as read.

    Raises:
        UsageError: If there is no run, a directory is not a run, or a target can't be written.
        RunError: If a run has not finished.
        DataError: If a run's files are damaged, or ``layers`` names a layer that is not there.
    """
    given = [Path(run_dirs)] if isinstance(run_dirs, str | Path) else [Path(folder) for folder in run_dirs]
    if not given:
        raise UsageError("No run directory given: name at least one that `secateur compress` wrote.")
    folders = list({folder.resolve(): folder for folder in given}.values())
    swept = [folder for folder in folders if (folder / SWEEP_FILE).is_file()]
    runs = named_apart([read_run(folder) for folder in folders if folder not in swept])
    sweeps = [read_trials(folder, [run.path for run in runs]) for folder in swept]
    everything = [*runs, *(run for sweep in sweeps for run in sweep.runs)]
    if not everything:
        raise UsageError(f"{swept[0]}: no run of its trials is in its folder; give runs beside it.")
    metrics = sorted({run.result.metric for run in everything})
    if len(metrics) > 1:
        raise UsageError(
            f"The runs measure different things ({', '.join(metrics)}); report those of one metric at a time."
        )
    drawn = [charts(run) for run in runs]
    maps = [_heat_maps(run, layers, max(2, HEAT_MAPS // len(runs))) for run in runs]
    html = (
        Path(output)
        if output is not None
        else runs[0].path / "report.html"
        if len(runs) == 1 and not sweeps
        else Path("report.html")
    )
    if html.suffix not in {".html", ".htm"}:
        raise UsageError(f"{html}: the report is an HTML file; end its name in .html.")
    page, numbers = render(runs, drawn, maps, sweeps), _numbers(runs, drawn, maps, sweeps)
    json_path = html.with_suffix(".json")
    with _replacing(html) as html_part, _replacing(json_path) as json_part:
        html_part.write_text(page, encoding="utf-8")
        json_part.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        images = _write_figures(Path(figures), runs, drawn, maps, sweeps) if figures is not None else []
    return ReportFiles(html, json_path, images, runs, sweeps)


def _heat_maps(run: Run, layers: list[str] | None, limit: int) -> list[HeatMap]:
    before, after = run.path / "baseline.safetensors", run.path / "model.safetensors"
    if not before.is_file():
        return []
    return heat_maps(before, after if after.is_file() else None, layers, limit)


def _numbers(
    runs: Sequence[Run], figures: Sequence[list[Figure]], maps: Sequence[list[HeatMap]], sweeps: Sequence[Swept]
) -> dict[str, Any]:
    """Everything the page shows, as JSON."""
    content = [
        {
            "name": run.name,
            "directory": str(run.path),
            "sentence": sentence(run),
            "headline": [asdict(item) for item in headline(run)],
            "figures": [asdict(f) for f in fs],
            "correlation": [asdict(m) for m in ms],
            "widths": asdict(widths(run)),
            "details": asdict(found) if (found := details(run)) else None,
            "rounds": asdict(rounds(run)),
            "refused": asdict(refusals(run)),
            "settings": asdict(settings(run)),
            "verification": run.result.verification,
            "speed": asdict(table) if (table := speeds(run)) else None,
        }
        for run, fs, ms in zip(runs, figures, maps, strict=True)
    ]
    compared = None
    if len(runs) > 1 or sweeps:
        everything = [*runs, *(run for sweep in sweeps for run in sweep.runs)]
        compared = {
            "table": asdict(side_by_side(everything)),
            "figures": [asdict(f) for f in comparison(runs, sweeps)],
            "sweeps": [{"name": s.name, "directory": str(s.path), "trials_away": s.away} for s in sweeps],
        }
    result: dict[str, Any] = finite({"format": 1, "runs": content, "comparison": compared})
    return result


def _write_figures(
    folder: Path,
    runs: Sequence[Run],
    figures: Sequence[list[Figure]],
    maps: Sequence[list[HeatMap]],
    sweeps: Sequence[Swept],
) -> list[Path]:
    """Draw into a folder beside the target, then move every file into place, so that none is half-drawn."""
    from secateur.report.paper import draw

    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".figures-", dir=folder))
    except OSError as error:
        raise UsageError(
            f"{folder}: figures can't be written here ({error.strerror}). Choose another folder."
        ) from error
    written: list[Path] = []
    several = len(runs) > 1 or bool(sweeps)
    try:
        for i, (fs, ms) in enumerate(zip(figures, maps, strict=True)):
            inner = part / (f"run{i}" if several else "")
            inner.mkdir(exist_ok=True)
            written += draw(fs, ms, inner)
        if several:
            written += draw(comparison(runs, sweeps), [], part)
        for i, file in enumerate(written):
            target = folder / file.relative_to(part)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
            written[i] = target
    except OSError as error:
        raise UsageError(f"{folder}: figures can't be written here ({error.strerror}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return written


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside ``path``, which replaces ``path`` if the block succeeds and is deleted if not."""
    if path.is_dir():
        raise UsageError(f"{path}: can't be written (it is a directory). Choose another target.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror}). Choose another target.") from error
    part = Path(name)
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror}). Choose another target.") from error
    finally:
        part.unlink(missing_ok=True)
