"""A trial without values: is a pruned network's program that of the original, without the channels that are gone?

The pruned network computes what the masked original computes where its program is the same call for call, but for
sizes, and every tensor on the way carries the labels that the plan leaves of the original's: then each operator sees
the channels that it has to. What layers compute plays no part in that, so a large network's convolutions and matrix
products need not be run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from secateur.tracing.labels import Labels, LabelStore
from secateur.tracing.program import BY_VALUE, Made, Step
from secateur.tracing.recording import Recording


def can_tell(whole: Recording) -> bool:
    """Tell whether comparing programs can tell anything of a recorded network: not where values decide what runs."""
    found, steps = whole.found, whole.program.steps
    if whole.program.random or found.moved or found.magnitudes or found.by_value:
        return False
    registered = any(layer.kind == "registered" for layer in found.layers)
    return not registered and not any(step.name in BY_VALUE for step in steps)


@dataclass(eq=False)
class _Match:
    """Labels of a pruned network's run beside those of the original's that have to be there."""

    kept: np.ndarray
    """For every label of the original, whether it stays."""
    tied: np.ndarray
    """For every label of the original, whether it goes together with another."""
    found: list[Labels] = field(default_factory=list)
    wanted: list[Labels] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def labels(self, whole: Labels, left: Labels) -> bool:
        """Note labels of one dimension in both; tell whether there are as many as stay."""
        key = (id(whole), id(left))
        if key in self.seen:
            return True
        self.seen.add(key)
        self.wanted.append(whole[self.kept[whole]].reshape(-1))
        self.found.append(left.reshape(-1))
        return self.wanted[-1].size == self.found[-1].size

    def stores(self, whole: LabelStore, left: LabelStore) -> bool:
        """Note the labels of parameters, and of what goes together."""
        homes = {home.key: whole.labels_of(home) for home in whole.homes}
        grouped = {(tensor, dim) for tensor, dim, blocks in homes if blocks > 1}
        for home in left.homes:
            labels = homes.get(home.key)
            if labels is None:
                return False
            if home.blocks == 1 and (home.tensor, home.dim) in grouped and not self.tied[labels].any():
                continue  # of the block that a grouped weight holds, beside those that stand for all its blocks
            if not self.labels(labels, left.labels_of(home)):
                return False
        if len(whole.joins) != len(left.joins):
            return False
        sides = ((a, b) for pair in zip(whole.joins, left.joins, strict=True) for a, b in zip(*pair, strict=True))
        return all(self.labels(a, b) for a, b in sides)

    def step(self, whole: Step, left: Step) -> bool:
        """Tell whether a call of the pruned network may be that of the original."""
        if (whole.name, whole.arguments) != (left.name, left.arguments) or len(whole.made) != len(left.made):
            return False
        if whole.bounds != left.bounds and not whole.along:
            return False
        return all(self._tensor(a, b) for a, b in zip(whole.made, left.made, strict=True))

    def _tensor(self, whole: Made, left: Made) -> bool:
        (shape, axes), (small_shape, small_axes) = whole, left
        if len(shape) != len(small_shape) or not small_axes.keys() <= axes.keys():
            return False
        for dim, size in enumerate(small_shape):
            if dim not in axes:
                if size != shape[dim]:
                    return False
            elif dim in small_axes:
                if not self.labels(axes[dim], small_axes[dim]):
                    return False
            elif size != 1 or self.kept[axes[dim]].sum() != 1:  # a dimension of one index carries no labels
                return False
        return True

    def consistent(self, count: int) -> bool:
        """Tell whether every one of the pruned network's labels stands for one label of the original."""
        if not self.found:
            return True
        found, wanted = np.concatenate(self.found), np.concatenate(self.wanted)
        stands_for = np.zeros(count, dtype=np.int64)
        stands_for[found] = wanted
        return bool((stands_for[found] == wanted).all())


def is_same(whole: Recording, left: Recording, classes: Labels, gone: np.ndarray) -> bool:
    """Tell whether a pruned network's run is that of the original without the channels that are gone.

    Args:
        whole: The original's run.
        left: The pruned network's run.
        classes: The class of each of the original's labels.
        gone: For every class, whether the plan removes it.
    """
    match = _Match(~gone[classes], np.bincount(classes)[classes] > 1)
    steps, others = whole.program.steps, left.program.steps
    return (
        len(steps) == len(others)
        and all(map(match.step, steps, others))
        and match.stores(whole.labels.store, left.labels.store)
        and match.consistent(left.labels.store.count)
    )
