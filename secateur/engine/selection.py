"""What a run may still remove: limits, goals and targets of its groups, whatever chooses the channels of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from secateur.engine import pairing
from secateur.engine.settings import Settings
from secateur.engine.state import Removed, State
from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan
from secateur.pruning.limits import Limits
from secateur.pruning.options import Options
from secateur.pruning.planning import Target, plan_removal


class Selection:
    """Chooses a round's channels; holds everything about that choice which does not change over a run.

    Args:
        graph: Channel graph of the unpruned network.
        groups: Those of its groups that may lose channels.
        options: Limits of each group's loss.
        settings: The run's settings.
        target: Fraction to remove; None where widths, ratios or the tolerance decide.

    Raises:
        UsageError: If the options leave no group to prune or contradict each other, or widths name no group or are out
            of reach.
    """

    selective = False
    """Whether a criterion selects by itself, and may stop short of a target."""

    def __init__(
        self,
        graph: ChannelGraph,
        groups: Sequence[ChannelGroup],
        options: Options,
        settings: Settings,
        target: Target | None,
    ) -> None:
        self.graph, self.options, self.settings, self.target = graph, options, settings, target
        self.left: dict[str, str] = {}
        """Groups that the method turned out not to be defined on -> why."""
        self.limits = Limits(graph, groups, options).by_group
        self.floors = {group.name: group.size - self.limits[group.name].most for group in groups}
        self.groups = list(groups)
        self.goals = [self._goal(widths) for widths in settings.widths]
        self.groups = [group for group in groups if self.limits[group.name].most]
        if self.goals:
            named = {name for goal in self.goals for name in goal}
            self.groups = [group for group in self.groups if group.name in named]
        if not self.groups:
            raise UsageError(
                "compress: the network has no group of filters that these settings let go; see trace for the reasons."
            )
        number = 1 if options.round_to == "auto" else options.round_to
        self.demands = {
            group.name: pairing.most_removable(group, self.floors[group.name], number)
            for group in self.groups
            if self.limits[group.name].forced
        }
        """Group -> channels that a ratio asks for."""

    @property
    def bounded(self) -> bool:
        """Whether the tolerance decides when to stop, rather than a target, ratios or widths."""
        return self.target is None and not self.goals and not self.options.ratios

    def parts(self, state: State) -> dict[str, str]:
        """Return what allocates and selects, for reports."""
        raise NotImplementedError

    def choose(self, state: State, graph: ChannelGraph) -> tuple[dict[str, list[list[int]]], Removed]:
        """Choose the pairs (CFP only) and the channels of a round.

        Args:
            state: Where the run stands.
            graph: Channel graph of the network as it is now.

        Returns:
            Group name -> [dropped, kept] channels, and group name -> channels that go, numbered as in the unpruned
            network.
        """
        raise NotImplementedError

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

    def target_met(self, removed: Removed) -> bool:
        """Tell whether the target is met, where there is one."""
        return self.target is None or self.removed_share(removed) >= self.target.fraction - 1e-12

    def reached(self, removed: Removed) -> bool:
        """Tell whether target and ratios are met."""
        asked = {name: count for name, count in self.demands.items() if name not in self.left}
        return all(len(removed.get(name, [])) >= n for name, n in asked.items()) and self.target_met(removed)

    def _multiple(self, state: State) -> int:
        """Return the multiple that kept channels are to be."""
        return state.round_to or (1 if self.options.round_to == "auto" else self.options.round_to)

    def _numbered(self, state: State, chosen: Mapping[str, Sequence[int]]) -> Removed:
        """Number the present network's channels as in the unpruned one."""
        alive = {name: self.alive(state, name) for name in chosen}
        return {name: [alive[name][c] for c in found] for name, found in chosen.items() if found}

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
            multiple = self.options.round_to
            if width < group.size and multiple != "auto" and width % multiple:
                raise UsageError(f"widths: {module} is to have {width} filters, which contradicts round_to {multiple}.")
            if goal.get(group.name, width) != width:
                raise UsageError(
                    f"widths: {module} shares its channels with {group.name}, which is to have {goal[group.name]}."
                )
            goal[group.name] = width
        return goal

    def _layers(self, group: ChannelGroup) -> list[str]:
        """Return the names of the layers that make a group's channels."""
        return [self.graph.layer_of(member) for member in group.producers]

    def _towards_goal(self, state: State, usual: Mapping[str, int]) -> dict[str, int]:
        """Return how many channels of each group go on the way to the present widths.

        Args:
            state: Where the run stands.
            usual: How many of each group go in a round where the number of rounds is not given.
        """
        goal = self.goals[state.goal]
        left = {name: len(self.alive(state, name)) - width for name, width in goal.items()}
        if not self.settings.rounds:
            return {name: min(usual[name], n) for name, n in left.items()}
        remaining = max(1, self.settings.rounds[state.goal] - state.goal_round)
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


def union(first: Mapping[str, list[int]], second: Mapping[str, list[int]]) -> Removed:
    """Return the channels of either selection."""
    return {
        name: sorted({*first.get(name, []), *second.get(name, [])})
        for name in [*first, *(n for n in second if n not in first)]
    }
