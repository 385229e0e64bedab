"""Scores and a target become a selection of channels, and this a plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
from torch import Tensor

from secateur.errors import PlanError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan, Selection
from secateur.graph.steps import steps
from secateur.pruning.allocation import CostOf, Table, Times, allocate, choices, costs_of, paying
from secateur.pruning.building import build, checked
from secateur.pruning.limits import Limit, Limits, totals
from secateur.pruning.options import SENSITIVITY, Allocation, OptionKeywords, Options
from secateur.pruning.target import Target as Target


def plan_removal(graph: ChannelGraph, removed: Mapping[str, Sequence[int]]) -> PruningPlan:
    """Turn an explicit choice of channels into a plan.

    Args:
        graph: The traced network.
        removed: Group name -> channels of that group to remove.

    Raises:
        PlanError: If a group or channel does not exist, can't be removed, is the last of its layer, or the choice
            breaks the group's constraint.
    """
    groups = {g.name: g for g in graph.groups}
    found: Selection = {}
    for name, chosen in removed.items():
        if name not in groups:
            raise PlanError(f"{name}: the graph has no such group. See `secateur trace`.")
        if channels := checked(groups[name], chosen):
            found[name] = channels
    return build(graph, found)


@dataclass(eq=False)
class _Candidate:
    """One group that may lose channels, in steps, the least important first."""

    name: str
    channels: np.ndarray
    """The channels of all steps, one step after the other."""
    ends: np.ndarray
    """Number of channels that all steps up to each remove."""
    keys: np.ndarray
    """By what steps of all groups are ordered: none is lower than the one before it."""
    size: int
    """Number of the group's channels."""
    fitting: np.ndarray
    """Whether what the steps up to each leave is a width that the request allows."""

    def removed(self, count: int) -> list[int]:
        """Return the channels of the first ``count`` steps, or of as many fewer as leave a width that is allowed."""
        count = self.allowed(count)
        return [int(c) for c in np.sort(self.channels[: self.ends[count - 1] if count else 0])]

    def allowed(self, count: int) -> int:
        """Return ``count``, or as many steps fewer as leave a width that is allowed."""
        while count and not self.fitting[count - 1]:
            count -= 1
        return count


def plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    target: Target | None = None,
    *,
    costs: Times | None = None,
    **options: Unpack[OptionKeywords],
) -> PruningPlan:
    """Choose the channels to remove: the lowest scores first, until the target is met.

    Args:
        graph: The traced network.
        scores: Group name -> one score a channel, shape ``(group.size,)``; the higher, the more important. Groups
            without scores are left alone.
        target: The fraction of MACs, parameters, channels, memory or latency to remove; None to follow ``ratios``
            alone. A target of latency leaves each group only widths that pay by ``costs``: a group that kept one step
            of channels more would take clearly longer.
        costs: Times of the network's layers, as :func:`secateur.latency` measures them, for a target of latency; and
            for ``round_to="auto"``, which leaves only widths that pay whatever the target.
        **options: ``round_to``, ``min_channels``, ``max_ratio``, ``ratios``, ``skip``, ``allocation`` and ``inexact``,
            see :class:`secateur.Options`.

    Returns:
        The plan that removes the least important channels and meets the target.

    Raises:
        PlanError: If the target can't be met, scores don't fit a group, or a channel's score is not a number.
        UsageError: If two requests contradict each other, or an option is unknown or out of range.
    """
    chosen = Options.of(options)
    if target is None and not chosen.ratios:
        raise UsageError("plan: nothing is asked for: give a target or ratios.")
    if chosen.allocation == SENSITIVITY:
        raise UsageError("allocation: plan measures nothing; give the table that secateur.sensitivity has measured.")
    groups = [g for g in graph.groups if g.name in scores and (g.exact or chosen.inexact)]
    limits = Limits(graph, groups, chosen).by_group
    allocation = chosen.allocation or "normalized"
    found = choose(graph, scores, target, limits, round_to=chosen.round_to, allocation=allocation, costs=costs)
    return build(graph, found)


def choose(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    target: Target | None,
    limits: Mapping[str, Limit],
    *,
    round_to: int | Literal["auto"] = 1,
    allocation: Allocation = "normalized",
    partial: bool = False,
    costs: Times | None = None,
) -> Selection:
    """Choose the channels that a plan removes.

    Args:
        graph: The channel graph; that of a network pruned already will do.
        scores: As in :func:`plan`.
        target: As in :func:`plan`.
        limits: Group name -> how many channels it may lose; groups that are missing lose none.
        round_to: As in :func:`plan`.
        allocation: As in :func:`plan`.
        partial: Take all that may go where the target is out of reach.
        costs: As in :func:`plan`.

    Raises:
        PlanError: As :func:`plan`.
        UsageError: If a ratio asks a group for more than its constraint allows, or times of layers are missing.
    """
    times = _times(graph, target, round_to, costs)
    candidates: list[_Candidate] = []
    forced: Selection = {}
    for group in graph.groups:
        if group.name not in limits or group.name not in scores:
            continue
        limit = limits[group.name]
        candidate = _candidate(group, scores[group.name], limit, allocation, 1 if round_to == "auto" else round_to)
        if not limit.forced:
            if times is not None:
                candidate.fitting &= paying(times, graph.groups.index(group), len(graph.groups), candidate.ends)
            candidates.append(candidate)
        elif channels := candidate.removed(candidate.ends.size):
            forced[group.name] = channels
    if target is None:
        return forced

    def removed(selection: Selection) -> float:
        return target.removed(graph, PruningPlan(removed=selection), costs)

    if isinstance(allocation, str):
        return _search(graph, candidates, forced, target, removed, partial)
    own = times if target.what == "latency" else costs_of(graph, target.what, target.setting.get("batch", 1))
    assert own is not None
    return _allocated(graph, candidates, forced, target, removed, allocation, own, partial)


def _times(graph: ChannelGraph, target: Target | None, round_to: int | str, costs: Times | None) -> CostOf | None:
    """Return the time of a network by what its groups lose, where the request asks for that."""
    if target is not None and target.what == "latency":
        return target.require_times(costs).of(graph)
    if round_to != "auto":
        return None
    if costs is None:
        raise UsageError(
            "round_to: plan measures nothing; for auto pass costs=secateur.latency(model, graph), which tell what "
            "pays, or let secateur.prune measure."
        )
    return costs.of(graph)


def _candidate(group: ChannelGroup, scores: Tensor, limit: Limit, allocation: Allocation, round_to: int) -> _Candidate:
    """Cut a group's channels into steps, as many as its limit allows, and rank them.

    Raises:
        UsageError: If a ratio names this very group, and fewer can be removed by the group's constraint.
    """
    values = _values(group, scores)
    found = steps(group, np.argsort(values, kind="stable").tolist())
    ends = np.cumsum([len(step) for step in found], dtype=np.int64)
    most = int(ends[-1]) if found else 0
    if limit.demand and any(most < n <= limit.most for n in totals(group)):
        raise UsageError(
            f"{group.name}: {limit.demand} of {group.size} channels is {limit.most}; {most} can go "
            f"({most / group.size:.3g}): {group.constraint or 'every layer keeps at least one'}."
        )
    ends = ends[ends <= limit.most]
    channels = np.array([c for step in found[: ends.size] for c in step], dtype=np.int64)
    if allocation == "uniform":
        keys = ends / group.size
    else:
        scale = float(np.abs(values).mean()) or 1.0
        sums = np.diff(np.cumsum(values[channels])[ends - 1], prepend=0.0)
        keys = sums / np.diff(ends, prepend=0) / (scale if allocation == "normalized" else 1.0)
    return _Candidate(
        group.name, channels, ends, np.maximum.accumulate(keys), group.size, (group.size - ends) % round_to == 0
    )


def _values(group: ChannelGroup, scores: Tensor) -> np.ndarray:
    values = scores.detach().to("cpu").double().numpy()
    if values.shape != (group.size,):
        raise PlanError(f"{group.name}: {group.size} channels need as many scores; found shape {tuple(values.shape)}.")
    if np.isnan(values).any():
        raise PlanError(f"{group.name}: the score of channel {int(np.isnan(values).argmax())} is not a number.")
    return np.asarray(values)


def _search(
    graph: ChannelGraph,
    candidates: list[_Candidate],
    forced: Selection,
    target: Target,
    removed_by: Callable[[Selection], float],
    partial: bool,
) -> Selection:
    """Find the fewest steps, in order of importance over all groups, that meet the target: by bisection.

    Where not every width is allowed, the last of them may take many channels at once, and more than are needed: then
    groups get back what the target can spare, those first that lost the most important channels.

    Raises:
        PlanError: If all steps together do not meet it.
    """
    lengths = [c.keys.size for c in candidates]
    owner = np.repeat(np.arange(len(candidates)), lengths)
    place = np.concatenate([np.arange(n) for n in (0, *lengths)])
    keys = np.concatenate([np.zeros(0), *(c.keys for c in candidates)])
    order = owner[np.lexsort((owner, place, keys))]

    def first(count: int) -> list[int]:
        """Return how many of the first steps are each group's."""
        counts: list[int] = np.bincount(order[:count], minlength=len(candidates)).tolist()
        return counts

    def selected(counts: list[int]) -> Selection:
        found = {c.name: c.removed(n) for c, n in zip(candidates, counts, strict=True)}
        return forced | {name: channels for name, channels in found.items() if channels}

    def removed(count: int) -> float:
        return removed_by(selected(first(count)))

    enough = target.fraction - 1e-12
    if (most := removed(order.size)) < enough:
        if partial:
            return selected(first(order.size))
        raise _out_of_reach(graph, target, most)
    fewest = first(bisect_left(range(order.size), enough, key=removed))
    counts = [c.allowed(n) for c, n in zip(candidates, fewest, strict=True)]
    uneven = [i for i, c in enumerate(candidates) if counts[i] and not c.fitting.all()]
    for i in sorted(uneven, key=lambda i: float(-candidates[i].keys[counts[i] - 1])):
        while counts[i]:
            fewer = [*counts[:i], candidates[i].allowed(counts[i] - 1), *counts[i + 1 :]]
            if removed_by(selected(fewer)) < enough:
                break
            counts = fewer
    return selected(counts)


def _out_of_reach(graph: ChannelGraph, target: Target, most: float) -> PlanError:
    if not graph.groups:
        why = f", such as: {graph.refused[0].reason}" if graph.refused else ""
        return PlanError(f"target: this network has no channels that can go; trace lists the reasons{why}.")
    at = "".join(f", {name} {value}" for name, value in target.setting.items())
    return PlanError(
        f"target: cannot remove {target.fraction:g} of the {target.what}{at}; all that may go is {most:.4g}. "
        f"Lower --{target.what}, or loosen --skip, --max-ratio, --min-channels or --round-to."
    )


def _allocated(
    graph: ChannelGraph,
    candidates: list[_Candidate],
    forced: Selection,
    target: Target,
    reached: Callable[[Selection], float],
    table: Table,
    costs: CostOf,
    partial: bool,
) -> Selection:
    """Find what every group loses by a table of damage, so that the plan meets the target.

    Costs are counted by shares of groups; where a layer reads its group unevenly the plan itself may miss the target
    by a little, and then as much more is asked for.

    Raises:
        PlanError: If the target is out of reach, or the table is of another network.
    """
    places = {group.name: i for i, group in enumerate(graph.groups)}
    start = np.zeros(len(places))
    for name, channels in forced.items():
        start[places[name]] = len(channels)
    allowed = {c.name: c.ends[c.fitting].tolist() for c in candidates}
    found = [choices(table, c.name, c.size, allowed[c.name]) for c in candidates if allowed[c.name]]

    def chosen(removed: np.ndarray) -> Selection:
        own = {c.name: int(removed[places[c.name]]) for c in candidates}
        return forced | {
            c.name: c.removed(int(np.searchsorted(c.ends, own[c.name])) + 1) for c in candidates if own[c.name]
        }

    whole = float(costs(np.zeros(len(places))))
    need = target.fraction * whole
    most = start.copy()
    most[[places[one.group] for one in found]] = [one.removed[-1] for one in found]
    while whole - float(costs(most)) >= need * (1 - 1e-12):
        selection = chosen(allocate(graph, costs, found, start, need))
        short = target.fraction - 1e-12 - reached(selection)
        if short <= 0:
            return selection
        need += max(short, 1e-4) * whole
    if (best := reached(chosen(most))) < target.fraction - 1e-12 and not partial:
        raise _out_of_reach(graph, target, best)
    return chosen(most)
