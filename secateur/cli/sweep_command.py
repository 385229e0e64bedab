"""The command that searches over runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from secateur.cli import console, options, signals
from secateur.errors import RunError

if TYPE_CHECKING:
    from secateur.runfile.trials import Trials


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(sweep)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of a run, with a section search.")],
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Runs in all, over all workers; search.trials of the file, or 20, unless given."
        ),
    ] = None,
    sweep_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the sweep; sweeps/NAME of the file unless given.", show_default=False
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="SECATEUR_STORAGE",
            help="Database where workers meet: postgresql://USER:PASSWORD@HOST/DATABASE for any number of machines, or "
            "sqlite:///FILE; sweep.db in the sweep's folder unless given. The environment variable SECATEUR_STORAGE "
            "keeps a password out of the list of processes.",
            show_default=False,
            show_envvar=False,
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the sweep in the database; the folder's unless given.", show_default=False
        ),
    ] = None,
    heartbeat: Annotated[
        int,
        typer.Option(
            metavar="SECONDS", min=1, help="Time between signs of life; a worker silent for four of them is dead."
        ),
    ] = 30,
    retry: Annotated[bool, typer.Option("--retry", help="Try trials again that failed.")] = False,
    no_wait: Annotated[
        bool,
        typer.Option(
            "--no-wait", help="Leave when no trial is left to begin, even if other workers may die in theirs."
        ),
    ] = False,
    trust: options.Trust = False,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "info",
    as_json: options.Json = False,
) -> None:
    """Search over runs: values of the file's search are drawn, run, and judged by accuracy, MACs or latency.

    The same command, given again, is another worker of the sweep, on this machine or another, or goes on with it.
    """
    from secateur.cli.run_commands import RunInterruptedError
    from secateur.runfile import space
    from secateur.runfile.sweep import Sweep

    run = space.load(file)
    space.section(run, file)
    options.require_trusted(file, space.code_named(run), trust)
    folder = sweep_dir or Path("sweeps") / file.stem
    with console.running(as_json, quiet=quiet, level=log_level) as steps:
        worker = Sweep(run, folder, storage=storage, study=study, total=trials, heartbeat=heartbeat)
        try:
            found = worker.work(steps, retry=retry, wait=not no_wait)
        except (KeyboardInterrupt, signals.Stopped) as stop:
            raise RunInterruptedError(
                f"{str(stop) or 'interrupted'}; the trial under way is kept, and the same command goes on with it",
                getattr(stop, "status", 130),
            ) from None
    front = [trial.number for trial in found.front]
    if as_json:
        console.write_json({**found.model_dump(mode="json"), "front": front, "sweep_dir": str(folder)})
    else:
        _show(found, folder)
    if not front and not found.of("running"):
        failed = found.of("failed")
        raise RunError(
            f"sweep: no trial was completed; {len(failed)} failed"
            + (f", the last: {failed[-1].error}" if failed else ".")
        )


def _show(found: Trials, folder: Path) -> None:
    screen = console.output()
    front = found.front
    table = Table(show_edge=False, pad_edge=False, header_style="bold", title="Pareto front", title_justify="left")
    table.add_column("run")
    for name in found.objectives:
        table.add_column(name, justify="right")
    table.add_column("values", overflow="fold")
    for trial in front:
        values = [_written(name, value) for name, value in zip(found.objectives, trial.values or (), strict=True)]
        table.add_row(trial.run, *values, ", ".join(f"{key}={_short(v)}" for key, v in trial.parameters.items()))
    if front:
        screen.print(table)
    for trial in found.of("failed"):
        console.error_line(f"trial {trial.number} failed: {trial.error}", "warning")
    counts = {state: len(found.of(state)) for state in ("complete", "pruned", "failed", "running", "waiting")}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    screen.print(f"\n{len(found.trials)} of {found.total} trials: {said}; {len(front)} on the front", markup=False)
    screen.print(f"Report: secateur report {shlex.quote(str(folder))}", markup=False, soft_wrap=True)


def _written(objective: str, value: float) -> str:
    return f"{value:.2%}" if objective in ("accuracy", "latency") else console.quantity(value)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
