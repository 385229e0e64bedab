"""The channels that an episode removes: how many of each group, which ones, and the fewest that meet a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur import criteria
from secateur.criteria.papers import singh2020cfp as cfp
from secateur.criteria.registry import NotDefinedError
from secateur.engine import pairing
from secateur.engine.settings import Settings
from secateur.engine.state import Removed, State
from secateur.engine.way import deciding
from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan
from secateur.pruning.limits import Limits
from secateur.pruning.options import Options
from secateur.pruning.planning import Target, plan_removal
from secateur.training import passes
from secateur.training.passes import Batches
from secateur.training.stages import Loss


class Selection:
    """Chooses an episode's channels; holds everything about that choice which does not change over a run.

    Args:
        graph: Channel graph of the unpruned network.
        method: ``cfp``, or the name of a criterion (or the criterion itself).
        settings: The run's settings.
        target: Fraction to remove; None where widths or the tolerance decide.
        seed: Seed of a criterion's random draws.
        train: Training batches, for a criterion that looks at data.
        loss: The training loss, for a criterion that needs gradients.

    Raises:
        UsageError: If the settings leave no group to prune, ``skip`` or ``pairs`` names no layer, widths name no group
            or are out of reach, or the criterion is unknown or has no such option.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        method: Any,
        settings: Settings,
        *,
        target: Target | None,
        seed: int,
        train: Batches,
        loss: Loss | None,
    ) -> None:
        self.graph, self.method, self.settings, self.target = graph, method, settings, target
        self.seed, self.train, self.loss = seed, train, loss
        self.selective = selective(method, settings.criterion)
        self.left: dict[str, str] = {}
        """Groups that the criterion turned out not to be defined on -> why."""
        by_name = {"skip": settings.skip, "pairs": settings.pairs if isinstance(settings.pairs, dict) else ()}
        for setting, patterns in by_name.items():
            for pattern in patterns:
                if not pairing.known(graph, pattern, starts=setting == "pairs"):
                    raise UsageError(f"{setting}: {pattern}: no layer has this name or class. See `secateur trace`.")
        self.groups = pairing.eligible(
            graph,
            internal_only=settings.internal_only,
            linear=settings.linear or bool(settings.widths),
            skip=settings.skip,
        )
        limits = Limits(
            graph, self.groups, Options(max_ratio=settings.max_ratio, min_channels=settings.min_channels)
        ).by_group
        self.floors = {group.name: group.size - limits[group.name].most for group in self.groups}
        self.goals = [self._goal(widths) for widths in settings.widths]
        if self.goals:
            named = {name for goal in self.goals for name in goal}
            self.groups = [group for group in self.groups if group.name in named]
        if not self.groups:
            raise UsageError(
                "compress: the network has no group of filters that these settings let go; see trace for the reasons."
            )

    def plan(self, removed: Removed) -> PruningPlan:
        """Return the plan, for the unpruned network, that removes these channels."""
        return plan_removal(self.graph, removed) if removed else PruningPlan()

    def alive(self, state: State, group: str) -> list[int]:
        """Return the channels that a group still has."""
        removed = set(state.removed.get(group, []))
        return [c for c in range(self.graph.group(group).size) if c not in removed]

    def removed_share(self, removed: Removed) -> float:
        """Return the fraction removed, of what the target counts."""
        assert self.target is not None
        return self.target.removed(self.graph, self.plan(removed))

    def reached(self, removed: Removed) -> bool:
        """Tell whether the target is met."""
        assert self.target is not None
        return self.removed_share(removed) >= self.target.fraction - 1e-12

    def _goal(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Turn widths by module into widths by group."""
        goal: dict[str, int] = {}
        for module, width in widths.items():
            found = [g for g in self.groups if module in self._layers(g)]
            if not found:
                known = ", ".join(g.name for g in self.groups)
                raise UsageError(f"widths: {module} has no filters that can be pruned here; groups are {known}.")
            group = found[0]
            if not group.size - pairing.most_removable(group, 1) <= width <= group.size:
                raise UsageError(
                    f"widths: {module} can have 1 to {group.size} filters within its constraint, found {width}."
                )
            if width < self.floors[group.name]:
                raise UsageError(
                    f"widths: {module} is to have {width} of {group.size} filters, which contradicts min_channels or "
                    f"max_ratio: they keep {self.floors[group.name]}."
                )
            if goal.get(group.name, width) != width:
                raise UsageError(
                    f"widths: {module} shares its channels with {group.name}, which is to have {goal[group.name]}."
                )
            goal[group.name] = width
        return goal

    def _layers(self, group: ChannelGroup) -> list[str]:
        """Return the names of the layers that make a group's channels."""
        return [self.graph.layer_of(member) for member in group.producers]

    def counts(self, state: State) -> dict[str, int]:
        """Return how many channels of each group go in this round."""
        chosen = self.settings
        groups = [self.groups[state.position]] if state.phase == 2 else self.groups
        if state.phase == 2 and chosen.phase2_pairs is not None:
            return {group.name: chosen.phase2_pairs for group in groups}
        counts = self._by_rule(groups)
        if not self.goals:
            return counts
        goal = self.goals[state.goal]
        left = {name: len(self.alive(state, name)) - width for name, width in goal.items()}
        if not chosen.rounds:
            return {name: min(counts[name], n) for name, n in left.items()}
        remaining = max(1, chosen.rounds[state.goal] - state.goal_round)
        return {name: self._paced(n, goal[name], remaining) for name, n in left.items()}

    def _paced(self, left: int, width: int, rounds: int) -> int:
        """Return how many of the ``left`` channels above the final ``width`` this round removes."""
        if left <= 0 or rounds == 1:
            return max(0, left)
        if self.settings.pace == "linear":
            return round(left / rounds)
        now = left + width
        kept = math.pow(width / now, 1 / rounds)
        return min(left, round(now * (1 - kept)))

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

    def choose(
        self, state: State, graph: ChannelGraph, counts: Mapping[str, int]
    ) -> tuple[dict[str, list[list[int]]], Removed]:
        """Choose the pairs (CFP only) and the channels of an episode.

        Args:
            state: Where the run stands.
            graph: Channel graph of the network as it is now.
            counts: Channels wanted of each group.

        Returns:
            Group name -> [dropped, kept] channels, and group name -> channels that go.
        """
        pairs, going = self._choose(state, graph, counts)
        alive = {name: self.alive(state, name) for name in going}
        return (
            {name: [[alive[name][d], alive[name][k]] for d, k in found] for name, found in pairs.items()},
            {name: [alive[name][c] for c in found] for name, found in going.items()},
        )

    def _choose(self, state: State, graph: ChannelGraph, counts: Mapping[str, int]) -> tuple[pairing.Pairs, Removed]:
        """Choose pairs or channels, numbered as in the present network."""
        chosen = self.settings
        wanted = {
            name: n for name, n in counts.items() if n > 0 and name not in self.left and graph.group(name).size > 1
        }
        pairs: pairing.Pairs = {}
        if self.method == "cfp":
            for name, count in wanted.items():
                paired = pairing.select_pairs(
                    state.network, graph, graph.group(name), count,
                    share=chosen.share, signed=chosen.signed, min_width=self.floors[name], order=chosen.order,
                )  # fmt: skip
                if paired:
                    pairs[name] = paired
                elif not pairing.producers(state.network, graph, graph.group(name)):
                    self.left[name] = "it has no filters of 2 elements or more to correlate"
            return pairs, {name: [d for d, _ in paired] for name, paired in pairs.items()}
        try:
            found = self._by_criterion(state, graph, wanted)
        except NotDefinedError as error:
            self.left |= dict.fromkeys(wanted, str(error).rstrip("."))
            return {}, {}
        for name in wanted.keys() - found.keys():
            self.left[name] = f"criterion {criteria.get(self.method).name} is not defined on it"
        return {}, {name: channels for name, channels in found.items() if channels}

    def _by_criterion(self, state: State, graph: ChannelGraph, wanted: Mapping[str, int]) -> Removed:
        """Choose channels by the criterion; groups that it is not defined on are missing."""
        if not wanted:
            return {}
        if self.selective:
            return self._criterion_selection(state, graph, wanted)
        scores = self._criterion_scores(state, graph, list(wanted))
        return {
            name: pairing.select_lowest(graph.group(name), scores[name], wanted[name], min_width=self.floors[name])
            for name in wanted
            if name in scores
        }

    def _criterion_scores(self, state: State, graph: ChannelGraph, groups: list[str]) -> dict[str, Tensor]:
        from secateur.criteria.scoring import score

        with passes.seeded(self.seed, state.round, 1):
            data = Some(self.train, self.settings.criterion_batches)
            return score(
                state.network, graph, self.method, data=data, groups=groups, loss=self.loss, seed=self.seed,
                **self.settings.criterion,
            )  # fmt: skip

    def _criterion_selection(self, state: State, graph: ChannelGraph, wanted: Mapping[str, int]) -> Removed:
        from secateur.criteria.scoring import select

        counts = {name: pairing.whole(graph.group(name), n, self.floors[name]) for name, n in wanted.items()}
        with passes.seeded(self.seed, state.round, 1):
            data = Some(self.train, self.settings.criterion_batches)
            found = select(
                state.network, graph, self.method, counts, data, loss=self.loss, seed=self.seed,
                **self.settings.criterion,
            )  # fmt: skip
        return {name: list(selected.removed) for name, selected in found.items()}

    def trim(self, state: State) -> None:
        """Shorten the last round to the fewest channels that reach the target; those selected last are kept."""
        order = [
            (place / len(chosen), name, place) for name, chosen in state.going.items() for place in range(len(chosen))
        ]
        steps = {name: pairing.step_size(self.graph.group(name)) for name in state.going}

        def taking(count: int) -> Removed:
            counts = dict.fromkeys(state.going, 0)
            for _, name, place in sorted(order)[:count]:
                counts[name] = place + 1
            return {name: state.going[name][: -(-n // steps[name]) * steps[name]] for name, n in counts.items() if n}

        if any(len(self.graph.group(name).blocks) and self.graph.group(name).blocks.max() > 0 for name in state.going):
            return  # blocks lose equal fractions, and a prefix of the selection may not

        low, high = 1, len(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.reached(union(state.removed, taking(middle))) else (middle + 1, high)
        state.going = taking(low)
        kept = {name: set(channels) for name, channels in state.going.items()}
        state.pairs = {
            name: [pair for pair in chosen if pair[0] in kept.get(name, set())] for name, chosen in state.pairs.items()
        }
        state.pairs = {name: chosen for name, chosen in state.pairs.items() if chosen}


def selective(method: Any, options: Mapping[str, Any]) -> bool:
    """Tell whether a criterion selects by itself: whether an option is given that decides a selection and no score.

    Raises:
        UsageError: If the criterion is unknown, or has no such option.
    """
    if method == "cfp":
        if options:
            raise UsageError(f"criterion: cfp takes no option {next(iter(options))!r}; share and signed are settings.")
        return False
    criterion = criteria.get(method)
    found = bool(deciding(criterion, options))
    criterion.check(options, found)
    return found


class Some:
    """The first ``count`` batches of some data, the same at every walk through them."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            if number >= self.count:
                return
            yield batch


def union(first: Mapping[str, list[int]], second: Mapping[str, list[int]]) -> Removed:
    """Return the channels of either selection."""
    return {
        name: sorted({*first.get(name, []), *second.get(name, [])})
        for name in [*first, *(n for n in second if n not in first)]
    }
