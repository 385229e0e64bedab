"""What a run came to: the network, its plan, its history, and the figures before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.graph.plan import PruningPlan

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class CompressResult:
    """What :func:`secateur.compress` returns."""

    model: nn.Module
    """The pruned, fine-tuned network, of the original's class."""
    plan: PruningPlan
    """From the unpruned network to ``model``."""
    history: list[dict[str, Any]]
    """One record a round, accepted or not: see ``history.jsonl``."""
    milestones: list[dict[str, Any]]
    """One record for each set of widths reached, and the end."""
    report: dict[str, Any]
    """``baseline`` and ``final`` figures, what was refused, the verification: see ``result.json``."""
    run_dir: Path | None = None
