"""Results: the pruned network, its plan, the history of a run, and the figures before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.verification import VerificationReport


def _table(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> list[str]:
    """Return a line for each figure that was measured before and after."""
    lines = []
    for key, name in (("macs", "MACs"), ("parameters", "parameters"), ("memory_bytes", "memory, bytes")):
        if before.get(key) and after.get(key) is not None:
            change = after[key] / before[key] - 1
            lines.append(f"{name:<14} {before[key]:>14,} -> {after[key]:>14,}  ({change:+.1%})")
    for key, name in (("test", f"{metric}, test"), ("validation", f"{metric}, validation")):
        if before.get(key) is not None and after.get(key) is not None:
            lines.append(f"{name}: {before[key]:.2%} -> {after[key]:.2%}")
    return lines


def _latency(found: Mapping[str, Any] | None) -> list[str]:
    return (
        [] if found is None else [f"time of a pass: {1000 * found['before']:.3g} ms -> {1000 * found['after']:.3g} ms"]
    )


def _rest(plan: PruningPlan, report: Mapping[str, Any]) -> list[str]:
    """Return what goes, by what method, and what could not be had."""
    lines = [f"removed: {sum(map(len, plan.removed.values()))} channels of {len(plan.removed)} groups"]
    lines += ["; ".join(f"{part}: {name}" for part, name in report["parts"].items())] if report.get("parts") else []
    return lines + [f"note: {note}" for note in report.get("notes", ())]


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return f"PruneResult({type(self.model).__name__}, {self.plan!r}, exact={self.check.exact})"

    def __str__(self) -> str:
        """Return the figures before and after, what was removed and how, and the verification."""
        report = self.report
        lines = _table(report.get("before", {}), report.get("after", {}), report.get("metric", "metric"))
        lines += _latency(report.get("latency"))
        return "\n".join([*lines, *_rest(self.plan, report), f"verified {self.check}"])


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return f"CompressResult({type(self.model).__name__}, {self.plan!r}, {len(self.history)} rounds)"

    def __str__(self) -> str:
        """Return the figures before and after, what was removed and how, the rounds, and where the files are."""
        report = self.report
        lines = _table(report.get("baseline", {}), report.get("final", {}), report.get("metric", "metric"))
        lines += _latency(report.get("latency"))
        kept = sum(bool(record.get("accepted", True)) for record in self.history)
        lines += [*_rest(self.plan, report), f"rounds: {len(self.history)}, {kept} accepted"]
        check = report.get("verification")
        lines += [] if check is None else [f"verified {'exact' if check['exact'] else 'not exact'}, as it was cut"]
        return "\n".join([*lines, *([] if self.run_dir is None else [f"files: {self.run_dir}"])])
