"""The command line: parse, call, print. Every error is one line; 2 is a wrong request, 1 a failed run, 130 Ctrl-C.

A run that SIGTERM or SIGUSR1 stops ends with 143 or 138.
"""

from __future__ import annotations

import gc
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
from secateur.cli import (
    console,
    deploy_commands,
    export_command,
    options,
    prune_command,
    run_commands,
    sensitivity_command,
    signals,
    sweep_command,
)
from secateur.errors import DataError, SecateurError, UsageError

app = typer.Typer(
    name="secateur",
    help="Make trained PyTorch CNNs smaller by removing redundant filters, and prove that nothing else changed.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
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
    with console.running(as_json, every=5.0) as steps:
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


sensitivity_command.register(app)
prune_command.register(app)
run_commands.register(app)
sweep_command.register(app)
deploy_commands.register(app)
export_command.register(app)


@app.command(name="config")
def config_command(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Configuration to check and complete.", show_default=False)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a configuration file instead.")
    ] = False,
) -> None:
    """Check a run's configuration and print it with every default, as YAML; or print its JSON schema.

    What the method decides where nothing is said is filled in, too; precision and channels_last are the machine's.
    """
    from secateur.runfile import config, space

    if schema == (file is not None):
        raise UsageError("config: give either a FILE to check or --schema.")
    if file is None:
        typer.echo(config.schema())
    else:
        typer.echo(config.to_yaml(config.resolved(space.load(file))), nl=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; those of the process unless given.

    Returns:
        The exit status: 0 success, 1 a failed run, 2 a wrong request, 130 interrupted, 143 SIGTERM, 138 SIGUSR1.
    """
    status = _status(arguments)
    if status > 128:
        # What was under way when it was stopped is let go: processes that read images end before this one does.
        gc.collect()
    return status


def _status(arguments: Sequence[str] | None) -> int:
    debug = bool(os.environ.get("SECATEUR_DEBUG"))
    try:
        with warnings.catch_warnings(), console.log_lines(), signals.heeded():
            if not debug:
                # A dependency's warnings are for programmers, and would bury the one line of an error.
                warnings.simplefilter("ignore")
            status = app(list(sys.argv[1:] if arguments is None else arguments), "secateur", standalone_mode=False)
    except typer.TyperException as error:
        console.error_line(error.format_message())
        return error.exit_code
    except run_commands.RunInterruptedError as error:
        console.error_line(str(error))
        return error.status
    except signals.Stopped as stop:
        console.error_line(f"{stop}.")
        return stop.status
    except (UsageError, DataError) as error:
        console.error_line(str(error))
        return 2
    except SecateurError as error:
        console.error_line(str(error))
        return 1
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        # The reader of standard output has closed it; Python's own flush at exit would fail again.
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
    """Describe an unexpected error in one line, with its place: a full disk, no memory left, or a fault of Secateur."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {last.filename}:{last.lineno}: {error} (SECATEUR_DEBUG=1 shows the traceback.)"
