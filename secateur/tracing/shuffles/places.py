"""The places of all labels in the shuffles of a run, and what each group may lose along them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from secateur.graph.shuffles import Order, Shuffle
from secateur.tracing.assumptions import Cause
from secateur.tracing.findings import Findings, Moved
from secateur.tracing.labels import Labels, LabelStore
from secateur.tracing.partition import Partition
from secateur.tracing.shuffles.schedule import schedule


@dataclass(frozen=True, eq=False)
class Places:
    """The shuffles of a run, and the place of every label in them."""

    shuffles: list[Shuffle]
    """Each behind those at whose places its own source lies."""
    moved: list[Moved]
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

    def enter(self, partition: Partition) -> None:
        """Say which channel of which group each place of the shuffles holds."""
        for moved, shuffle in zip(self.moved, self.shuffles, strict=True):
            shuffle.group[:] = partition.groups(moved.source)
            shuffle.channel[:] = partition.channels(moved.source)


def places(store: LabelStore, moved: list[Moved]) -> Places:
    """Find the place of every label in the shuffles of a run; groups and channels are entered later."""
    none = np.zeros(0, dtype=np.int64)
    if not moved:
        return Places([], [], none, none, [])
    # Labels at one and the same place of a vector, whichever tensor holds it.
    together = store.classes(moved=False)
    turn = _turn(moved, together)
    kept = [
        (m.labels, replace(m.cause, reason="is shuffled, and meets itself unshuffled"))
        for i, m in enumerate(moved)
        if i not in turn
    ]
    moved = [moved[i] for i in turn]
    shuffle_at = np.full(int(together.max()) + 1, -1, dtype=np.int64)
    place_at = shuffle_at.copy()
    for index, move in enumerate(moved):
        own = together[move.labels]
        kept.append((move.labels[shuffle_at[own] >= 0], replace(move.cause, reason="is shuffled in two ways at once")))
        shuffle_at[own], place_at[own] = index, np.arange(move.size)
    shuffle_of, place_of = shuffle_at[together], place_at[together]
    shuffles = []
    for move in moved:
        unknown = np.full(move.size, -1, dtype=np.int64)
        order = Order(shuffle_of[move.source], place_of[move.source])
        shuffles.append(Shuffle(move.rows, unknown, unknown.copy(), order))
    return Places(shuffles, moved, shuffle_of, place_of, kept)


def _turn(moved: list[Moved], together: Labels) -> list[int]:
    """Return the shuffles, each behind those at whose places its source lies, less those that go round in a circle.

    What is shuffled may lie, by a sum with what is made later, at the places of a later shuffle, or of its own result.
    """
    made = [np.unique(together[move.labels]) for move in moved]
    read = [np.unique(together[move.source]) for move in moved]
    waits = [{i for i, own in enumerate(made) if np.isin(own, source).any()} for source in read]
    turn: list[int] = []
    while ready := [i for i, before in enumerate(waits) if i not in turn and before.issubset(turn)]:
        turn.append(ready[0])
    return turn


def schedules(
    store: LabelStore, found: Findings, all_places: Places, partition: Partition, free: np.ndarray
) -> dict[int, tuple[Labels, np.ndarray] | None]:
    """Return, for every group that passes a shuffle, its blocks and what they may lose step by step."""
    result: dict[int, tuple[Labels, np.ndarray] | None] = {}
    holders = [store.labels_of(home) for home in store.homes] if all_places.shuffles else []
    for g in {int(i) for s in all_places.shuffles for i in np.unique(s.group) if i >= 0}:
        inside = [(i, s) for i, s in enumerate(all_places.shuffles) if (s.group == g).any()]
        number = np.full(len(all_places.shuffles) + 1, -1, dtype=np.int64)
        number[[i for i, _ in inside]] = np.arange(len(inside))

        def renumbered(order: Order, number: Labels = number) -> Order:
            return Order(number[order.shuffle], np.where(number[order.shuffle] < 0, -1, order.place))

        orders = [all_places.order(labels) for labels in holders if (partition.groups(labels) == g).any()]
        blocks = [
            [*partition.counts(share.blocks, g), np.array([block.size for block in share.blocks])]
            for share in found.shares
            if g in partition.among(np.concatenate(share.blocks))
        ]
        result[g] = schedule(
            [Shuffle(s.rows, s.group, s.channel, renumbered(s.order)) for _, s in inside],
            [renumbered(order) for order in orders if order is not None],
            g,
            free[partition.own[g]],
            blocks,
        )
    return result
