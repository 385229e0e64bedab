"""The command that prunes once and without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secateur.cli import console, options
from secateur.errors import VerificationError


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=options.NamingCriteria)(prune)


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    """Take the defaults of the command's options from a file."""
    if file is not None:
        from secateur.runfile import config

        context.default_map = config.load_prune(file).words()
    return file


def prune(
    context: typer.Context,
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=_from_file,
            help="YAML file of these options: keys as in a run's file, and ratios, max_ratio, skip, round_to, …; "
            "options given beside it go before it.",
        ),
    ] = None,
    model_option: options.ModelOptions = None,
    weights: options.Weights = None,
    data: options.Data = None,
    data_option: options.DataOptions = None,
    input_shape: options.InputShapes = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="CRITERION",
            help=f"How channels are ranked: auto, the best there is with the data given; {options.CRITERIA}; or a "
            "criterion of yours, path/to/file.py:FUNCTION or package.module:FUNCTION.",
        ),
    ] = "auto",
    method_option: Annotated[
        list[str] | None,
        typer.Option(
            "--method-option",
            metavar="NAME=VALUE",
            help="Option of the criterion; repeatable. One that decides a selection, such as corrnet's threshold=0.9, "
            "may remove less than asked for.",
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
    compensate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Adjust the kept channels, before any training: merge, least_squares, bn; several with commas; none. "
            "Unless given: least_squares for auto with data.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option(metavar="N", min=1, help="Training batches that criterion and compensation see.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of fresh weights and of the data's order.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            *options.OUT,
            metavar="FILE",
            help="Write the pruned network here: safetensors, with its plan; a missing folder is made.",
            show_default=False,
        ),
    ] = None,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Remove the least important channels of a network, once and without training, and verify the result."""
    if config_file is not None:
        from secateur.runfile import config

        said = {name: value for name, value in context.params.items() if options.is_said(context, name)}
        said = {**said, "model": said.get("model") or said.get("model_flag"), "model_options": None}
        options.require_trust(config_file, config.load_prune(config_file), trust, said)
    with console.running(as_json) as steps:
        import secateur as sc
        from secateur.engine.way import require_possible, way_of
        from secateur.runfile import sources, suspicions
        from secateur.training import tasks

        amounts = {"macs": macs, "params": params, "channels": channels, "memory": memory, "latency": latency}
        setting: dict[str, Any] = {"batch": batch, "runtime": runtime, "threads": threads}
        goal = options.target(*options.nearest(context, **amounts), **setting)
        model, model_flag = options.nearest(context, model=model, model_flag=model_flag)
        limits = options.planning(
            ratio=ratio, skip=skip, max_ratio=max_ratio, round_to=round_to, min_channels=min_channels,
            allocation=allocation, inexact=inexact,
        )  # fmt: skip
        if "allocation" in limits:
            limits["allocation"] = options.allocation(limits["allocation"])
        if out is not None:
            sources.writable(out)
        ranked, given = sources.method(method), options.values("--method-option", method_option)
        adjusted = () if compensate == "none" else compensate
        # What can't be had is refused before data and model are loaded.
        aim = sc.Target(**goal) if goal else None
        way = way_of(ranked, limits.get("allocation"), adjusted, data is not None)
        require_possible(aim, way, sc.Options(**limits), given, data is not None)
        bundle = None
        if data is not None:
            with steps.step("loading the data"):
                bundle = sources.data(data, options.values("--data-option", data_option))
                tasks.require_classes(bundle, way.criterion)
        with steps.step("building the model"):
            sources.seed(seed)
            found = sources.open_model(
                options.one(model, model_flag),
                options.values("--model-option", model_option),
                weights,
                input_shape or (),
                bundle,
            )
        bundle, read = found.data, dict[str, Any]()
        if bundle is not None:
            read = {"data": tasks.sample(bundle, batches, seed), "loss": tasks.loss(bundle)}
            if tasks.labelled(bundle.test):
                read |= {"test": tasks.evaluation_batches(bundle, "test"), "metric": tasks.metric(bundle)}
        try:
            result = sc.prune(
                found.model,
                found.inputs,
                aim,
                method=ranked,
                method_options=given,
                compensate=adjusted,
                seed=seed,
                steps=steps,
                **read,
                **limits,
            )
        except VerificationError as error:
            raise VerificationError(f"{found.name}: {error}") from error
        suspicions.of_fresh_weights(found, weights, "prune")
        if bundle is not None:
            suspicions.of_classes(found, bundle)
            if "test" not in read:
                result.report["notes"].append(f"accuracy was not measured, as {bundle.name} holds no labels")
        values = {
            "model": found.name,
            **result.report,
            "method": result.report["method"] if method == "auto" else method,
            "file": None if out is None else str(out),
        }
        if out is not None:
            sc.save(result.model, (*found.plans, result.plan), out, extra=found.origin)
            values["after"]["file_bytes"] = out.stat().st_size
    if as_json:
        console.write_json(values)
        return
    console.show_pruned(values, advised=data is None)
    if values["measured"] is not None:
        _show_measured(values["measured"], values["round_to"])
    if values["latency"] is not None:
        console.show_latency(values["latency"])


def _show_measured(measured: Mapping[str, Any], round_to: int) -> None:
    """Tabulate the times of the multiples of channels, and say how the network runs fastest."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for name in ("round_to", "contiguous, ms", "channels-last, ms"):
        table.add_column(name, justify="right")
    times = {(row["round_to"], row["memory_format"]): row["ms"] for row in measured["times"]}
    for multiple in sorted({multiple for multiple, _ in times}):
        row = [times.get((multiple, layout)) for layout in ("contiguous", "channels_last")]
        table.add_row(str(multiple), *("–" if ms is None else f"{ms:.3g}" for ms in row))
    screen = console.output()
    screen.print()
    screen.print(table)
    how = ", in channels-last memory format" if measured["memory_format"] == "channels_last" else ""
    screen.print(f"fastest here: channels in multiples of {round_to}{how}")
    for multiple, reason in measured["infeasible"].items():
        console.error_line(f"--round-to {multiple}: not possible: {reason}", "warning")
