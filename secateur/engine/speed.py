"""A target of latency: planned by times of layers, then measured on the whole network, and corrected by that."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.deploy.timing import whole
from secateur.deploy.timing.table import Latency
from secateur.deploy.turns import quartiles, within_noise
from secateur.errors import PlanError
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.surgery import cut
from secateur.pruning.target import Target

MISSED = 0.1
"""A network that takes so much more or less of the time than asked for is planned anew."""
ATTEMPTS = 4
"""So often a network is planned at most."""


@dataclass(frozen=True)
class Timed:
    """A network that was planned by time, and what it takes."""

    plan: PruningPlan
    model: nn.Module
    report: dict[str, Any]
    """``asked``, ``predicted`` and ``measured`` are shares of the unpruned network's time that are left, ``error`` is
    how far the prediction is off, relative to what is measured; ``before`` and ``after`` are seconds; ``within_noise``
    says that the rounds differ by as much as the networks do."""


def in_time(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Any,
    target: Target,
    costs: Latency,
    plan: Callable[[Target], PruningPlan],
) -> Timed:
    """Plan to a target of latency, and measure what comes of it.

    Where the network misses the share of time that was asked for by more than a tenth, it is planned anew: to a
    prediction corrected by what was measured, and once an attempt was too fast, to one between its own and that of the
    nearest that was too slow (regula falsi), the unpruned network among them. The nearest of all attempts is returned.

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
    asked = 1 - target.fraction
    tried = [_measured(model, graph, example_inputs, target, costs, plan(target))]
    came_of = [(float(tried[0].report["measured"]), asked)]
    while abs(came_of[-1][0] / asked - 1) > MISSED and len(came_of) < ATTEMPTS:
        aim = _corrected(came_of, asked)
        try:
            again = plan(Target(latency=1 - aim, **target.setting))
        except PlanError as error:
            raise PlanError(
                f"target: cannot remove {target.fraction:g} of the latency; a plan that was to do that left "
                f"{min(came_of)[0]:.3g} of the time as measured, and by the times of layers no more can go. Ask for "
                f"less latency to go. ({error})"
            ) from error
        found = next((one for one in tried if one.plan == again), None)
        if found is None:
            found = _measured(model, graph, example_inputs, target, costs, again)
            tried.append(found)
        came_of.append((float(found.report["measured"]), aim))
    nearest = min(tried, key=lambda one: abs(float(one.report["measured"]) / asked - 1))
    if nearest is not tried[0]:
        nearest.report["corrected_from"] = tried[0].report["measured"]
    return nearest


def _corrected(came_of: list[tuple[float, float]], asked: float) -> float:
    """Return the share of time to plan for, by the shares that were measured and those that they were planned for."""
    fast = [pair for pair in came_of if pair[0] < asked]
    if not fast:
        left, aim = min(came_of)
        return asked * aim / left
    (low, aim), (high, other) = max(fast), min(pair for pair in [*came_of, (1.0, 1.0)] if pair[0] >= asked)
    return aim + (asked - low) / (high - low) * (other - aim)


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
            "within_noise": within_noise(*quartiles(before, after)),
            "corrected_from": None,
        },
    )
