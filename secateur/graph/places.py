"""Which channel of which group each index of a dimension is, and so which indices a selection removes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

IndexArray = NDArray[np.signedinteger[Any]]


def mask_at(groups: np.ndarray | None, channels: np.ndarray | None, masks: list[np.ndarray]) -> np.ndarray:
    """Return the mask of a dimension: which of its indices are removed.

    Args:
        groups: The group of every index, or -1 for one that stays; None where all stay.
        channels: The channel of every index in its group.
        masks: The mask of every group, see :func:`secateur.graph.plan.masks`.

    Returns:
        The mask; empty where all indices stay.
    """
    if groups is None or channels is None:
        return np.zeros(0, dtype=bool)
    result = np.zeros(groups.size, dtype=bool)
    if groups.size and groups[0] >= 0 and (groups == groups[0]).all():  # nearly everywhere; quicker than what follows
        result[:] = masks[groups[0]][channels]
        return result
    for g in np.unique(groups[groups >= 0]).tolist():
        own = groups == g
        result[own] = masks[g][channels[own]]
    return result
