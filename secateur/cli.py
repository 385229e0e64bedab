"""The command line: parse, call, print. Every error is one line; 2 is a wrong request, 1 a failed run, 130 Ctrl-C."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur import config, console
from secateur.errors import DataError, SecateurError, UsageError

app = typer.Typer(
    name="secateur",
    help="Make trained PyTorch CNNs smaller by removing redundant filters, and prove that nothing else changed.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="lenet5, vgg16, resnet20, resnet56, resnet110; torchvision:NAME; timm:NAME; path/to/file.py:FUNCTION; "
        "package.module:FUNCTION.",
        show_default=False,
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same as the argument MODEL.")]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option("--model-option", metavar="NAME=VALUE", help="Argument of the model's function; repeatable."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights: a file that Secateur saved, a safetensors file or a state dict saved by torch; or "
        "'pretrained' for what torchvision or timm publish.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="digits; mnist:ROOT, cifar10:ROOT, imagefolder:ROOT; path/to/file.py:FUNCTION; package.module:FUNCTION.",
    ),
]
DataOptions = Annotated[
    list[str] | None,
    typer.Option("--data-option", metavar="NAME=VALUE", help="Argument of the data's loader; repeatable."),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHAPE",
        help="Shape of the model's input with its batch, e.g. 1x3x224x224; NAME=SHAPE for a keyword argument, "
        "SHAPE:long for integers; repeatable. Taken from the data or the model's source unless given.",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of weights, data order and every other draw.")]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output and nothing else.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"secateur {installed('secateur')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


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
