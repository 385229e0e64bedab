"""Channel shuffle: channels are cut into rows, transposed, and merged again.

Mostly the channels at one place of every row go together, which keeps the order of what is left; that is the rule of
``view``. Where it leaves nothing to prune, as in ShuffleNet v2, whose blocks shuffle a stream again and again, the rows
may lose any channels, equally many: what is left then lies in the order in which the pruned network shuffles it, and
layers that read it are cut in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from secateur.tracing.findings import Grid, Shuffled
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Labels, runs

_MERGING = ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view_copy")
_SWAPPING = ("aten::transpose", "aten::swapaxes")
_KEEPING = ("aten::clone", "aten::contiguous", "aten::detach", "aten::alias")


def is_loose(flow: Flow, labels: Labels) -> bool:
    """Tell whether rows that channels are cut into may lose different indices, and remember that they could."""
    flow.shuffled.append(Shuffled(flow.ordinal, labels))
    return flow.ordinal in flow.loose


def cut_into_rows(flow: Flow, labels: Labels, row: int, column: int, shape: Sequence[int]) -> Grid:
    """Return the two dimensions that channels are cut into; what later operators do with them tells of a shuffle."""
    is_loose(flow, labels)
    return Grid(row, column, labels.reshape(shape[row], shape[column]), flow.ordinal)


def loosely(flow: Flow, labels: Labels, rows: int) -> Labels:
    """Interleave the rows of a vector, each of which loses as many channels, whichever they are."""
    flow.share(list(labels.reshape(rows, -1)), "is shuffled in rows of equal length")
    flow.moved_at.append(flow.cause(""))
    return flow.store.shuffle(labels, rows)


def carry(flow: Flow, name: str, args: tuple[Any, ...], out: Any) -> None:
    """Carry a grid through an operator whose own rule has run.

    Where the operator has no way to, a grid that is taken loosely is frozen; one that is taken strictly would be.
    """
    for tensor in flow.operands:
        grid = flow.grid(tensor)
        if grid is None or (tensor is args[0] and isinstance(out, Tensor) and _moved(flow, name, args, out, grid)):
            continue
        if grid.key in flow.loose:
            flow.freeze(grid.labels, "is shuffled by other operators than a transposition between two views")
        else:
            flow.futile.add(grid.key)


def _moved(flow: Flow, name: str, args: tuple[Any, ...], out: Tensor, grid: Grid) -> bool:
    """Carry the grid of the first argument on; tell whether the operator has a way to do so."""
    x = args[0]
    place = {d: d for d in range(x.ndim)}
    if name in _MERGING:
        return _merged(flow, grid, x, out)
    if name in _SWAPPING:
        a, b = args[1] % x.ndim, args[2] % x.ndim
        place |= {a: b, b: a}
    elif name == "aten::permute":
        place = {d % x.ndim: new for new, d in enumerate(args[1])}
    elif name not in _KEEPING:
        return False
    flow.set_grid(out, replace(grid, row=place[grid.row], column=place[grid.column]))
    return True


def _merged(flow: Flow, grid: Grid, x: Tensor, out: Tensor) -> bool:
    """Merge the two dimensions of a grid into one; tell whether a view does so."""
    for left, right in runs(x.shape, out.shape):
        if sorted(left) != sorted((grid.row, grid.column)) or len(right) != 1:
            continue
        if grid.key in flow.loose:
            vector = grid.labels.reshape(-1)
            labels = vector if left[0] == grid.row else loosely(flow, vector, len(grid.labels))
            flow.set(out, {**flow.axes(out), right[0]: labels}, weight=flow.is_weight(x))
        return True
    return False
