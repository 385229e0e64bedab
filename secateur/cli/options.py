"""The options that commands share, and how their words become values."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from typer.core import TyperCommand

from secateur.errors import UsageError

CRITERIA = "CRITERIA"
"""Stands in a help text for the names of all criteria, those of installed packages too."""


class NamingCriteria(TyperCommand):
    """A command whose help names the criteria, which are looked up only when it is shown, since that imports torch."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        from secateur import criteria

        for parameter in self.params:
            if getattr(parameter, "help", None):
                parameter.help = parameter.help.replace(CRITERIA, ", ".join(criteria.names()))  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="lenet5, vgg16, resnet20, resnet56, resnet110; torchvision:NAME; timm:NAME; path/to/file.py:FUNCTION; "
        "package.module:FUNCTION, where a class does as well.",
        show_default=False,
    ),
]
ModelFlag = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same as the argument MODEL.")]
ModelOptions = Annotated[
    list[str] | None,
    typer.Option("--model-option", metavar="NAME=VALUE", help="Argument of the model's function or class; repeatable."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights: a file that Secateur saved, a safetensors file or a state dict saved by torch; or "
        "'pretrained' for what torchvision or timm publish, pretrained:IMAGENET1K_V1 for a version of torchvision's.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="digits; mnist:ROOT, cifar10:ROOT, cifar100:ROOT, imagefolder:ROOT; masks:ROOT (a class a "
        "pixel); voc:ROOT, coco:ROOT, gtsdb:ROOT (boxes, for detectors); path/to/file.py:FUNCTION; "
        "package.module:FUNCTION.",
    ),
]
DataOptions = Annotated[
    list[str] | None,
    typer.Option("--data-option", metavar="NAME=VALUE", help="Argument of the data's loader; repeatable."),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of the model's input with its batch, e.g. 1x3x224x224; NAME=SHAPE for a keyword argument, "
        "SHAPE:long for integers; repeatable. Unless given: that of the data, of a file that "
        "Secateur saved, or of the model's source.",
    ),
]
OUT = ("--out", "--output", "-o")
"""What says where a command writes its result."""

Macs = Annotated[float | None, typer.Option(metavar="FRACTION", help="Fraction of the MACs to remove, in (0, 1).")]
Params = Annotated[
    float | None, typer.Option(metavar="FRACTION", help="Fraction of the parameters to remove, in (0, 1).")
]
Channels = Annotated[
    float | None, typer.Option(metavar="FRACTION", help="Fraction of the prunable channels to remove, in (0, 1).")
]
Memory = Annotated[
    float | None,
    typer.Option(metavar="FRACTION", help="Fraction of the run-time memory at --batch to remove, in (0, 1)."),
]
Latency = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION",
        help="Fraction of the time of a forward pass to remove, in (0, 1), as measured on this machine at --batch, "
        "--runtime and --threads.",
    ),
]
BatchOfCosts = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", help="Examples that --memory and --latency count; 8 unless given."),
]
Runtime = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What --latency is measured with: onnxruntime, as unless given, or eager."),
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Threads that --latency is measured with; 1 unless given.")
]
Ratios = Annotated[
    list[str] | None,
    typer.Option(
        "--ratio",
        metavar="PATTERN=FRACTION",
        help="Fraction of channels to remove from every group that a pattern names, whatever the target; repeatable; "
        "'*' stands for the groups that nothing else names.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave alone what a pattern names: a layer, or all layers of a module, by name with wildcards or by "
        "class; repeatable.",
    ),
]
MaxRatios = Annotated[
    list[str] | None,
    typer.Option(
        "--max-ratio",
        metavar="[PATTERN=]FRACTION",
        help="Remove at most this fraction of any group, or of every group that a pattern names; repeatable, the one "
        "without a pattern for all that no other names.",
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="How many channels each group loses. sensitivity: as measured on the data, what costs the network least; "
        "a file, of prune: as 'secateur sensitivity' has measured it; "
        "normalized: rank all channels together, scores divided by their group's mean; global: scores as they are; "
        "uniform: the same fraction from every group. Unless given: sensitivity for auto with data, else normalized.",
        show_default=False,
    ),
]
RoundTo = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Keep a multiple of N channels in every group that loses any, 1 unless given; 'auto' measures which of 1, "
        "4, 8, 16, 32 runs fastest on this CPU.",
        show_default=False,
    ),
]
MinChannels = Annotated[
    int | None, typer.Option(metavar="N", help="Keep at least N channels in every group, 1 unless given.")
]
Inexact = Annotated[
    bool | None,
    typer.Option("--inexact", help="Prune also groups whose removal can't equal zeroing (layer norm, softmax)."),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Folder for the run's files; runs/MODEL-METHOD unless given.",
        show_default=False,
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run the code that the file names (path/to/file.py:FUNCTION, package.module:FUNCTION) without asking; "
        "folders named in SECATEUR_TRUST are trusted, too.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show neither progress nor the log; warnings and the result remain.")
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option(
        "--log-level", help="Least level of the lines on standard error: info is one an epoch and a decision of a run."
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Send losses, metric, MACs, |ρ|, learning rate and speed to a tracker: tensorboard, wandb, mlflow or "
        "another that Accelerate knows; repeatable.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output, and nothing else.")]


def is_said(context: typer.Context, name: str) -> bool:
    """Tell whether a parameter's value is from the command line, and no default or file's."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def nearest(context: typer.Context, **values: Any) -> list[Any]:
    """Of options that exclude each other, keep those on the command line; where there are none, those of the file.

    Args:
        context: The command's context, which knows where each value comes from.
        values: Parameter's name -> its value.

    Returns:
        The values in their order, None for each that is not kept.
    """
    said = {name for name in values if is_said(context, name)}
    return [value if name in said or not said else None for name, value in values.items()]


def require_trust(file: Path, run: Any, given: bool, said: Mapping[str, Any] | None = None) -> None:
    """Let a person say whether the code that a file names may run.

    Args:
        file: The file.
        run: Its values.
        given: Whether ``--trust`` is.
        said: Values of the command line, which are the person's own word.

    Raises:
        UsageError: If it may not.
    """
    from secateur.runfile import trust

    require_trusted(file, trust.code_named(run, said), given)


def require_trusted(file: Path, named: Mapping[str, str], given: bool) -> None:
    """Let a person say whether what a file names may run, see :func:`require_trust`.

    Args:
        file: The file.
        named: What of it is code: key -> name.
        given: Whether ``--trust`` is.

    Raises:
        UsageError: If it may not.
    """
    from secateur.runfile import trust

    def ask(question: str) -> bool:
        return typer.confirm(question, default=False, err=True)

    terminal = sys.stdin.isatty() and sys.stderr.isatty()
    trust.require(file, named, given=given, ask=ask if terminal else None)


def require_trust_of_run(folder: Path, given: bool) -> None:
    """Let a person say whether the code that a run's file names may run; see :func:`require_trust`.

    Raises:
        UsageError: If it may not, or the file can't be read.
    """
    from secateur.runfile import config

    if (folder / config.FILE).is_file():
        require_trust(folder / config.FILE, config.load(folder / config.FILE), given)


def one(argument: str | None, flag: str | None) -> str:
    """Return the model, which may be given as an argument or as ``--model``.

    Raises:
        UsageError: If it is given twice or not at all.
    """
    if argument is not None and flag is not None:
        raise UsageError(f"MODEL is given twice: {argument} and --model {flag}; give one.")
    given = argument or flag
    if not given:
        raise UsageError("MODEL is missing; name one, e.g. lenet5 or torchvision:resnet18 (--help lists the forms).")
    return given


def values(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts; a value is written as in YAML.

    Args:
        option: Name of the command-line option, for messages.
        texts: The option's values.

    Raises:
        UsageError: If a text has no ``=``, its value is no YAML, or a name is given twice.

    Example:
        >>> values("--set", ["lr=1e-3", "widths=[4, 5]", "merge=true", "name=a=b"])
        {'lr': 0.001, 'widths': [4, 5], 'merge': True, 'name': 'a=b'}
    """
    read: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"{option} {text}: write NAME=VALUE.")
        if name in read:
            raise UsageError(f"{option} {name}: given twice; give one value.")
        try:
            read[name] = _scalar(yaml.safe_load(value))
        except yaml.YAMLError:
            raise UsageError(f"{option} {text}: the value can't be read; write it as in YAML, e.g. [4, 5].") from None
    return read


def _scalar(value: Any) -> Any:
    # YAML 1.1 reads 1e-3, which has no dot, as a string.
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def fractions(option: str, texts: Sequence[str] | None) -> dict[str, float]:
    """Read ``PATTERN=FRACTION`` texts.

    Raises:
        UsageError: If a text is not of that form.
    """
    read = values(option, texts)
    for pattern, value in read.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise UsageError(f"{option} {pattern}={value}: write PATTERN=FRACTION with a fraction in [0, 1).")
    return read


def caps(option: str, texts: Sequence[str] | None) -> float | dict[str, float]:
    """Read ``FRACTION`` and ``PATTERN=FRACTION`` texts, each an upper bound.

    Args:
        option: Name of the command-line option, for messages.
        texts: The option's values; none of them means no bound.

    Returns:
        The one fraction, or pattern -> fraction; the fraction without a pattern has the pattern ``*``.

    Raises:
        UsageError: If a text is not of that form, or a pattern is given twice.

    Example:
        >>> caps("--max-ratio", ["0.8"]), caps("--max-ratio", ["0.8", "conv1=0.3"])
        (0.8, {'*': 0.8, 'conv1': 0.3})
    """
    read = values(option, [text if "=" in text else f"*={text}" for text in texts or ()])
    for pattern, value in read.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            given = str(value) if pattern == "*" else f"{pattern}={value}"
            raise UsageError(f"{option} {given}: write FRACTION or PATTERN=FRACTION with a fraction in [0, 1].")
    return float(read.get("*", 1.0)) if set(read) <= {"*"} else read


def target(
    macs: float | None,
    params: float | None,
    channels: float | None,
    memory: float | None = None,
    latency: float | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """Collect the target that ``--macs`` or another amount gives; empty if none does.

    ``setting`` holds ``--batch``, ``--runtime`` and ``--threads``, which say how memory and latency are counted.

    Raises:
        UsageError: If more than one is given, a fraction is not between 0 and 1, or a setting belongs to none.
    """
    amounts = {"macs": macs, "params": params, "channels": channels, "memory": memory, "latency": latency}
    given = {k: v for k, v in amounts.items() if v is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in given)} contradict each other; give one.")
    for name, value in given.items():
        if not 0 < value < 1:
            raise UsageError(f"--{name} {value:g}: is the fraction to remove, above 0 and below 1.")
    said = {k: v for k, v in setting.items() if v is not None}
    if said and not given:
        raise UsageError(f"--{next(iter(said))}: says how --latency is measured; give --latency, too.")
    return given | said


def allocation(text: str | None) -> Any:
    """Read ``--allocation``: the name of one, or a file that holds a table of sensitivity.

    Raises:
        UsageError: If it is no name, and no such file.
    """
    known = ("sensitivity", "normalized", "global", "uniform")
    if text is None or text in known:
        return text
    from secateur.compensation.sensitivity import Sensitivity

    if not Path(text).exists():
        close = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give {', '.join(known)} or a table of sensitivity."
        raise UsageError(f"--allocation {text}: no such file; {hint}")
    return Sensitivity.load(text)


def planning(
    *,
    ratio: Sequence[str] | None,
    skip: Sequence[str] | None,
    max_ratio: Sequence[str] | None,
    round_to: str | None,
    min_channels: int | None,
    allocation: str | None,
    inexact: bool | None,
) -> dict[str, Any]:
    """Read the options that :class:`secateur.Options` documents; those that are not given are left out.

    Raises:
        UsageError: If one can't be read.

    Example:
        >>> none = dict.fromkeys(["skip", "max_ratio", "min_channels", "allocation", "inexact"])
        >>> planning(ratio=["conv1=0.5"], round_to="8", **none)
        {'ratios': {'conv1': 0.5}, 'round_to': 8}
    """
    given = {
        "ratios": fractions("--ratio", ratio) or None,
        "skip": tuple(skip) if skip else None,
        "max_ratio": caps("--max-ratio", max_ratio) if max_ratio else None,
        "round_to": None if round_to is None else _round_to(round_to),
        "min_channels": min_channels,
        "allocation": allocation,
        "inexact": inexact or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _round_to(text: str) -> int | Literal["auto"]:
    """Read ``--round-to``: a number, or ``auto``.

    Raises:
        UsageError: If it is neither ``auto`` nor a positive whole number.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--round-to {text}: give a whole number from 1 up, or auto.")
    return int(text)
