"""Channels are chosen: scored by a criterion, allocated under a target, or selected by the criterion itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from torch import nn

from secateur.compensation.damage import NotComparableError
from secateur.compensation.sensitivity import Sensitivity, Share, refined, sensitivity
from secateur.criteria import Criterion
from secateur.criteria.feature_maps import examples
from secateur.criteria.scoring import score, select
from secateur.engine.way import deciding
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import Selection
from secateur.pruning.allocation import Times
from secateur.pruning.limits import Limit
from secateur.pruning.options import Allocation
from secateur.pruning.planning import Target, choose, plan_removal
from secateur.training import passes
from secateur.training.passes import Batches

MEASURED_IMAGES = 512
"""So many images are enough to measure sensitivity on."""
MEASURED_BATCH = 8
"""Examples in the forward passes that ``round_to="auto"`` times."""
REFINEMENTS = 2
"""So often the table is measured more finely around the widths planned by it."""


class Choice:
    """A network's channels, scored once, of which any number can be chosen.

    Args:
        model: The network.
        graph: Its channel graph.
        criterion: What scores, and selects where one of its options decides that.
        options: The criterion's own.
        groups: Names of the groups to score.
        **reading: ``data``, ``loss`` and ``seed`` of :func:`secateur.score`.

    Raises:
        CriterionError: If the criterion is defined on none of the groups.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        criterion: Criterion,
        options: Mapping[str, Any],
        groups: Iterable[str],
        **reading: Any,
    ) -> None:
        self.model, self.graph, self.criterion = model, graph, criterion
        self.reading = {**reading, **options}
        decided = deciding(criterion, options)
        self.selects = bool(decided)
        scoring = {name: value for name, value in self.reading.items() if name not in decided}
        self.scores = score(model, graph, criterion, groups=list(groups), **scoring)

    def __call__(
        self,
        target: Target | None,
        limits: Mapping[str, Limit],
        *,
        round_to: int | Literal["auto"] = 1,
        allocation: Allocation = "normalized",
        partial: bool = False,
        costs: Times | None = None,
    ) -> Selection:
        """Choose the channels to remove; see :func:`secateur.pruning.planning.choose`."""
        found = choose(
            self.graph, self.scores, target, limits, round_to=round_to, allocation=allocation, partial=partial,
            costs=costs,
        )  # fmt: skip
        if not self.selects:
            return found
        counts = {name: len(channels) for name, channels in found.items()}
        picked = select(self.model, self.graph, self.criterion, counts, **self.reading)
        return {name: list(own.removed) for name, own in picked.items() if own.removed}


def measured(
    model: nn.Module,
    graph: ChannelGraph,
    data: Iterable[Any],
    limits: Mapping[str, Limit],
    target: Target | None,
    *,
    inexact: bool,
    costs: Times | None = None,
    progress: Callable[[int, int], None] | None = None,
    share: Share | None = None,
) -> Sensitivity:
    """Measure the sensitivity of the groups whose loss is still to be found, on as many images as it takes.

    It is measured more finely around the widths that it leads to under the target.
    """
    few, images = [], 0
    for batch in data:
        few.append(batch)
        images += examples(batch) or 0
        if images >= MEASURED_IMAGES:
            break
    open_to = [name for name, limit in limits.items() if limit.most and not limit.forced]
    table = sensitivity(model, graph, few, groups=open_to, inexact=inexact, progress=progress, share=share)
    if target is not None and open_to:
        scores = score(model, graph, "l2", groups=list(limits), inexact=True)
        for _ in range(REFINEMENTS):
            found = choose(graph, scores, target, limits, allocation=table, partial=True, costs=costs)
            table = refined(model, graph, few, table, plan_removal(graph, found), progress=progress, share=share)
    return table


def unmeasured(error: NotComparableError) -> str:
    """Say what ``auto`` goes by where sensitivity can't be measured, and why it can't."""
    return f"allocation by normalized scores, as sensitivity can't be measured: {error}"


class Some:
    """The first ``count`` batches of some data, all when None; their order follows from ``seed`` at every walk."""

    def __init__(self, batches: Batches, count: int | None, seed: int) -> None:
        self.batches, self.count, self.seed = batches, count, seed

    def __iter__(self) -> Iterator[Any]:
        passes.order(self.batches, self.seed)
        return islice(iter(self.batches), self.count)
