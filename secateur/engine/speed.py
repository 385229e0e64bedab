"""A target of latency: planned by times of layers, then measured on the whole network, and corrected once."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.deploy.timing import whole
from secateur.deploy.timing.table import Latency
from secateur.errors import PlanError
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.surgery import cut
from secateur.pruning.target import Target

MISSED = 0.1
"""A network that takes so much more or less of the time than asked for is planned anew."""


@dataclass(frozen=True)
class Timed:
    """A network that was planned by time, and what it takes."""

    plan: PruningPlan
    model: nn.Module
    report: dict[str, Any]
    """``asked``, ``predicted`` and ``measured`` are shares of the unpruned network's time that are left, ``error`` is
    how far the prediction is off, relative to what is measured; ``before`` and ``after`` are seconds."""


def in_time(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Any,
    target: Target,
    costs: Latency,
    plan: Callable[[Target], PruningPlan],
) -> Timed:
    """Plan to a target of latency, and measure what comes of it.

    Where the network misses the share of time that was asked for by more than a tenth, the prediction is corrected by
    what was measured, and planned anew, once.

    Args:
        model: The unpruned network.
        graph: Its channel graph.
        example_inputs: What it is timed on.
        target: Of latency.
        costs: Times of its layers, by which ``plan`` counts.
        plan: Plans to a target.

    Raises:
        PlanError: If the target can't be met, by the times of layers or as it was measured.
    """
    found = _measured(model, graph, example_inputs, target, costs, plan(target))
    asked, left = found.report["asked"], found.report["measured"]
    if abs(left / asked - 1) <= MISSED:
        return found
    corrected = 1 - asked * found.report["predicted"] / left
    if not 0 < corrected < 1:
        return found
    try:
        again = plan(Target(latency=corrected, **target.setting))
    except PlanError as error:
        raise PlanError(
            f"target: cannot remove {target.fraction:g} of the latency; a plan that was to do that left {left:.3g} of "
            f"the time as measured, and by the times of layers no more can go. Ask for less latency to go. ({error})"
        ) from error
    if again == found.plan:
        return found
    second = _measured(model, graph, example_inputs, target, costs, again)
    closer = abs(second.report["measured"] / asked - 1) < abs(left / asked - 1)
    chosen = second if closer else found
    return Timed(chosen.plan, chosen.model, {**chosen.report, "corrected_from": left if closer else None})


def _measured(
    model: nn.Module, graph: ChannelGraph, example_inputs: Any, target: Target, costs: Latency, plan: PruningPlan
) -> Timed:
    small = cut(model, plan)
    before, after = whole.whole([model, small], example_inputs, **target.setting)
    left = statistics.median(after) / statistics.median(before)
    predicted = costs.seconds(graph, plan) / costs.seconds(graph)
    return Timed(
        plan,
        small,
        {
            **target.setting,
            "asked": 1 - target.fraction,
            "predicted": predicted,
            "measured": left,
            "error": predicted / left - 1,
            "before": statistics.median(before),
            "after": statistics.median(after),
            "slower": left >= 1,
            "corrected_from": None,
        },
    )
