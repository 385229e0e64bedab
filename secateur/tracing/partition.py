"""The partition of a run's labels: joined labels are one class, a class that layers make is one channel of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.tracing.assumptions import Cause
from secateur.tracing.findings import Findings
from secateur.tracing.labels import Home, Labels, LabelStore


@dataclass(frozen=True, eq=False)
class Partition:
    """Which channel of which group every label is; -1 stands for none."""

    classes: Labels
    """The class of every label."""
    group_of: Labels
    """The group of every class."""
    channel_of: Labels
    """The channel in its group of every class."""
    own: dict[int, Labels]
    """Group -> its classes, in the order of its channels."""

    def groups(self, labels: Labels) -> Labels:
        """Return the group of each label."""
        return self.group_of[self.classes[labels]]

    def channels(self, labels: Labels) -> Labels:
        """Return the channel of each label."""
        return self.channel_of[self.classes[labels]]

    def among(self, labels: Labels) -> list[int]:
        """Return the groups that any of these labels belongs to, ascending."""
        found = self.groups(labels)
        if (found == found[:1]).all():  # nearly always, and seen much sooner
            found = found[:1]
        return [int(g) for g in np.unique(found[found >= 0])]

    def counts(self, blocks: Sequence[Labels], group: int) -> Labels:
        """Return, a row a block, how many of its positions hold each channel of a group."""
        width = self.own[group].size
        return np.stack([np.bincount(self.channels(b)[self.groups(b) == group], minlength=width) for b in blocks])

    def renumbered(self, index_of: dict[int, int]) -> Partition:
        """Return the partition with other numbers for its groups, and without those that get none."""
        final = np.full(int(self.group_of.max(initial=0)) + 2, -1, dtype=np.int64)
        for group, index in index_of.items():
            final[group] = index
        group_of = final[self.group_of]
        channel_of = np.where(group_of < 0, -1, self.channel_of)
        return Partition(self.classes, group_of, channel_of, {i: self.own[g] for g, i in index_of.items()})


def marked(count: int, classes: Labels, arrays: Sequence[Labels]) -> np.ndarray:
    """Return for every class whether one of these arrays of labels names it."""
    mark = np.zeros(count, dtype=bool)
    for labels in arrays:
        mark[classes[labels]] = True
    return mark


def first_cause(count: int, classes: Labels, found: Sequence[tuple[Labels, Cause]]) -> Labels:
    """Return for every class the index of the first cause that names it, or -1."""
    index = np.full(count, -1, dtype=np.int32)
    for i in reversed(range(len(found))):
        index[classes[found[i][0]]] = i
    return index


@dataclass(frozen=True, eq=False)
class Makers:
    """The dimensions of parameters that hold channels, and those of them that make any."""

    homes: list[Home]
    making: set[tuple[str, int, int]]
    """Keys of those that make channels."""

    @classmethod
    def of(cls, store: LabelStore, found: Findings, produced: np.ndarray) -> Makers:
        """Find them among all dimensions of parameters and buffers."""
        classes = store.classes()
        homes = [home for home in store.homes if produced[classes[home.start : home.start + home.size]].any()]
        making = store.homes_of(list({id(labels): labels for labels in found.produced}.values()))
        return cls(homes, {home.key for home in making})

    @property
    def making_homes(self) -> list[Home]:
        """The dimensions that make channels."""
        return [home for home in self.homes if home.key in self.making]


def partition(store: LabelStore, found: Findings, makers: Makers, produced: np.ndarray, free: np.ndarray) -> Partition:
    """Put classes made by the same layers into a group, and those that blocks of one layer or one cut tie together.

    Args:
        store: The labels of a run.
        found: What the run found.
        makers: Which parameters make channels.
        produced: For every class, whether a layer makes it.
        free: For every class, whether it may go. A group in which none may is no group.
    """
    classes = store.classes()
    count = produced.size
    signature = _signatures(count, classes, makers.making_homes)
    group_of = np.full(count, -1, dtype=np.int64)
    group_of[produced] = _linked(signature, found, classes, produced)[signature[produced]]
    first = np.full(count, np.iinfo(np.int64).max, dtype=np.int64)
    for home in makers.making_homes:
        labels = np.arange(home.start, home.start + home.size)
        np.minimum.at(first, classes[labels], labels)
    live = np.flatnonzero(group_of >= 0)
    live = live[np.lexsort((first[live], group_of[live]))]
    ends = np.flatnonzero(np.diff(group_of[live])) + 1
    channel_of = np.full(count, -1, dtype=np.int64)
    own = {}
    for mine in np.split(live, ends):
        if mine.size and free[mine].any():
            own[int(group_of[mine[0]])] = mine
            channel_of[mine] = np.arange(mine.size)
    order = sorted(own, key=lambda g: int(first[own[g]].min()))
    kept = np.isin(group_of, order)
    return Partition(classes, np.where(kept, group_of, -1), channel_of, {g: own[g] for g in order})


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


def _linked(signature: Labels, found: Findings, classes: Labels, produced: np.ndarray) -> Labels:
    """Unite signatures whose classes one constraint ties together (union–find); return the group of every signature."""
    parent = np.arange(int(signature.max()) + 1 if signature.size else 0)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for share in found.shares:
        own = classes[np.concatenate(share.blocks)]
        tied = np.unique(signature[own[produced[own]]]).tolist()
        for other in tied[1:]:
            parent[root(other)] = root(tied[0])
    return np.array([root(i) for i in range(parent.size)], dtype=np.int64)
