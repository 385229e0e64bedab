"""The section ``search:`` of a run's file: which keys a sweep varies, and what it looks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Objective = Literal["accuracy", "macs", "parameters", "latency"]
"""What a trial is judged by: the first is the larger the better, the others the smaller."""

FIXED = ("data", "run_dir", "baselines", "workers", "track", "search")
"""Keys of a run that are the same in every trial."""


class Range(BaseModel):
    """Numbers between two bounds, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: int | float = Field(description="Least value.")
    high: int | float = Field(description="Greatest value.")
    step: int | float | None = Field(None, gt=0, description="Distance of values; any number unless given.")
    log: bool = Field(False, description="Whether values are drawn evenly on a logarithmic scale.")

    @model_validator(mode="after")
    def _drawable(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low is below high, found {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range begins above 0, found low {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("a logarithmic range has no step; leave one of both out")
        return self


Choices = Annotated[list[Any], Field(min_length=1)]
Varied = Annotated[
    Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")],
    Discriminator(lambda given: "choices" if isinstance(given, (list, tuple)) else "range"),
]
"""What a key takes in turn. The tags keep a message to the form that was meant."""


class SearchConfig(BaseModel):
    """What ``secateur sweep`` varies over the runs of a sweep, and what it looks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: dict[str, Varied] = Field(
        min_length=1,
        description="Key of a run -> a list of choices, or a range {low, high, step, log}; a key of a section is "
        "written with a dot: settings.lr, target.macs.",
    )
    objectives: tuple[Objective, ...] = Field(
        ("accuracy", "macs"),
        min_length=1,
        description="What a trial is judged by: accuracy, the metric on the validation data; macs; parameters; "
        "latency, the time of a forward pass as a share of the unpruned network's on the same machine.",
    )
    trials: int = Field(20, ge=1, description="Runs in all, over all workers.")
    sampler: Literal["tpe", "random", "grid", "qmc", "nsga2", "gp"] = Field(
        "tpe", description="Sampler of Optuna's that draws a trial's values; grid takes every combination in turn."
    )
    pruner: Literal["none", "median", "halving", "hyperband"] = Field(
        "none", description="Pruner of Optuna's that ends a trial early, after a cut or a round; of one objective."
    )
    seed: int = Field(0, ge=0, description="Seed of what the sampler draws; the run's own seed is another key.")
    batch: int = Field(8, ge=1, description="Examples that latency is measured with.")
    runtime: Literal["onnxruntime", "eager"] = Field("onnxruntime", description="What latency is measured with.")
    threads: int = Field(1, ge=1, description="Threads that latency is measured with.")

    @field_validator("objectives", mode="before")
    @classmethod
    def _lone_objective(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("space", mode="before")
    @classmethod
    def _parted(cls, value: Any) -> Any:
        """Say which key is neither choices nor a range, where pydantic would list both forms' complaints."""
        for key, given in value.items() if isinstance(value, dict) else ():
            if not isinstance(given, (list, tuple, dict, Range)):
                raise ValueError(f"{key} is a list of choices or a range {{low: …, high: …}}, found {given!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives: each stands once, found {', '.join(self.objectives)}")
        if self.pruner != "none" and len(self.objectives) > 1:
            raise ValueError(
                f"pruner: Optuna prunes trials of one objective only, found {', '.join(self.objectives)}; "
                "leave the pruner out, or name one objective"
            )
        if self.pruner != "none" and self.objectives == ("latency",):
            raise ValueError("pruner: latency is measured at the end of a trial alone; leave the pruner out")
        for key in self.space:
            if key.partition(".")[0] in FIXED:
                raise ValueError(f"space: {key} is the same in every trial; name it outside search")
        return self
