"""From a model and data to what a criterion is made of, and from a criterion to scores or a selection.

The criteria themselves (:mod:`secateur.criteria`) are pure functions of tensors; :mod:`secateur.criteria.gathering`
takes those tensors out of the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria import Criterion, Returns, Selection, feature_maps, get, weights
from secateur.criteria.gathering import Gatherer, Loss
from secateur.criteria.papers.li2017l1 import l2
from secateur.criteria.registry import NotDefinedError
from secateur.errors import CriterionError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.steps import steps
from secateur.network.inputs import unwrapped

Unseen = Literal["skip", "weights", "error"]
"""What becomes of groups that a criterion is not defined on."""

_LOG = logging.getLogger(__name__)


class Scores(dict[str, Tensor]):
    """Group name -> one score a channel; as a text, the range of each group's."""

    def __repr__(self) -> str:
        return f"Scores({len(self)} groups)"

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=5)
        lines = [f"{'group':<{width}}  channels   lowest  highest"]
        for name, values in list(self.items())[:_MOST_GROUPS]:
            lines.append(f"{name:<{width}}  {len(values):>8} {values.min():>8.3g} {values.max():>8.3g}")
        if len(self) > _MOST_GROUPS:
            lines.append(f"... and {len(self) - _MOST_GROUPS} more groups")
        return "\n".join(lines)


_MOST_GROUPS = 20


@dataclass
class _Scoring:
    """One criterion on its way over the groups of one network."""

    gatherer: Gatherer
    unseen: Unseen

    def each(
        self, one: Callable[[ChannelGroup], Any], instead: Callable[[ChannelGroup, Tensor], Any]
    ) -> dict[str, Any]:
        """Call a function for every group, in their order.

        Args:
            one: What the criterion says of a group.
            instead: What is said of a group by the scores of its weights, where the criterion is not defined on it and
                weights are to stand in.

        Raises:
            NotDefinedError: If the criterion is defined on none of the groups, or an error was asked for.
        """
        gatherer, order = self.gatherer, list(self.gatherer.groups)
        result: dict[str, Any] = {}
        left = gatherer.left
        with torch.inference_mode(False):  # in which gradients and sums over batches can't be had
            gatherer.gather()
            for group in list(gatherer.groups):
                try:
                    result[group.name] = one(group)
                except NotDefinedError as error:
                    left[group.name] = str(error)
        weighed = [group for group in order if group.name in left and self.unseen == "weights"]
        for group in weighed:
            if weights.making(gatherer.model, gatherer.graph, group):
                scores = l2(weights.filters(gatherer.model, gatherer.graph, group))
                result[group.name] = instead(group, scores.cpu())
        self._tell(left, result)
        return {group.name: result[group.name] for group in order if group.name in result}

    def _tell(self, left: Mapping[str, str], result: Mapping[str, Any]) -> None:
        """Say which groups were left out, or scored by their weights, and why."""
        if not left:
            return
        where, (name, why) = f"criterion {self.gatherer.criterion.name}", next(iter(left.items()))
        if self.unseen == "error" or not result:
            raise NotDefinedError(
                f"{where}: {name}: {why}. Use a criterion of weights, such as l1, or leave the group out."
            )
        by_reason: dict[str, list[str]] = {}
        for name, why in left.items():
            fate = "scored by weights" if name in result else "left out"
            by_reason.setdefault(f"{fate}, as {why}", []).append(name)
        _LOG.warning("%s: %s.", where, "; ".join(f"{', '.join(names)}: {text}" for text, names in by_reason.items()))


def _prepare(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion | Callable[..., Any],
    data: Iterable[Any] | None,
    groups: Iterable[str],
    settings: dict[str, Any],
    unseen: Unseen,
    options: dict[str, Any],
    selecting: bool,
) -> _Scoring:
    if unseen not in get_args(Unseen):
        raise UsageError(f"unseen is {unseen!r}. Use {', '.join(get_args(Unseen))}.")
    model = unwrapped(model)
    found = get(criterion)
    found.check(options, selecting)
    if "seed" in found.takes(selecting):  # k-means draws with the same seed as everything else
        options = {"seed": settings["seed"], **options}
    chosen = feature_maps.chosen_groups(graph, groups)
    return _Scoring(Gatherer(model, graph, found, data, chosen, settings, options), unseen)


def _scored(graph: ChannelGraph, inexact: bool) -> list[str]:
    """Return the names of the groups that are looked at where none are named."""
    return [group.name for group in graph.groups if group.exact or inexact]


def score(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion | Callable[..., Any],
    data: Iterable[Any] | None = None,
    *,
    groups: Iterable[str] | None = None,
    inexact: bool = False,
    unseen: Unseen = "skip",
    loss: Loss | None = None,
    positions: int = feature_maps.POSITIONS,
    exact: bool = False,
    seed: int = 0,
    memory: int = feature_maps.MEMORY,
    **options: Any,
) -> dict[str, Tensor]:
    """Score every channel of every group by a criterion.

    Args:
        model: The network; it is run in eval mode where data are needed, and left as found.
        graph: Its channel graph.
        criterion: Name of a criterion, a :class:`secateur.criteria.Criterion`, or a function whose parameters are
            named after what it needs, e.g. ``lambda filters: filters.abs().amax(1)``.
        data: Batches, see :func:`secateur.criteria.feature_maps.batches`; only for criteria that need data.
        groups: Names of groups; by default all exact ones, and the others if ``inexact``.
        inexact: Whether to score groups whose removal can't equal zeroing, too, as :func:`secateur.plan` takes them.
        unseen: What becomes of groups that the criterion is not defined on, such as those whose maps are read by code
            that calls no layer: ``skip`` leaves them out and lists them in a line of the log, ``weights`` scores them
            by the Euclidean norm of their filters, ``error`` raises.
        loss: Function of outputs and labels, for criteria of gradients; cross-entropy by default. Where it has a
            method ``prepare``, that is called with the model in eval mode, which is put back afterwards.
        positions: See :func:`secateur.criteria.feature_maps.observe`.
        exact: See :func:`secateur.criteria.feature_maps.observe`.
        seed: Seed of everything that is drawn.
        memory: See :func:`secateur.criteria.feature_maps.observe`.
        **options: The criterion's own.

    Returns:
        Group name -> scores, shape ``(C,)``, fp64, on the CPU; higher = keep. Groups that were left out are missing.

    Raises:
        UsageError: If the criterion, an option or a group is unknown, or data are missing.
        DataError: If the data are empty or don't fit the model.
        CriterionError: If the criterion isn't defined on any group, or returns something that is not a score a channel.
    """
    settings = {"loss": loss, "positions": positions, "exact": exact, "seed": seed, "memory": memory}
    names = _scored(graph, inexact) if groups is None else groups
    scoring = _prepare(model, graph, criterion, data, names, settings, unseen, options, selecting=False)
    return Scores(scoring.each(lambda group: _scores(scoring.gatherer, group), lambda _, scores: scores))


def _scores(gatherer: Gatherer, group: ChannelGroup) -> Tensor:
    found = gatherer.criterion
    if found.returns is Returns.SCORES or found.scores is not None:
        values = gatherer.call(group, found.scores or found.function, {})
    else:
        picked = gatherer.call(group, found.function, {"remove": group.size - 1})
        values = _by_order(_checked(picked, group, found, group.size - 1), group.size)
    return _checked_scores(values, group, found)


def _by_order(selection: Selection, size: int) -> Tensor:
    scores = torch.ones(size, dtype=torch.float64)
    for place, channel in enumerate(selection.removed):
        scores[channel] = place / size
    return scores


def _checked_scores(values: Any, group: ChannelGroup, criterion: Criterion) -> Tensor:
    where = f"criterion {criterion.name}, group {group.name}"
    if not isinstance(values, Tensor) or tuple(values.shape) != (group.size,):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise CriterionError(f"{where}: returned {found} in place of one score for each of {group.size} channels.")
    result: Tensor = values.detach().double().cpu()
    if bool(result.isnan().any()):
        raise CriterionError(f"{where}: {int(result.isnan().sum())} scores are NaN. Check the weights for NaN.")
    return result


def _checked(selection: Any, group: ChannelGroup, criterion: Criterion, remove: int) -> Selection:
    where = f"criterion {criterion.name}, group {group.name}"
    if not isinstance(selection, Selection):
        raise CriterionError(f"{where}: returned {type(selection).__name__} in place of a Selection.")
    chosen = selection.removed
    if len(set(chosen)) != len(chosen) or len(chosen) > remove or any(not 0 <= c < group.size for c in chosen):
        raise CriterionError(
            f"{where}: selected {list(chosen)}, not at most {remove} different channels of {group.size}."
        )
    return selection


def select(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion | Callable[..., Any],
    remove: Mapping[str, int] | float,
    data: Iterable[Any] | None = None,
    *,
    inexact: bool = False,
    unseen: Unseen = "skip",
    loss: Loss | None = None,
    positions: int = feature_maps.POSITIONS,
    exact: bool = False,
    seed: int = 0,
    memory: int = feature_maps.MEMORY,
    **options: Any,
) -> dict[str, Selection]:
    """Select channels to remove, of each group a given number.

    A criterion that returns scores gives its lowest. One with a threshold may select fewer than asked for. In a group
    whose channels aren't free (blocks that lose equal fractions, fixed channels) the lowest scores go that the rule
    allows, never more channels than asked for. No layer loses the last of the group's channels that it makes or reads.

    Args:
        model: See :func:`score`.
        graph: See :func:`score`.
        criterion: See :func:`score`.
        remove: Group name -> number of channels to remove; or one fraction of each group, in [0, 1), rounded down.
        data: See :func:`score`.
        inexact: See :func:`score`; groups that ``remove`` names are looked at in any case.
        unseen: See :func:`score`; of groups that are left out nothing is selected.
        loss: See :func:`score`.
        positions: See :func:`score`.
        exact: See :func:`score`.
        seed: See :func:`score`.
        memory: See :func:`score`.
        **options: The criterion's own.

    Returns:
        Group name -> selection; ``{name: list(s.removed)}`` is what :func:`secateur.plan_removal` takes.

    Raises:
        UsageError: If a number is out of range; and as :func:`score`.
        DataError: As :func:`score`.
        CriterionError: As :func:`score`.
    """
    counts = _counts(graph, remove, inexact)
    settings = {"loss": loss, "positions": positions, "exact": exact, "seed": seed, "memory": memory}
    names = [name for name, count in counts.items() if count]
    scoring = _prepare(model, graph, criterion, data, names, settings, unseen, options, selecting=True)
    found = scoring.gatherer.criterion

    def pick(group: ChannelGroup) -> Selection:
        wanted = counts[group.name]
        if found.returns is Returns.SCORES or group.constraint:
            return Selection(lowest(group, _scores(scoring.gatherer, group), wanted))
        picked = _checked(scoring.gatherer.call(group, found.function, {"remove": wanted}), group, found, wanted)
        return possible(group, picked)

    def weigh(group: ChannelGroup, scores: Tensor) -> Selection:
        return Selection(lowest(group, scores, counts[group.name]))

    return {name: Selection(()) for name in counts} | scoring.each(pick, weigh)


def _counts(graph: ChannelGraph, remove: Mapping[str, int] | float, inexact: bool) -> dict[str, int]:
    if isinstance(remove, Mapping):
        groups = {group.name: group for group in feature_maps.chosen_groups(graph, remove)}
        for name, count in remove.items():
            if not 0 <= count < groups[name].size:
                raise UsageError(
                    f"{name}: cannot remove {count} of {groups[name].size} filters; a layer keeps at least 1."
                )
        return dict(remove)
    if not 0.0 <= remove < 1.0:
        raise UsageError(f"the fraction to remove is {remove}, not in [0, 1). Half of the filters is 0.5.")
    return {name: int(remove * graph.group(name).size + 1e-9) for name in _scored(graph, inexact)}


def lowest(group: ChannelGroup, scores: Tensor, count: int) -> tuple[int, ...]:
    """Pick the lowest-scoring channels that may go together, at most ``count``, the lowest first.

    Every block loses the same fraction of its channels and keeps one, and fixed channels stay.
    """
    picked: set[int] = set()
    for step in steps(group, np.argsort(scores.numpy(), kind="stable").tolist()):
        if len(picked) + len(step) > count:
            break
        picked |= set(step)
    return tuple(sorted(picked, key=lambda channel: float(scores[channel])))


def possible(group: ChannelGroup, selection: Selection) -> Selection:
    """Leave out of a selection what can't go together with the rest: the last channel of each layer stays."""
    chosen = set(selection.removed)
    order = [*selection.removed, *(c for c in range(group.size) if c not in chosen)]
    allowed: set[int] = set()
    for step in steps(group, order):
        if not chosen.issuperset(step):
            break
        allowed |= set(step)
    return Selection(
        tuple(channel for channel in selection.removed if channel in allowed),
        tuple(pair for pair in selection.pairs if pair.dropped in allowed),
    )
