"""A finished run, read back from its directory and checked before anything is drawn from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.compensation.sensitivity import Sensitivity
from secateur.engine.rundir import resume_call
from secateur.errors import DataError, RunError, UsageError
from secateur.report.naming import drawn, name_of, names_of
from secateur.runfile import config as run_config
from secateur.runfile import trials, trust

_Model = TypeVar("_Model", bound=BaseModel)


class _Record(BaseModel):
    """A part of a run's files: unknown keys are ignored, missing ones are an error."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=True)


class Layer(_Record):
    """Cost of one convolution or linear layer."""

    module: str
    macs: int = Field(ge=0)
    """Multiply-accumulates for one example (CFP eqs. 1-3)."""
    parameters: int = Field(ge=0)
    out_channels: int = Field(ge=0)
    positions: int = Field(ge=0)
    """Output positions of one example, w_o·h_o; 1 for a linear layer."""


class State(_Record):
    """A network before or after pruning: how good, how large, how fast."""

    validation: float | None = None
    """Metric on the held-out split of the training data, the one every decision was taken on."""
    test: float | None = None
    """Metric on the test set, of the last epoch."""
    details: dict[str, Any] | None = None
    """Further figures of the metric, of the test set where there is one; ``classes`` holds those of each class."""
    macs: int = Field(ge=0)
    parameters: int = Field(ge=0)
    file_bytes: int | None = None
    latency_ms: float | None = None
    latency_within_noise: bool = False
    """Whether the times before and after differ by no more than the rounds that they are medians of."""
    widths: dict[str, int] = Field(default_factory=dict)
    """Module name -> output channels."""
    layers: list[Layer] = Field(default_factory=list)


class Refused(_Record):
    """Something that could not be pruned, and why."""

    operator: str = ""
    module: str = ""
    source: str = ""
    reason: str = ""


class MaxCorrelation(_Record):
    """Largest |ρ| among the filters of each layer."""

    before: dict[str, float] = Field(default_factory=dict)
    after: dict[str, float] = Field(default_factory=dict)


class AskedLatency(_Record):
    """The setting at which a target of latency was asked for, and what came of it there."""

    runtime: str
    batch: int
    threads: int
    asked: float
    """Share of the unpruned network's time that was to be left; so are the next two."""
    predicted: float
    measured: float
    before: float
    """Seconds of the unpruned network."""
    after: float
    within_noise: bool = False
    """As of :class:`State`."""

    @property
    def setting(self) -> str:
        """The setting in words."""
        return f"{self.runtime}, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Result(_Record):
    """``result.json``: the run's result."""

    metric: str = "accuracy"
    baseline: State
    final: State
    refused: list[Refused] = Field(default_factory=list)
    verification: dict[str, Any] = Field(default_factory=dict)
    latency: AskedLatency | None = None
    """What a target of latency predicted and measured."""
    max_abs_rho: MaxCorrelation = Field(default_factory=MaxCorrelation)


class Episode(_Record):
    """One line of ``history.jsonl``: the channels removed, and the metric before and after."""

    round: int
    phase: int | str | None = None
    group: str | None = None
    removed: dict[str, list[int]] = Field(default_factory=dict)
    abs_rho_before: dict[str, float] = Field(default_factory=dict)
    abs_rho_after: dict[str, float] = Field(default_factory=dict)
    metric_before: float | None = None
    metric_dropped: float | None = None
    metric_tuned: float | None = None
    macs: int
    parameters: int
    widths: dict[str, int] = Field(default_factory=dict)
    accepted: bool
    seconds: float | None = None

    @property
    def channels(self) -> int:
        """Number of channels removed in the episode."""
        return sum(len(indices) for indices in self.removed.values())


class Measurement(_Record):
    """One row of ``benchmark.json``: one network, one setting, its time and its memory."""

    variant: str
    """``original`` or ``pruned``."""
    backend: str
    device: str
    precision: str = "fp32"
    memory_format: str = "contiguous"
    threads: int = 1
    batch_size: int
    seconds: float
    """Median time of one forward pass."""
    iqr: float = 0.0
    peak_bytes: int | None = None
    """Peak memory of one forward pass beyond what the loaded model takes."""
    weight_bytes: int | None = None

    @property
    def setting(self) -> str:
        """Everything but the network and the batch size, in words."""
        words = [self.device, self.backend]
        if self.precision != "fp32":
            words.append(self.precision)
        if self.memory_format != "contiguous":
            words.append(self.memory_format.replace("_", "-"))
        if self.device.startswith("cpu"):
            words.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        return ", ".join(words)


class BenchmarkRows(_Record):
    """``benchmark.json`` as far as the report needs it."""

    rows: list[Measurement]
    environment: dict[str, Any] = Field(default_factory=dict)


class Run(_Record):
    """Everything the report knows of one run."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    path: Path
    name: str
    config: dict[str, Any]
    result: Result
    history: list[Episode]
    benchmark: BenchmarkRows | None = None
    sensitivity: Sensitivity | None = None
    """What each group lost when the run measured it last, where its method does."""


@dataclass(frozen=True)
class Swept:
    """The runs of a sweep's complete trials, as they stand beside other runs."""

    name: str
    path: Path
    runs: list[Run]
    away: int
    """Complete trials whose runs are not in the sweep's folder."""


def read_trials(folder: Path, told: Sequence[Path] = ()) -> Swept:
    """Read the runs of a sweep's complete trials.

    Args:
        folder: Of the sweep.
        told: Folders of runs that are told of by themselves, and no second time as trials.

    Raises:
        DataError: If one of their files is damaged.
        RunError: If no trial has been completed yet.
    """
    found = trials.read(folder)
    if not found.of("complete"):
        raise RunError(f"{folder}: no trial of the sweep has been completed yet; there is nothing to draw.")
    runs, away, others = [], 0, {path.resolve() for path in told}
    for trial in found.of("complete"):
        path = folder / trial.run
        if not (path / "result.json").is_file():
            away += 1
        elif path.resolve() not in others:
            name = f"{found.study}, trial {trial.number}"
            said = f"{name}: {drawn(trial.parameters)}" if trial.parameters else name
            runs.append(read_run(path).model_copy(update={"name": said}))
    return Swept(found.study, folder, runs, away)


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """Return runs whose names tell them apart, by their settings; a lone run keeps its own."""
    if len(runs) < 2:
        return list(runs)
    names = names_of([run.config for run in runs], [run.path.resolve().name for run in runs])
    return [run.model_copy(update={"name": name}) for run, name in zip(runs, names, strict=True)]


def read_run(run_dir: str | Path) -> Run:
    """Read a run directory that :func:`secateur.compress` has finished.

    Args:
        run_dir: The directory, with ``config.json``, ``history.jsonl`` and ``result.json``; ``benchmark.json`` is
            read where there is one.

    Returns:
        The run, every field checked.

    Raises:
        UsageError: If there is no such directory, or it is not the directory of a run.
        RunError: If the run has not finished.
        DataError: If a file is damaged; the line and the field are named.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UsageError(f"{path}: no such run directory. Give the directory that `secateur compress` wrote.")
    if not (path / "history.jsonl").is_file():
        raise UsageError(
            f"{path}: no history.jsonl, so this is not a run, or one that stopped before its first round. "
            "Give the directory that `secateur compress` wrote."
        )
    if not (path / "config.json").is_file():
        raise UsageError(f"{path}: no config.json, so this is not the directory of a run.")
    history = _read_history(path / "history.jsonl")
    if not (path / "result.json").is_file():
        raise RunError(
            f"{path}: the run has not finished: {len(history)} round(s) and no result.json. "
            f"Finish it with `{_way_on(path)}`."
        )
    config = _read_json(path / "config.json")
    if not isinstance(config, dict):
        raise DataError(f"{path / 'config.json'}: expected an object, found {type(config).__name__}.")
    benchmark, table = path / "benchmark.json", path / "sensitivity.json"
    return Run(
        path=path,
        name=name_of(config, path.resolve().name),
        config=config,
        result=_validated(Result, _read_json(path / "result.json"), str(path / "result.json")),
        history=history,
        benchmark=_validated(BenchmarkRows, _read_json(benchmark), str(benchmark)) if benchmark.is_file() else None,
        sensitivity=Sensitivity.load(table) if table.is_file() else None,
    )


def _way_on(path: Path) -> str:
    """Return what goes on with an unfinished run: a command, or Python where no file says what the run was."""
    file = path / run_config.FILE
    if not file.is_file():
        return resume_call(path)
    return trust.resume_command(path, run_config.load(file))


def _read_history(path: Path) -> list[Episode]:
    episodes = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg}); the file is half-written or damaged. "
                f"Restore it with `secateur resume {path.parent}`."
            ) from error
        episodes.append(_validated(Episode, record, where))
    return episodes


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file (byte {error.start} is not UTF-8).") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON (line {error.lineno}: {error.msg}); the file is half-written or damaged. "
            f"Write it again with `secateur resume {path.parent}`."
        ) from error


def _validated(model: type[_Model], record: Any, where: str) -> _Model:
    try:
        return model.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the record"
        raise DataError(f"{where}: {field}: {first['msg'].lower()}.") from error
