"""The command line: parse, call, print. Every error is one line; 2 is a wrong request, 1 a failed run, 130 Ctrl-C."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur import __version__
from secateur.cli import console, deploy_commands, options, run_commands
from secateur.errors import DataError, SecateurError, UsageError, VerificationError

app = typer.Typer(
    name="secateur",
    help="Make trained PyTorch CNNs smaller by removing redundant filters, and prove that nothing else changed.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"secateur {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the run's files; runs/demo unless given.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything that is drawn.")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what is printed as an SVG picture, too; a missing folder is made."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Train a LeNet-5 on real digits, remove 90% of its MACs, verify, save and reload it; nothing is downloaded."""
    with console.running(as_json) as steps:
        from secateur.cli.demo import demonstrate
        from secateur.runfile.sources import writable

        if picture is not None:
            writable(picture)
        values = demonstrate(run_dir, seed, steps)
    console.write_json(values) if as_json else console.show_demo(values, picture)


@app.command()
def trace(
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    model_option: options.ModelOptions = None,
    weights: options.Weights = None,
    input_shape: options.InputShapes = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the coupling, too: an HTML page that needs no network, a row a layer and a strand a group.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show which channels of a network can be removed together, and what can't be removed and why."""
    with console.running(as_json) as steps:
        import secateur as sc
        from secateur.runfile.sources import open_model, writable

        if figure is not None:
            if figure.suffix not in {".html", ".htm"}:
                raise UsageError(f"--figure {figure}: the figure is an HTML file; end its name in .html.")
            writable(figure)
        with steps.step("building the model"):
            found = open_model(
                options.one(model, model_flag),
                options.values("--model-option", model_option),
                weights,
                input_shape or (),
            )
        with steps.step("tracing"):
            started = time.perf_counter()
            graph = sc.trace(found.model, found.inputs)
            seconds = time.perf_counter() - started
        if figure is not None:
            from secateur.checkpoint import write_atomic
            from secateur.report import draw_graph

            with steps.step("drawing"):
                write_atomic(figure, draw_graph(graph, found.name).encode())
    if as_json:
        drawn = None if figure is None else str(figure)
        console.write_json({"model": found.name, "seconds": seconds, **console.graph_values(graph), "figure": drawn})
    else:
        console.show_graph(graph, found.name, seconds, figure)


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    """Let a file give the defaults of the command's options."""
    if file is not None:
        from secateur.runfile import config

        context.default_map = config.load_prune(file).options()
    return file


@app.command(cls=options.NamingCriteria)
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
            help=f"How channels are ranked: {options.CRITERIA}; or a criterion of yours, path/to/file.py:FUNCTION or "
            "package.module:FUNCTION.",
        ),
    ] = "l1",
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
    ranking: options.Ranking = "normalized",
    inexact: Annotated[
        bool,
        typer.Option("--inexact", help="Prune also groups whose removal can't equal zeroing (layer norm, softmax)."),
    ] = False,
    compensate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Adjust what stays, before any training: merge, least_squares, bn; several with commas.",
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
        from secateur import criteria
        from secateur.compensation import compensate as move
        from secateur.compensation import parse
        from secateur.runfile import sources
        from secateur.training import stages, tasks

        goal = options.target(*options.nearest(context, macs=macs, params=params, channels=channels))
        model, model_flag = options.nearest(context, model=model, model_flag=model_flag)
        ratios, caps = options.fractions("--ratio", ratio), options.caps("--max-ratio", max_ratio)
        multiple = deploy_commands.round_to(round_to)
        if not goal and not ratios:
            raise UsageError("prune: how much? Give --macs, --params or --channels, or --ratio for some layers.")
        if out is not None:
            sources.writable(out)
        criterion = criteria.get(sources.method(method))
        if data is None and criterion.needs_data:
            raise UsageError(f"prune: --method {method} looks at feature maps; give --data, e.g. --data digits.")
        if data is None and set(parse(compensate or ())) - {"merge"}:
            raise UsageError(
                f"prune: --compensate {compensate} looks at feature maps; give --data, e.g. --data digits."
            )
        given = options.values("--method-option", method_option)
        # Such as a threshold: within the numbers that a plan by scores allows, the criterion then selects by itself.
        deciding = set(given) & (criterion.takes(True) - criterion.takes(False))
        criterion.check(given, bool(deciding))
        if deciding and multiple != 1:
            raise UsageError(
                f"prune: --round-to can't hold what --method-option {min(deciding)} selects; leave one of them out."
            )
        bundle = None
        if data is not None:
            with steps.step("loading the data"):
                bundle = sources.data(data, options.values("--data-option", data_option))
                tasks.require_classes(bundle, criterion)
        metric = None if bundle is None else tasks.metric(bundle)
        with steps.step("building the model"):
            sources.seed(seed)
            found = sources.open_model(
                options.one(model, model_flag),
                options.values("--model-option", model_option),
                weights,
                input_shape or (),
                bundle,
            )
        sample = None if bundle is None else tasks.sample(bundle, batches, seed)
        loss = None if bundle is None else tasks.loss(bundle)
        with steps.step("tracing"):
            graph = sc.trace(found.model, found.inputs)
        with steps.step(f"scoring by {method}"):
            scoring = {name: value for name, value in given.items() if name not in deciding}
            scores = sc.score(found.model, graph, criterion, data=sample, loss=loss, seed=seed, **scoring)

        def planned(multiple: int) -> sc.PruningPlan:
            budget = sc.plan(
                graph,
                scores,
                sc.Target(**goal) if goal else None,
                round_to=multiple,
                min_channels=min_channels,
                max_ratio=caps,
                ratios=ratios,
                skip=skip or (),
                ranking=ranking,
                inexact=inexact,
            )
            if not deciding:
                return budget
            counts = {name: len(channels) for name, channels in budget.removed.items()}
            chosen = sc.select(found.model, graph, criterion, counts, sample, loss=loss, seed=seed, **given)
            return sc.plan_removal(graph, {name: list(s.removed) for name, s in chosen.items() if s.removed})

        choice = None
        if multiple is None:
            choice = deploy_commands.fastest(lambda n: sc.apply(found.model, planned(n)), found.inputs, steps)
            multiple = choice.round_to
        with steps.step("pruning"):
            plan = planned(multiple)
            small = sc.apply(found.model, plan)
        with steps.step("verifying"):
            check = sc.verify(found.model, small, plan, found.inputs)
        if not check.trains:
            raise VerificationError(
                f"{found.name}: train mode: the pruned network fails, and the original does not: "
                f"{check.training_failure}; nothing was saved. A size is written in code that runs in train mode "
                "alone: leave out the layers whose channels it counts (--skip)."
            )
        if not check.exact and not inexact:
            raise VerificationError(
                f"{found.name}: the pruned network differs from the original with the removed channels zeroed, by "
                f"{check.max_error:.1e} of its output ({'; '.join((*check.mismatched, *check.refused)[:2])}); "
                "nothing was saved. Please report it."
            )
        moved = None
        if compensate is not None:
            with steps.step(f"compensating by {compensate}"):
                moved = move(found.model, small, plan, compensate, sample, graph=graph, example_inputs=found.inputs)
        before: dict[str, float] = {"macs": sc.macs(graph), "parameters": sc.parameters(graph)}
        after: dict[str, float] = {"macs": sc.macs(graph, plan), "parameters": sc.parameters(graph, plan)}
        if bundle is not None:
            for network, measured in ((found.model, before), (small, after)):
                with steps.step("evaluating"):
                    measured["test"] = stages.evaluate(network, tasks.evaluation_batches(bundle, "test"), metric)
        if out is not None:
            sc.save(small, (*found.plans, plan), out, extra=found.origin)
            after["file_bytes"] = out.stat().st_size
    values = {
        "model": found.name,
        "method": method,
        "metric": stages.metric_name(metric),
        "before": before,
        "after": after,
        "widths": {"before": console.graph_widths(graph), "after": console.graph_widths(graph, plan)},
        "verification": dataclasses.asdict(check),
        "compensation": None if moved is None else dataclasses.asdict(moved),
        "round_to": multiple,
        "measured": None if choice is None else deploy_commands.choice_values(choice),
        "file": None if out is None else str(out),
    }
    if as_json:
        console.write_json(values)
        return
    console.show_pruned(values)
    if choice is not None:
        deploy_commands.show_choice(choice)


run_commands.register(app)
deploy_commands.register(app)


@app.command(name="config")
def config_command(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Configuration to check and complete.", show_default=False)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a configuration file instead.")
    ] = False,
) -> None:
    """Check a run's configuration and print it with every default, as YAML; or print its JSON schema."""
    from secateur.runfile import config

    if schema == (file is not None):
        raise UsageError("config: give either a FILE to check or --schema.")
    if file is None:
        typer.echo(config.schema())
    else:
        typer.echo(config.to_yaml(config.load(file)), nl=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; those of the process unless given.

    Returns:
        The exit status: 0 success, 1 a failed run, 2 a wrong request, 130 interrupted.
    """
    debug = bool(os.environ.get("SECATEUR_DEBUG"))
    try:
        with warnings.catch_warnings(), console.log_lines():
            if not debug:
                # What a dependency has to say to programmers would bury the one line that people need.
                warnings.simplefilter("ignore")
            status = app(list(sys.argv[1:] if arguments is None else arguments), "secateur", standalone_mode=False)
    except typer.TyperException as error:
        console.error_line(error.format_message())
        return error.exit_code
    except run_commands.RunInterruptedError as error:
        console.error_line(str(error))
        return 130
    except (UsageError, DataError) as error:
        console.error_line(str(error))
        return 2
    except SecateurError as error:
        console.error_line(str(error))
        return 1
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        # The reader of our output has gone; a further write at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        console.error_line(_unforeseen(error))
        return 1
    if status == 130:
        console.error_line("interrupted.")
    return status if isinstance(status, int) else 0


def _unforeseen(error: Exception) -> str:
    """Say in one line what nobody foresaw, and where: a full disk, memory that is used up, or a fault of ours."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {last.filename}:{last.lineno}: {error} (SECATEUR_DEBUG=1 shows the traceback.)"
