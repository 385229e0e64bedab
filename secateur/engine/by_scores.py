"""The channels of a round by a criterion: allocated and limited as in a plan, in as many rounds as it takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from secateur.compensation.damage import NotComparableError
from secateur.compensation.sensitivity import Sensitivity, Share
from secateur.criteria.papers import singh2020cfp as cfp
from secateur.criteria.registry import NotDefinedError
from secateur.deploy.timing import choose_round_to
from secateur.deploy.timing.measuring import latency
from secateur.deploy.timing.table import Latency
from secateur.engine import pairing
from secateur.engine.choosing import MEASURED_BATCH, Choice, Some, measured, unmeasured
from secateur.engine.selection import Selection
from secateur.engine.settings import Settings
from secateur.engine.speed import in_time
from secateur.engine.state import Removed, State
from secateur.engine.way import Way
from secateur.errors import PlanError, UsageError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.allocation import Table, curve
from secateur.pruning.limits import Limit, Limits
from secateur.pruning.options import SENSITIVITY, Allocation, Options
from secateur.pruning.planning import Target, plan_removal
from secateur.pruning.surgery import cut
from secateur.training import passes
from secateur.training.passes import Batches
from secateur.training.processes import agreed, told
from secateur.training.stages import Loss

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOG = logging.getLogger(__name__)

STALE = 0.25
"""A table is measured anew once this share of the MACs has gone since."""
SEVERAL = (0.6, 0.8)
"""``auto`` goes to a target in one round, in two from the first share of the MACs on, in three from the second."""


class Scores(Selection):
    """Chooses a round's channels by a criterion, exactly as :func:`secateur.plan` does; see :class:`Selection`.

    A target is gone to in ``rounds`` rounds, or in as many as it takes to remove at most ``fraction`` of the channels
    in each; the plan of each goes a part of the way, from what is left. A target of latency is gone to in one round,
    since times are those of the unpruned network's layers. Under a tolerance a round removes ``fraction`` of the
    channels, by ``auto`` of the MACs.

    Args:
        graph: See :class:`Selection`.
        options: See :class:`Selection`.
        settings: See :class:`Selection`.
        target: See :class:`Selection`.
        way: How channels are chosen.
        train: Training batches, for a criterion that looks at data.
        loss: The training loss, for a criterion that needs gradients.
        seed: Seed of a criterion's random draws.
        example_inputs: What the network is timed on.
        runtime: Accelerate runtime; of several processes the main one measures times.

    Raises:
        UsageError: As :class:`Selection`; if the criterion has no such option, or settings of pairs are given.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        options: Options,
        settings: Settings,
        target: Target | None,
        *,
        way: Way,
        train: Batches,
        loss: Loss | None,
        seed: int,
        example_inputs: Any,
        runtime: Accelerator,
    ) -> None:
        self.way, self.train, self.loss, self.seed = way, train, loss, seed
        self.example_inputs, self.runtime = example_inputs, runtime
        self.check(way, settings)
        if target is None and not options.ratios:
            if options.round_to == "auto":
                raise UsageError("round_to: auto is measured on a plan; give a target or ratios, or a number, e.g. 8.")
            if settings.rounds and not settings.widths:
                raise UsageError("rounds: lead to a target, ratios or widths; give one of them.")
        groups = pairing.eligible(
            graph,
            internal_only=settings.internal_only,
            linear=settings.linear is not False,
            inexact=options.inexact,
            paired=False,
        )
        super().__init__(graph, groups, options, settings, target)

    def parts(self, state: State) -> dict[str, str]:
        """Return what allocates and selects, for reports."""
        parts = self.way.parts
        if self.goals:
            parts["allocation"] = "widths"
        elif parts["allocation"] == SENSITIVITY and not (state.table or {}).get("sizes"):
            parts["allocation"] = "normalized"
        if not self.goals and self.target is None and self.options.ratios:  # they leave nothing to allocate
            del parts["allocation"]
        return parts

    @staticmethod
    def check(way: Way, settings: Settings) -> None:
        """Refuse settings of pairs, which a criterion has not.

        Raises:
            UsageError: If there is one.
        """
        for name in ("pairs", "phase2_pairs"):
            if getattr(settings, name) not in ("width", None):
                raise UsageError(f"{name}: is cfp's, and the method is {way.name}; set fraction, rounds or allocation.")

    # Times of layers

    @property
    def by_time(self) -> bool:
        """Whether the target counts latency."""
        return self.target is not None and self.target.what == "latency"

    def needs_measuring(self, state: State) -> bool:
        """Tell whether times or sensitivity are to be measured before the next choice."""
        return self.needs_times(state) or self.needs_table(state)

    def needs_times(self, state: State) -> bool:
        """Tell whether the times of layers are to be measured before the first choice."""
        return self.by_time and state.times is None

    def measure(
        self, state: State, graph: ChannelGraph, progress: Callable[[int, int], None], share: Share | None = None
    ) -> None:
        """Measure the times of layers, if they count and are not known, else the sensitivity of the network as it is.

        Both go into the state as plain data.
        """
        if self.target is not None and self.needs_times(state):
            at = self.target.setting
            state.times = told(
                self.runtime,
                lambda: asdict(latency(state.network, self.graph, **at, example_inputs=self.example_inputs)),
            )
            return
        with passes.seeded(self.seed, 0, 3) as seed:
            try:
                table = agreed(
                    self.runtime,
                    lambda: measured(
                        state.network, graph, Some(self.train, None, seed), self.limits_now(state, graph),
                        self.target_now(state, graph), inexact=self.options.inexact, costs=self.times(state),
                        progress=progress, share=share,
                    ),
                )  # fmt: skip
                self.store_table(state, table)
            except NotComparableError as error:
                state.table = {"sizes": {}, "damage": {}, "macs": 0}
                state.notes.append(unmeasured(error))
                _LOG.warning("compress: %s", state.notes[-1])

    def times(self, state: State) -> Latency | None:
        """Return the times of layers, where latency is to be reached."""
        return None if state.times is None else Latency.from_dict(state.times)

    def target_met(self, removed: Removed) -> bool:
        """Tell whether the target is met; one of latency by its one round, which has measured what it leads to."""
        return bool(removed) if self.by_time else super().target_met(removed)

    # The table of sensitivity

    def needs_table(self, state: State) -> bool:
        """Tell whether sensitivity is to be measured before the next choice."""
        by_table = self.way.allocation == SENSITIVITY or not isinstance(self.way.allocation, str)
        if not by_table or self.goals or state.phase == 2:
            return False
        if self.target is None and not self.bounded:
            return False  # ratios alone leave nothing to allocate
        if state.table is None:
            return True
        if self.graph.shuffles:
            return False  # no cell can be cut by the graph of what is left, which knows no shuffles
        least: float = (1 - STALE) * state.table["macs"]
        return cost.macs(self.graph, self.plan(state.removed)) < least

    def store_table(self, state: State, table: Table) -> None:
        """Put a table into the state, as plain data."""
        damage = {name: {str(n): d for n, d in own.items()} for name, own in table.damage.items()}
        now = cost.macs(self.graph, self.plan(state.removed))
        state.table = {"sizes": dict(table.sizes), "damage": damage, "macs": now}
        if isinstance(table, Sensitivity):
            state.table |= {"measure": table.measure, "images": table.images, "network": table.network}

    def _allocation(self, state: State, graph: ChannelGraph) -> Allocation:
        if state.table is not None and state.table["sizes"]:
            return _since(state.table, graph)
        return "normalized" if self.way.allocation == SENSITIVITY else self.way.allocation

    # Limits and targets of a round

    def limits_now(self, state: State, graph: ChannelGraph, *, remaining: int = 1) -> dict[str, Limit]:
        """Return how many of its present channels each group may lose in this round.

        Args:
            state: Where the run stands.
            graph: Channel graph of the network as it is now.
            remaining: Rounds that are left, this one among them, over which ratios are spread.
        """
        sizes = {group.name: graph.group(group.name).size for group in self.groups if group.name not in self.left}
        usual = {g.name: cfp.pairs_by_width(g.size, self.settings.fraction) for g in self.groups}

        def some(name: str, count: int) -> Limit:
            return Limit(pairing.whole(graph.group(name), count, self.floors[name], self._multiple(state)), forced=True)

        if state.phase == 2:
            name = self.groups[state.position].name
            return {name: some(name, usual[name])} if name in sizes else {}
        if self.goals:
            return {name: some(name, n) for name, n in self._towards_goal(state, usual).items() if name in sizes}
        found = {}
        for name, size in sizes.items():
            limit, left = self.limits[name], max(0, size - self.floors[name])
            spread = limit.forced and remaining > 1
            found[name] = some(name, self._paced(left, size - left, remaining)) if spread else replace(limit, most=left)
        return found

    def target_now(self, state: State, graph: ChannelGraph, remaining: int = 1) -> Target | None:
        """Return what this round is to remove of the network as it is now."""
        if self.goals or state.phase == 2:
            return None
        if self.bounded:
            share = state.step or self.settings.fraction
            if self.way.auto:
                whole, now = cost.macs(self.graph), cost.macs(self.graph, self.plan(state.removed))
                return Target(macs=min(share * whole / now, _MOST))
            own = sum(g.size for g in self.groups if g.name not in self.left)
            channels = share * own / sum(g.size for g in graph.groups)
            return Target(channels=min(channels, _MOST))
        if self.target is None or (remaining == 1 and not state.removed):
            return self.target
        done = self.removed_share(state.removed)
        kept = (1 - self.target.fraction) / (1 - done)
        part = (1 - kept) / remaining if self.settings.pace == "linear" else 1 - math.pow(kept, 1 / remaining)
        if part <= 0:
            return None
        part_of: dict[str, Any] = {self.target.what: part}
        return replace(self.target, **part_of)

    def _rounds(self, whole: Removed) -> int:
        """Return in how many rounds the channels of a whole plan go."""
        if self.settings.rounds:
            return self.settings.rounds[0]
        if self.way.auto:
            removed = 1 - cost.macs(self.graph, PruningPlan(removed=whole)) / cost.macs(self.graph)
            return 1 + sum(removed >= share for share in SEVERAL)
        share = sum(map(len, whole.values())) / sum(group.size for group in self.groups)
        return max(1, math.ceil(share / self.settings.fraction - 1e-9))

    # The choice

    def choose(self, state: State, graph: ChannelGraph) -> tuple[dict[str, list[list[int]]], Removed]:
        """Choose the channels that go; see :meth:`Selection.choose`."""
        names = [g.name for g in self.groups if g.name not in self.left and graph.group(g.name).size > 1]
        if not names:
            return {}, {}
        with passes.seeded(self.seed, state.round, 1) as seed:
            data = Some(self.train, self.settings.criterion_batches, seed)
            try:
                choice = Choice(
                    state.network, graph, self.way.criterion, self.settings.criterion, names,
                    data=data, loss=self.loss, seed=self.seed,
                )  # fmt: skip
            except NotDefinedError as error:
                self.left |= dict.fromkeys(names, str(error).rstrip("."))
                return {}, {}
            self.selective = choice.selects
            self._leave_out(set(names) - choice.scores.keys())
            return {}, self._numbered(state, self._chosen(state, graph, choice))

    def _leave_out(self, names: Iterable[str]) -> None:
        for name in names:
            self.left[name] = f"criterion {self.way.criterion.name} is not defined on it"
        if self.left:
            # A ratio that names nothing but such a group is an error, as in a plan.
            Limits(self.graph, [g for g in self.groups if g.name not in self.left], self.options)

    def _chosen(self, state: State, graph: ChannelGraph, choice: Choice) -> Mapping[str, list[int]]:
        allocation = self._allocation(state, graph)
        planned = self.target is not None or bool(self.options.ratios and not self.goals)

        def whole(round_to: int) -> Removed:
            """Choose all at once, as a plan does."""
            limits = self._limits_for(round_to)
            return choice(self.target_now(state, graph), limits, round_to=round_to, allocation=allocation)

        try:
            if planned and not state.rounds:
                if self.target is not None and self.by_time:
                    state.rounds = 1
                    return self._in_time(state, graph, choice, self.target, allocation)
                if self.options.round_to == "auto":
                    state.round_to = self._fastest(state, whole)
                found = whole(self._multiple(state))
                state.rounds = self._rounds(found)
                if state.rounds == 1:
                    return found
            remaining = max(1, state.rounds - state.goal_round)
            return choice(
                self.target_now(state, graph, remaining),
                self.limits_now(state, graph, remaining=remaining),
                round_to=self._multiple(state),
                allocation=allocation,
                partial=self.bounded or self.selective,
            )
        except PlanError as error:
            why = "".join(f" {name} is left alone: {reason}." for name, reason in self.left.items())
            raise PlanError(f"{error}{why}") from error

    def _in_time(
        self, state: State, graph: ChannelGraph, choice: Choice, target: Target, allocation: Allocation
    ) -> Mapping[str, list[int]]:
        """Choose by the times of layers, and by what the whole network takes as measured."""
        costs, round_to = self.times(state), self.options.round_to
        assert costs is not None
        limits = self._limits_for(round_to)

        def planned(goal: Target) -> PruningPlan:
            found = choice(goal, limits, round_to=round_to, allocation=allocation, costs=costs)
            return plan_removal(graph, found)

        def found() -> tuple[dict[str, list[int]], dict[str, Any]]:
            timed = in_time(state.network, graph, self.example_inputs, target, costs, planned)
            return timed.plan.removed, timed.report

        removed, state.latency = told(self.runtime, found)
        return removed

    def _limits_for(self, round_to: int | Literal["auto"]) -> dict[str, Limit]:
        """Return the limits of the unpruned network's groups for a multiple of channels."""
        groups = [group for group in self.groups if group.name not in self.left]
        return Limits(self.graph, groups, replace(self.options, round_to=round_to)).by_group

    def _fastest(self, state: State, whole: Any) -> int:
        """Measure which multiple of channels runs fastest on this CPU."""
        return told(
            self.runtime,
            lambda: (
                choose_round_to(
                    lambda n: cut(state.network, self.plan(whole(n))), self.example_inputs, batch_size=MEASURED_BATCH
                ).round_to
            ),
        )


_MOST = 1 - 1e-9


@dataclass(frozen=True)
class _Since:
    """The rest of a table, from the widths on that a network has come to since it was measured."""

    sizes: dict[str, int]
    damage: dict[str, dict[int, float]]


def _since(table: Mapping[str, Any], graph: ChannelGraph) -> _Since:
    """Return what each group's further loss does, by a table that was measured when it had more channels."""
    sizes, damage = {}, {}
    for name, size in table["sizes"].items():
        sizes[name] = graph.group(name).size
        gone = size - sizes[name]
        at, repaired = curve({int(n): float(d) for n, d in table["damage"][name].items()})
        now = float(np.interp(gone, at, repaired))
        damage[name] = {n - gone: float(d) - now for n, d in zip(at.tolist(), repaired, strict=True) if n > gone}
    return _Since(sizes, damage)
