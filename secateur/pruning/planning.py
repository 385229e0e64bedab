"""Scores and a target become a plan: which channels go, in names and integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from secateur.errors import PlanError, UsageError
from secateur.graph import cost, shuffles
from secateur.graph.places import lost
from secateur.graph.plan import PruningPlan, Removed, masks
from secateur.graph.shuffles import Order
from secateur.graph.steps import steps
from secateur.pruning.limits import Limits, totals

if TYPE_CHECKING:
    from secateur.graph.channels import ChannelGraph, ChannelGroup


Ranking = Literal["normalized", "global", "uniform"]


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
    names = {g.name: g for g in graph.groups}
    checked: Removed = {}
    for name, chosen in removed.items():
        if name not in names:
            raise PlanError(f"{name}: the graph has no such group. See `secateur trace`.")
        group = names[name]
        channels = sorted({int(c) for c in chosen})
        if not channels:
            continue
        if channels[0] < 0 or channels[-1] >= group.size:
            raise PlanError(f"{name}: channel {channels[-1] if channels[0] >= 0 else channels[0]} does not exist; "
                            f"the group has {group.size}.")  # fmt: skip
        fixed = [c for c in channels if not group.removable[c]]
        if fixed:
            raise PlanError(f"{name}: channel {fixed[0]} can't be removed: it is coupled to one that has to stay.")
        if len(channels) == group.size:
            raise PlanError(f"{name}: cannot remove all {group.size} filters; a layer keeps at least 1.")
        if group.size - len(channels) < group.least:
            raise PlanError(
                f"{name}: cannot remove {len(channels)} of {group.size} channels: at least {group.least} have to stay, "
                "or the network's own code fails or does something else."
            )
        for some in group.staying:
            if (left := int(np.isin(some.channels, channels, invert=True).sum())) < some.least:
                raise PlanError(
                    f"{name}: of {len(some.channels)} channels {some.least} have to stay, and {left} would: the code "
                    "squeezes away a dimension of one index, or compares their number with another."
                )
        if len(channels) % group.multiple:
            raise PlanError(
                f"{name}: cannot remove {len(channels)} channels: they go in multiples of {group.multiple}, since the "
                "network's own code asks for the remainder of their number."
            )
        sizes = np.bincount(group.blocks)
        gone = np.bincount(group.blocks[channels], minlength=sizes.size)
        if group.schedule is not None:
            if not (gone == group.schedule).all(1).any():
                near = group.schedule[np.abs(group.schedule - gone).sum(1).argmin()].tolist()
                raise PlanError(
                    f"{name}: its {sizes.size} blocks can't lose {gone.tolist()} channels; "
                    f"the nearest that they can is {near}. Choose a step of the group's schedule."
                )
        elif (gone * sizes[0] != gone[0] * sizes).any():
            raise PlanError(
                f"{name}: its {sizes.size} blocks have to lose equal fractions ({group.constraint}); "
                f"found {gone.tolist()} of {sizes.tolist()}. Choose as many channels in every block."
            )
        checked[name] = channels
    return _build(graph, checked)


def _build(graph: ChannelGraph, removed: Removed) -> PruningPlan:
    gone_of = masks(graph, removed)
    ranks = shuffles.ranks(graph.shuffles, gone_of)
    touched = {i for i, g in enumerate(graph.groups) if g.name in removed}
    kept_outputs: dict[str, list[int]] = {}
    kept_inputs: dict[str, list[int]] = {}
    direct: set[str] = set()
    outside = {name for port in graph.layers if not port.owned for name in (port.weight, *port.parts)}
    for port in graph.layers:
        if not port.owned:
            continue
        gone_out = lost(port.out_group, port.out_channel, gone_of)
        gone_in = lost(port.in_group, port.in_channel, gone_of)
        for gone in (gone_out, gone_in):
            if gone.size and gone.all():
                raise PlanError(f"{port.module}: cannot remove all {gone.size} channels; a layer keeps at least 1.")
        if gone_out.any():
            kept_outputs[port.module] = shuffles.arranged(np.flatnonzero(~gone_out), port.out_order, ranks).tolist()
        if gone_in.any():
            kept_inputs[port.module] = shuffles.arranged(np.flatnonzero(~gone_in), port.in_order, ranks).tolist()
        if port.weight == _qualified(port.module, "weight"):
            direct |= {port.weight, _qualified(port.module, "bias")}
    kept: dict[tuple[str, int], np.ndarray] = {}
    orders: dict[tuple[str, int], Order] = {}
    blocks: dict[str, int] = {}
    reads: dict[str, dict[int, list[int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for index in sorted(touched):
        for member in graph.groups[index].members:
            gone = member.positions[gone_of[index][member.channels]]
            if not gone.size:
                continue
            shape = graph.shapes[member.tensor]
            shapes[member.tensor] = shape
            if member.read and member.tensor in outside and (member.blocks == 1 or member.tensor not in direct):
                dims = reads.setdefault(member.tensor, {})
                before = dims.get(member.dim, range(shape[member.dim] * member.blocks))
                dims[member.dim] = sorted(set(before) - set(gone.tolist()))
            if member.tensor in direct:
                continue
            mask = kept.setdefault((member.tensor, member.dim), np.ones(shape[member.dim] * member.blocks, dtype=bool))
            mask[gone] = False
            if member.order is not None:
                nowhere = np.full(mask.size, -1)
                order = orders.setdefault((member.tensor, member.dim), Order(nowhere, nowhere.copy()))
                order.shuffle[member.positions] = member.order.shuffle
                order.place[member.positions] = member.order.place
            if member.blocks > 1:
                blocks[member.tensor] = member.blocks
    kept_tensors: dict[str, dict[int, list[int]]] = {}
    for (name, dim), mask in kept.items():
        left = shuffles.arranged(np.flatnonzero(mask), orders.get((name, dim)), ranks)
        kept_tensors.setdefault(name, {})[dim] = left.tolist()
    attributes: dict[str, dict[str, int]] = {}
    for rule in graph.attributes:
        gone = lost(rule.group, rule.channel, gone_of)
        if gone.any():
            attributes.setdefault(rule.module, {})[rule.name] = rule.value - int(gone.sum())
    magnitudes = {
        m.tensor: (m.direction, m.dim) for m in graph.magnitudes if set(kept_tensors.get(m.direction, ())) - {m.dim}
    }
    return PruningPlan(
        kept_outputs=kept_outputs,
        kept_inputs=kept_inputs,
        kept_tensors=kept_tensors,
        blocks=blocks,
        reads=reads,
        magnitudes=magnitudes,
        attributes=attributes,
        removed=removed,
        shapes=shapes,
    )


def _qualified(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


@dataclass(eq=False)
class _Candidate:
    """One group that may lose channels: its steps, least important first, and what each costs in importance."""

    name: str
    channels: np.ndarray
    """The channels of all steps, one step after the other."""
    ends: np.ndarray
    """Number of channels after each step."""
    keys: np.ndarray
    size: int

    def removed(self, count: int, round_to: int) -> list[int]:
        """Return the channels of the first ``count`` steps, less those that rounding gives back."""
        while count and (self.size - int(self.ends[count - 1])) % round_to:
            count -= 1
        return [int(c) for c in np.sort(self.channels[: self.ends[count - 1] if count else 0])]


def plan(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    target: Target | None = None,
    *,
    round_to: int = 1,
    min_channels: int = 1,
    max_ratio: float | Mapping[str, float] = 1.0,
    ratios: Mapping[str, float] | None = None,
    skip: Sequence[str] = (),
    ranking: Ranking = "normalized",
    inexact: bool = False,
) -> PruningPlan:
    """Choose the channels to remove: the lowest scores first, until the target is met.

    Args:
        graph: The traced network.
        scores: Group name -> one score a channel, shape ``(group.size,)``; the higher, the more important. Groups
            without scores are left alone.
        target: The fraction of MACs, parameters or channels to remove; None to follow ``ratios`` alone.
        round_to: Kept channels are a multiple of this in every group that loses any.
        min_channels: A group keeps at least this many channels.
        max_ratio: A group loses at most this fraction of its channels; or pattern -> fraction, for the groups that
            each pattern names.
        ratios: Pattern -> fraction of channels to remove from every group that it names, whatever the target says. A
            pattern is the name of a module, with wildcards, or its class; it names the groups whose channels such a
            layer, or a layer in such a module, makes. The pattern ``*`` stands for the groups that no other pattern
            names; a ratio of it gives way to ``skip``, ``min_channels``, ``round_to`` and the caps of other patterns,
            where any other ratio that contradicts them is an error.
        skip: Patterns of groups that lose nothing.
        ranking: ``normalized`` ranks all channels together, each score divided by its group's mean; ``global`` ranks
            the scores as they are; ``uniform`` removes the same fraction from every group.
        inexact: Whether groups whose removal can't equal zeroing may lose channels.

    Returns:
        The plan that removes the least important channels and meets the target.

    Raises:
        PlanError: If the target can't be met, scores don't fit a group, or a channel's score is not a number.
        UsageError: If two requests contradict each other or an argument is out of range.
    """
    if target is None and not ratios:
        raise UsageError("plan: nothing is asked for: give a target or ratios.")
    if ranking not in ("normalized", "global", "uniform"):
        raise UsageError(f"ranking: expected normalized, global or uniform; found {ranking!r}.")
    groups = [g for g in graph.groups if g.name in scores and (g.exact or inexact)]
    limits = Limits(
        graph, groups, ratios=ratios or {}, max_ratio=max_ratio, skip=skip, round_to=round_to, min_channels=min_channels
    )
    candidates: list[_Candidate] = []
    forced: Removed = {}
    for group in groups:
        limit = limits.of(group)
        values = _values(group, scores[group.name])
        found = steps(group, np.argsort(values, kind="stable").tolist())
        ends = np.cumsum([len(step) for step in found], dtype=np.int64)
        most = int(ends[-1]) if found else 0
        if limit.demand and any(most < n <= limit.most for n in totals(group)):
            raise UsageError(
                f"{group.name}: {limit.demand} of {group.size} channels is {limit.most}; {most} can go "
                f"({most / group.size:.3g}): {group.constraint or 'every layer keeps at least one'}."
            )
        if not found:
            continue
        # As many whole steps as the limit allows.
        ends = ends[ends <= limit.most]
        taken = np.array([c for step in found[: ends.size] for c in step], dtype=np.int64)
        if ranking == "uniform":
            keys = ends / group.size
        else:
            scale = float(np.abs(values).mean()) or 1.0
            sums = np.diff(np.cumsum(values[taken])[ends - 1], prepend=0.0)
            keys = sums / np.diff(ends, prepend=0) / (scale if ranking == "normalized" else 1.0)
        candidate = _Candidate(group.name, taken, ends, np.maximum.accumulate(keys), group.size)
        if not limit.forced:
            candidates.append(candidate)
        elif removed := candidate.removed(ends.size, round_to):
            forced[group.name] = removed
    if target is None:
        return _build(graph, forced)
    return _search(graph, candidates, forced, target, round_to)


def _values(group: ChannelGroup, scores: Tensor) -> np.ndarray:
    values = scores.detach().to("cpu").double().numpy()
    if values.shape != (group.size,):
        raise PlanError(f"{group.name}: {group.size} channels need as many scores; found shape {tuple(values.shape)}.")
    if np.isnan(values).any():
        raise PlanError(f"{group.name}: the score of channel {int(np.isnan(values).argmax())} is not a number.")
    return np.asarray(values)


def _search(
    graph: ChannelGraph, candidates: list[_Candidate], forced: Removed, target: Target, round_to: int
) -> PruningPlan:
    """Find the fewest steps, in order of importance over all groups, that meet the target."""
    lengths = [len(c.keys) for c in candidates]
    owner = np.repeat(np.arange(len(candidates)), lengths)
    place = np.concatenate([np.arange(n) for n in lengths]) if candidates else owner
    keys = np.concatenate([c.keys for c in candidates]) if candidates else np.zeros(0)
    order = owner[np.lexsort((owner, place, keys))]

    def taking(count: int) -> PruningPlan:
        taken = np.bincount(order[:count], minlength=len(candidates))
        removed = dict(forced)
        for candidate, steps_taken in zip(candidates, taken.tolist(), strict=True):
            if gone := candidate.removed(steps_taken, round_to):
                removed[candidate.name] = gone
        return PruningPlan(removed=removed)

    def enough(candidate: PruningPlan) -> bool:
        return target.removed(graph, candidate) >= target.fraction - 1e-12

    everything = taking(len(order))
    if not enough(everything):
        most = target.removed(graph, everything)
        raise PlanError(
            f"target: cannot remove {target.fraction:g} of the {target.what}; all that may go is {most:.4g}. "
            f"Lower --{target.what}, or loosen --skip, --max-ratio, --min-channels or --round-to."
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if enough(taking(middle)):
            high = middle
        else:
            low = middle + 1
    return _build(graph, taking(low).removed)
