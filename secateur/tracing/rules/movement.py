"""Rules for operators that move elements and compute nothing: views, permutations, joins."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from secateur.tracing.call import Call
from secateur.tracing.geometry import merged, pieces, rows_along, varying
from secateur.tracing.labels import Axes, Labels
from secateur.tracing.numbers import plain
from secateur.tracing.rules.registry import rule
from secateur.tracing.tensor_labels import Grid

HEAD_COUNTS = (
    "num_heads", "n_heads", "nhead", "heads", "num_attention_heads", "n_head", "num_head", "nheads", "head_num",
)  # fmt: skip
"""Names under which a module keeps the number of blocks that it cuts its channels into."""
HARD_CODED = "sizes written in the code do not follow the removed channels"


def _along_heads(call: Call, shape: Sequence[int], labels: Labels) -> int | None:
    """Return the axis that counts the heads of the module at work, if it says how many it has."""
    for name in HEAD_COUNTS:
        heads = plain(getattr(call.layer, name, None))  # what is asked here is not asked by the code
        if isinstance(heads, int) and not isinstance(heads, bool) and heads > 1:
            # Of (3, heads, size) and (heads, size), the last but one.
            found = [a for a in varying(labels) if shape[a] == heads]
            return next((a for a in found if a == len(shape) - 2), found[0] if found else None)
    return None


def _split(call: Call, labels: Labels, shape: Sequence[int], dims: Sequence[int]) -> Axes:
    """Cut one labelled dimension into several; one of them is chosen to lose channels, whole rows at a time.

    Which one the code lets vary can't be read off the sizes. The module's own count of heads tells; without one the
    longest is tried first, then the others.
    """
    block = labels.reshape(shape)
    axes = varying(block)
    if len(axes) <= 1:
        axis = axes[0] if axes else 0
        return {dims[axis]: rows_along(labels, shape, axis)[:, 0].copy()}
    heads = _along_heads(call, shape, block)
    order = [heads] if heads is not None else sorted(axes, key=lambda a: (-shape[a], -a))
    option = call.assume(
        labels, "is cut into blocks of fixed sizes", *(f"along {a}" for a in order), along=dict.fromkeys(dims, labels)
    )
    axis = order[0] if option == "freeze" else int(option.split()[1])
    left = call.join_rows(rows_along(labels, shape, axis))
    counting = [n for n in HEAD_COUNTS if axis == heads and getattr(call.layer, n, None) == shape[axis]]
    for name in dict.fromkeys([*counting, *call.counts(shape[axis], at=dims[axis])]):
        call.count(name, left)
    return {dims[axis]: left}


def _keep_sizes(call: Call, axes: Axes) -> None:
    """Take the sizes that the code gives for dimensions of channels to follow, and so the attributes that hold them."""
    call.assume(np.concatenate(list(axes.values())), HARD_CODED, "follow", along=axes)
    _count_widths(call, axes)


def _count_widths(call: Call, axes: Axes) -> None:
    for dim, labels in axes.items():
        for name in call.counts(labels.size, at=dim):
            call.count(name, labels)


def reshaped(call: Call, axes: Axes, old: Sequence[int], new: Sequence[int], *, trusted: bool = False) -> Axes:
    """Carry axes through a reshape from shape ``old`` to shape ``new``; ``trusted`` where the code gives no size."""
    result: Axes = {}
    for left, right in pieces(old, new):
        inside = [d for d in left if d in axes]
        if len(inside) == len(left) == len(right) == 1:
            result[right[0]] = axes[left[0]]
            continue
        if len(inside) > 1:
            for dim in [d for d in inside if call.found.are_copies(axes[d])]:
                call.freeze(axes[dim], "is a fixed number of copies")
                inside.remove(dim)
        if len(inside) != 1:
            for dim in inside:
                call.freeze(axes[dim], "is merged with another dimension of channels")
            continue
        labels = axes[inside[0]]
        vector = merged(labels, left, inside[0], old)
        if len(right) > 1:
            result |= _split(call, vector, [new[d] for d in right], right)
            continue
        result[right[0]] = vector
        _count_widths(call, {right[0]: vector})
        if not trusted:
            call.assume(labels, HARD_CODED, "follow", along={right[0]: labels})
    return result


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view_copy", "aten::unflatten",
      keeps_weights=True)  # fmt: skip
def view(call: Call, x: Tensor, *_: Any) -> Axes:
    """Merge and cut dimensions; every element keeps its labels."""
    axes, old, new = call.axes(x), tuple(x.shape), tuple(call.out.shape)
    if not axes:
        return {}
    if old == new:
        _keep_sizes(call, axes)
        return axes
    cut = pieces(old, new)
    untouched = {a[0]: b[0] for a, b in cut if len(a) == len(b) == 1}
    fixed = {untouched[d]: labels for d, labels in axes.items() if d in untouched}
    if fixed and not call.is_weight(x):
        _keep_sizes(call, fixed)
    for left, right in cut:
        if len(left) == 1 and len(right) == 2 and left[0] in axes:
            # What later operators do with the two dimensions tells whether it is a shuffle.
            rows = axes[left[0]].reshape([new[d] for d in right])
            call.grid = Grid(right[0], right[1], rows, call.assume_rows(axes[left[0]]))
            if call.grid.is_apart:
                axes = {d: labels for d, labels in axes.items() if d != left[0]}
            break
    return reshaped(call, axes, old, new)


@rule("aten::permute", "aten::permute_copy", keeps_weights=True)
def permute(call: Call, x: Tensor, order: Sequence[int]) -> Axes:
    """Reorder dimensions."""
    axes = call.axes(x)
    return {new: axes[d % x.ndim] for new, d in enumerate(order) if d % x.ndim in axes}


@rule("aten::transpose", "aten::transpose_", "aten::swapaxes", "aten::t", "aten::t_", "aten::numpy_T",
      keeps_weights=True)  # fmt: skip
def transpose(call: Call, x: Tensor, first: int = 0, second: int = -1) -> Axes:
    """Exchange two dimensions."""
    a, b = (first % x.ndim, second % x.ndim) if x.ndim else (0, 0)
    exchange = {a: b, b: a}
    return {exchange.get(d, d): labels for d, labels in call.axes(x).items()}


@rule("aten::unsqueeze", "aten::unsqueeze_", "aten::squeeze", "aten::squeeze_", keeps_weights=True)
def squeeze(call: Call, x: Tensor, dims: Any = None) -> Axes:
    """Add or drop dimensions of size 1; a dimension of channels that was not dropped must not come to be."""
    axes = call.axes(x)
    before = call.shape_before or tuple(x.shape)
    if len(call.out.shape) <= len(before):
        given = range(len(before)) if dims is None else dims if isinstance(dims, (list, tuple)) else (dims,)
        asked = {d % max(len(before), 1) for d in given}
        call.found.staying += [(labels, 2) for dim, labels in axes.items() if dim in asked]
    return reshaped(call, axes, before, call.out.shape, trusted=True)


@rule("aten::as_strided", "aten::as_strided_", keeps_weights=True)
def as_strided(call: Call, x: Tensor, *_: Any) -> Axes:
    """Keep the channels where sizes and strides stay the same (a memory format); freeze them otherwise."""
    out = call.out
    if call.shape_before == tuple(out.shape) and all(
        size == 1 or old == new for size, old, new in zip(out.shape, call.stride_before, out.stride(), strict=True)
    ):
        return call.axes(x)
    call.freeze_tensor(x, "is read through strides written in the code")
    return {}


@rule("aten::expand", "aten::expand_copy", "aten::repeat", "aten::tile", keeps_weights=True)
def expand(call: Call, x: Tensor, *_: Any, **__: Any) -> Axes:
    """Repeat along dimensions: equal copies may be as many as the code makes of them."""
    offset = call.out.ndim - x.ndim
    own = call.axes(x)
    axes: Axes = {}
    for dim, size in enumerate(call.out.shape):
        before = x.shape[dim - offset] if dim >= offset else 1
        labels = own.get(dim - offset)
        if labels is not None:
            axes[dim] = labels if size == before else np.tile(labels, size // before)
        elif before == 1 and size > 1:
            axes[dim] = call.fresh(size)
            call.found.copies.append((int(axes[dim][0]), int(axes[dim][-1]) + 1))
            call.assume(axes[dim], "is repeated a fixed number of times", "follow")
    return axes


@rule("aten::repeat_interleave", keeps_weights=True)
def repeat_interleave(call: Call, x: Tensor, repeats: Any = None, dim: int | None = None, **_: Any) -> Axes:
    """Repeat every index of one dimension in place."""
    axes = dict(call.axes(x))
    if not isinstance(repeats, int) or dim is None:
        call.freeze_tensor(x, "is repeated by a tensor of counts")
        return {}
    if dim % x.ndim in axes:
        axes[dim % x.ndim] = np.repeat(axes[dim % x.ndim], repeats)
    return axes


@rule("aten::cat", "aten::concat", "aten::concatenate", "aten::_cat", keeps_weights=True)
def cat(call: Call, given: Sequence[Tensor], dim: int = 0) -> Axes:
    """Lay tensors side by side; along the other dimensions their channels join."""
    tensors = [t for t in given if not (t.ndim == 1 and t.shape[0] == 0)]
    labelled = {d for t in tensors for d in call.axes(t)}
    dim %= call.out.ndim
    axes: Axes = {}
    for d in labelled - {dim}:
        labels = next(call.axes(t)[d] for t in tensors if d in call.axes(t))
        for t in tensors:
            own = call.axes(t).get(d)
            if own is not None:
                call.join(labels, own)
            elif t.shape[d] > 1:
                call.freeze(labels, "is laid beside a tensor whose values there are no known channels")
        axes[d] = labels
    if dim in labelled:
        parts = []
        for t in tensors:
            own = call.axes(t).get(dim)
            parts.append(own if own is not None else call.fixed(t.shape[dim], "is no known channel"))
        axes[dim] = np.concatenate(parts)
    return axes


@rule("aten::stack", keeps_weights=True)
def stack(call: Call, tensors: Sequence[Tensor], dim: int = 0) -> Axes:
    """Lay tensors along a new dimension; their channels join."""
    dim %= call.out.ndim
    return {d + (d >= dim): labels for d, labels in call.combine(list(tensors), tensors[0].shape).items()}


@rule("aten::flip", keeps_weights=True)
def flip(call: Call, x: Tensor, dims: Sequence[int]) -> Axes:
    """Reverse dimensions: what is left of the channels is reversed too."""
    reversed_dims = {d % x.ndim for d in dims}
    return {d: labels[::-1] if d in reversed_dims else labels for d, labels in call.axes(x).items()}


@rule("aten::constant_pad_nd", "aten::pad", keeps_weights=True)
def pad(call: Call, x: Tensor, widths: Sequence[int], *_: Any) -> Axes:
    """Add constant positions at the ends: those are as many as the code says, and are kept."""
    axes = dict(call.axes(x))
    for dim in list(axes):
        back = x.ndim - 1 - dim
        low, high = widths[2 * back : 2 * back + 2] if 2 * back < len(widths) else (0, 0)
        if low < 0 or high < 0:
            call.freeze(axes.pop(dim), "is cut at its ends by a fixed number of channels")
        elif low or high:
            reason = "is padded with a number of channels written in the code"
            axes[dim] = np.concatenate([call.fixed(low, reason), axes[dim], call.fixed(high, reason)])
    return axes


@rule("aten::_pack_padded_sequence", "aten::_pad_packed_sequence")
def pack_sequence(call: Call, x: Tensor, *_: Any) -> list[Axes]:
    """Merge steps and examples into one dimension, or take them apart; features behind them stay as they are."""
    behind = x.ndim - call.out[0].ndim
    kept = {d: labels for d, labels in call.axes(x).items() if d >= (2 if behind > 0 else 1)}
    call.freeze_tensor(x, "are steps or examples of a packed sequence", [d for d in call.axes(x) if d not in kept])
    return [{d - behind: labels for d, labels in kept.items()}, *({} for _ in call.out[1:])]


@rule("aten::pixel_shuffle", "aten::pixel_unshuffle")
def pixel_shuffle(call: Call, x: Tensor, *_: Any) -> Axes:
    """Exchange channels for space: the r·r channels of one position go together."""
    channel, out = x.ndim - 3, call.out
    call.freeze_tensor(x, "is shuffled as if it were space", [channel + 1, channel + 2])
    axes = {d: v for d, v in call.axes(x).items() if d <= channel}
    labels = axes.get(channel)
    if labels is not None and out.shape[channel] < x.shape[channel]:
        axes[channel] = call.join_rows(labels.reshape(out.shape[channel], -1))
    elif labels is not None:
        axes[channel] = np.repeat(labels, out.shape[channel] // x.shape[channel])
    return {d: v for d, v in axes.items() if out.shape[d] > 1}


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(call: Call, x: Tensor, groups: int) -> Axes:
    """Interleave g blocks of channels: the channels at one place of every block go together."""
    axes = dict(call.axes(x))
    labels = axes.get(1)
    if labels is not None and call.assume_rows(labels).option == "apart":
        axes[1] = call.move(labels, groups)
    elif labels is not None:
        block = labels.reshape(groups, -1)
        call.join(block[:1], block)
        axes[1] = block.T.reshape(-1)
    return axes


@rule("aten::unfold", "aten::unfold_copy")
def unfold(call: Call, x: Tensor, dim: int, *_: Any) -> Axes:
    """Slide a window along one dimension, which must be space; the window becomes a last dimension."""
    call.freeze_tensor(x, "is cut into windows as if it were space", [dim % x.ndim])
    return {d: labels for d, labels in call.axes(x).items() if d != dim % x.ndim}


@rule("aten::glu")
def glu(call: Call, x: Tensor, dim: int = -1) -> Axes:
    """Gate the first half of a dimension by the second: the channels of both halves join in pairs."""
    dim %= x.ndim
    axes = dict(call.axes(x))
    if dim in axes:
        first, second = np.split(axes[dim], 2)
        call.join(first, second)
        axes[dim] = first
        if first.size == 1:
            call.freeze(axes.pop(dim), "is gated by its only partner")
    return axes


@rule("aten::im2col")
def im2col(call: Call, x: Tensor, kernel: Sequence[int], *_: Any) -> Axes:
    """Gather windows into channels: every channel stands k_h·k_w times in a row."""
    channel = x.ndim - 3
    call.freeze_tensor(x, "is cut into windows as if it were space", [channel + 1, channel + 2])
    axes = {d: labels for d, labels in call.axes(x).items() if d <= channel}
    if channel in axes:
        axes[channel] = np.repeat(axes[channel], prod(kernel))
    return axes


@rule("aten::col2im")
def col2im(call: Call, x: Tensor, *_: Any) -> Axes:
    """Add windows up into space: the k_h·k_w rows of one channel go together."""
    channel, made = x.ndim - 2, call.out.ndim - 3
    call.freeze_tensor(x, "is folded as if it were space", [x.ndim - 1])
    axes = {d: labels for d, labels in call.axes(x).items() if d < channel}
    labels = call.axes(x).get(channel)
    if labels is not None and call.out.shape[made] > 1:
        axes[made] = call.join_rows(labels.reshape(call.out.shape[made], -1))
    elif labels is not None:
        call.freeze(labels, "is folded into a single channel")
    return axes
