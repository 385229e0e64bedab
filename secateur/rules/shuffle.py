"""Channel shuffle: channels are cut into rows, transposed, and merged again.

Mostly the channels at one place of every row go together, which keeps the order of what is left; that is the rule of
``view``. Where it leaves nothing to prune, as in ShuffleNet v2, whose blocks shuffle a stream again and again, the rows
may lose any channels, equally many: what is left then lies in the order in which the pruned network shuffles it, and
layers that read it are cut in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateur.labels import Axes, Labels, runs
from secateur.rules.flow import Flow, Grid, Shuffled
from secateur.rules.registry import tensors_in

_MERGING = ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view_copy")
_SWAPPING = ("aten::transpose", "aten::swapaxes")
_KEEPING = ("aten::clone", "aten::contiguous", "aten::detach", "aten::alias")


def is_loose(flow: Flow, labels: Labels) -> bool:
    """Tell whether rows that channels are cut into may lose different indices, and remember that they could."""
    flow.shuffled.append(Shuffled(flow.ordinal, labels))
    return flow.ordinal in flow.loose


def loosely(flow: Flow, labels: Labels, rows: int) -> Labels:
    """Interleave the rows of a vector, each of which loses as many channels, whichever they are."""
    flow.share(list(labels.reshape(rows, -1)), "is shuffled in rows of equal length")
    return flow.store.shuffle(labels, rows)


def carry(flow: Flow, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Carry a grid through an operator whose own rule has run; freeze its channels where the operator has no way."""
    for tensor in tensors_in((*args, *kwargs.values())):
        grid = flow.grid(tensor)
        if grid is not None and not (tensor is args[0] and isinstance(out, Tensor) and _moved(flow, name, args, out)):
            flow.freeze(grid.labels, "is shuffled by other operators than a transposition between two views")


def _moved(flow: Flow, name: str, args: tuple[Any, ...], out: Tensor) -> bool:
    """Carry the grid of the first argument on; tell whether the operator has a way to do so."""
    x = args[0]
    grid = flow.grid(x)
    assert grid is not None
    place = {d: d for d in range(x.ndim)}
    if name in _MERGING:
        merged = _merged(flow, grid, x.shape, out.shape)
        if merged is not None:
            flow.set(out, {**flow.axes(out), **merged}, weight=flow.is_weight(x))
        return merged is not None
    if name in _SWAPPING:
        a, b = args[1] % x.ndim, args[2] % x.ndim
        place |= {a: b, b: a}
    elif name == "aten::permute":
        place = {d % x.ndim: new for new, d in enumerate(args[1])}
    elif name not in _KEEPING:
        return False
    flow.set_grid(out, Grid(place[grid.row], place[grid.column], grid.labels))
    return True


def _merged(flow: Flow, grid: Grid, old: Sequence[int], new: Sequence[int]) -> Axes | None:
    """Merge the two dimensions of a grid into one; None where a view does something else with them."""
    for left, right in runs(old, new):
        if left == [grid.column, grid.row] and len(right) == 1:
            return {right[0]: loosely(flow, grid.labels.reshape(-1), len(grid.labels))}
        if left == [grid.row, grid.column] and len(right) == 1:
            return {right[0]: grid.labels.reshape(-1)}
    return None
