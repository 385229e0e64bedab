"""A run as a typed YAML file: what ``secateur compress --config run.yaml`` reads, and every run directory keeps."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from secateur import criteria
from secateur.checkpoint import write_atomic
from secateur.engine import Settings
from secateur.engine.settings import meant
from secateur.errors import UsageError
from secateur.graph.structure import shown
from secateur.pruning.options import AUTO, Options
from secateur.pruning.target import Target
from secateur.runfile import yaml_lines
from secateur.runfile.search import Range, SearchConfig
from secateur.training.stages import TrainingSettings
from secateur.training.tasks import TRAINING_BATCH

FILE = "run.yaml"
"""Name under which a run directory keeps its configuration."""


class _Section(BaseModel):
    # A misspelt key would otherwise leave a default in force that nobody asked for.
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetConfig(_Section):
    """How much to remove, as a fraction of the original; exactly one amount is given."""

    macs: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="Fraction of the MACs to remove.")
    params: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Fraction of the parameters to remove."
    )
    channels: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Fraction of the removable channels to remove."
    )
    memory: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Fraction of the run-time memory to remove."
    )
    latency: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Fraction of the time of a forward pass on this machine to remove."
    )
    batch: int | None = Field(None, ge=1, description="Examples that memory and latency are counted with; 8.")
    runtime: Literal["onnxruntime", "eager"] | None = Field(
        None, description="What latency is measured with; onnxruntime."
    )
    threads: int | None = Field(None, ge=1, description="Threads that latency is measured with; 1.")

    @model_validator(mode="after")
    def _exactly_one(self) -> TargetConfig:
        try:
            Target(**self.model_dump())
        except UsageError as error:
            raise ValueError(str(error).removeprefix("target: ").rstrip(".")) from error
        return self


class _Planning(_Section):
    """The options of :class:`secateur.Options`, which are documented there."""

    round_to: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    min_channels: int = Field(1, ge=1)
    max_ratio: Annotated[float, Field(gt=0, le=1)] | dict[str, Annotated[float, Field(ge=0, le=1)]] = 1.0
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(default_factory=dict)
    skip: tuple[str, ...] = ()
    allocation: Literal["sensitivity", "normalized", "global", "uniform"] | None = None
    inexact: bool = False

    @field_validator("skip", mode="before")
    @classmethod
    def _lone_pattern(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def options(self) -> Options:
        """The options of the plan."""
        return Options(**{f.name: getattr(self, f.name) for f in fields(Options)})


@dataclass(frozen=True)
class Baseline(TrainingSettings):
    """How the network is trained before it is compressed, where no weights are given."""

    epochs: int = 10
    """Passes over the training data."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What the learning rate follows over the training."""

    def __post_init__(self) -> None:
        """Refuse values that can't be trained with."""
        super().__post_init__()
        if self.epochs < 1:
            raise UsageError(f"epochs: must be at least 1, found {self.epochs}.")


if TYPE_CHECKING:
    CheckedSettings = Settings
    CheckedBaseline = Baseline
else:
    # The engine's own dataclasses, with every value checked and converted, since YAML reads 1e-3 as a string.
    _STRICT = ConfigDict(extra="forbid")
    CheckedSettings = pydantic_dataclass(Settings, config=_STRICT, frozen=True)
    CheckedBaseline = pydantic_dataclass(Baseline, config=_STRICT, frozen=True)


class RunConfig(_Planning):
    """Everything that defines a compression run."""

    model: str = Field(
        description="lenet5, vgg16, resnet20, resnet56, resnet110; torchvision:NAME; timm:NAME; "
        "path/to/file.py:FUNCTION; or package.module:FUNCTION."
    )
    model_options: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the model's function, e.g. num_classes."
    )
    weights: str | None = Field(
        None,
        description="Trained weights: a safetensors file or a state dict saved by torch, or 'pretrained' for those "
        "that torchvision or timm publish, 'pretrained:IMAGENET1K_V1' for a version of torchvision's. Without weights, "
        "or with 'none', the baseline is trained first.",
    )
    data: str = Field(
        description="digits; mnist:ROOT, cifar10:ROOT, cifar100:ROOT, imagefolder:ROOT; masks:ROOT, a class a "
        "pixel; voc:ROOT, coco:ROOT, gtsdb:ROOT, boxes for detectors; path/to/file.py:FUNCTION; or "
        "package.module:FUNCTION."
    )
    data_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the data's loader.")
    input: tuple[str, ...] = Field(
        (), description="Shapes of the model's inputs, e.g. 1x3x224x224; taken from the data unless given."
    )
    method: str = Field(
        "auto",
        description="Compression method: auto, cfp, a criterion's name, path/to/file.py:FUNCTION or "
        "package.module:FUNCTION.",
    )
    settings: CheckedSettings = Field(
        default_factory=lambda: CheckedSettings(), description="Episodes, optimisation and training of the method."
    )
    tolerance: float = Field(
        0.5, ge=0, description="Loss that is accepted, in points of the metric on the validation set."
    )
    target: TargetConfig | None = Field(None, description="Where to stop; without a target, where the tolerance ends.")
    baseline: CheckedBaseline = Field(
        default_factory=lambda: CheckedBaseline(),
        description="Training before compression, where no weights are given.",
    )
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Images a training step; 128 unless given, 8 where they have boxes."
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Processes that read image files; one a core unless given, 0 reads them in the run's own.",
    )
    seed: int = Field(0, ge=0, description="Seed of weights, data order and every other draw.")
    baselines: str | None = Field(
        None, description="Folder where runs that ask for the same baseline share it; baselines/ beside run_dir's."
    )
    track: tuple[str, ...] = Field(
        (), description="Trackers that are told of every epoch and round: tensorboard, wandb, mlflow, …"
    )
    run_dir: str | None = Field(None, description="Folder of the run's files; runs/MODEL-METHOD unless given.")
    search: SearchConfig | None = Field(None, description="What 'secateur sweep' varies, and looks for.")

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        # An unknown method is refused here, before the baseline is trained.
        names = [AUTO, *criteria.names()]
        if value not in names and ":" not in value:
            close = difflib.get_close_matches(value, names, n=1)
            raise ValueError(
                f"unknown method {shown(value)}; " + (f"did you mean {close[0]!r}" if close else ", ".join(names))
            )
        return value

    @field_validator("weights")
    @classmethod
    def _no_weights(cls, value: str | None) -> str | None:
        # So that the command line can take away the weights that a file names.
        return None if value == "none" else value

    @field_validator("track", mode="before")
    @classmethod
    def _lone_tracker(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("settings", mode="before")
    @classmethod
    def _lone_values(cls, value: Any) -> Any:
        """Take a lone value where a list is meant: ``rounds: 2``, ``widths: {conv1: 4}``."""
        if not isinstance(value, Mapping):
            return value
        lists = {f.name for f in fields(Settings) if str(f.type).startswith("tuple[")}
        return {k: _listed(k, v) if k in lists else v for k, v in value.items()}

    @field_validator("settings", "baseline", mode="wrap")
    @classmethod
    def _in_range(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Hand a section's own UsageError to pydantic, so that the message names the section's key and line."""
        try:
            return check(value)
        except UsageError as error:
            raise ValueError(str(error).removesuffix(".")) from None


def _listed(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return value
    return [part.strip() for part in value.split(",")] if name == "compensate" and isinstance(value, str) else [value]


_PARAMETERS = {
    "input": "input_shape",
    "ratios": "ratio",
    **{f"{of}_options": f"{of}_option" for of in ("model", "data", "method")},
}
"""Key of a file for ``prune`` -> the command's parameter, where they differ."""


class PruneConfig(_Planning):
    """What ``secateur prune --config`` reads: the options of the command, with the names that a run's file has."""

    model: str | None = Field(None, description="As in a run's file.")
    model_options: dict[str, Any] = Field(default_factory=dict, description="As in a run's file.")
    weights: str | None = Field(None, description="As in a run's file.")
    data: str | None = Field(None, description="As in a run's file; for criteria that look at feature maps.")
    data_options: dict[str, Any] = Field(default_factory=dict, description="As in a run's file.")
    input: tuple[str, ...] = Field((), description="As in a run's file.")
    method: str = Field("auto", description="Criterion by which channels are ranked; auto is the best there is.")
    method_options: dict[str, Any] = Field(default_factory=dict, description="Options of the criterion.")
    target: TargetConfig | None = Field(None, description="How much to remove; without it, what the ratios ask for.")
    compensate: tuple[str, ...] | None = Field(
        None, description="Adjust the kept channels: merge, least_squares, bn; [] for none."
    )
    batches: int = Field(8, ge=1, description="Training batches that criterion and compensation see.")
    seed: int = Field(0, ge=0, description="Seed of fresh weights and of the data's order.")
    out: str | None = Field(None, description="File of the pruned network.")

    @field_validator("input", "compensate", mode="before")
    @classmethod
    def _lone_value(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def words(self) -> dict[str, Any]:
        """Return the values that the file gives as the command's parameters, written as on the command line."""
        words: dict[str, Any] = {}
        for name in self.model_fields_set:
            value = getattr(self, name)
            option = _PARAMETERS.get(name, name)
            if value is None:
                continue
            if isinstance(value, TargetConfig):
                words |= value.model_dump(exclude_none=True)
            elif isinstance(value, Mapping):
                words[option] = [f"{key}={json.dumps(inner)}" for key, inner in value.items()]
            elif name == "max_ratio":
                words[option] = [str(value)]
            elif name == "compensate":
                words[option] = ",".join(value) or "none"
            else:
                words[option] = list(value) if isinstance(value, tuple) else str(value) if name == "round_to" else value
        return words


def load_prune(path: str | Path) -> PruneConfig:
    """Read the options of ``secateur prune`` from a YAML file.

    Raises:
        UsageError: As :func:`load` does.
    """
    path = Path(path)
    tree, values = yaml_lines.parsed(path)
    known = list(PruneConfig.model_fields)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
            raise UsageError(f"{path}:{yaml_lines.line_of(tree, [str(key)])}: {key}: no such key; {advice}")
    try:
        return PruneConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, str(path), tree)) from error


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration from a YAML file.

    Args:
        path: YAML file.
        overrides: Values that take precedence over the file's; a mapping is merged into the file's mapping.

    Raises:
        UsageError: If the file is missing or no YAML, a key is unknown or doubled, or a value is out of range; the
            message says in which line.
    """
    path = Path(path)
    tree, values = yaml_lines.parsed(path)
    try:
        return RunConfig.model_validate(_merge(values, overrides or {}))
    except ValidationError as error:
        raise UsageError(explain(error, str(path), tree, overrides)) from error


def build(values: Mapping[str, Any]) -> RunConfig:
    """Make a configuration of values that come from the command line.

    Raises:
        UsageError: If a key is unknown, one is missing, or a value is out of range.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(explain(error, "")) from error


def resolved(run: RunConfig) -> RunConfig:
    """Return a configuration with what its method decides where nothing is said, as far as it is known without data.

    Distillation is filled in for data of classes, scored by the network; a run on boxes has none.
    """
    bounded = run.target is None and not run.settings.widths and not run.ratios
    teaches = not run.data.startswith("voc:")
    settings = run.settings.resolved(auto=run.method == AUTO, bounded=bounded, teaches=teaches)
    share = run.allocation or ("sensitivity" if run.method == AUTO else None if run.method == "cfp" else "normalized")
    batch = run.batch_size or TRAINING_BATCH["classification" if teaches else "detection"]
    return run.model_copy(update={"settings": settings, "allocation": share, "batch_size": batch})


def changed(run: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with other values; a mapping is merged into what is there, but for a target.

    Raises:
        UsageError: If a key is unknown or a value out of range.
    """
    if not values:
        return run
    kept = {k: v for k, v in plain(run).items() if k != "target" or "target" not in values}
    return build(_merge(kept, values))


def save(config: RunConfig, path: str | Path) -> None:
    """Write a configuration as YAML that :func:`load` reads back to an equal one, whole or not at all."""
    write_atomic(path, to_yaml(config).encode())


def to_yaml(config: RunConfig) -> str:
    """Return a configuration as YAML, every default written out."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as JSON values that :func:`build` makes an equal one of, without what None stands for."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    chosen = config.settings
    # None is a value of its own where the default is another, as of correlation_target.
    said = {f.name: None for f in fields(Settings) if f.default is not None and getattr(chosen, f.name) is None}
    return values | {"settings": values.get("settings", {}) | said}


_SECTIONS: list[tuple[str, type]] = [("Settings", Settings), ("Baseline", Baseline), ("Baseline", TrainingSettings)]


def schema() -> str:
    """Return the JSON schema of a configuration file, for editors that complete and check YAML."""
    values = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    places = [(values["$defs"][of], made) for of, made in _SECTIONS] + [(values, Options)]
    for section, made in places:
        for name, text in _attribute_docstrings(made).items():
            section["properties"][name].setdefault("description", text)
    return json.dumps(values, indent=2, ensure_ascii=False)


_KEY = 80
"""So many characters of a key are shown in a message."""


def explain(
    error: ValidationError, place: str, tree: yaml.Node | None = None, overrides: Mapping[str, Any] | None = None
) -> str:
    """Put pydantic's first finding in one line: where, what was found, and what to do.

    Args:
        error: What validation raised.
        place: File that the values come from; empty for the command line.
        tree: The file's YAML nodes, for line numbers.
        overrides: Values that took precedence over the file's; an error in one of them is not reported as the file's.
    """
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    # An unknown key often explains the missing one, so it is told first.
    findings = sorted(error.errors(), key=lambda e: e["type"] not in unknown)
    first = findings[0]
    location = [part if len(part) <= _KEY else f"{part[:_KEY]}…" for part in map(str, first["loc"])]
    said = str(first["ctx"]["error"]) if first["type"] == "value_error" else ""
    name, colon, rest = said.partition(": ")
    if colon and len(location) == 1 and name in _keys(location):
        # The message of a section's own check begins with the key at fault.
        location, said = [*location, name], rest
    key = ".".join(location)
    if first["type"] != "missing" and _overridden(overrides, location):
        place = ""
    line = yaml_lines.line_of(tree, location)
    where = (f"{place}:{line}: " if line else f"{place}: ") if place else ""
    if first["type"] in unknown:
        known = _keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
        if location[0] == "settings":
            advice = meant(location[-1])
        text = f"{key}: no such key; {advice}"
    elif first["type"] == "missing":
        text = f"{key}: missing; " + (f"add '{key}: …'." if place else f"give --{key} or a --config file that has it.")
    elif first["type"] == "value_error":
        text = f"{key}: {said}."
    else:
        message = first["msg"].removeprefix("Input ")
        text = f"{key}: {message[0].lower()}{message[1:]}, found {shown(first['input'])}."
    more = len({finding["loc"][:2] for finding in findings}) - 1
    return f"{where}{text}" + (f" ({more} more like this.)" if more else "")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _keys(location: list[str]) -> list[str]:
    """Names of the keys that a section of a configuration has; those of the whole where there is no such section."""
    sections: dict[str, Any] = {
        "settings": Settings, "baseline": Baseline, "target": TargetConfig, "search": SearchConfig
    }  # fmt: skip
    section = Range if location[-1:] == ["range"] else sections.get("".join(location[:1]), RunConfig)
    return [f.name for f in fields(section)] if is_dataclass(section) else list(section.model_fields)


def _attribute_docstrings(made: type) -> dict[str, str]:
    """Return the text that stands under each field of a dataclass."""
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(made))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(inspect.cleandoc(text.value.value).split())
        for field, text in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _overridden(overrides: Mapping[str, Any] | None, location: list[str]) -> bool:
    value: Any = overrides
    for part in location:
        if not isinstance(value, Mapping):
            break
        if part not in value:
            return False
        value = value[part]
    return overrides is not None
