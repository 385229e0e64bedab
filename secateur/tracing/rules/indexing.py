"""Rules for operators that read or write at given indices: their channels are frozen, those beside them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.network.named import tensors_in
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Axes
from secateur.tracing.rules.registry import rule


@rule("aten::select", "aten::select_copy", "aten::unbind", "aten::unbind_copy")
def select(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Take single indices of a dimension: its channels are frozen, the others kept."""
    x = args[0]
    axes = flow.axes(x)
    if not axes:
        return
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.ndim
    if dim in axes:
        flow.freeze(axes[dim], "is read one channel at a time")
    left = {d - (d > dim): labels for d, labels in axes.items() if d != dim}
    for result in out if isinstance(out, (list, tuple)) else [out]:
        flow.set(result, left, weight=flow.is_weight(x))


@rule("aten::index_select", "aten::gather", "aten::take_along_dim")
def index_select(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Read a dimension at given indices: its channels are frozen, those of the others kept."""
    x, dim, index = args[:3]
    axes = dict(flow.axes(x))
    flow.freeze_tensor(index, "is used as an index")
    if dim % x.ndim in axes:
        flow.freeze(axes.pop(dim % x.ndim), "is read at given indices")
    if index.ndim > 1:
        for d in list(axes):
            flow.freeze(axes.pop(d), "is read at given indices")
    flow.set(out, axes)


@rule("aten::index", "aten::_unsafe_index")
def index(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Read some dimensions at given indices: their channels are frozen, those of the others kept."""
    x, indices = args[:2]
    axes = flow.axes(x)
    for tensor in tensors_in(indices):
        flow.freeze_tensor(tensor, "is used as an index")
    if not axes:
        return
    consumed = _indexed(indices)
    flow.freeze_tensor(x, "is read at given indices", consumed)
    position = _positions(consumed, x.ndim, out.ndim)
    flow.set(out, {new: axes[d] for d, new in position.items() if d in axes}, weight=False)


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
def index_put(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Write values at given indices of some dimensions: their channels are frozen, those of the others join."""
    x, indices, values = args[:3]
    (mask, *others) = tensors_in(indices)
    if not others and mask.dtype is torch.bool and mask.shape == x.shape and values.numel() == 1 and not flow.name(x):
        flow.set(out, flow.combine([x, mask], x.shape))  # one value for whatever the mask tells, element by element
        return
    for tensor in tensors_in(indices):
        flow.freeze_tensor(tensor, "is used as an index")
    consumed = _indexed(indices)
    flow.freeze_tensor(x, "is written at given indices", consumed)
    own, given = flow.axes(x), dict(flow.axes(values))
    written: Axes = {}
    indexed = x.ndim - len(consumed) + max(1 if _is_mask(t) else t.ndim for t in tensors_in(indices))
    for dim, place in _positions(consumed, x.ndim, indexed).items():
        place -= indexed - values.ndim
        labels = given.pop(place, None)
        if dim in own and (place < 0 or values.shape[place] == 1):
            written[dim] = own[dim]
            continue
        if labels is not None and dim in own and labels.size == own[dim].size:
            flow.store.join(own[dim], labels)
            written[dim] = labels
            continue
        for unknown in (labels, own.get(dim)):
            if unknown is not None:
                flow.freeze(unknown, "is written together with values that are no known channels")
    for labels in given.values():
        flow.freeze(labels, "is written at given indices")
    flow.set(out, written)
