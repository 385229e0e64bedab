"""The command that measures what each group loses at several widths."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import console, options, signals
from secateur.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(sensitivity)


def sensitivity(
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    model_option: options.ModelOptions = None,
    weights: options.Weights = None,
    data: options.Data = None,
    data_option: options.DataOptions = None,
    input_shape: options.InputShapes = None,
    images: Annotated[
        int, typer.Option(metavar="N", min=1, help="Training images to measure on, rounded up to whole batches.")
    ] = 512,
    levels: Annotated[int, typer.Option(metavar="N", min=1, help="Widths of each group that are measured.")] = 8,
    loss: Annotated[
        bool,
        typer.Option(
            "--loss",
            help="Measure by how much the loss on the labels rises, not by how far outputs are from what they were.",
        ),
    ] = False,
    inexact: Annotated[
        bool,
        typer.Option("--inexact", help="Measure also groups whose removal can't equal zeroing (layer norm, softmax)."),
    ] = False,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that share the work, each on one thread.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of fresh weights and of which images are taken.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            *options.OUT,
            metavar="FILE",
            help="Write the table here as JSON, as it grows; an interrupted one is gone on with. "
            "'secateur prune --allocation FILE' takes it.",
            show_default=False,
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw a curve a group: an HTML page, or a PNG or SVG picture."),
    ] = None,
    pruned: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A network that Secateur has pruned once from this one; its widths are marked."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure what each group of channels loses at several widths, on unlabelled images; prune takes the table."""
    with console.running(as_json) as steps:
        import secateur as sc
        from secateur.cli.run_commands import RunInterruptedError
        from secateur.report.sensitivity import draw_sensitivity, require_drawable
        from secateur.runfile import sources, suspicions
        from secateur.training import tasks

        if data is None:
            raise UsageError("sensitivity: outputs are compared on images; give --data, e.g. --data digits.")
        if pruned is not None and figure is None:
            raise UsageError("sensitivity: --pruned marks widths in a figure; give --figure, too.")
        for file in (output, figure):
            if file is not None:
                sources.writable(file)
        if figure is not None:
            require_drawable(figure)
        plan = None if pruned is None else _only_plan(pruned)
        with steps.step("loading the data"):
            bundle = sources.data(data, options.values("--data-option", data_option))
        with steps.step("building the model"):
            sources.seed(seed)
            found = sources.open_model(
                options.one(model, model_flag),
                options.values("--model-option", model_option),
                weights,
                input_shape or (),
                bundle,
            )
            bundle = found.data or bundle
        suspicions.of_fresh_weights(found, weights, "sensitivity")
        with steps.step("tracing"):
            graph = sc.trace(found.model, found.inputs)
        started = time.perf_counter()
        try:
            table = sc.sensitivity(
                found.model,
                graph,
                tasks.sample(bundle, -(-images // tasks.SAMPLE_BATCH[bundle.task]), seed),
                levels=levels,
                loss=_loss(bundle) if loss else None,
                inexact=inexact,
                path=output,
                workers=workers,
                progress=lambda done, of: steps("measuring sensitivity", done, of),
            )
        except (KeyboardInterrupt, signals.Stopped) as stop:
            if output is None or not output.exists():
                raise
            raise RunInterruptedError(
                f"{str(stop) or 'interrupted'}; {output} is kept, and the same command goes on with it",
                getattr(stop, "status", 130),
            ) from None
        seconds = time.perf_counter() - started
        if output is not None:
            table.save(output)
        if figure is not None:
            with steps.step("drawing"):
                draw_sensitivity(table, figure, plan, title=f"Sensitivity of {found.name}")
    files = {name: None if file is None else str(file) for name, file in (("file", output), ("figure", figure))}
    if as_json:
        console.write_json({"model": found.name, "seconds": seconds, **table.to_dict(), **files})
    else:
        console.show_sensitivity(table, found.name, seconds, files)


def _loss(bundle: Any) -> Any:
    """Return the loss of the data's task."""
    from torch import nn

    from secateur.training import tasks

    return tasks.loss(bundle) or nn.functional.cross_entropy


def _only_plan(file: Path) -> Any:
    """Return the plan of a file that holds one."""
    from secateur.checkpoint import read_header

    plans = read_header(file).plans
    if len(plans) != 1:
        raise UsageError(f"{file}: holds {len(plans)} plans; the widths of one that was pruned once can be marked.")
    return plans[0]
