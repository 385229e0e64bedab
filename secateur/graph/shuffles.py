"""The order in which kept channels lie behind shuffles, where the blocks that these mix lose different indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import PlanError
from secateur.graph.places import IndexArray, mask_at

Ranks = list[np.ndarray]
"""For every shuffle, the place at which each of its places is found in the pruned network, or -1 if it is removed."""


@dataclass(frozen=True, eq=False)
class Order:
    """Where the positions of one dimension lie in shuffled vectors; kept positions stay in the order of these.

    Position ``i`` is place ``place[i]`` of shuffle ``shuffle[i]``; both are -1 for one that no shuffle moves.
    """

    shuffle: IndexArray
    """Indices into ``ChannelGraph.shuffles``."""
    place: IndexArray

    def stretches(self) -> IndexArray:
        """Return the number of the stretch that each position is in: neighbours that follow one another in a shuffle.

        Within a stretch kept positions are in the shuffle's order; the stretches themselves keep their order.
        """
        step = np.diff(self.place)
        together = (np.diff(self.shuffle) == 0) & ((self.shuffle[1:] < 0) | (step == 0) | (step == 1))
        return np.concatenate([[0], np.cumsum(~together)])


@dataclass(frozen=True, eq=False)
class Shuffle:
    """A vector of channels read in rows and laid out in columns.

    Place ``s · rows + r`` of the result is the ``s``-th kept channel of row ``r``.
    """

    rows: int
    group: IndexArray
    """Index of the group of every channel of the vector before the shuffle, or -1; see ``LayerPort``."""
    channel: IndexArray
    order: Order


def ranks(shuffles: Sequence[Shuffle], masks: list[np.ndarray]) -> Ranks:
    """Follow a selection through all shuffles of a graph.

    Args:
        shuffles: Those of a graph, each behind those that its source comes from.
        masks: The mask of every group, see :func:`secateur.graph.plan.masks`.

    Raises:
        PlanError: If a shuffle would mix rows of different lengths.
    """
    result: Ranks = []
    for shuffle in shuffles:
        mask = mask_at(shuffle.group, shuffle.channel, masks)
        columns = mask.size // shuffle.rows
        # Positions of the source in the pruned network's order, in which those of a row have to follow one another.
        kept = arranged(np.flatnonzero(~mask), shuffle.order, result)
        row, width = kept // columns, kept.size // shuffle.rows
        if kept.size % shuffle.rows or (row != np.repeat(np.arange(shuffle.rows), width)).any():
            raise PlanError("a shuffle of the network would mix rows of different lengths; choose along the schedule.")
        place = np.arange(kept.size)
        rank = np.full(mask.size, -1, dtype=np.int64)
        rank[(kept % columns) * shuffle.rows + row] = (place % width) * shuffle.rows + place // width
        result.append(rank)
    return result


def arranged(kept: np.ndarray, order: Order | None, found: Ranks) -> np.ndarray:
    """Return kept positions of a dimension in the order in which they lie in the pruned network.

    Args:
        kept: Ascending positions.
        order: How all positions of the dimension lie behind shuffles; None where none moves them.
        found: What :func:`ranks` returned, at least for the shuffles that ``order`` names.
    """
    if order is None or (order.shuffle < 0).all():
        return kept
    key = np.arange(order.shuffle.size)
    for index in np.unique(order.shuffle[order.shuffle >= 0]).tolist():
        own = order.shuffle == index
        key[own] = found[index][order.place[own]]
    result: np.ndarray = kept[np.lexsort((kept, key[kept], order.stretches()[kept]))]
    return result
