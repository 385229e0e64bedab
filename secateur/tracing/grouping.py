"""From the labels of a run to the groups of coupled channels, and to what can't be pruned and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from secateur.graph.channels import AttributeRule, ChannelGraph, ChannelGroup, LayerPort, Member, Refusal, Role
from secateur.tracing.assumptions import FREEZE, Assumption, Assumptions, Cause
from secateur.tracing.constraints import cells, multiples, staying, unsplittable
from secateur.tracing.findings import Findings, LayerCall
from secateur.tracing.labels import Labels
from secateur.tracing.partition import Makers, Partition, first_cause, marked, partition
from secateur.tracing.recording import Recording
from secateur.tracing.shuffles.places import Places, places, schedules
from secateur.tracing.source_lines import shown

_SIZED = "is given the number of other channels as its size"
_GIVEN = "gives the number of these channels as others' size"


@dataclass(frozen=True, eq=False)
class Grouping:
    """A graph together with the partition of the labels, from which a failed trial finds what to assume instead."""

    graph: ChannelGraph
    partition: Partition
    """Its groups are numbered as in the graph."""
    assumptions: list[Assumption]
    stuck: list[Assumption]
    """Those that leave a group nothing to prune, and have another option."""

    def concerned(self, assumption: Assumption) -> list[int]:
        """Return the groups whose channels an assumption is about."""
        return self.partition.among(assumption.labels)


def group_channels(recording: Recording, assumptions: Assumptions, batch: int) -> Grouping:
    """Assemble the groups of a run, less what its code contradicts.

    A *class* of joined labels is one channel. Classes made by the same layers form a group; so do classes that blocks
    of one layer or one cut tie together. Inside a group, blocks of several constraints are refined into cells, and all
    cells lose the same fraction, which satisfies every constraint at once.
    """
    while True:
        grouping = _Assembly(recording, assumptions, batch).grouping()
        wrong = _contradicted(grouping, recording.found)
        if not wrong:
            return grouping
        for labels, cause in wrong:
            recording.found.freeze(labels, cause)


def _contradicted(grouping: Grouping, found: Findings) -> list[tuple[Labels, Cause]]:
    """Return channels that can't be pruned, since code takes their number for that of others, and why.

    Neither can: a group need not lose as many as another, or as what never goes.
    """
    own, graph = grouping.partition, grouping.graph

    def can_lose(labels: Labels) -> bool:
        groups, channels = own.groups(labels), own.channels(labels)
        return any(graph.groups[g].removable[channels[groups == g]].any() for g in own.among(labels))

    pairs = [
        (sized, given, replace(a.cause, reason=_SIZED), replace(a.cause, reason=_GIVEN))
        for a in found.assumptions
        for sized, given in a.asked
    ]
    for counted, measure in found.counted:
        for other, line in measure.equal:
            cause = Cause("comparison", "", shown(*line), "is compared with the equal number of other channels")
            pairs.append((counted, other, cause, cause))
    return [
        (labels, cause)
        for one, other, *causes in pairs
        if not np.isin(own.classes[one], own.classes[other]).any() and not set(own.among(one)) & set(own.among(other))
        for labels, cause in zip((one, other), causes, strict=True)
        if can_lose(labels)
    ]


class _Assembly:
    """One graph being put together: what all its parts are made of."""

    def __init__(self, recording: Recording, assumptions: Assumptions, batch: int) -> None:
        self.recording, self.batch = recording, batch
        self.store, self.found = recording.labels.store, recording.found
        self.classes = self.store.classes()
        count = int(self.classes.max()) + 1 if self.classes.size else 0
        self.produced = marked(count, self.classes, self.found.produced)
        self.makers = Makers.of(self.store, self.found, self.produced)
        self.places = places(self.store, self.found.moved)
        kept = ((self.store.labels_of(h), assumptions.kept(h.tensor, h.dim)) for h in self.store.homes)
        first = [(labels, cause) for labels, cause in kept if cause is not None]
        self.causes = [*first, *self.found.frozen, *self.places.kept]
        self.cause_of = first_cause(count, self.classes, self.causes)
        self.free = self.produced & (self.cause_of < 0)
        self.inexact_of = first_cause(count, self.classes, self.found.inexact)
        self.partition = partition(self.store, self.found, self.makers, self.produced, self.free)
        self.places.enter(self.partition)
        self.members = self._members()

    def grouping(self) -> Grouping:
        """Return the groups that can lose channels, with all that tells which."""
        groups, unable = self._groups()
        index_of = {g: i for i, g in enumerate(groups)}
        tied = np.isin(self.partition.group_of, list(unable))
        stuck = [a for a in self.found.assumptions if _gives_way(a) and tied[self.classes[a.labels]].any()]
        refused = tuple(self._refused() + self._tied(unable))
        self.partition = own = self.partition.renumbered(index_of)
        self.places.enter(own)
        named = self.recording.labels.named
        graph = ChannelGraph(
            groups=tuple(groups.values()),
            refused=refused,
            layers=tuple(_port(layer, own, self.places) for layer in self.found.layers),
            shapes={name: tuple(t.shape) for name, t in named.items()},
            parameters=frozenset(n for n, t in named.items() if isinstance(t, nn.Parameter)),
            module_types=dict(self.recording.types),
            batch=self.batch,
            notes=self.recording.notes,
            attributes=tuple(
                AttributeRule(a.module, a.name, a.value, own.groups(a.labels), own.channels(a.labels))
                for a in self.found.attributes
            ),
            magnitudes=tuple(self.found.magnitudes),
            shuffles=tuple(self.places.shuffles),
        )
        return Grouping(graph, own, self.found.assumptions, stuck)

    def _members(self) -> dict[int, list[Member]]:
        """Return for every group the parameter dimensions that hold its channels."""
        found: dict[int, list[Member]] = defaultdict(list)
        read = {home.key for home in self.store.homes_of(self.found.consumed, mixed=True)}
        for home in self.makers.homes:
            labels = self.store.labels_of(home)
            groups, channels = self.partition.groups(labels), self.partition.channels(labels)
            making, reading = home.key in self.makers.making, home.key in read
            role = Role.PRODUCER if making else Role.CONSUMER if reading else Role.FOLLOWER
            module = home.tensor.rpartition(".")[0]
            for g in self.partition.among(labels):
                at = np.flatnonzero(groups == g)
                order = self.places.order(labels[at])
                found[g].append(
                    Member(home.tensor, module, home.dim, role, at, channels[at], home.blocks, reading, order)
                )
        return found

    def _groups(self) -> tuple[dict[int, ChannelGroup], dict[int, str]]:
        """Return the groups that can lose channels, in order, and why the others can't."""
        found, own = self.found, self.partition
        blocks, uneven = cells(found, own)
        stepwise = schedules(self.store, found, self.places, own, self.free)
        stay, times = staying(found, own), multiples(found, own)
        groups: dict[int, ChannelGroup] = {}
        unable: dict[int, str] = {}
        names: dict[str, int] = {}
        for g, classes in own.own.items():
            removable, multiple, schedule = self.free[classes].copy(), times.get(g, 1), None
            if g not in stepwise:
                reason = uneven.get(g) or unsplittable(blocks[g], removable, multiple)
            elif stay.get(g) or multiple > 1:
                reason = "is shuffled, and a number of channels has to stay"
            elif (steps := stepwise[g]) is None:
                reason = "no smaller width keeps the rows of all its shuffles equal"
            else:
                reason, (blocks[g], schedule) = "", steps
            if reason:
                unable[g] = reason
                continue
            inexact = self.inexact_of[classes]
            inexact = inexact[inexact >= 0]
            why = _text(self.found.inexact[inexact[0]][1]) if inexact.size else ""
            name = _group_name(self.members[g], names)
            groups[g] = ChannelGroup(
                name, classes.size, tuple(self.members[g]), blocks[g], removable, not why, why, schedule,
                stay.get(g, ()), multiple=multiple,
            )  # fmt: skip
        return groups, unable

    def _refused(self) -> list[Refusal]:
        """List what makes channels that can't go: one entry a cause, with the parameters it fixes."""
        tensors: dict[Cause, dict[str, None]] = {}
        # A layer that never applies its own weight (it is quantized on the way, say) makes channels by another name.
        weights = {f"{name}.weight".lstrip(".") for name in self.recording.kernels}
        idle = weights - {layer.weight for layer in self.found.layers}
        shown = self._shown()
        for home in self.store.homes:
            asked = home.key in shown
            if not asked and (home.tensor not in idle or home.dim):
                continue
            own = self.classes[home.start : home.start + home.size]
            found = np.unique(self.cause_of[own[self.produced[own]] if asked else own])
            for index in found[found >= 0].tolist():
                tensors.setdefault(self.causes[index][1], {})[home.tensor] = None
        return [Refusal(c.operator, c.module, c.source, c.reason, tuple(names)) for c, names in tensors.items()]

    def _tied(self, unable: Mapping[int, str]) -> list[Refusal]:
        """List the groups whose constraints leave nothing to remove."""
        shown, refused = self._shown(), []
        for g, reason in unable.items():
            makers = [m for m in self.members[g] if (m.tensor, m.dim, m.blocks) in shown]
            first = self.partition.own[g][0]
            shares = (s.cause for s in self.found.shares if (self.classes[np.concatenate(s.blocks)] == first).any())
            cause = next(shares, Cause("coupling", makers[0].module if makers else "", "", ""))
            names = tuple(dict.fromkeys(m.tensor for m in makers))
            refused.append(Refusal(cause.operator, cause.module, cause.source, reason, names))
        return refused

    def _shown(self) -> set[tuple[str, int, int]]:
        """Return the parameter dimensions that refusals name: a depthwise convolution's, too, which makes none."""
        return self.makers.making | {(c.weight, 0, 1) for c in self.found.layers if c.kind == "conv"}


def _gives_way(assumption: Assumption) -> bool:
    """Tell whether an assumption ties channels together that another of its options leaves free."""
    return assumption.option in ("together", "share") and assumption.following not in ("", FREEZE)


def _text(cause: Cause) -> str:
    where = f" in {cause.module}" if cause.module else ""
    line = f" ({cause.source})" if cause.source else ""
    return f"{cause.operator}{where}{line}: {cause.reason}"


def _group_name(members: list[Member], names: dict[str, int]) -> str:
    producer = next((m for m in members if m.role is Role.PRODUCER), members[0])
    name = producer.module.removesuffix(".parametrizations.weight") or producer.tensor
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name}#{names[name]}"


def _port(layer: LayerCall, own: Partition, all_places: Places) -> LayerPort:
    """Return which channel of which group each input and output channel of a layer's call is."""

    def side(labels: Labels | None) -> tuple[Labels | None, Labels | None]:
        known = labels is not None and bool((own.groups(labels) >= 0).any())
        return (own.groups(labels), own.channels(labels)) if labels is not None and known else (None, None)

    return LayerPort(
        layer.module, layer.kind, layer.weight, layer.owned, layer.in_channels, layer.out_channels, layer.groups,
        layer.kernel, layer.positions, layer.batch, *side(layer.inputs), *side(layer.outputs),
        all_places.order(layer.inputs), all_places.order(layer.outputs), layer.parts, layer.window,
    )  # fmt: skip
