"""Which channel of which group each index of a dimension is, and which of them a selection takes away."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

IndexArray = NDArray[np.signedinteger[Any]]


def lost(places: np.ndarray | None, channels: np.ndarray | None, removed: list[np.ndarray]) -> np.ndarray:
    """Return which of a layer's channels are removed, given the group and channel that each of them is."""
    if places is None or channels is None:
        return np.zeros(0, dtype=bool)
    if places.size and (places == places[0]).all():  # as nearly everywhere
        g = int(places[0])
        whole: np.ndarray = removed[g][channels] if g >= 0 else np.zeros(places.size, dtype=bool)
        return whole
    result = np.zeros(places.size, dtype=bool)
    for g in np.unique(places[places >= 0]).tolist():
        own = places == g
        result[own] = removed[g][channels[own]]
    return result
