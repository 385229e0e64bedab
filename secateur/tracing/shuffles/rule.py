"""Channel shuffle: channels are cut into rows, transposed, and merged again.

Mostly the channels at one place of every row go together, which keeps the order of what is left; that is the rule of
``view``. Where it leaves nothing to prune, as in ShuffleNet v2, whose blocks shuffle a stream again and again, the rows
may lose any channels, equally many: what is left then lies in the order in which the pruned network shuffles it, and
layers that read it are cut in that order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from secateur.tracing.call import Call
from secateur.tracing.geometry import pieces
from secateur.tracing.tensor_labels import Grid

_MERGING = ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view_copy")
_SWAPPING = ("aten::transpose", "aten::swapaxes")
_KEEPING = ("aten::clone", "aten::contiguous", "aten::detach", "aten::alias")


def carry_grids(call: Call, name: str, args: tuple[Any, ...]) -> None:
    """Carry grids through an operator whose own rule has run.

    Where the operator has no way to, a grid whose rows lie apart is frozen; rows that go together already are.
    """
    for tensor in call.operands:
        grid = call.labels.grid(tensor)
        if grid is None or (tensor is args[0] and isinstance(call.out, Tensor) and _carried(call, name, args, grid)):
            continue
        if grid.is_apart:
            call.freeze(grid.labels, "is shuffled by other operators than a transposition between two views")
        else:
            grid.assumption.options = ("together",)


def _carried(call: Call, name: str, args: tuple[Any, ...], grid: Grid) -> bool:
    """Carry the grid of the first argument on; tell whether the operator has a way to do so."""
    x = args[0]
    place = {d: d for d in range(x.ndim)}
    if name in _MERGING:
        return _merged(call, grid, x)
    if name in _SWAPPING:
        a, b = args[1] % x.ndim, args[2] % x.ndim
        place |= {a: b, b: a}
    elif name == "aten::permute":
        place = {d % x.ndim: new for new, d in enumerate(args[1])}
    elif name not in _KEEPING:
        return False
    call.labels.put_grid(call.out, replace(grid, row=place[grid.row], column=place[grid.column]))
    return True


def _merged(call: Call, grid: Grid, x: Tensor) -> bool:
    """Merge the two dimensions of a grid into one; tell whether a view does so."""
    for left, right in pieces(x.shape, call.out.shape):
        if sorted(left) != sorted((grid.row, grid.column)) or len(right) != 1:
            continue
        if grid.is_apart:
            vector = grid.labels.reshape(-1)
            labels = vector if left[0] == grid.row else call.move(vector, len(grid.labels))
            axes = {**call.axes(call.out), right[0]: labels}
            call.give(call.out, axes, weight=call.is_weight(x))
        return True
    return False
