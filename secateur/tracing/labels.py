"""Channel labels: the integers that follow every channel through a network, and the joins between them.

A *label* names one index of one dimension of one tensor. A tensor's *axes* map some of its dimensions to a vector of
labels, one an index; a dimension without labels (batch, space) can never lose an index. An element of the tensor goes
when any of its labels goes, so what is left is always a rectangular tensor.

Labels that have to go together are *joined*; :meth:`LabelStore.classes` gives the finest partition of all labels in
which joined ones are together: the connected components of the joins.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Labels = NDArray[np.signedinteger[Any]]
Axes = dict[int, Labels]


@dataclass(frozen=True)
class Home:
    """A run of labels that was made for one dimension of one parameter or buffer."""

    tensor: str
    dim: int
    start: int
    size: int
    blocks: int = 1
    """More than 1 for the channels of a grouped convolution, of which its weight holds one block; see ``Member``."""

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it apart from the others, whatever is left of the channels."""
        return self.tensor, self.dim, self.blocks


class LabelStore:
    """Hands out labels and remembers which have to go together."""

    def __init__(self) -> None:
        self.count = 0
        self.homes: list[Home] = []
        self._starts: list[int] = []
        self.joins: list[tuple[Labels, Labels]] = []
        self.mixed: list[tuple[Labels, Labels]] = []
        """Those of the joins that stem from operators on parameters and buffers alone."""
        self.moved: list[tuple[Labels, Labels]] = []
        """Those of the joins whose labels go together, but lie at other places: behind a shuffle, and before it."""
        self._found: tuple[object, Labels] = None, np.zeros(0, dtype=np.int32)
        """The classes last asked for, and after how many labels and joins that was."""

    def fresh(self, size: int) -> Labels:
        """Return ``size`` new labels in a row, joined to nothing."""
        labels = np.arange(self.count, self.count + size, dtype=np.int32)
        self.count += size
        return labels

    def fresh_for(self, tensor: str, dim: int, size: int, blocks: int = 1) -> Labels:
        """Return new labels for dimension ``dim`` of a parameter or buffer, and remember whose they are."""
        self.homes.append(Home(tensor, dim, self.count, size, blocks))
        self._starts.append(self.count)
        return self.fresh(size)

    def labels_of(self, home: Home) -> Labels:
        """Return the labels that were made for a parameter dimension."""
        return np.arange(home.start, home.start + home.size, dtype=np.int32)

    def home(self, label: int) -> Home | None:
        """Return the parameter dimension for which a label was made, if it was made for one."""
        index = bisect_right(self._starts, label) - 1
        if index < 0:
            return None
        home = self.homes[index]
        return home if label < home.start + home.size else None

    def homes_of(self, vectors: Sequence[Labels], *, mixed: bool = False) -> list[Home]:
        """Return every parameter dimension for which some of the labels in these arrays were made.

        Args:
            vectors: Arrays of labels.
            mixed: Whether to take the dimensions, too, of what weights with these labels are computed from.
        """
        found = np.zeros(self.count + 1, dtype=bool)
        for labels in vectors:
            found[labels] = True
        if mixed and self.mixed:
            least = self._least(self.mixed)
            roots = np.zeros(self.count, dtype=bool)
            roots[least[found[:-1]]] = True
            found[:-1] = _taken(roots, least)
        bounds = [label for home in self.homes for label in (home.start, home.start + home.size)]
        inside = np.logical_or.reduceat(found, bounds)[::2] if bounds else ()
        return [home for home, held in zip(self.homes, inside, strict=True) if held]

    def are_apart(self, labels: Labels, at: int) -> bool:
        """Tell whether a vector holds something else from an index on: of another parameter, or of another place."""
        left, right = int(labels[at - 1]), int(labels[at])
        if self.home(left) is not self.home(right):
            return True
        strides = np.diff(labels[max(at - 2, 0) : at + 2])
        beside = [*strides[: min(at, 2) - 1], *strides[min(at, 2) :]]
        return right - left not in beside if beside else right < left

    def join(self, left: Labels, right: Labels, *, mixed: bool = False, moved: bool = False) -> None:
        """Let every label of ``left`` go together with its counterpart in ``right``, broadcasting.

        Args:
            left: Labels.
            right: Labels.
            mixed: Whether an operator on parameters and buffers alone is the reason.
            moved: Whether the two are the same channels at different places.
        """
        if left is right:
            return
        a, b = np.broadcast_arrays(left, right)
        self.joins.append((a, b))  # of what is broadcast, no copy
        if mixed:
            self.mixed.append(self.joins[-1])
        if moved:
            self.moved.append(self.joins[-1])

    def classes(self, *, moved: bool = True) -> Labels:
        """Return the class of every label, numbered from 0; without what moved, of labels at one and the same place."""
        if not moved and self.moved:
            kept = {id(join) for join in self.moved}
            return self._components([join for join in self.joins if id(join) not in kept])
        state = self.count, len(self.joins)
        if self._found[0] != state:
            self._found = state, self._components(self.joins)
            self._found[1].flags.writeable = False
        return self._found[1]

    def _components(self, joins: list[tuple[Labels, Labels]]) -> Labels:
        """Return for every label the number of the labels that these joins tie together, by the least of each."""
        least = self._least(joins)
        number = np.cumsum(least == np.arange(self.count, dtype=np.int32), dtype=np.int32) - 1
        return _taken(number, least)

    def _least(self, joins: list[tuple[Labels, Labels]]) -> NDArray[np.int32]:
        """Return for every label the least of those that these joins tie it to."""
        least = np.arange(self.count, dtype=np.int32)
        for pairs in _batches(joins):
            _tie(least, pairs)
        return least


_PAIRS = 1 << 19
"""So many pairs of labels are tied together at once: more take more memory, fewer take longer."""


_TURNS = 3
"""So often the first of several roots is taken for the least."""


def _batches(joins: Sequence[tuple[Labels, Labels]]) -> Iterator[NDArray[np.int32]]:
    """Yield the pairs that joins are made of, one side in each row."""
    ends = np.cumsum([left.size for left, _ in joins])
    start = 0
    while start < len(joins):
        past = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, past + _PAIRS, side="right")))
        pairs = np.empty((2, int(ends[stop - 1] - past)), dtype=np.int32)
        for at, both in zip((ends - past).tolist()[start:stop], joins[start:stop], strict=True):
            for side, labels in zip(pairs, both, strict=True):
                side[at - labels.size : at].reshape(labels.shape)[...] = labels
        yield pairs
        start = stop


def _tie(least: NDArray[np.int32], pairs: NDArray[np.int32]) -> None:
    """Bring the least label of each component up to date for these pairs.

    Of each pair the greater root is hung below the lesser, until all pairs have one root. Where a root meets several,
    the first is taken, which mostly is the least; if that takes long, the least of them is looked for.
    """
    left, right = pairs
    for turn in count():
        left, right = least.take(left), least.take(right)
        apart = np.flatnonzero(left != right)
        if not apart.size:
            return
        left, right = left.take(apart), right.take(apart)
        high, low = np.maximum(left, right), np.minimum(left, right)
        if turn < _TURNS:
            least[high[::-1]] = low[::-1]
        else:
            np.minimum.at(least, high, low)
        while not np.array_equal(above := _taken(least, least), least):
            least[:] = above


def _taken(values: NDArray[Any], places: NDArray[np.int32]) -> NDArray[Any]:
    """Return ``values[places]``, part by part: NumPy makes a larger copy of the places on the way."""
    if places.size <= _PAIRS:
        return values.take(places)
    taken = np.empty(places.shape, dtype=values.dtype)
    for start in range(0, places.size, _PAIRS):
        part = slice(start, start + _PAIRS)
        taken[part] = values.take(places[part])
    return taken
