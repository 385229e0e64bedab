"""The pairs of an episode of CFP: how many of each group, which ones, and the fewest that meet a target."""

from __future__ import annotations

from typing import Any

from secateur.criteria.papers import singh2020cfp as cfp
from secateur.engine import pairing
from secateur.engine.selection import Selection, union
from secateur.engine.settings import Settings
from secateur.engine.state import Removed, State
from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.pruning.options import Options
from secateur.pruning.planning import Target


class Pairs(Selection):
    """Chooses an episode's pairs, so many of every group; see :class:`Selection`.

    Raises:
        UsageError: As :class:`Selection`; if ``pairs`` names no layer, or an option has no place in CFP.
    """

    def __init__(self, graph: ChannelGraph, options: Options, settings: Settings, target: Target | None) -> None:
        self.check(options, settings, target)
        for pattern in settings.pairs if isinstance(settings.pairs, dict) else ():
            if not pairing.known(graph, pattern):
                raise UsageError(f"pairs: {pattern}: no layer has this name or class. See `secateur trace`.")
        groups = pairing.eligible(
            graph,
            internal_only=settings.internal_only,
            linear=bool(settings.linear or settings.widths),
            inexact=options.inexact,
        )
        super().__init__(graph, groups, options, settings, target)

    def parts(self, state: State) -> dict[str, str]:
        """Return what allocates and selects, for reports."""
        allocation = "widths" if self.goals else f"pairs of every layer ({self.settings.pairs})"
        return {"method": "cfp", "allocation": allocation, "selection": f"pairs by {self.settings.order}"}

    @staticmethod
    def check(options: Options, settings: Settings, target: Target | None) -> None:
        """Refuse what has no place in CFP.

        Raises:
            UsageError: If an option, a setting or the target has none.
        """
        if target is not None and target.what == "latency":
            raise UsageError("target: cfp counts no latency; choose another method, such as auto, or give --macs.")
        for name in settings.criterion:
            raise UsageError(f"criterion: cfp takes no option {name!r}; share and signed are settings.")
        if settings.rounds and not settings.widths:
            raise UsageError("rounds: are those of widths, where cfp goes by pairs; set pairs, fraction or widths.")
        if options.allocation is not None:
            raise UsageError(
                "allocation: cfp takes pairs of every layer in its place; set pairs, or choose another method."
            )
        if options.round_to == "auto":
            raise UsageError("round_to: auto is measured on a plan, which cfp makes none of; give a number, such as 8.")

    def counts(self, state: State) -> dict[str, int]:
        """Return how many channels of each group go in this round."""
        chosen = self.settings
        if state.phase == 2:
            groups = [self.groups[state.position]]
            if chosen.phase2_pairs is not None:
                return {group.name: chosen.phase2_pairs for group in groups}
            return self._by_rule(groups)
        counts = self._by_rule(self.groups)
        if self.goals:
            return self._towards_goal(state, counts)
        left = {name: n - len(state.removed.get(name, [])) for name, n in self.demands.items()}
        counts |= {name: min(counts[name], max(0, n)) for name, n in left.items()}
        # Where the target is met, or ratios stand alone, those groups go on that a ratio asks for.
        ratios_alone = bool(self.demands) and self.target_met(state.removed)
        return {name: n for name, n in counts.items() if name in self.demands or not ratios_alone}

    def _by_rule(self, groups: list[ChannelGroup]) -> dict[str, int]:
        rule, fraction = self.settings.pairs, self.settings.fraction
        sizes = [group.size for group in groups]
        if rule == "width":
            numbers = [cfp.pairs_by_width(size, fraction) for size in sizes]
        elif rule == "macs":
            macs = pairing.layer_macs(self.graph)
            shares = [sum(macs.get(name, 0) for name in self._layers(group)) for group in groups]
            numbers = cfp.pairs_by_macs(shares, sizes, fraction)
        elif isinstance(rule, int):
            numbers = [rule] * len(groups)
        elif isinstance(rule, dict):
            starts = [max((s for s in rule if g.name.startswith(s)), key=len, default=None) for g in groups]
            numbers = [0 if start is None else rule[start] for start in starts]
        elif isinstance(rule, tuple):
            distinct = sorted({group.size for group in self.groups})
            if len(distinct) != len(rule):
                raise UsageError(f"pairs: {list(rule)} needs one number for each of the widths {distinct}.")
            numbers = [rule[distinct.index(size)] for size in sizes]
        else:
            raise UsageError(f"pairs: is width, macs, a number, a list or a mapping, found {rule!r}.")
        return {group.name: n for group, n in zip(groups, numbers, strict=True)}

    def choose(self, state: State, graph: ChannelGraph) -> tuple[dict[str, list[list[int]]], Removed]:
        """Choose the pairs, and the channels that go; see :meth:`Selection.choose`."""
        chosen = self.settings
        pairs: dict[str, list[list[int]]] = {}
        for name, count in self.counts(state).items():
            group = graph.group(name)
            if count <= 0 or name in self.left or group.size < 2:
                continue
            found = pairing.select_pairs(
                state.network, graph, group, count, share=chosen.share, signed=chosen.signed,
                floor=self.floors[name], round_to=self._multiple(state), order=chosen.order,
            )  # fmt: skip
            if found:
                alive = self.alive(state, name)
                pairs[name] = [[alive[dropped], alive[kept]] for dropped, kept in found]
            elif not pairing.producers(state.network, graph, group):
                self.left[name] = "it has no filters of 2 elements or more to correlate"
        return self._trimmed(state, graph, pairs)

    def _trimmed(
        self, state: State, graph: ChannelGraph, pairs: dict[str, list[list[int]]]
    ) -> tuple[dict[str, list[list[int]]], Removed]:
        """Shorten the last round to the fewest channels that reach the target; those selected last are kept."""
        going = {name: [dropped for dropped, _ in found] for name, found in pairs.items()}
        blocks = [graph.group(name).blocks for name in going]
        # Blocks lose equal fractions, and a prefix of the selection may not.
        prefixes = not any(len(own) and own.max() > 0 for own in blocks)
        if self.target is None or not prefixes or not self.target_met(union(state.removed, going)):
            return pairs, going
        ends = sorted(
            (count / len(chosen), name, count)
            for name, chosen in going.items()
            if name not in self.demands
            for count in pairing.totals(graph.group(name), self.floors[name], self._multiple(state))
            if count <= len(chosen)
        )

        def taking(count: int) -> dict[str, int]:
            """Return how many channels of each group the first ``count`` ends remove."""
            full = {name: len(chosen) for name, chosen in going.items() if name in self.demands}
            return full | {name: end for _, name, end in ends[:count]}

        def enough(count: int) -> bool:
            return self.target_met(union(state.removed, _firsts(going, taking(count))))

        low, high = 0, len(ends)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle + 1, high)
        kept = taking(low)
        return _firsts(pairs, kept), _firsts(going, kept)


def _firsts(lists: dict[str, list[Any]], counts: dict[str, int]) -> dict[str, list[Any]]:
    return {name: lists[name][:count] for name, count in counts.items() if count}
