"""The command that prunes once and without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secateur.cli import console, options
from secateur.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from secateur.criteria import Criterion


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(cls=options.NamingCriteria)(prune)


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    """Take the defaults of the command's options from a file."""
    if file is not None:
        from secateur.runfile import config

        context.default_map = config.load_prune(file).options()
    return file


def prune(
    context: typer.Context,
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    _config_file: Annotated[
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
    ratio: options.Ratios = None,
    skip: options.Skip = None,
    round_to: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Keep a multiple of N channels in every group that loses any; 'auto' measures which of 1, 4, 8, 16, "
            "32 runs fastest on this CPU.",
        ),
    ] = "1",
    min_channels: Annotated[int, typer.Option(metavar="N", min=1, help="Keep at least N channels in every group.")] = 1,
    max_ratio: options.MaxRatios = None,
    allocation: options.Allocation = None,
    inexact: Annotated[
        bool,
        typer.Option("--inexact", help="Prune also groups whose removal can't equal zeroing (layer norm, softmax)."),
    ] = False,
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
            metavar="FILE",
            help="Write the pruned network here: safetensors, with its plan; a missing folder is made.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Remove the least important channels of a network, once and without training, and verify the result."""
    with console.running(as_json) as steps:
        import secateur as sc
        from secateur.engine import once
        from secateur.runfile import sources
        from secateur.training import tasks

        goal = options.target(*options.nearest(context, macs=macs, params=params, channels=channels))
        model, model_flag = options.nearest(context, model=model, model_flag=model_flag)
        ratios, caps = options.fractions("--ratio", ratio), options.caps("--max-ratio", max_ratio)
        multiple, allotted = options.round_to(round_to), options.allocation(allocation)
        if not goal and not ratios:
            raise UsageError("prune: how much? Give --macs, --params or --channels, or --ratio for some layers.")
        if out is not None:
            sources.writable(out)
        ranked, given = sources.method(method), options.values("--method-option", method_option)
        adjusted = () if compensate == "none" else compensate
        criterion = once.way_of(ranked, allotted, adjusted, data).criterion
        _require_possible(method, criterion, given, adjusted, multiple, data, allocation)
        bundle = None
        if data is not None:
            with steps.step("loading the data"):
                bundle = sources.data(data, options.values("--data-option", data_option))
                tasks.require_classes(bundle, criterion)
        with steps.step("building the model"):
            sources.seed(seed)
            found = sources.open_model(
                options.one(model, model_flag),
                options.values("--model-option", model_option),
                weights,
                input_shape or (),
                bundle,
            )
        read: dict[str, Any] = {}
        if bundle is not None:
            read = {"data": tasks.sample(bundle, batches, seed), "loss": tasks.loss(bundle)}
            read |= {"test": tasks.evaluation_batches(bundle, "test"), "metric": tasks.metric(bundle)}
        try:
            result = sc.prune(
                found.model,
                found.inputs,
                sc.Target(**goal) if goal else None,
                method=ranked,
                method_options=given,
                ratios=ratios,
                max_ratio=caps,
                skip=skip or (),
                round_to=multiple,
                min_channels=min_channels,
                allocation=allotted,
                inexact=inexact,
                compensate=adjusted,
                seed=seed,
                steps=steps,
                **read,
            )
        except VerificationError as error:
            raise VerificationError(f"{found.name}: {error}") from error
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
    console.show_pruned(values)
    if values["measured"] is not None:
        _show_measured(values["measured"], values["round_to"])


def _require_possible(
    method: str,
    criterion: Criterion,
    given: Mapping[str, Any],
    compensate: Any,
    round_to: Any,
    data: str | None,
    allocation: str | None,
) -> None:
    """Refuse, in the words of the command line, what :func:`secateur.prune` would refuse with data and model loaded."""
    from secateur.compensation import parse
    from secateur.engine.selection import deciding

    if data is None and criterion.needs_data:
        raise UsageError(f"prune: --method {method} looks at feature maps; give --data, e.g. --data digits.")
    if data is None and allocation == "sensitivity":
        raise UsageError("prune: --allocation sensitivity looks at feature maps; give --data, e.g. --data digits.")
    if data is None and set(parse(compensate or ())) - {"merge"}:
        raise UsageError(f"prune: --compensate {compensate} looks at feature maps; give --data, e.g. --data digits.")
    decided = deciding(criterion, given)
    criterion.check(given, bool(decided))
    if decided and round_to != 1:
        raise UsageError(
            f"prune: --round-to can't hold what --method-option {min(decided)} selects; leave one of them out."
        )


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
