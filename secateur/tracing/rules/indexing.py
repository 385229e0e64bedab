"""Rules for operators that read or write at given indices: their channels are frozen, those beside them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.network.named import tensors_in
from secateur.tracing.call import Call
from secateur.tracing.labels import Axes
from secateur.tracing.rules.registry import rule


@rule("aten::select", "aten::select_copy", "aten::unbind", "aten::unbind_copy", keeps_weights=True)
def select(call: Call, x: Tensor, dim: int = 0, index: int = 0) -> Axes:
    """Take single indices of a dimension: its channels are frozen, the others kept."""
    dim %= max(x.ndim, 1)
    call.freeze_tensor(x, "is read one channel at a time", [dim])
    return {d - (d > dim): labels for d, labels in call.axes(x).items() if d != dim}


@rule("aten::index_select")
def index_select(call: Call, x: Tensor, dim: int, index: Tensor) -> Axes:
    """Read a dimension at given indices: its channels are frozen, those of the others kept."""
    call.freeze_tensor(index, "is used as an index")
    call.freeze_tensor(x, "is read at given indices", [dim % x.ndim])
    return {d: labels for d, labels in call.axes(x).items() if d != dim % x.ndim}


@rule("aten::gather")
def gather(call: Call, x: Tensor, dim: int, index: Tensor, **_: Any) -> None:
    """Read single elements at given indices: all channels are frozen."""
    call.freeze_tensor(index, "is used as an index")
    call.freeze_tensor(x, "is read at given indices")


@rule("aten::index", "aten::_unsafe_index")
def index(call: Call, x: Tensor, indices: Sequence[Any]) -> Axes:
    """Read some dimensions at given indices: their channels are frozen, those of the others kept."""
    for tensor in tensors_in(indices):
        call.freeze_tensor(tensor, "is used as an index")
    axes = call.axes(x)
    consumed = _indexed(indices)
    call.freeze_tensor(x, "is read at given indices", consumed)
    return {new: axes[d] for d, new in _positions(consumed, x.ndim, call.out.ndim).items() if d in axes}


def _indexed(indices: Sequence[Any]) -> list[int]:
    """Return the dimensions that indices stand for: a mask of n dimensions for n of them, None for none."""
    found: list[int] = []
    dim = 0
    for entry in indices:
        width = entry.ndim if _is_mask(entry) else 1
        if entry is not None:
            found.extend(range(dim, dim + width))
        dim += width
    return found


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8)


def _positions(consumed: Sequence[int], before: int, after: int) -> dict[int, int]:
    """Return where each dimension that is not indexed lies in the result of indexing."""
    kept = [d for d in range(before) if d not in consumed]
    added = after - len(kept)
    adjacent = list(consumed) == list(range(consumed[0], consumed[0] + len(consumed))) if consumed else True
    first = consumed[0] if consumed and adjacent else 0
    return {d: i if i < first else i + added for i, d in enumerate(kept)}


@rule("aten::index_put_", "aten::_index_put_impl_")
def index_put(call: Call, x: Tensor, indices: Sequence[Any], values: Tensor, *_: Any) -> Axes:
    """Write values at given indices of some dimensions: their channels are frozen, those of the others join."""
    (mask, *others) = tensors_in(indices)
    whole = not others and mask.dtype is torch.bool and mask.shape == x.shape
    if whole and values.numel() == 1 and not call.labels.name(x):
        return call.combine([x, mask], x.shape)  # one value for whatever the mask tells, element by element
    for tensor in tensors_in(indices):
        call.freeze_tensor(tensor, "is used as an index")
    consumed = _indexed(indices)
    call.freeze_tensor(x, "is written at given indices", consumed)
    own, given = call.axes(x), dict(call.axes(values))
    written: Axes = {}
    indexed = x.ndim - len(consumed) + max(1 if _is_mask(t) else t.ndim for t in tensors_in(indices))
    for dim, place in _positions(consumed, x.ndim, indexed).items():
        place -= indexed - values.ndim
        labels = given.pop(place, None)
        if dim in own and (place < 0 or values.shape[place] == 1):
            written[dim] = own[dim]
            continue
        if labels is not None and dim in own and labels.size == own[dim].size:
            call.join(own[dim], labels)
            written[dim] = labels
            continue
        for unknown in (labels, own.get(dim)):
            if unknown is not None:
                call.freeze(unknown, "is written together with values that are no known channels")
    for labels in given.values():
        call.freeze(labels, "is written at given indices")
    return written
