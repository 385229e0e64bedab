"""How many channels each block of a shuffled group may lose, step by step.

ShuffleNet v2 halves a stream, works on one half, joins the two and shuffles them, block after block. A half of a
shuffled stream holds the first half of each of its rows, a quarter of the stream before, and so on: after removal every
layer has to find in its half what it found there before. That fixes how many channels go of each such stretch, as a
function of the width that is left; which of them go is free. The numbers are found by following the cuts back through
the shuffles, once for the whole width and once for every smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from secateur.graph.shuffles import Order, Shuffle
from secateur.tracing.labels import Labels

Cuts = dict[int, int]
"""Position at which a vector is cut -> the position of the same cut in the pruned network."""


@dataclass(frozen=True)
class _Stretch:
    """Positions of a vector that follow one another in a shuffle, from its place ``first`` on, or in none."""

    start: int
    stop: int
    shuffle: int
    first: int


def _stretches(order: Order) -> list[_Stretch]:
    numbers = order.stretches()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    stops = [*starts[1:].tolist(), numbers.size]
    return [
        _Stretch(a, b, int(order.shuffle[a]), int(order.place[a])) for a, b in zip(starts.tolist(), stops, strict=True)
    ]


def _cuts(shuffles: Sequence[Shuffle], readers: Sequence[Order]) -> list[set[int]]:
    """Return the places at which the code cuts each shuffled vector: the ends of what is read or moved on of it."""
    found: list[set[int]] = [{0, shuffle.group.size} for shuffle in shuffles]
    for order in (*readers, *(shuffle.order for shuffle in shuffles)):
        for stretch in _stretches(order):
            if stretch.shuffle >= 0:
                last = int(order.place[stretch.stop - 1])
                found[stretch.shuffle] |= {stretch.first, last + 1}
    return found


def _followed(
    shuffles: Sequence[Shuffle], cuts: list[set[int]], width: int, whole: int
) -> dict[tuple[int, int], Cuts] | None:
    """Follow all cuts back through the shuffles, with ``width`` of every ``whole`` positions left.

    Returns:
        For every stretch ``(shuffle, start)`` that comes from no shuffle, where it is cut; None where some vector can't
        be cut at that width as it was.
    """
    known: list[Cuts] = []
    for places in cuts:
        if any(place * width % whole for place in places):
            return None
        known.append({place: place * width // whole for place in places})
    leaves: dict[tuple[int, int], Cuts] = {}
    for index in reversed(range(len(shuffles))):
        shuffle = shuffles[index]
        columns = shuffle.group.size // shuffle.rows
        if columns * width % whole:
            return None
        left = columns * width // whole
        starts: dict[int, int] = {}
        position = 0
        stretches = _stretches(shuffle.order)
        for stretch in stretches:
            starts[stretch.start] = position
            length = stretch.stop - stretch.start
            if stretch.shuffle >= 0:
                inner = known[stretch.shuffle]
                if stretch.first + length not in inner:
                    return None
                position += inner[stretch.first + length] - inner[stretch.first]
            elif length * width % whole:
                return None
            else:
                position += length * width // whole
                leaves.setdefault((index, stretch.start), {0: 0, length: length * width // whole})
        starts[shuffle.group.size] = position
        for place, pruned in known[index].items():
            for row in range(shuffle.rows):
                taken = max(-(-(place - row) // shuffle.rows), 0)
                taken_pruned = max(-(-(pruned - row) // shuffle.rows), 0)
                at, to = row * columns + taken, row * left + taken_pruned
                if at in starts:
                    if starts[at] != to:
                        return None
                    continue
                stretch = next(s for s in stretches if s.start < at < s.stop)
                inside, to_inside = at - stretch.start, to - starts[stretch.start]
                if stretch.shuffle >= 0:
                    target, offset = known[stretch.shuffle], stretch.first
                    to_inside += target[offset]
                else:
                    target, offset = leaves[index, stretch.start], 0
                if target.setdefault(offset + inside, to_inside) != to_inside:
                    return None
    return leaves


def schedule(
    shuffles: Sequence[Shuffle],
    readers: Sequence[Order],
    group: int,
    free: np.ndarray,
    blocks: Sequence[Sequence[Labels]],
) -> tuple[Labels, np.ndarray] | None:
    """Find what each block of a group's channels may lose, step by step.

    Args:
        shuffles: Every shuffle that the group's channels pass, each behind those that its source comes from.
        readers: How the positions of layers and vectors lie that hold the group's channels.
        group: Index of the group.
        free: Which of its channels may go.
        blocks: For every constraint on the group its blocks, each as the number of positions of every channel in it,
            and last the blocks' sizes; all blocks of one constraint lose the same fraction.

    Returns:
        The block of every channel, and how many channels each block has lost after each step, ascending; None where
        there is no step.
    """
    cuts = _cuts(shuffles, readers)
    whole = int(np.gcd.reduce([shuffle.group.size // shuffle.rows for shuffle in shuffles]))
    full = _followed(shuffles, cuts, whole, whole)
    if full is None:
        return None
    keys = [counts for *parts, _ in blocks for counts in parts]
    segments: list[tuple[tuple[int, int], int, int, Labels]] = []
    for (index, start), found in full.items():
        places = sorted(found)
        for low, high in pairwise(places):
            own = slice(start + low, start + high)
            if (shuffles[index].group[own] != group).any():
                return None
            held = np.bincount(shuffles[index].channel[own], minlength=free.size)
            keys.append(held)
            segments.append(((index, start), low, high, held))
    _, inverse = np.unique(np.stack(keys, 1), axis=0, return_inverse=True)
    order = {c: i for i, c in enumerate(dict.fromkeys(inverse.reshape(-1).tolist()))}
    cells = np.array([order[c] for c in inverse.reshape(-1).tolist()], dtype=np.int64)
    sizes = np.bincount(cells)
    most = np.bincount(cells, weights=free).astype(np.int64)
    one = np.array([np.flatnonzero(cells == c)[0] for c in range(sizes.size)])
    steps: list[np.ndarray] = []
    last = np.zeros_like(sizes)
    for width in range(whole - 1, 0, -1):
        leaves = _followed(shuffles, cuts, width, whole)
        lost = _lost(leaves, segments, sizes, one, (whole - width) / whole) if leaves is not None else None
        if lost is None or (lost < last).any() or not _fair(lost, one, blocks):
            continue
        if (lost > most).any():
            break
        steps.append(lost)
        last = lost
    return (cells, np.stack(steps)) if steps else None


def _lost(
    leaves: dict[tuple[int, int], Cuts],
    segments: list[tuple[tuple[int, int], int, int, Labels]],
    sizes: np.ndarray,
    one: np.ndarray,
    fraction: float,
) -> np.ndarray | None:
    """Return how many channels each cell loses, if every segment's cells can share its loss in whole numbers.

    Channels that pass no shuffle lose ``fraction``.
    """
    lost = np.full(sizes.size, -1, dtype=np.int64)
    for leaf, low, high, held in segments:
        found = leaves[leaf]
        if low not in found or high not in found:
            return None
        gone = (high - low) - (found[high] - found[low])
        if not 0 <= gone <= high - low:
            return None
        inside = np.flatnonzero(held[one])
        parts = sizes[inside] * gone
        if (parts % (high - low)).any():
            return None
        before = lost[inside]
        if ((before >= 0) & (before != parts // (high - low))).any():
            return None
        lost[inside] = parts // (high - low)
    other = lost < 0
    lost[other] = np.round(sizes[other] * fraction)
    return lost if np.isclose(lost[other], sizes[other] * fraction).all() else None


def _fair(lost: np.ndarray, one: np.ndarray, blocks: Sequence[Sequence[Labels]]) -> bool:
    """Tell whether the blocks of every constraint lose the same fraction."""
    for *parts, sizes in blocks:
        gone = np.array([int((counts[one] * lost).sum()) for counts in parts])
        if (gone * sizes[0] != gone[0] * sizes).any():
            return False
    return True
