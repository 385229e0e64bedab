"""The commands of a run: compress, resume, and evaluate, which measures a network that a run begins with or makes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from secateur.cli import console, options, signals
from secateur.errors import SecateurError, UsageError
from secateur.pruning.options import AUTO
from secateur.training.launched import process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from secateur.engine import CompressResult
    from secateur.runfile.config import RunConfig


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(cls=options.NamingCriteria)(compress)
    app.command()(resume)
    app.command()(evaluate)


def compress(
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML file of the run; options given beside it go before it."),
    ] = None,
    model_option: options.ModelOptions = None,
    weights: options.Weights = None,
    data: options.Data = None,
    data_option: options.DataOptions = None,
    input_shape: options.InputShapes = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"What chooses the channels: auto; {options.CRITERIA}; or a criterion of yours, "
            "path/to/file.py:FUNCTION or package.module:FUNCTION. Unless given: auto, which measures what each group's "
            "loss costs, refits what stands behind, and fine-tunes by distillation.",
        ),
    ] = None,
    compensate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Adjust the kept filters before any fine-tuning: merge, least_squares, bn; several with commas; none. "
            "Unless given: least_squares for auto.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Points of accuracy, or of mAP, that may be lost on the validation set; 0.5 unless given. Unused with "
            "a target.",
        ),
    ] = None,
    macs: options.Macs = None,
    params: options.Params = None,
    channels: options.Channels = None,
    memory: options.Memory = None,
    latency: options.Latency = None,
    batch: options.BatchOfCosts = None,
    runtime: options.Runtime = None,
    threads: options.Threads = None,
    ratio: options.Ratios = None,
    skip: options.Skip = None,
    round_to: options.RoundTo = None,
    min_channels: options.MinChannels = None,
    max_ratio: options.MaxRatios = None,
    allocation: options.Allocation = None,
    inexact: options.Inexact = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Setting of the method, e.g. final_epochs=4 (of auto to a target; finetune_epochs=4 of rounds before "
            "the last, and of other methods); repeatable; 'secateur config --schema' lists them.",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="How to train the network first, where no weights are given, e.g. epochs=20; repeatable.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Images a training step; 128 unless given, 8 where they have boxes.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="RATE", help="Learning rate of fine-tuning; as --set lr=RATE.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Epochs of fine-tuning: of auto to a target those after its last round (--set final_epochs=N), else "
            "those of every round (--set finetune_epochs=N).",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; as --set device=NAME.")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Processes that read image files; one a core unless given.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of everything that is drawn; 0 unless given.")
    ] = None,
    run_dir: options.RunDir = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run where it has begun already: one command for a queue."),
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Time a few steps with fresh weights, say how long the run would take here and what bounds it, and "
            "write nothing.",
        ),
    ] = False,
    trust: options.Trust = False,
    track: options.Track = None,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "info",
    as_json: options.Json = False,
) -> None:
    """Prune and fine-tune a trained network round by round, as far as its accuracy allows or to a target."""
    from secateur.runfile import config, configured_run

    limits = options.planning(
        ratio=ratio, skip=skip, max_ratio=max_ratio, round_to=round_to, min_channels=min_channels,
        allocation=allocation, inexact=inexact,
    )  # fmt: skip
    chosen_settings = options.values("--set", settings)
    if compensate is not None:
        chosen_settings["compensate"] = [] if compensate == "none" else compensate
    chosen_settings |= {key: value for key, value in (("lr", lr), ("device", device)) if value is not None}
    given = {
        "model": options.one(model, model_flag) if config_file is None or model or model_flag else None,
        "model_options": options.values("--model-option", model_option),
        "weights": weights,
        "data": data,
        "data_options": options.values("--data-option", data_option),
        "input": input_shape,
        "method": method,
        "tolerance": tolerance,
        "target": options.target(
            macs, params, channels, memory, latency, batch=batch, runtime=runtime, threads=threads
        ),
        "settings": chosen_settings,
        "baseline": options.values("--baseline", baseline),
        "batch_size": batch_size,
        "workers": workers,
        "seed": seed,
        "run_dir": None if run_dir is None else str(run_dir),
        "track": track,
        **limits,
    }
    chosen = {name: value for name, value in given.items() if value not in (None, {}, [])}
    configured = config.build(chosen) if config_file is None else config.load(config_file, chosen)
    if configured.search is not None:
        raise UsageError(f"{config_file}: search: is for 'secateur sweep'; compress makes one run, without it.")
    if epochs is not None:
        name = "final_epochs" if configured.method == AUTO and configured.target is not None else "finetune_epochs"
        configured = config.changed(configured, {"settings": {name: epochs}})
    if config_file is not None:
        options.require_trust(config_file, configured, trust, chosen)
    if estimate:
        _show_estimate(configured, as_json, quiet)
        return
    with console.running(as_json, quiet=quiet, level=log_level) as steps:
        grounded = configured_run.grounded(configured)
        with _resumable(grounded.run_dir or ""):
            values = _values(lambda: configured_run.start(grounded, steps, go_on_with=resume), grounded.run_dir)
    _show_run(values, as_json)


def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the interrupted run.")],
    trust: options.Trust = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting from here on, e.g. lr=0.001; repeatable."),
    ] = None,
    tolerance: Annotated[float | None, typer.Option(metavar="POINTS", help="Another tolerance from here on.")] = None,
    macs: options.Macs = None,
    params: options.Params = None,
    channels: options.Channels = None,
    track: options.Track = None,
    quiet: options.Quiet = False,
    log_level: options.LogLevel = "info",
    as_json: options.Json = False,
) -> None:
    """Go on with a run that was interrupted, from its last whole epoch.

    So does one that an error ended. Other settings hold from the beginning of the round under way, and are recorded.
    """
    options.require_trust_of_run(run_dir, trust)
    with console.running(as_json, quiet=quiet, level=log_level) as steps:
        from secateur.runfile import configured_run

        given = {
            "settings": options.values("--set", settings),
            "tolerance": tolerance,
            "target": options.target(macs, params, channels),
            "track": track,
        }
        changes = {name: value for name, value in given.items() if value not in (None, {}, [])}
        with _resumable(run_dir):
            values = _values(lambda: configured_run.go_on(run_dir, steps, changes), run_dir)
    _show_run(values, as_json)


def evaluate(
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    model_option: options.ModelOptions = None,
    weights: options.Weights = None,
    data: options.Data = None,
    data_option: options.DataOptions = None,
    input_shape: options.InputShapes = None,
    split: Annotated[Literal["test", "validation"], typer.Option(help="Part of the data to measure on.")] = "test",
    as_json: options.Json = False,
) -> None:
    """Measure a network, pruned or not: accuracy, or mAP of a detector, mIoU of masks; MACs, parameters."""
    with console.running(as_json) as steps:
        import secateur as sc
        from secateur.runfile import sources, suspicions
        from secateur.training import evaluation, tasks

        if data is None:
            raise UsageError("evaluate: --data is missing; name what to measure on, e.g. --data digits.")
        with steps.step("loading the data"):
            bundle = sources.data(data, options.values("--data-option", data_option))
        metric = evaluation.chosen(tasks.metric(bundle))
        with steps.step("building the model"):
            found = sources.open_model(
                options.one(model, model_flag),
                options.values("--model-option", model_option),
                weights,
                input_shape or (),
                bundle,
            )
            bundle = found.data or bundle
        with steps.step("evaluating"):
            value = evaluation.evaluate(found.model, tasks.evaluation_batches(bundle, split), metric)
        suspicions.of_fresh_weights(found, weights, "evaluate")
        suspicions.of_classes(found, bundle)
        graph = sc.trace(found.model, found.inputs)
    values = {
        "model": found.name,
        "weights": weights,
        "data": data,
        "split": split,
        "examples": len(getattr(bundle, split)),
        evaluation.metric_name(metric): value,
        **(evaluation.details(metric) or {}),
        "macs": sc.macs(graph),
        "parameters": sc.parameters(graph),
    }
    console.write_json(values) if as_json else console.show_values(values)


class RunInterruptedError(SecateurError):
    """Ctrl-C or a signal during a run; the message says how to resume it."""

    def __init__(self, text: str, status: int = 130) -> None:
        super().__init__(text)
        self.status = status


@contextmanager
def _resumable(run_dir: str | Path) -> Iterator[None]:
    """Say how to resume a run that is interrupted."""
    try:
        yield
    except (KeyboardInterrupt, signals.Stopped) as stop:
        said, status = (str(stop), stop.status) if isinstance(stop, signals.Stopped) else ("interrupted", 130)
        file, way = Path(run_dir) / "run.yaml", "the same command, as nothing is written yet"
        if file.is_file():
            from secateur.runfile import config, trust

            way = trust.resume_command(run_dir, config.load(file))
        raise RunInterruptedError(f"{said}; go on with: {way}", status) from None


def _values(run: Callable[[], CompressResult], run_dir: str | Path | None) -> dict[str, Any]:
    """Return what is to be shown of a run, or of one that has finished before."""
    from secateur.runfile.configured_run import FinishedRunError

    try:
        result = run()
    except FinishedRunError as finished:
        if given := finished.changes:
            raise UsageError(f"{finished} Begin another one with {', '.join(given)}, from its model.") from None
        if not process():
            console.error_line(str(finished), "note")
        return {**finished.report, "history": finished.history, "run_dir": str(run_dir)}
    return {**result.report, "history": result.history, "run_dir": str(result.run_dir)}


def _show_estimate(run: RunConfig, as_json: bool, quiet: bool) -> None:
    from secateur.runfile.estimate import estimate

    with console.running(as_json, quiet=quiet) as steps:
        told = estimate(run, steps)
    console.write_json(told.plain()) if as_json else console.output().print(str(told), markup=False, soft_wrap=True)


def _show_run(values: Mapping[str, Any], as_json: bool) -> None:
    if process():
        return
    console.write_json(values) if as_json else console.show_run(values)
