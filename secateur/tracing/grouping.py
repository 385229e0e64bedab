"""From the labels of a traced run to the groups of coupled channels, and to what can't be pruned and why."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from secateur.graph.channels import (
    AttributeRule,
    ChannelGraph,
    ChannelGroup,
    LayerPort,
    Member,
    Refusal,
    Role,
    Staying,
    quotas,
)
from secateur.graph.shuffles import Order, Shuffle
from secateur.tracing.findings import Call, Cause, Site
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Home, Labels, Moved
from secateur.tracing.shuffles.schedule import schedule as scheduled


@dataclass(eq=False)
class _Shuffles:
    """The shuffles of a run, and the place of every label in them."""

    shuffles: list[Shuffle]
    """Each behind those at whose places its own source lies."""
    moves: list[Moved]
    """What each of them was made of."""
    shuffle_of: Labels
    place_of: Labels
    kept: list[tuple[Labels, Cause]]
    """Labels that have no one place in an order that can be found, and why."""

    def order(self, labels: Labels | None) -> Order | None:
        """Return where a vector's positions lie; None where no shuffle is behind them."""
        if labels is None or not self.shuffles or (self.shuffle_of[labels] < 0).all():
            return None
        return Order(self.shuffle_of[labels], self.place_of[labels])


@dataclass(eq=False)
class Grouping:
    """A graph together with the class of every label, from which a failed trial finds what to give up."""

    graph: ChannelGraph
    classes: Labels
    group_of: Labels
    """Index of the group of every class, or -1."""
    channel_of: Labels
    """Channel in that group of every class, or -1."""
    sites: list[Site]
    stuck: list[int]
    """Keys of shuffles that leave a group nothing to prune where the channels at one place of all rows go together."""
    shared: list[int]
    """Keys of cuts that leave a group nothing to prune where all parts lose the same fraction."""


def group_channels(flow: Flow, module_types: Mapping[str, str], notes: tuple[str, ...], batch: int) -> Grouping:
    """Assemble the groups of a traced run.

    A *class* of joined labels is one channel. Classes made by the same layers form a group; so do classes that blocks
    of one layer or one cut tie together. Inside a group, blocks of several constraints are refined into cells, and all
    cells lose the same fraction, which satisfies every constraint at once.
    """
    classes = flow.store.classes()
    count = int(classes.max()) + 1 if classes.size else 0
    produced = _marked(count, classes, flow.produced)
    moved = _shuffles(flow)
    causes = [*flow.frozen, *moved.kept]
    cause_of = _first_cause(count, classes, causes)
    frozen = cause_of >= 0
    inexact_of = _first_cause(count, classes, flow.inexact)

    producing = {id(a): a for a in flow.produced}
    homes = [h for h in flow.store.homes if produced[classes[h.start : h.start + h.size]].any()]
    made = _keys(flow.store.homes_of(list(producing.values())))
    signature = _signatures(count, classes, [h for h in homes if h.key in made])
    group_of_signature = _linked(signature, flow, classes, produced)

    free = produced & ~frozen
    group_id = np.full(count, -1, dtype=np.int64)
    group_id[produced] = group_of_signature[signature[produced]]

    sizes = np.bincount(group_id[group_id >= 0], minlength=int(group_id.max()) + 1 if count else 0)
    first = _first_position(homes, made, classes, count)
    channel_of = np.full(count, -1, dtype=np.int64)
    members: dict[int, list[Member]] = defaultdict(list)
    order: list[int] = []
    by_group: dict[int, Labels] = {}
    live = np.flatnonzero(group_id >= 0)
    live = live[np.lexsort((first[live], group_id[live]))]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    for g in range(sizes.size):
        own = live[bounds[g] : bounds[g + 1]]
        if own.size and free[own].any():
            by_group[g] = own
            channel_of[own] = np.arange(own.size)
            order.append(g)
    kept_group = np.full(sizes.size + 1, -1, dtype=np.int64)
    kept_group[order] = order
    group_id = kept_group[group_id]

    _members(flow, homes, made, classes, group_id, channel_of, moved, members)
    for move, shuffle in zip(moved.moves, moved.shuffles, strict=True):
        shuffle.group[:] = group_id[classes[move.source]]
        shuffle.channel[:] = channel_of[classes[move.source]]
    cells, uneven = _cells(flow, classes, group_id, channel_of, by_group)
    schedules = _schedules(flow, moved, classes, group_id, channel_of, by_group, free)
    staying = _staying(flow, classes, group_id, channel_of)
    multiples = _multiples(flow, classes, group_id, channel_of, by_group)
    order.sort(key=lambda g: int(first[by_group[g]].min()))
    groups: list[ChannelGroup] = []
    index_of: dict[int, int] = {}
    names: dict[str, int] = {}
    lost: dict[int, str] = {}
    for g in order:
        own = by_group[g]
        removable = free[own].copy()
        cell = cells[g]
        schedule = None
        multiple = multiples.get(g, 1)
        if g in schedules:
            found = schedules[g]
            reason = "" if found is not None else "no smaller width keeps the rows of all its shuffles equal"
            reason = "is shuffled, and a number of channels has to stay" if staying.get(g) or multiple > 1 else reason
            cell, schedule = found if found is not None else (cell, None)
        else:
            reason = uneven.get(g) or _unsplittable(cell, removable, multiple)
        if reason:
            lost[g] = reason
            continue
        inexactly = inexact_of[own]
        exact = bool((inexactly < 0).all())
        why = "" if exact else _text(flow.inexact[inexactly[inexactly >= 0][0]][1])
        name = _group_name(members[g], names)
        index_of[g] = len(groups)
        sets = tuple(staying.get(g, ()))
        made_of = tuple(members[g])
        groups.append(
            ChannelGroup(name, own.size, made_of, cell, removable, exact, why, schedule, sets, multiple=multiple)
        )
    final = np.full(sizes.size + 1, -1, dtype=np.int64)
    for g, index in index_of.items():
        final[g] = index
    tied = np.isin(group_id, list(lost))
    stuck = [s.key for s in flow.shuffled if s.key not in flow.futile and tied[classes[s.labels]].any()]
    shared = [
        s.key for s in flow.sites if s.options[s.choice :][:2] == ("share", "parts") and tied[classes[s.labels]].any()
    ]
    group_id = final[group_id]
    channel_of[group_id < 0] = -1
    for shuffle in moved.shuffles:
        shuffle.channel[final[shuffle.group] < 0] = -1
        shuffle.group[:] = final[shuffle.group]

    why_of = [cause for _, cause in causes]
    refused = _refusals(flow, made, classes, produced, cause_of, why_of, lost, by_group, members)
    shapes = {name: tuple(t.shape) for name, t in flow.named.items()}
    graph = ChannelGraph(
        groups=tuple(groups),
        refused=tuple(refused),
        layers=tuple(_port(call, classes, group_id, channel_of, moved) for call in flow.calls),
        shapes=shapes,
        parameters=frozenset(n for n, t in flow.named.items() if isinstance(t, nn.Parameter)),
        module_types=dict(module_types),
        batch=batch,
        notes=notes,
        attributes=tuple(
            AttributeRule(a.module, a.name, a.value, group_id[classes[a.labels]], channel_of[classes[a.labels]])
            for a in flow.attributes
        ),
        magnitudes=tuple(flow.magnitudes),
        shuffles=tuple(moved.shuffles),
    )
    return Grouping(graph, classes, group_id, channel_of, flow.sites, stuck, shared)


def _shuffles(flow: Flow) -> _Shuffles:
    """Find the place of every label in the shuffles of a run; groups and channels are entered later."""
    none = np.zeros(0, dtype=np.int64)
    moved = _Shuffles([], [], none, none, [])
    if not flow.store.moves:
        return moved
    # Labels at one and the same place of a vector, whichever tensor holds it.
    together = flow.store.classes(moved=False)
    turn = _turn(flow.store.moves, together)
    moved.moves = [flow.store.moves[i] for i in turn]
    for i in set(range(len(flow.store.moves))).difference(turn):
        cause = replace(flow.moved_at[i], reason="is shuffled, and meets itself unshuffled")
        moved.kept.append((flow.store.moves[i].labels, cause))
    shuffle_at = np.full(int(together.max()) + 1, -1, dtype=np.int64)
    place_at = shuffle_at.copy()
    for index, move in enumerate(moved.moves):
        own = together[move.labels]
        cause = replace(flow.moved_at[turn[index]], reason="is shuffled in two ways at once")
        moved.kept.append((move.labels[shuffle_at[own] >= 0], cause))
        shuffle_at[own], place_at[own] = index, np.arange(move.size)
    moved.shuffle_of, moved.place_of = shuffle_at[together], place_at[together]
    for move in moved.moves:
        order = Order(moved.shuffle_of[move.source], moved.place_of[move.source])
        unknown = np.full(move.size, -1, dtype=np.int64)
        moved.shuffles.append(Shuffle(move.rows, unknown, unknown.copy(), order))
    return moved


def _turn(moves: list[Moved], together: Labels) -> list[int]:
    """Return the shuffles, each behind those at whose places its source lies, less those that go round in a circle.

    What is shuffled may lie, by a sum with what is made later, at the places of a later shuffle, or of its own result.
    """
    made = [np.unique(together[move.labels]) for move in moves]
    read = [np.unique(together[move.source]) for move in moves]
    waits = [{i for i, own in enumerate(made) if np.isin(own, source).any()} for source in read]
    turn: list[int] = []
    while ready := [i for i, before in enumerate(waits) if i not in turn and before.issubset(turn)]:
        turn.append(ready[0])
    return turn


def _schedules(
    flow: Flow,
    moved: _Shuffles,
    classes: Labels,
    group_id: Labels,
    channel_of: Labels,
    by_group: dict[int, Labels],
    free: np.ndarray,
) -> dict[int, tuple[Labels, np.ndarray] | None]:
    """Return, for every group that passes a shuffle, its blocks and what they may lose step by step."""
    found: dict[int, tuple[Labels, np.ndarray] | None] = {}
    holders = [np.arange(h.start, h.start + h.size) for h in flow.store.homes] if moved.shuffles else []
    for g in {int(i) for s in moved.shuffles for i in np.unique(s.group) if i >= 0}:
        inside = [(i, s) for i, s in enumerate(moved.shuffles) if (s.group == g).any()]
        number = np.full(len(moved.shuffles) + 1, -1, dtype=np.int64)
        number[[i for i, _ in inside]] = np.arange(len(inside))

        def renumbered(order: Order, number: Labels = number) -> Order:
            return Order(number[order.shuffle], np.where(number[order.shuffle] < 0, -1, order.place))

        shuffles = [Shuffle(s.rows, s.group, s.channel, renumbered(s.order)) for _, s in inside]
        orders = [moved.order(labels) for labels in holders if (group_id[classes[labels]] == g).any()]
        readers = [renumbered(order) for order in orders if order is not None]
        blocks = []
        for share in flow.shares:
            held, sizes = classes[np.concatenate(share.blocks)], np.array([block.size for block in share.blocks])
            if (group_id[held] == g).any():
                blocks.append([*_counted(held, sizes, g, group_id, channel_of, by_group[g].size), sizes])
        found[g] = scheduled(shuffles, readers, g, free[by_group[g]], blocks)
    return found


def _staying(flow: Flow, classes: Labels, group_id: Labels, channel_of: Labels) -> dict[int, list[Staying]]:
    """Return for every group the sets of channels of which some have to stay, and how many; each set once."""
    found: dict[int, dict[bytes, Staying]] = defaultdict(dict)
    for labels, least in flow.staying:
        own = classes[labels]
        groups = group_id[own]
        needed = least - int((groups < 0).sum())
        for g in np.unique(groups[groups >= 0]).tolist() if needed > 0 else ():
            channels, places = np.unique(channel_of[own[groups == g]], return_counts=True)
            count = min(-(-needed // int(places.min())), channels.size)
            known = found[g].get(channels.tobytes())
            found[g][channels.tobytes()] = Staying(channels, max(count, known.least if known is not None else 0))
    return {g: [s for s in sets.values() if s.least > 1] for g, sets in found.items()}


def _multiples(
    flow: Flow, classes: Labels, group_id: Labels, channel_of: Labels, by_group: dict[int, Labels]
) -> dict[int, int]:
    """Return for every group of how many channels a multiple has to go: then no remainder changes that code asks for.

    Where only some of a group's channels are counted, or some more often than others, as many as there are: none go.
    """
    found: dict[int, int] = {}
    for labels, divisor in flow.multiples:
        own = classes[labels]
        groups = group_id[own]
        for g in np.unique(groups[groups >= 0]).tolist():
            counts = np.bincount(channel_of[own[groups == g]], minlength=by_group[g].size)
            if (counts % divisor == 0).all():
                continue
            alike = bool((counts == counts[0]).all())
            needed = divisor // math.gcd(divisor, int(counts[0])) if alike else by_group[g].size
            found[g] = math.lcm(found.get(g, 1), needed)
    return found


def _counted(held: Labels, sizes: Labels, g: int, group_id: Labels, channel_of: Labels, width: int) -> Labels:
    """Return, a row a block, how many of its positions hold each channel of a group; blocks lie one after another."""
    mine = group_id[held] == g
    places = np.repeat(np.arange(sizes.size), sizes)[mine] * width + channel_of[held[mine]]
    return np.bincount(places, minlength=sizes.size * width).reshape(sizes.size, width)


def _text(cause: Cause) -> str:
    where = f" in {cause.module}" if cause.module else ""
    line = f" ({cause.source})" if cause.source else ""
    return f"{cause.operator}{where}{line}: {cause.reason}"


def _marked(count: int, classes: Labels, arrays: list[Labels]) -> np.ndarray:
    mark = np.zeros(count, dtype=bool)
    for labels in arrays:
        mark[classes[labels]] = True
    return mark


def _first_cause(count: int, classes: Labels, found: list[tuple[Labels, Cause]]) -> np.ndarray:
    """Return for every class the index of the first cause that names it, or -1."""
    index = np.full(count, -1, dtype=np.int32)
    for i in reversed(range(len(found))):
        index[classes[found[i][0]]] = i
    return index


def _keys(homes: list[Home]) -> set[tuple[str, int, int]]:
    return {home.key for home in homes}


def _signatures(count: int, classes: Labels, homes: list[Home]) -> Labels:
    """Number the sets of layers that make a class; classes with the same number have the same makers."""
    number = np.zeros(count, dtype=np.int64)
    following = 1
    for home in homes:
        # Refine: of the classes that were alike so far, those that this home makes part from the others.
        own = np.unique(classes[home.start : home.start + home.size])
        alike, inverse = np.unique(number[own], return_inverse=True)
        number[own] = following + inverse.reshape(-1)
        following += alike.size
    return np.unique(number, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _linked(signature: Labels, flow: Flow, classes: Labels, produced: np.ndarray) -> Labels:
    """Unite signatures whose classes one constraint ties together; return the group of every signature."""
    parent = np.arange(int(signature.max()) + 1 if signature.size else 0)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for share in flow.shares:
        own = classes[np.concatenate(share.blocks)]
        found = np.unique(signature[own[produced[own]]]).tolist()
        for other in found[1:]:
            parent[root(other)] = root(found[0])
    return np.array([root(i) for i in range(parent.size)], dtype=np.int64)


def _first_position(homes: list[Home], made: set[tuple[str, int, int]], classes: Labels, count: int) -> Labels:
    """Return for every class the first label that makes it, which gives channels and groups their order."""
    first = np.full(count, np.iinfo(np.int64).max, dtype=np.int64)
    for home in homes:
        if home.key in made:
            labels = np.arange(home.start, home.start + home.size)
            np.minimum.at(first, classes[labels], labels)
    return first


def _members(
    flow: Flow,
    homes: list[Home],
    made: set[tuple[str, int, int]],
    classes: Labels,
    group_id: Labels,
    channel_of: Labels,
    moved: _Shuffles,
    members: dict[int, list[Member]],
) -> None:
    read = _keys(flow.store.homes_of(flow.consumed, mixed=True))
    for home in homes:
        own = classes[home.start : home.start + home.size]
        ids = group_id[own]
        role = Role.PRODUCER if home.key in made else Role.CONSUMER if home.key in read else Role.FOLLOWER
        module = home.tensor.rpartition(".")[0]
        first = int(ids[0])
        alike = bool((ids == first).all())  # as mostly
        for g in ([first] if first >= 0 else []) if alike else np.unique(ids[ids >= 0]).tolist():
            positions = np.arange(ids.size) if alike else np.flatnonzero(ids == g)
            order = moved.order(home.start + positions)
            channels = channel_of[own[positions]]
            members[g].append(
                Member(home.tensor, module, home.dim, role, positions, channels, home.blocks, home.key in read, order)
            )


def _cells(
    flow: Flow, classes: Labels, group_id: Labels, channel_of: Labels, by_group: dict[int, Labels]
) -> tuple[dict[int, Labels], dict[int, str]]:
    """Number for every group the cells of its channels: those with equal counts in every block of every constraint.

    A group is uneven, and said to be, where channels that never go make up more of one block than of another: then no
    choice takes the same fraction from both.
    """
    uneven: dict[int, str] = {}
    rows: dict[int, list[Labels]] = defaultdict(list)
    for share in flow.shares:
        held, sizes = classes[np.concatenate(share.blocks)], np.array([block.size for block in share.blocks])
        touched = set(np.unique(group_id[held]).tolist())
        for g in touched - {-1}:
            counts = _counted(held, sizes, g, group_id, channel_of, by_group[g].size)
            inside = counts.sum(1)
            if (inside * sizes[0] != inside[0] * sizes).any():
                uneven[g] = f"{share.cause.reason}, and one of its blocks holds channels that stay"
            if (counts == counts[:1]).all() and len(touched) == 1:
                continue
            rows[g].append(counts)
    cells: dict[int, Labels] = {}
    for g, own in by_group.items():
        if g in rows:
            # Rows are told apart as strings of bytes, which sort much faster than rows of numbers.
            stacked = np.ascontiguousarray(np.concatenate(rows[g]).T)
            strings = stacked.view(np.dtype((np.void, stacked.itemsize * stacked.shape[1]))).reshape(-1)
            _, first, inverse = np.unique(strings, return_index=True, return_inverse=True)
            cells[g] = np.argsort(np.argsort(first))[inverse.reshape(-1)]
        else:
            cells[g] = np.zeros(own.size, dtype=np.int64)
    return cells, uneven


def _unsplittable(cells: Labels, removable: np.ndarray, multiple: int) -> str:
    """Say why no step can be taken at all; empty where one can."""
    sizes = np.bincount(cells)
    quota = quotas(cells, multiple)
    if multiple > 1 and quota.sum() >= cells.size:
        return f"the remainder of their number by {multiple} is asked for"
    if (sizes <= quota).any():
        return "its channels only go together" if sizes.size == 1 else "its blocks can't lose equal fractions"
    if (np.bincount(cells, weights=removable) < quota).any():
        return "every block has to lose channels, and one has none that can go"
    return ""


def _group_name(members: list[Member], names: dict[str, int]) -> str:
    producer = next((m for m in members if m.role is Role.PRODUCER), members[0])
    name = producer.module.removesuffix(".parametrizations.weight") or producer.tensor
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name}#{names[name]}"


def _places(
    labels: Labels | None, classes: Labels, group_id: Labels, channel_of: Labels
) -> tuple[Labels | None, Labels | None]:
    if labels is None:
        return None, None
    own = classes[labels]
    groups = group_id[own]
    return (groups, channel_of[own]) if (groups >= 0).any() else (None, None)


def _port(call: Call, classes: Labels, group_id: Labels, channel_of: Labels, moved: _Shuffles) -> LayerPort:
    in_group, in_channel = _places(call.inputs, classes, group_id, channel_of)
    out_group, out_channel = _places(call.outputs, classes, group_id, channel_of)
    return LayerPort(
        call.module, call.kind, call.weight, call.owned, call.in_channels, call.out_channels, call.groups, call.kernel,
        call.positions, call.batch, in_group, in_channel, out_group, out_channel,
        moved.order(call.inputs), moved.order(call.outputs), call.parts,
    )  # fmt: skip


def _refusals(
    flow: Flow,
    made: set[tuple[str, int, int]],
    classes: Labels,
    produced: np.ndarray,
    cause_of: np.ndarray,
    causes: list[Cause],
    lost: dict[int, str],
    by_group: dict[int, Labels],
    members: dict[int, list[Member]],
) -> list[Refusal]:
    """List what makes channels that can't go: one entry a cause, with the parameters it fixes."""
    tensors: dict[Cause, dict[str, None]] = {}
    # A depthwise convolution makes no channels of its own, but is looked for all the same.
    shown = made | {(call.weight, 0, 1) for call in flow.calls if call.kind == "conv"}
    # A layer that never applies its own weight (it is quantized on the way, say) makes channels by another name.
    idle = flow.kernels - {call.weight for call in flow.calls}
    for home in flow.store.homes:
        asked = home.key in shown
        if not asked and (home.tensor not in idle or home.dim):
            continue
        own = classes[home.start : home.start + home.size]
        own = own[produced[own]] if asked else own
        found = np.unique(cause_of[own])
        for index in found[found >= 0].tolist():
            tensors.setdefault(causes[index], {})[home.tensor] = None
    refused = [Refusal(c.operator, c.module, c.source, c.reason, tuple(names)) for c, names in tensors.items()]
    for g, reason in lost.items():
        producers = [m for m in members[g] if (m.tensor, m.dim, m.blocks) in shown]
        causes_of = [
            s.cause for s in flow.shares if (classes[np.concatenate(s.blocks)][:, None] == by_group[g][:1]).any()
        ]
        cause = causes_of[0] if causes_of else Cause("coupling", producers[0].module if producers else "", "", "")
        refused.append(
            Refusal(
                cause.operator,
                cause.module,
                cause.source,
                reason,
                tuple(dict.fromkeys(m.tensor for m in producers)),
            )
        )
    return refused
