"""Scores and a target become a plan: which channels go, in names and integers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1
"""Version of the plan's JSON form; raised when an older reader could misread a newer plan."""


@dataclass(frozen=True)
class PruningPlan:
    """What to keep of a network, as plain data: names and ascending integers.

    A plan needs nothing but a freshly built original model to be applied: no graph, no trace, no data.
    """

    kept_outputs: dict[str, list[int]] = field(default_factory=dict)
    """Module name -> ascending kept output channels of every convolution and linear layer the plan touches."""
    kept_inputs: dict[str, list[int]] = field(default_factory=dict)
    """Module name -> ascending kept input channels of every convolution and linear layer the plan touches."""
    kept_tensors: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    """Name of every other parameter or buffer -> dimension -> ascending kept indices."""
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module name -> attribute -> new value, for layers of the user's own that are registered."""
    removed: dict[str, list[int]] = field(default_factory=dict)
    """Group name -> removed channels of that group; for people and reports, not read by ``apply``."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape in the original model of every tensor that the plan touches, to refuse another model."""
    version: int = FORMAT_VERSION
