"""A run as a typed YAML file: what ``secateur compress --config run.yaml`` reads, and every run directory keeps."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import UsageError

FILE = "run.yaml"
"""Name under which a run directory keeps its configuration."""


class _Section(BaseModel):
    # A misspelt key would otherwise leave a default in force that nobody asked for.
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetConfig(_Section):
    """How much to remove, as a fraction of the original; the run ends when each of those given is reached."""

    macs: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="Fraction of the MACs to remove.")
    params: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Fraction of the parameters to remove."
    )
    channels: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Fraction of the removable channels to remove."
    )

    @model_validator(mode="after")
    def _one_at_least(self) -> TargetConfig:
        if self.macs is None and self.params is None and self.channels is None:
            raise ValueError("names no amount; give macs, params or channels, each a fraction removed")
        return self


class BaselineConfig(_Section):
    """How the network is trained before it is compressed, where no weights are given."""

    epochs: int = Field(10, ge=1, description="Passes over the training set.")
    lr: float = Field(0.01, gt=0, description="Peak learning rate of SGD.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay of SGD.")
    batch_size: int = Field(128, ge=1, description="Images a step.")


class RunConfig(_Section):
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
        "that torchvision or timm publish. Without weights the baseline is trained first.",
    )
    data: str = Field(
        description="digits; mnist:ROOT, cifar10:ROOT, imagefolder:ROOT; path/to/file.py:FUNCTION; "
        "or package.module:FUNCTION."
    )
    data_options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the data's loader.")
    input: tuple[str, ...] = Field(
        (), description="Shapes of the model's inputs, e.g. 1x3x224x224; taken from the data unless given."
    )
    method: str = Field("cfp", description="Compression method.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of the method.")
    tolerance: float = Field(
        0.5, ge=0, description="Loss that is accepted, in points of the metric on the validation set."
    )
    target: TargetConfig | None = Field(None, description="Where to stop; without a target, where the tolerance ends.")
    baseline: BaselineConfig = Field(default_factory=BaselineConfig, description="Training before compression.")
    seed: int = Field(0, ge=0, description="Seed of weights, data order and every other draw.")
    device: Literal["auto", "cpu"] = Field("auto", description="cpu, or auto for the accelerator where there is one.")
    run_dir: str | None = Field(None, description="Folder of the run's files; runs/MODEL-METHOD unless given.")


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a configuration from a YAML file.

    Args:
        path: YAML file.
        overrides: Values that go before those of the file; a mapping is merged into the file's mapping.

    Raises:
        UsageError: If the file is missing or no YAML, a key is unknown or doubled, or a value is out of range; the
            message says in which line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_doubled(tree, path)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UsageError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a configuration is a mapping such as 'model: lenet5', found {_kind(values)}.")
    merged = _merge(values, overrides or {})
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise UsageError(explain(error, str(path), RunConfig, tree)) from error


def build(values: Mapping[str, Any]) -> RunConfig:
    """Make a configuration of values that come from the command line.

    Raises:
        UsageError: If a key is unknown, one is missing, or a value is out of range.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(explain(error, "", RunConfig)) from error


def save(config: RunConfig, path: str | Path) -> None:
    """Write a configuration as YAML that :func:`load` reads back to an equal one, whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(to_yaml(config), encoding="utf-8")
    partial.replace(path)


def to_yaml(config: RunConfig) -> str:
    """Return a configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def schema() -> str:
    """Return the JSON schema of a configuration file, for editors that complete and check YAML."""
    return json.dumps(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()},
        indent=2,
        ensure_ascii=False,
    )


def explain(error: ValidationError, place: str, model: type[BaseModel], tree: yaml.Node | None = None) -> str:
    """Put pydantic's first finding in one line: where, what was found, and what to do.

    Args:
        error: What validation raised.
        place: File that the values come from; empty for the command line.
        model: Model that the values were checked against.
        tree: The file's YAML nodes, for line numbers.
    """
    # An unknown key often explains the missing one, so it is told first.
    findings = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = findings[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    line = _line_of(tree, location)
    where = (f"{place}:{line}: " if line else f"{place}: ") if place else ""
    if first["type"] == "extra_forbidden":
        known = _keys(model, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
        text = f"{key}: no such key; {advice}"
    elif first["type"] == "missing":
        text = f"{key}: missing; " + (f"add '{key}: …'." if place else f"give --{key} or a --config file that has it.")
    elif first["type"] == "value_error":
        text = f"{key}: {first['ctx']['error']}." if key else f"{first['ctx']['error']}."
    else:
        message = first["msg"].removeprefix("Input ")
        text = f"{key}: {message[0].lower()}{message[1:]}, found {first['input']!r}."
    more = len(findings) - 1
    return f"{where}{text}" + (f" ({more} more like this.)" if more else "")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the fields that a place in a configuration knows."""
    for part in location:
        annotation = model.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(a for a in options if isinstance(a, type) and issubclass(a, BaseModel))
    return list(model.model_fields)


def _line_of(tree: yaml.Node | None, location: list[str]) -> int | None:
    """Line, counted from 1, of the key at ``location``, or of the last mapping on the way to it."""
    line = None
    for part in location:
        if not isinstance(tree, yaml.MappingNode):
            break
        found = next(((k, v) for k, v in tree.value if k.value == part), None)
        if found is None:
            break
        line, tree = found[0].start_mark.line + 1, found[1]
    return line


def _refuse_doubled(node: yaml.Node | None, path: Path) -> None:
    """Refuse a key that stands twice in one mapping: YAML readers keep the last and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise UsageError(f"{path}:{line}: {name}: already given in line {seen[name]}; remove one.")
            seen[name] = line
            _refuse_doubled(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_doubled(value, path)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
