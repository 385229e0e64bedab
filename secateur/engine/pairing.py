"""From a network's channel groups to an episode: which pairs, which filters go, and the regulariser over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.criteria import Selection, weights
from secateur.criteria.papers import singh2020cfp as cfp
from secateur.criteria.scoring import possible
from secateur.criteria.weights import Slices
from secateur.engine.settings import Share
from secateur.errors import CriterionError, PlanError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph, ChannelGroup, Member
from secateur.graph.steps import steps
from secateur.pruning.limits import names

Pairs = dict[str, list[tuple[int, int]]]
"""Group name -> (dropped, kept) channels."""


@dataclass(frozen=True)
class Producer:
    """One weight whose slices are the filters of a group's channels."""

    slices: Slices
    index: Tensor
    """Row of the slices' table of each channel of the group; -1 where the weight does not make it."""
    weight: float
    """Share in the group's score."""

    def filters(self, model: nn.Module) -> Tensor:
        """Return the filters, one a row: ``(present channels, elements)``."""
        weight = self.slices.weight(model)
        return self.slices.select(weight, self.slices.table.flatten().to(weight.device), len(self.slices.table))


def producers(model: nn.Module, graph: ChannelGraph, group: ChannelGroup, share: Share = "mean") -> list[Producer]:
    """Return the weights of a group that have filters to correlate, with their share in its score.

    Biases, weights of one element a filter (a depthwise 1×1) and layouts in which channels own different numbers of
    positions have none.
    """
    macs = layer_macs(graph)
    found: list[Producer] = []
    for slices in weights.making(model, graph, group):
        weight = slices.weight(model)
        elements = weight.numel() // (weight.shape[slices.dim] * slices.blocks) * slices.table.shape[1]
        if bool((slices.table < 0).any()) or elements < 2:
            continue
        index = torch.full((group.size,), -1, dtype=torch.int64)
        index[slices.channels] = torch.arange(len(slices.table))
        part = float(macs.get(slices.layer, 0)) if share == "macs" else 1.0
        if share == "first" and found:
            part = 0.0
        found.append(Producer(slices, index, part))
    if found and not any(p.weight > 0 for p in found):
        raise PlanError(f"{group.name}: none of its producers has MACs to weight by; use share 'mean'.")
    return found


def layer_macs(graph: ChannelGraph) -> dict[str, int]:
    """Return the MACs of each layer for one example, over all its calls (Singh et al. 2020, eqs. 1-3)."""
    macs: dict[str, int] = {}
    for layer in cost.layer_costs(graph):
        macs[layer.module] = macs.get(layer.module, 0) + layer.macs
    return macs


def correlations(
    model: nn.Module,
    graph: ChannelGraph,
    group: ChannelGroup,
    *,
    share: Share,
    signed: bool,
    order: cfp.Order = "correlation",
) -> Tensor | None:
    """Score every pair of a group, ``(size, size)`` on the CPU; None where it has no filters to correlate.

    ``correlation`` scores the mean of |ρ| over the producers; ``residual`` scores minus the mean residual of the row's
    filters after the column's stand in for them, as a share of the largest mean residual. Channels that are produced
    by different sets of layers can't stand in for each other, and score -2, below every other score.
    """
    sources = producers(model, graph, group, share)
    if not sources:
        return None
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    weight = torch.zeros_like(total)
    alike = torch.ones_like(total, dtype=torch.bool)
    for source in sources:
        with torch.no_grad():
            filters = source.filters(model)
            if order == "residual":
                found = cfp.residual(filters, signed=signed).double().cpu()
            else:
                rho = cfp.pearson(filters).double().cpu()
                found = rho if signed else rho.abs()
        here = source.index >= 0
        alike &= here[:, None] == here[None, :]
        which = torch.nonzero(here).flatten()
        block = (which[:, None], which[None, :])
        total[block] += source.weight * found
        weight[block] += source.weight
    scored = torch.where(weight > 0, total / weight.clamp_min(1e-300), 0.0)
    if order == "residual":
        scored = -scored / scored.max().clamp_min(1e-300)
    return torch.where(alike, scored, -2.0)


def norms(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> Tensor:
    """Return the L1 norm of each channel's filters over all producers, ``(size,)``."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for source in producers(model, graph, group):
        with torch.no_grad():
            lengths = source.filters(model).double().abs().sum(dim=1).cpu()
        here = source.index >= 0
        total[here] += lengths[source.index[here]]
    return total


def totals(group: ChannelGroup, floor: int = 1, round_to: int = 1) -> list[int]:
    """Return how many channels a group may lose, ascending.

    Args:
        group: The group; its constraint is kept.
        floor: Channels that it keeps in any case.
        round_to: What is kept is a multiple of this.
    """
    ends = np.cumsum([len(step) for step in steps(group, range(group.size))])
    return [int(n) for n in ends if n <= group.size - floor and (group.size - n) % round_to == 0]


def most_removable(group: ChannelGroup, floor: int = 1, round_to: int = 1) -> int:
    """Return how many channels of a group may go at most; arguments as of :func:`totals`."""
    return max(totals(group, floor, round_to), default=0)


def whole(group: ChannelGroup, count: int, floor: int = 1, round_to: int = 1) -> int:
    """Return the number that a group may lose which is nearest to ``count``: some if any may go, and ``count`` > 0."""
    if count <= 0:
        return 0
    return min(totals(group, floor, round_to), key=lambda n: (abs(n - count), -n), default=0)


def select_pairs(
    model: nn.Module,
    graph: ChannelGraph,
    group: ChannelGroup,
    count: int,
    *,
    share: Share,
    signed: bool,
    floor: int = 1,
    round_to: int = 1,
    order: cfp.Order = "correlation",
) -> list[tuple[int, int]]:
    """Choose about ``count`` channels of a group to drop, each with the partner that is kept.

    Blocks lose the same fraction each, so the number is rounded to what the group's constraint allows; empty where
    nothing may go.
    """
    wanted = whole(group, count, floor, round_to)
    scores = correlations(model, graph, group, share=share, signed=signed, order=order) if wanted else None
    if scores is None:
        return []
    lengths, free = norms(model, graph, group), torch.from_numpy(group.removable.copy())

    def choose(own: Tensor, n: int) -> list[tuple[int, int]]:
        between = scores[own][:, own]
        if order == "residual":
            found = cfp.select_least_lost(-between, n, removable=free[own])
        else:
            found = cfp.select_pairs(between, n, norms=lengths[own], removable=free[own])
        return [(int(own[dropped]), int(own[kept])) for dropped, kept in found]

    while True:
        pairs: list[tuple[int, int]] = []
        for block, n in enumerate(_shares(group, wanted, free.numpy())):
            pairs += choose(torch.from_numpy(np.flatnonzero(group.blocks == block)), n)
        selection = Selection(tuple(dropped for dropped, _ in pairs))
        # Another channel goes in place of one that is the last of its layer.
        last = set(selection.removed) - set(possible(group, selection).removed)
        if not last:
            return pairs
        free[list(last)] = False


def _shares(group: ChannelGroup, count: int, free: NDArray[np.bool_]) -> list[int]:
    """Return how many channels each block loses: as many as asked for, or as its free ones and a partner allow."""
    sizes, able = np.bincount(group.blocks), np.bincount(group.blocks[free], minlength=int(group.blocks.max()) + 1)
    most = np.minimum(able, sizes - 1)
    if group.schedule is not None:
        rows = [row for row in group.schedule if row.sum() <= count and (row <= most).all()]
        return [int(n) for n in rows[-1]] if rows else [0] * len(sizes)
    quota = group.quota
    rounds = min(int((most // quota).min()), count // int(quota.sum()))
    return [rounds * int(n) for n in quota]


def eligible(
    graph: ChannelGraph,
    *,
    internal_only: bool = False,
    linear: bool = False,
    inexact: bool = False,
    paired: bool = True,
) -> list[ChannelGroup]:
    """Return the groups that a run may prune, in execution order.

    Args:
        graph: The traced network.
        internal_only: Leave out the groups that several layers produce together, the residual streams.
        linear: Take the outputs of linear layers, too.
        inexact: Take groups whose removal can't equal zeroing, too.
        paired: Take those alone that have filters to pair: a depthwise layer's, say, go with their inputs.
    """
    kinds = {layer.name: layer.kind for layer in graph.layers}
    chosen = []
    for group in graph.groups:
        sources = [m for m in group.producers if len(graph.shapes[m.tensor]) >= 2]
        dense = [m for m in sources if not _depthwise(graph, m)]
        if not (group.exact or inexact) or (paired and not dense) or not most_removable(group):
            continue
        if internal_only and len({graph.layer_of(m) for m in dense}) > 1:
            continue
        if not linear and any(kinds.get(graph.layer_of(m)) == "linear" for m in dense):
            continue
        chosen.append(group)
    return chosen


def known(graph: ChannelGraph, pattern: str) -> bool:
    """Tell whether a pattern names a module or group, or is the start of such a name."""
    places = [*graph.module_types, *(group.name for group in graph.groups)]
    return any(place.startswith(pattern) or names(pattern, place, graph) for place in places)


def _depthwise(graph: ChannelGraph, member: Member) -> bool:
    name = graph.layer_of(member)
    return any(layer.name == name and layer.groups == layer.in_channels > 1 for layer in graph.layers)


class CorrelationRegulariser:
    r"""The term that trains an episode's pairs towards |ρ| = 1: λ times a form of :func:`singh2020cfp.regulariser`.

    Only the filters of the selected pairs are read, in a handful of operations for all layers together, so a step costs
    O(pairs · filter size). Computed in fp32 (or wider) whatever the precision of the run.

    Args:
        model: The model that trains; its parameters are looked up by name.
        graph: Its channel graph.
        pairs: Group name -> (dropped, kept) channels.
        form: One of ``paper``, ``pair``, ``layer_mean``, ``log``.
        strength: λ.
        share: How a coupled group's producers share in its score.
        signed: Train towards ρ = 1 instead.

    Raises:
        CriterionError: If ``pairs`` holds no pair.
        KeyError: If the graph has no group of a name.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        pairs: Mapping[str, Sequence[tuple[int, int]]],
        *,
        form: cfp.Form = "pair",
        strength: float = 1.0,
        share: Share = "mean",
        signed: bool = False,
    ) -> None:
        self.form, self.strength, self.signed = form, strength, signed
        self._model = model
        self._sizes = [len(p) for p in pairs.values()]
        if not sum(self._sizes):
            raise CriterionError("regulariser: the episode has no pair; select at least one.")
        self.groups = list(pairs)
        # One entry a filter length, so that all filters of that length are correlated at once.
        buckets: dict[int, list[tuple[Producer, Tensor, Tensor, float]]] = {}
        start = 0
        for name, chosen in pairs.items():
            sources = producers(model, graph, graph.group(name), share)
            ends = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
            for source in sources:
                rows = source.index[ends]
                here = (rows >= 0).all(dim=1)
                if source.weight > 0 and bool(here.any()):
                    slots = start + torch.nonzero(here).flatten()
                    length = source.filters(model).shape[1]
                    buckets.setdefault(length, []).append((source, rows[here], slots, source.weight))
            start += len(chosen)
        self._parts: list[tuple[list[tuple[Slices, Tensor, int]], Tensor, Tensor]] = []
        self._slots: list[Tensor] = []
        weights_of: list[Tensor] = []
        for entries in buckets.values():
            reads, first, second, offset = [], [], [], 0
            for source, rows, slots, weight in entries:
                distinct, place = torch.unique(rows, return_inverse=True)
                device = source.slices.weight(model).device
                reads.append((source.slices, source.slices.places(distinct).to(device), len(distinct)))
                first.append(place[:, 0] + offset)
                second.append(place[:, 1] + offset)
                offset += len(distinct)
                self._slots.append(slots)
                weights_of.append(torch.full((len(slots),), weight, dtype=torch.float64))
            device = reads[0][1].device
            self._parts.append((reads, torch.cat(first).to(device), torch.cat(second).to(device)))
        device = self._parts[0][1].device
        slot = torch.cat(self._slots)
        weight_of = torch.cat(weights_of)
        total = torch.zeros(start, dtype=torch.float64).index_add(0, slot, weight_of)
        self._slot, self._weight = slot.to(device), (weight_of / total[slot]).to(device)
        self._total, self._last = start, torch.zeros(start)

    def scores(self) -> Tensor:
        """Return the score of every pair, ``(pairs,)``, in the order given: |ρ|, or ρ for ``signed``."""
        found = []
        for reads, first, second in self._parts:
            filters = torch.cat([
                slices.select(slices.weight(self._model), places, count) for slices, places, count in reads
            ])  # fmt: skip
            found.append(cfp.pair_correlation(filters.index_select(0, first), filters.index_select(0, second)))
        rho = torch.cat(found)
        rho = rho if self.signed else rho.abs()
        return torch.zeros(self._total, dtype=rho.dtype, device=rho.device).index_add(
            0, self._slot, rho * self._weight.to(rho.dtype)
        )

    def __call__(self) -> Tensor:
        """Return λ times the regulariser, a differentiable scalar."""
        scores = self.scores()
        self._last = scores.detach()
        return self.strength * cfp.regulariser(self._split(scores), self.form)

    def _split(self, scores: Tensor) -> list[Tensor]:
        ends = np.cumsum(self._sizes).tolist()
        return [scores[end - size : end] for end, size in zip(ends, self._sizes, strict=True)]

    @property
    def minimum(self) -> float:
        """Smallest score of a pair at the last call; the optimisation ends when it reaches ``correlation_target``."""
        return float(self._last.min())

    def by_group(self) -> dict[str, list[float]]:
        """Return the present score of each pair, by group."""
        with torch.no_grad():
            parts = self._split(self.scores().cpu())
        return {name: part.tolist() for name, part in zip(self.groups, parts, strict=True)}


def largest_correlations(model: nn.Module, graph: ChannelGraph) -> dict[str, float]:
    """Return the largest |ρ| between two filters of each convolution and linear layer: the paper's analysis.

    Layers with one filter, or one element a filter, have none and are left out.
    """
    found: dict[str, float] = {}
    for layer in graph.layers:
        if layer.name in found or not layer.weight:
            continue
        owner = (layer.module, "weight") if layer.owned else weights.owner(model, layer.weight)
        weight = weights.weight_of(model.get_submodule(owner[0]), owner[1]).detach()
        transposed = layer.kind == "conv_transposed"
        rows = weights.rows_of(weight, 1 if transposed else 0, layer.groups if transposed else 1)
        if len(rows) < 2 or rows.shape[1] < 2:
            continue
        found[layer.name] = float(cfp.pearson(rows).abs().triu(diagonal=1).max())
    return found


def as_plain(pairs: Pairs, scores: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return pairs as JSON: one object a pair, with the score at selection."""
    return [
        {"group": name, "dropped": dropped, "kept": kept, "score": round(score, 6)}
        for name, chosen in pairs.items()
        for (dropped, kept), score in zip(chosen, scores[name], strict=True)
    ]
