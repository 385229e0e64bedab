"""What a selection of a group's channels has to keep: equal fractions of blocks, multiples, and channels that stay."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from secateur.graph.channels import Staying, quotas
from secateur.tracing.findings import Findings
from secateur.tracing.labels import Labels
from secateur.tracing.partition import Partition


def cells(found: Findings, partition: Partition) -> tuple[dict[int, Labels], dict[int, str]]:
    """Number for every group the cells of its channels: those with equal counts in every block of every constraint.

    All cells lose the same fraction, which satisfies every constraint at once. A group is uneven, and said to be, where
    channels that never go make up more of one block than of another: then no choice takes the same fraction from both.

    Returns:
        Group -> the cell of each channel; group -> why it is uneven.
    """
    uneven: dict[int, str] = {}
    rows: dict[int, list[Labels]] = defaultdict(list)
    for share in found.shares:
        held, sizes = np.concatenate(share.blocks), np.array([block.size for block in share.blocks])
        touched = partition.among(held)
        whole = len(touched) == 1 and bool((partition.groups(held) >= 0).all())
        for g in touched:
            counts = partition.counts(share.blocks, g)
            inside = counts.sum(1)
            if (inside * sizes[0] != inside[0] * sizes).any():
                uneven[g] = f"{share.cause.reason}, and one of its blocks holds channels that stay"
            if not (whole and (counts == counts[:1]).all()):
                rows[g].append(counts)
    numbered: dict[int, Labels] = {}
    for g, own in partition.own.items():
        numbered[g] = np.zeros(own.size, dtype=np.int64)
        if g in rows:
            # Rows are told apart as strings of bytes, which sort much faster than rows of numbers.
            stacked = np.ascontiguousarray(np.concatenate(rows[g]).T)
            strings = stacked.view(np.dtype((np.void, stacked.itemsize * stacked.shape[1]))).reshape(-1)
            _, first, inverse = np.unique(strings, return_index=True, return_inverse=True)
            numbered[g] = np.argsort(np.argsort(first))[inverse.reshape(-1)]
    return numbered, uneven


def staying(found: Findings, partition: Partition) -> dict[int, tuple[Staying, ...]]:
    """Return for every group the sets of channels of which some have to stay, and how many; each set once."""
    sets: dict[int, dict[bytes, Staying]] = defaultdict(dict)
    for labels, least in found.staying:
        groups, channels = partition.groups(labels), partition.channels(labels)
        needed = least - int((groups < 0).sum())
        for g in partition.among(labels) if needed > 0 else ():
            own, places = np.unique(channels[groups == g], return_counts=True)
            count = min(-(-needed // int(places.min())), own.size)
            known = sets[g].get(own.tobytes())
            sets[g][own.tobytes()] = Staying(own, max(count, known.least if known is not None else 0))
    return {g: tuple(s for s in known.values() if s.least > 1) for g, known in sets.items()}


def multiples(found: Findings, partition: Partition) -> dict[int, int]:
    """Return for every group of how many channels a multiple has to go: then no remainder changes that code asks for.

    Where only some of a group's channels are counted, or some more often than others, as many as there are: none go.
    """
    result: dict[int, int] = {}
    for labels, divisor in found.multiples:
        for g in partition.among(labels):
            (counts,) = partition.counts([labels], g)
            if (counts % divisor == 0).all():
                continue
            alike = bool((counts == counts[0]).all())
            needed = divisor // math.gcd(divisor, int(counts[0])) if alike else counts.size
            result[g] = math.lcm(result.get(g, 1), needed)
    return result


def unsplittable(blocks: Labels, removable: np.ndarray, multiple: int) -> str:
    """Say why no step can be taken at all; empty where one can."""
    sizes = np.bincount(blocks)
    quota = quotas(blocks, multiple)
    if multiple > 1 and quota.sum() >= blocks.size:
        return f"the remainder of their number by {multiple} is asked for"
    if (sizes <= quota).any():
        return "its channels only go together" if sizes.size == 1 else "its blocks can't lose equal fractions"
    if (np.bincount(blocks, weights=removable) < quota).any():
        return "every block has to lose channels, and one has none that can go"
    return ""
