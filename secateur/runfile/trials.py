"""The trials of a sweep as its folder keeps them, so that a report needs neither Optuna's storage nor its password."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from secateur import checkpoint
from secateur.errors import DataError
from secateur.runfile.search import Objective
from secateur.structure import Record, checked, parsed

FILE = "trials.json"
"""Name of the file in a sweep's folder; every worker that sees the folder writes it after every trial."""
SWEEP_FILE = "sweep.yaml"
"""Name of the run's file that a sweep began with, in its folder."""


class Trial(Record):
    """One trial: what was drawn, and what came of it. A trial whose worker died is the same one when it is retried."""

    number: int = Field(ge=0)
    state: Literal["waiting", "running", "complete", "pruned", "failed"]
    parameters: dict[str, Any]
    values: list[float] | None = None
    """One of each objective, of a complete trial."""
    error: str | None = None
    """Why it failed."""
    attempts: int = Field(ge=1)
    seconds: float | None = None
    """Of its last attempt."""
    worker: str | None = None
    """Host and process of its last attempt."""

    @property
    def run(self) -> str:
        """Where its run is, below the sweep's folder."""
        return run_name(self.number)


class Trials(Record):
    """All trials of a sweep that have begun."""

    format: Literal[1] = 1
    study: str
    storage: str
    """Without a password."""
    objectives: list[Objective]
    total: int = Field(ge=1)
    """Trials that were asked for."""
    trials: list[Trial]

    @model_validator(mode="after")
    def _judged(self) -> Trials:
        for trial in self.of("complete"):
            if len(trial.values or ()) != len(self.objectives):
                raise ValueError(f"trial {trial.number} has {len(trial.values or ())} values of the objectives")
        return self

    def of(self, state: str) -> list[Trial]:
        """Return the trials in a state."""
        return [trial for trial in self.trials if trial.state == state]

    @property
    def front(self) -> list[Trial]:
        """The complete trials that no other beats in one objective without being beaten in another; best first."""
        found = self.of("complete")
        costs = [costs_of(trial.values or (), self.objectives) for trial in found]
        best = [t for t, own in zip(found, costs, strict=True) if not any(_beats(other, own) for other in costs)]
        return sorted(best, key=lambda trial: costs_of(trial.values or (), self.objectives))


def run_name(number: int) -> str:
    """Return the folder of a trial's run, below the sweep's."""
    return f"runs/{number:04d}"


def costs_of(values: Sequence[float], objectives: Sequence[str]) -> list[float]:
    """Return values of objectives so that less is better in each."""
    return [-value if name == "accuracy" else value for name, value in zip(objectives, values, strict=True)]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def write(trials: Trials, folder: Path) -> None:
    """Write the trials into the sweep's folder."""
    checkpoint.write_json(folder / FILE, trials.model_dump(mode="json"))


def read(folder: Path) -> Trials:
    """Read the trials of a sweep.

    Raises:
        DataError: If the file is missing or damaged.
    """
    file = folder / FILE
    try:
        return checked(Trials, parsed(file.read_bytes()))
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: missing or damaged: {said}; the sweep's own command writes it anew.") from error
