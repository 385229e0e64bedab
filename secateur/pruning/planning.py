"""Scores and a target become a selection of channels, and this a plan."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Unpack

import numpy as np
from torch import Tensor

from secateur.errors import PlanError, UsageError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan, Selection
from secateur.graph.steps import steps
from secateur.pruning.allocation import Table, allocate, choices, costs_of
from secateur.pruning.building import build, checked
from secateur.pruning.limits import Limit, Limits, totals
from secateur.pruning.options import SENSITIVITY, Allocation, OptionKeywords, Options


@dataclass(frozen=True)
class Target:
    """How much to remove: each a fraction of the unpruned network's, in (0, 1); exactly one is given."""

    macs: float | None = None
    params: float | None = None
    channels: float | None = None

    def __post_init__(self) -> None:
        """Check the fractions.

        Raises:
            UsageError: If not exactly one is given, or it is outside (0, 1).
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            raise UsageError(
                f"target: give exactly one of macs, params and channels; found {', '.join(given) or 'none'}."
            )
        for name, value in given.items():
            if not 0 < value < 1:
                raise UsageError(f"target: {name} is the fraction to remove, between 0 and 1; found {value}.")

    @property
    def what(self) -> str:
        """The quantity that the target counts."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction of it to remove."""
        return float(getattr(self, self.what))

    def removed(self, graph: ChannelGraph, plan: PruningPlan) -> float:
        """Return the fraction of the quantity that a plan removes."""
        if self.what == "channels":
            total = sum(g.size for g in graph.groups)
            return sum(len(v) for v in plan.removed.values()) / total if total else 0.0
        count = cost.macs if self.what == "macs" else cost.parameters
        before = count(graph)
        return 1 - count(graph, plan) / before if before else 0.0


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

    def removed(self, count: int, round_to: int) -> list[int]:
        """Return the channels of the first ``count`` steps, or of as many fewer as rounding asks for."""
        while count and (self.size - int(self.ends[count - 1])) % round_to:
            count -= 1
        return [int(c) for c in np.sort(self.channels[: self.ends[count - 1] if count else 0])]


def plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    target: Target | None = None,
    **options: Unpack[OptionKeywords],
) -> PruningPlan:
    """Choose the channels to remove: the lowest scores first, until the target is met.

    Args:
        graph: The traced network.
        scores: Group name -> one score a channel, shape ``(group.size,)``; the higher, the more important. Groups
            without scores are left alone.
        target: The fraction of MACs, parameters or channels to remove; None to follow ``ratios`` alone.
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
    if chosen.round_to == "auto":
        raise UsageError("round_to: plan measures nothing; give a number, or let secateur.prune measure it.")
    groups = [g for g in graph.groups if g.name in scores and (g.exact or chosen.inexact)]
    limits = Limits(graph, groups, chosen).by_group
    allocation = chosen.allocation or "normalized"
    return build(graph, choose(graph, scores, target, limits, round_to=chosen.round_to, allocation=allocation))


def choose(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    target: Target | None,
    limits: Mapping[str, Limit],
    *,
    round_to: int = 1,
    allocation: Allocation = "normalized",
    partial: bool = False,
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

    Raises:
        PlanError: As :func:`plan`.
        UsageError: If a ratio asks a group for more than its constraint allows.
    """
    candidates: list[_Candidate] = []
    forced: Selection = {}
    for group in graph.groups:
        if group.name not in limits or group.name not in scores:
            continue
        limit = limits[group.name]
        candidate = _candidate(group, scores[group.name], limit, allocation)
        if not limit.forced:
            candidates.append(candidate)
        elif channels := candidate.removed(candidate.ends.size, round_to):
            forced[group.name] = channels
    if target is None:
        return forced
    if isinstance(allocation, str):
        return _search(graph, candidates, forced, target, round_to, partial)
    return _allocated(graph, candidates, forced, target, round_to, allocation, partial)


def _candidate(group: ChannelGroup, scores: Tensor, limit: Limit, allocation: Allocation) -> _Candidate:
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
    return _Candidate(group.name, channels, ends, np.maximum.accumulate(keys), group.size)


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
    round_to: int,
    partial: bool,
) -> Selection:
    """Find the fewest steps, in order of importance over all groups, that meet the target: by bisection.

    Raises:
        PlanError: If all steps together do not meet it.
    """
    lengths = [c.keys.size for c in candidates]
    owner = np.repeat(np.arange(len(candidates)), lengths)
    place = np.concatenate([np.arange(n) for n in (0, *lengths)])
    keys = np.concatenate([np.zeros(0), *(c.keys for c in candidates)])
    order = owner[np.lexsort((owner, place, keys))]

    def first(count: int) -> Selection:
        """Return what the first steps remove of all groups."""
        counts = np.bincount(order[:count], minlength=len(candidates)).tolist()
        found = {c.name: c.removed(n, round_to) for c, n in zip(candidates, counts, strict=True)}
        return forced | {name: channels for name, channels in found.items() if channels}

    def removed(count: int) -> float:
        return target.removed(graph, PruningPlan(removed=first(count)))

    enough = target.fraction - 1e-12
    if (most := removed(order.size)) < enough:
        if partial:
            return first(order.size)
        raise _out_of_reach(graph, target, most)
    return first(bisect_left(range(order.size), enough, key=removed))


def _out_of_reach(graph: ChannelGraph, target: Target, most: float) -> PlanError:
    if not graph.groups:
        why = f", such as: {graph.refused[0].reason}" if graph.refused else ""
        return PlanError(f"target: this network has no channels that can go; trace lists the reasons{why}.")
    return PlanError(
        f"target: cannot remove {target.fraction:g} of the {target.what}; all that may go is {most:.4g}. "
        f"Lower --{target.what}, or loosen --skip, --max-ratio, --min-channels or --round-to."
    )


def _allocated(
    graph: ChannelGraph,
    candidates: list[_Candidate],
    forced: Selection,
    target: Target,
    round_to: int,
    table: Table,
    partial: bool,
) -> Selection:
    """Find what every group loses by a table of damage, so that the plan meets the target.

    Costs are counted by shares of groups; where a layer reads its group unevenly the plan itself may miss the target
    by a little, and then as much more is asked for.

    Raises:
        PlanError: If the target is out of reach, or the table is of another network.
    """
    costs = costs_of(graph, target.what)
    places = {group.name: i for i, group in enumerate(graph.groups)}
    start = np.zeros(len(places))
    for name, channels in forced.items():
        start[places[name]] = len(channels)
    allowed = {c.name: [int(n) for n in c.ends if (c.size - n) % round_to == 0] for c in candidates}
    found = [choices(table, c.name, c.size, allowed[c.name]) for c in candidates if allowed[c.name]]

    def chosen(removed: np.ndarray) -> Selection:
        own = {c.name: int(removed[places[c.name]]) for c in candidates}
        return forced | {
            c.name: c.removed(int(np.searchsorted(c.ends, own[c.name])) + 1, round_to)
            for c in candidates
            if own[c.name]
        }

    def reached(selection: Selection) -> float:
        return target.removed(graph, PruningPlan(removed=selection))

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
