"""How many channels each group may lose: ratios, caps and skips by pattern, and where two of them contradict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.pruning.options import Options

EVERY = "*"
"""The pattern of a general request: it stands for the groups that no other pattern of the same mapping names."""


def matches(group: ChannelGroup, pattern: str, graph: ChannelGraph) -> bool:
    """Tell whether a pattern names a group.

    A group is named by its own name; by the name of a layer that makes its channels, or of a module around such a
    layer; and by the class of either. So ``layer1`` names the groups of all layers in it.
    """
    return fnmatchcase(group.name, pattern) or any(names(pattern, m.module, graph) for m in group.producers)


def names(pattern: str, module: str, graph: ChannelGraph) -> bool:
    """Tell whether a pattern names a module or one around it, by name or by class; wildcards name the module only."""
    parts = module.split(".")
    around = [".".join(parts[:n]) for n in range(len(parts) + 1)]
    return fnmatchcase(module, pattern) or any(pattern in (place, graph.module_types.get(place)) for place in around)


@dataclass(frozen=True)
class Limit:
    """How many channels one group loses."""

    most: int
    """Channels that may be removed at most."""
    forced: bool = False
    """Whether a ratio asks for that many, whatever the target says."""
    demand: str = ""
    """The ratio in words where a pattern other than ``*`` asks for it, so that to remove fewer is an error."""


@dataclass(frozen=True)
class _Request:
    """A fraction that is asked for of the groups that a pattern names."""

    what: str
    """``ratio`` or ``max_ratio``."""
    pattern: str
    value: float

    @property
    def general(self) -> bool:
        """Whether it gives way to other requests, where any that is not general contradicts them."""
        return self.pattern == EVERY

    def __str__(self) -> str:
        by = "" if self.general else f" (by {self.pattern!r})"
        return f"{self.what} {self.value:g}{by}"


class Limits:
    """What a request lets each group lose.

    Args:
        graph: The traced network.
        groups: Those of its groups that may lose channels at all.
        options: ``ratios``, ``max_ratio``, ``skip``, ``round_to`` and ``min_channels`` of them.

    Raises:
        UsageError: If a pattern names no layer, a ratio names nothing that may be removed, or two requests contradict
            each other.
    """

    def __init__(self, graph: ChannelGraph, groups: Sequence[ChannelGroup], options: Options) -> None:
        self._graph, self._skip, self._min_channels = graph, options.skip, options.min_channels
        self._round_to = 1 if options.round_to == "auto" else options.round_to
        caps = options.max_ratio if isinstance(options.max_ratio, Mapping) else {EVERY: options.max_ratio}
        self._ratios = [_Request("ratio", pattern, value) for pattern, value in options.ratios.items()]
        self._caps = [_Request("max_ratio", pattern, value) for pattern, value in caps.items()]
        for pattern in (*(r.pattern for r in (*self._ratios, *self._caps)), *self._skip):
            self._check_pattern(pattern)
        self.by_group = {group.name: self._limit(group) for group in groups}
        """Group -> how many channels it loses."""
        for ratio in self._ratios:
            if ratio.value > 0 and not ratio.general and not any(matches(g, ratio.pattern, graph) for g in groups):
                raise UsageError(self._why_in_vain(ratio))

    def _check_pattern(self, pattern: str) -> None:
        graph = self._graph
        known = {t.rpartition(".")[0] for r in graph.refused for t in r.tensors} | set(graph.module_types)
        named = any(fnmatchcase(module, pattern) for module in known) or pattern in graph.module_types.values()
        if not named and not any(matches(group, pattern, graph) for group in graph.groups):
            raise UsageError(f"{pattern}: no layer has this name or class. See `secateur trace`.")

    def _request_for(self, group: ChannelGroup, requests: Sequence[_Request]) -> _Request | None:
        """Return the request whose pattern names a group; the general one where no other does."""
        found = [r for r in requests if not r.general and matches(group, r.pattern, self._graph)]
        if any(r.pattern == group.name for r in found):
            # A layer may make channels of several groups, one of which has its name: that one alone is meant then.
            others = {g.name for g in self._graph.groups} - {group.name}
            found = [r for r in found if r.pattern not in others]
        for other in found[1:]:
            if other.value != found[0].value:
                raise UsageError(f"{group.name}: {found[0]} contradicts {other}.")
        return found[0] if found else next((r for r in requests if r.general), None)

    def _limit(self, group: ChannelGroup) -> Limit:
        ratio, cap = self._request_for(group, self._ratios), self._request_for(group, self._caps)
        skipped = next((p for p in self._skip if matches(group, p, self._graph)), None)
        if skipped is not None:
            if ratio is not None and ratio.value > 0 and not ratio.general:
                raise UsageError(f"{group.name}: {ratio} contradicts skip {skipped!r}.")
            return Limit(0)
        fraction = 1.0
        if cap is not None:
            self._check_cap(group, cap)
            fraction = cap.value
        if ratio is not None:
            gives_way = ratio.general and cap is not None and not cap.general
            if ratio.value > fraction and not gives_way:
                raise UsageError(f"{group.name}: {ratio} contradicts {cap}; lower the one or raise the other.")
            self._check_ratio(group, ratio)
            fraction = min(ratio.value, fraction)
        most = min(_channels_in(fraction, group), group.size - self._min_channels)
        demand = "" if ratio is None or ratio.general else str(ratio)
        return Limit(max(most, 0), ratio is not None, demand)

    def _check_ratio(self, group: ChannelGroup, ratio: _Request) -> None:
        """Refuse a ratio that ``min_channels`` or ``round_to`` forbids; a general one gives way to them."""
        if ratio.general:
            return
        size, count = group.size, _channels_in(ratio.value, group)
        if size - count < self._min_channels:
            raise UsageError(f"{group.name}: {ratio} of {size} channels contradicts min_channels {self._min_channels}.")
        least = self._fewest(group)
        if any(n <= count for n in totals(group)) and (least is None or count < least):
            raise UsageError(
                f"{group.name}: {ratio} of {size} channels contradicts round_to {self._round_to}: "
                f"{_rounded(group, least)}."
            )

    def _check_cap(self, group: ChannelGroup, cap: _Request) -> None:
        """Refuse a cap under which ``round_to`` lets the group lose nothing; a general one gives way to it."""
        least = self._fewest(group)
        if cap.general or cap.value == 0 or self._round_to == 1 or least is None:
            return
        if _channels_in(cap.value, group) < least <= group.size - self._min_channels:
            raise UsageError(
                f"{group.name}: {cap} of {group.size} channels contradicts round_to {self._round_to}: "
                f"{_rounded(group, least)}. Raise the one, lower the other, or give 0."
            )

    def _fewest(self, group: ChannelGroup) -> int | None:
        """Return the smallest number of channels that a group may lose if any; None where rounding forbids all."""
        return next((n for n in totals(group) if (group.size - n) % self._round_to == 0), None)

    def _why_in_vain(self, ratio: _Request) -> str:
        """Say why a ratio names nothing that may be removed."""
        named = [g for g in self._graph.groups if matches(g, ratio.pattern, self._graph)]
        inexact = next((g for g in named if not g.exact), None)
        if inexact is not None:
            return (
                f"{inexact.name}: {ratio}, but its removal can't equal zeroing ({inexact.reason}); "
                "pass inexact (--inexact) or leave it out."
            )
        if named:
            return f"{named[0].name}: {ratio}, but the group has no scores; score it, too, or leave it out."
        for refusal in self._graph.refused:
            for tensor in refusal.tensors:
                module = tensor.rpartition(".")[0]
                if names(ratio.pattern, module, self._graph):
                    return f"{module}: {ratio}, but its channels can't be removed: {refusal.operator}: {refusal.reason}"
        return f"{ratio.pattern}: {ratio}, but it names no channels that can be removed. See `secateur trace`."


def _channels_in(fraction: float, group: ChannelGroup) -> int:
    """Return how many whole channels a fraction of a group is: 0.3 of 10 are 3, though 0.3 * 10 may be less in fp64."""
    return int(fraction * group.size + 1e-9)


def totals(group: ChannelGroup) -> list[int]:
    """Return the numbers of channels that can be removed of a group by its constraint, ascending."""
    if group.schedule is not None:
        return [int(n) for n in group.schedule.sum(1) if n <= group.size - group.least]
    step = int(group.quota.sum())
    return list(range(step, group.size - group.least + 1, step))


def _rounded(group: ChannelGroup, least: int | None) -> str:
    """Say what rounding leaves of a group's choices."""
    if least is None:
        return "no number of channels that may go leaves a multiple"
    return f"the group loses at least {least} channels ({least / group.size:.3g}) or none"
