"""What a benchmark gives: rows of measurements, speed-ups, and what could not be measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.deploy.turns import within_noise

Setting = tuple[str, str, str, str, int, int]
"""Backend, device, precision, memory format, threads, batch size."""


@dataclass(frozen=True)
class Row:
    """One network under one setting."""

    variant: str
    backend: str
    device: str
    precision: str
    memory_format: str
    threads: int
    batch_size: int
    seconds: float
    """Median time of one forward pass."""
    iqr: float
    """Interquartile range of that time."""
    peak_bytes: int | None = None
    """Peak memory of one forward pass beyond the loaded network and its inputs: resident memory of a process of its
    own on a CPU, the allocator's on CUDA."""
    weight_bytes: int | None = None

    @property
    def setting(self) -> Setting:
        """Everything but the network."""
        return self.backend, self.device, self.precision, self.memory_format, self.threads, self.batch_size


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster the network is than the one it is compared with, under one setting."""

    backend: str
    device: str
    precision: str
    memory_format: str
    threads: int
    batch_size: int
    measured: float
    """Median over rounds of the ratio of two neighbouring measurements."""
    low: float
    """First quartile of that ratio."""
    high: float
    """Third quartile of that ratio."""
    theoretical: float | None
    """Ratio of MACs; None where they were not counted."""

    @property
    def within_noise(self) -> bool:
        """Whether the rounds differ by as much as the networks do."""
        return within_noise(self.low, self.measured, self.high)


@dataclass(frozen=True)
class Skipped:
    """A setting that could not be measured, and why."""

    variant: str
    setting: str
    reason: str


@dataclass(frozen=True)
class BenchmarkResult:
    """Every row measured, in pairs where there are two networks."""

    rows: list[Row]
    speed_ups: list[SpeedUp]
    skipped: list[Skipped]
    environment: dict[str, Any]
    macs: dict[str, int] = field(default_factory=dict)
    """Variant -> MACs of one example."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, the form of ``benchmark.json`` in a run directory."""
        return asdict(self)


@dataclass(frozen=True)
class RoundToChoice:
    """The multiple of channels, and the memory format, that run fastest here."""

    round_to: int
    memory_format: str
    seconds: dict[tuple[int, str], float]
    """(round_to, memory format) -> median time of one forward pass."""
    infeasible: dict[int, str] = field(default_factory=dict)
    """Candidate -> why the target can't be met with it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the choice of memory format, every time in milliseconds, and what is infeasible, as plain data."""
        times = [
            {"round_to": multiple, "memory_format": layout, "ms": 1000 * seconds}
            for (multiple, layout), seconds in self.seconds.items()
        ]
        infeasible = {str(multiple): reason for multiple, reason in self.infeasible.items()}
        return {"memory_format": self.memory_format, "times": times, "infeasible": infeasible}
