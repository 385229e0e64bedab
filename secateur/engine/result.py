"""Results: the pruned network, its plan, the history of a run, and the figures before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.verification import VerificationReport


@dataclass(frozen=True)
class PruneResult:
    """What :func:`secateur.prune` returns."""

    model: nn.Module
    """The pruned network, of the original's class, compensated if asked for."""
    plan: PruningPlan
    check: VerificationReport
    """How the network as it was cut, before compensation, compares with the original whose channels are zeroed."""
    graph: ChannelGraph
    """The original's channel graph."""
    report: dict[str, Any]
    """Plain values, ready for JSON: ``method``, ``parts`` (what allocated, selected and compensated), ``notes`` (what
    of ``auto`` could not be had), ``metric``, the figures ``before`` and ``after``, ``widths``, ``verification``,
    ``compensation``, ``round_to``, under ``measured`` the times that chose it, and under ``latency`` what a target of
    latency predicted and measured (:class:`secateur.engine.speed.Timed`)."""


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
    """``parts`` (what allocated, selected, compensated and trained), ``notes`` (what of ``auto`` could not be had),
    ``baseline`` and ``final`` figures, what was refused, the verification: see ``result.json``."""
    run_dir: Path | None = None
