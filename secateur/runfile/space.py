"""The space of a sweep: what is drawn for a trial becomes a run's configuration, and all of it is checked first."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from secateur.engine import Settings
from secateur.errors import UsageError
from secateur.runfile import config, trust, yaml_lines
from secateur.runfile.config import RunConfig
from secateur.runfile.search import Range, SearchConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_SECTIONS: dict[str, type] = {"settings": Settings, "baseline": config.Baseline, "target": config.TargetConfig}


def load(path: Path) -> RunConfig:
    """Read a run's file, and check every choice and both ends of every range of its ``search:``, if it has one.

    Raises:
        UsageError: As :func:`secateur.runfile.config.load` does, and if a value that may be drawn can't be run with;
            the message says in which line.
    """
    run = config.load(path)
    if run.search is None:
        return run
    tree, _ = yaml_lines.parsed(path)
    for key, values in variants(run.search):
        line = yaml_lines.line_of(tree, ["search", "space", key])
        try:
            configured(run, values)
        except UsageError as error:
            raise UsageError(f"{path}:{line}: search.space.{key}: {error}") from error
    if run.search.sampler == "grid":
        for key, given in run.search.space.items():
            if isinstance(given, Range) and given.step is None and not _is_whole(key, given):
                line = yaml_lines.line_of(tree, ["search", "space", key])
                raise UsageError(f"{path}:{line}: search.space.{key}: a grid takes choices, or a range with a step.")
    return run


def section(run: RunConfig, path: Path) -> SearchConfig:
    """Return what a run's file says of a sweep.

    Raises:
        UsageError: If it says nothing.
    """
    if run.search is None:
        raise UsageError(
            f"{path}: search: missing; say what to vary, e.g. search: {{space: {{settings.lr: {{low: 0.001, high: 0.1, "
            "log: true}}}."
        )
    return run.search


def variants(search: SearchConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each choice and both ends of each range, with the first value of every other key."""
    ends = {key: [given.low, given.high] if isinstance(given, Range) else given for key, given in search.space.items()}
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        for value in values:
            yield key, {**first, key: value}


def code_named(run: RunConfig) -> dict[str, str]:
    """Return what of a sweep's file is code, as :func:`secateur.runfile.trust.code_named`, its choices included."""
    found: dict[str, list[str]] = {key: [name] for key, name in trust.code_named(run).items()}
    for _, values in variants(run.search) if run.search is not None else ():
        for key, name in trust.code_named(configured(run, values)).items():
            if name not in found.setdefault(key, []):
                found[key].append(name)
    return {key: " and ".join(names) for key, names in found.items()}


def configured(run: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a trial's run.

    Args:
        run: The sweep's.
        values: Key -> value of the trial; a key of a section has a dot.

    Raises:
        UsageError: If a key is unknown or a value out of range.
    """
    plain = run.model_dump(mode="json", exclude_none=True, exclude={"search"})
    for key, value in values.items():
        # A mapping of a section keeps the dots of its own keys: settings.pairs.layer1.0.
        *sections, last = key.split(".", 2 if key.startswith("settings.") else 1)
        place = plain
        for name in sections:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UsageError(f"{name} is {place!r} in the run, and no mapping; write it as one.")
        place[last] = value
    return config.build(plain)


def distributions(search: SearchConfig) -> dict[str, BaseDistribution]:
    """Return the space as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, given in search.space.items():
        if not isinstance(given, Range):
            found[key] = CategoricalDistribution([_plain(choice) for choice in given])
        elif _is_whole(key, given):
            found[key] = IntDistribution(int(given.low), int(given.high), log=given.log, step=int(given.step or 1))
        else:
            found[key] = FloatDistribution(float(given.low), float(given.high), log=given.log, step=given.step)
    return found


def drawn(search: SearchConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Optuna has drawn as values of a run: a choice that is a list or a mapping is text in Optuna."""
    found = {}
    for key, given in search.space.items():
        value = parameters[key]
        found[key] = value if isinstance(given, Range) else next(c for c in given if _plain(c) == value)
    return found


def cells(search: SearchConfig) -> list[dict[str, Any]]:
    """Return every combination of a grid, as Optuna has its values."""
    columns: list[list[Any]] = []
    for key, given in search.space.items():
        if isinstance(given, Range):
            # Decimals, in which 0.1 + 2 * 0.1 is 0.3.
            low, high, step = (Decimal(str(number)) for number in (given.low, given.high, given.step or 1))
            values: list[Any] = [low + i * step for i in range(int((high - low) / step) + 1)]
            columns.append([int(value) if _is_whole(key, given) else float(value) for value in values])
        else:
            columns.append([_plain(choice) for choice in given])
    return [dict(zip(search.space, combination, strict=True)) for combination in itertools.product(*columns)]


def _plain(choice: Any) -> Any:
    return json.dumps(choice, sort_keys=True) if isinstance(choice, (list, dict)) else choice


def _is_whole(key: str, given: Range) -> bool:
    """Tell whether whole numbers alone are drawn: the file writes none else, and the key takes no others."""
    if not all(isinstance(number, int) for number in (given.low, given.high, given.step or 1)):
        return False
    name, _, inner = key.partition(".")
    hint = get_type_hints(_SECTIONS.get(name, RunConfig)).get(inner if name in _SECTIONS else name)
    return hint is not float and float not in get_args(hint)
