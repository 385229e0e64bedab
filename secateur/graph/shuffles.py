"""In which order the channels that are left lie, behind shuffles that mix blocks which lost different indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import PlanError
from secateur.graph.places import IndexArray, lost

Ranks = list[np.ndarray]
"""For every shuffle, the place at which each of its places is found in the pruned network, or -1 where it goes."""


@dataclass(frozen=True, eq=False)
class Order:
    """Where the positions of one dimension lie in shuffled vectors, whose order what is left of them keeps.

    Position ``i`` is place ``place[i]`` of shuffle ``shuffle[i]``; both are -1 where it keeps its own order.
    """

    shuffle: IndexArray
    """Indices into ``ChannelGraph.shuffles``."""
    place: IndexArray

    def stretches(self) -> IndexArray:
        """Return the number of the stretch that each position is in: neighbours that follow one another in a shuffle.

        Within a stretch what is left keeps the shuffle's order; stretches keep theirs.
        """
        step = np.diff(self.place)
        together = (np.diff(self.shuffle) == 0) & ((self.shuffle[1:] < 0) | (step == 0) | (step == 1))
        return np.concatenate([[0], np.cumsum(~together)])


@dataclass(frozen=True, eq=False)
class Shuffle:
    """A vector of channels read in rows and laid out in columns.

    Place ``s · rows + r`` of the result is the ``s``-th of row ``r``, of those left.
    """

    rows: int
    group: IndexArray
    """Index of the group of every channel of the vector before the shuffle, or -1; see ``LayerPort``."""
    channel: IndexArray
    order: Order


def ranks(shuffles: Sequence[Shuffle], removed: list[np.ndarray]) -> Ranks:
    """Follow a selection through all shuffles, each behind those that its source comes from.

    Args:
        shuffles: Those of a graph, each behind those that its source comes from.
        removed: For every group, which of its channels go.

    Raises:
        PlanError: If a shuffle would mix rows of different lengths.
    """
    result: Ranks = []
    for shuffle in shuffles:
        gone = lost(shuffle.group, shuffle.channel, removed)
        rank = np.full(gone.size, -1, dtype=np.int64)
        columns = gone.size // shuffle.rows
        # Positions of the source in the pruned network's order; each row's have to follow one another.
        left = arranged(np.flatnonzero(~gone), shuffle.order, result)
        row = left // columns
        if left.size % shuffle.rows or (row != np.repeat(np.arange(shuffle.rows), left.size // shuffle.rows)).any():
            raise PlanError("a shuffle of the network would mix rows of different lengths; choose along the schedule.")
        width = left.size // shuffle.rows
        place = np.arange(left.size)
        rank[(left % columns) * shuffle.rows + row] = (place % width) * shuffle.rows + place // width
        result.append(rank)
    return result


def arranged(kept: np.ndarray, order: Order | None, found: Ranks) -> np.ndarray:
    """Return kept positions of a dimension in the order in which they lie in the pruned network.

    Args:
        kept: Ascending positions.
        order: How all positions of the dimension lie behind shuffles; None: they keep their order.
        found: What :func:`ranks` returned, as far as needed.
    """
    if order is None or (order.shuffle < 0).all():
        return kept
    key = np.arange(order.shuffle.size)
    for index in np.unique(order.shuffle[order.shuffle >= 0]).tolist():
        own = order.shuffle == index
        key[own] = found[index][order.place[own]]
    result: np.ndarray = kept[np.lexsort((kept, key[kept], order.stretches()[kept]))]
    return result
