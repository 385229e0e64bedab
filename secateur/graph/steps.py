"""A removal order cut into the smallest steps that keep a group's constraint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from secateur.graph.channels import ChannelGroup


def steps(group: ChannelGroup, order: Sequence[int]) -> list[list[int]]:
    """Cut a removal order into the smallest steps that keep the group's constraint, the least important first.

    Each step removes channels of every block in proportion to the block's size, so that after any number of steps all
    blocks have lost the same fraction; or as many of each as the group's schedule says. One channel at least of every
    block and of every layer stays, and ``group.least`` of the group.
    """
    found = _steps(group, order)
    kept = group.size - np.cumsum([len(step) for step in found])
    return found[: int(np.searchsorted(-kept, -group.least, side="right"))]


def _steps(group: ChannelGroup, order: Sequence[int]) -> list[list[int]]:
    sizes = np.bincount(group.blocks)
    ordered = np.asarray(order, dtype=np.int64).reshape(-1)
    place = np.full(group.size, -1, dtype=np.int64)
    place[ordered] = np.arange(ordered.size)
    free = group.removable.copy()
    if group.schedule is None:
        # The most important channel of every layer stays, since a layer may hold only some of the group's channels.
        held = {m.channels.tobytes(): m.channels for m in group.members if m.channels.size}
        free[[int(channels[place[channels].argmax()]) for channels in held.values()]] = False
    for some in group.staying:
        free[some.channels[np.argsort(place[some.channels])[-some.least :]]] = False
    # The free channels of each block follow one another in the queue, each block's in the order of removal.
    queue = ordered[free[ordered]]
    blocks = group.blocks[queue]
    queue = queue[np.argsort(blocks, kind="stable")]
    lengths = np.bincount(blocks, minlength=sizes.size)
    starts = np.cumsum(lengths) - lengths
    if group.schedule is not None:
        before = np.vstack([np.zeros_like(sizes), group.schedule])
        return [
            [int(c) for start, i, j in zip(starts, low, high, strict=True) for c in queue[start + i : start + j]]
            for low, high in pairwise(before)
        ]
    quota = group.quota
    count = int((np.minimum(lengths, sizes - 1) // quota).min())
    of_blocks = [
        queue[i : i + count * k].reshape(count, k) for i, k in zip(starts.tolist(), quota.tolist(), strict=True)
    ]
    found: list[list[int]] = np.concatenate(of_blocks, axis=1).tolist()
    return found
