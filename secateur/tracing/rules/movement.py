"""Rules for operators that move elements and compute nothing: views, permutations, joins, cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from secateur.tracing.findings import Grid
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Axes, Labels, merged, runs, varying
from secateur.tracing.numbers import plain
from secateur.tracing.rules.registry import rule
from secateur.tracing.shuffles.rule import cut_into_rows, is_loose, loosely

HEAD_COUNTS = (
    "num_heads", "n_heads", "nhead", "heads", "num_attention_heads", "n_head", "num_head", "nheads", "head_num",
)  # fmt: skip
"""Names under which a module keeps the number of blocks that it cuts its channels into."""

_HARD_CODED = "sizes written in the code do not follow the removed channels"


def _along_heads(flow: Flow, shape: Sequence[int], labels: Labels) -> int | None:
    """Return the axis that counts the heads of the module at work, if it says how many it has."""
    for name in HEAD_COUNTS:
        heads = plain(getattr(flow.layer, name, None))  # what is asked here is not asked by the code
        if isinstance(heads, int) and not isinstance(heads, bool) and heads > 1:
            # Of (3, heads, size) and (heads, size), the last but one.
            found = [a for a in varying(labels) if shape[a] == heads]
            return next((a for a in found if a == len(shape) - 2), found[0] if found else None)
    return None


def _split(flow: Flow, labels: Labels, shape: Sequence[int], dims: Sequence[int]) -> dict[int, Labels]:
    """Cut one labelled dimension into several; one of them is chosen to lose channels, whole rows at a time.

    Which one the code lets vary can't be read off the sizes. The module's own count of heads tells; without one the
    longest is tried first, then the others.
    """
    block = labels.reshape(shape)
    axes = varying(block)
    if len(axes) <= 1:
        axis = axes[0] if axes else 0
        return {axis: np.ascontiguousarray(np.moveaxis(block, axis, 0).reshape(shape[axis], -1)[:, 0])}
    heads = _along_heads(flow, shape, block)
    order = [heads] if heads is not None else sorted(axes, key=lambda a: (-shape[a], -a))
    option = flow.assume(
        labels, "is cut into blocks of fixed sizes", *(f"along {a}" for a in order), along=dict.fromkeys(dims, labels)
    )
    axis = order[0] if option == "freeze" else int(option.split()[1])
    rows = np.moveaxis(block, axis, 0).reshape(shape[axis], -1)
    flow.store.join(rows[:, :1], rows)
    left = np.ascontiguousarray(rows[:, 0])
    counting = [n for n in HEAD_COUNTS if axis == heads and getattr(flow.layer, n, None) == shape[axis]]
    for name in dict.fromkeys([*counting, *flow.counts(shape[axis], at=dims[axis])]):
        flow.count(name, left)
    return {axis: left}


def _count_width(flow: Flow, labels: Labels, dim: int) -> None:
    """Let an attribute of the module at work follow, where it is given as the number of these channels."""
    for name in flow.counts(labels.size, at=dim):
        flow.count(name, labels)


def reshaped(flow: Flow, axes: Axes, old: Sequence[int], new: Sequence[int], *, trusted: bool = False) -> Axes:
    """Carry axes through a reshape from shape ``old`` to shape ``new``."""
    result: Axes = {}
    for left, right in runs(old, new):
        inside = [d for d in left if d in axes]
        if not inside:
            continue
        if len(left) == len(right) == 1:
            result[right[0]] = axes[left[0]]
            continue
        if len(inside) > 1:
            for dim in [d for d in inside if flow.are_copies(axes[d])]:
                flow.freeze(axes[dim], "is a fixed number of copies")
                inside.remove(dim)
        if len(inside) != 1:
            for dim in inside:
                flow.freeze(axes[dim], "is merged with another dimension of channels")
            continue
        vector = merged(axes[inside[0]], left, inside[0], old)
        if len(right) == 1:
            result[right[0]] = vector
            _count_width(flow, vector, right[0])
            if not trusted:
                flow.assume(axes[inside[0]], _HARD_CODED, "follow", along={right[0]: axes[inside[0]]})
        else:
            cut = _split(flow, vector, [new[d] for d in right], right)
            result |= {right[axis]: labels for axis, labels in cut.items()}
    return result


def _grid(flow: Flow, axes: Axes, old: Sequence[int], new: Sequence[int]) -> tuple[int, Grid] | None:
    """Return the dimension of channels that a view cuts into two, and these."""
    for left, right in runs(old, new):
        if len(left) == 1 and len(right) == 2 and left[0] in axes:
            row, column = right
            return left[0], cut_into_rows(flow, axes[left[0]], row, column, new)
    return None


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view_copy", "aten::unflatten")
def view(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Merge and cut dimensions; every element keeps its labels."""
    x = args[0]
    axes = flow.axes(x)
    if not axes:
        return
    if tuple(x.shape) == tuple(out.shape):
        flow.assume(np.concatenate(list(axes.values())), _HARD_CODED, "follow", along=axes)
        for dim, labels in axes.items():
            _count_width(flow, labels, dim)
        flow.set(out, axes, weight=flow.is_weight(x))
        return
    untouched = {a[0]: b[0] for a, b in runs(x.shape, out.shape) if len(a) == len(b) == 1}
    fixed = {untouched[d]: labels for d, labels in axes.items() if d in untouched}
    if fixed and not flow.is_weight(x):
        flow.assume(np.concatenate(list(fixed.values())), _HARD_CODED, "follow", along=fixed)
        for dim, labels in fixed.items():
            _count_width(flow, labels, dim)
    cut = _grid(flow, axes, x.shape, out.shape)
    if cut is not None and cut[1].key in flow.loose:
        axes = {d: labels for d, labels in axes.items() if d != cut[0]}
    flow.set(out, reshaped(flow, axes, x.shape, out.shape), weight=flow.is_weight(x))
    if cut is not None:
        flow.set_grid(out, cut[1])


@rule("aten::permute", "aten::permute_copy")
def permute(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Reorder dimensions."""
    x, order = args[:2]
    axes = flow.axes(x)
    flow.set(
        out, {new: axes[d % x.ndim] for new, d in enumerate(order) if d % x.ndim in axes}, weight=flow.is_weight(x)
    )


@rule("aten::transpose", "aten::transpose_", "aten::swapaxes", "aten::t", "aten::t_", "aten::numpy_T", "aten::movedim")
def transpose(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Exchange two dimensions."""
    x = args[0]
    a, b = (args[1] % x.ndim, args[2] % x.ndim) if len(args) > 2 else (0, x.ndim - 1)
    exchange = {a: b, b: a}
    axes = {exchange.get(d, d): labels for d, labels in flow.axes(x).items()} if x.ndim > 1 else flow.axes(x)
    flow.set(out, axes, weight=flow.is_weight(x))


@rule("aten::unsqueeze", "aten::unsqueeze_", "aten::squeeze", "aten::squeeze_")
def squeeze(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Add or drop dimensions of size 1; a dimension of channels that was not dropped must not come to be."""
    x = args[0]
    axes = flow.axes(x)
    before = flow.shape_before or x.shape
    if len(out.shape) <= len(before):
        asked = args[1] if len(args) > 1 else range(len(before))
        asked = {d % len(before) for d in (asked if isinstance(asked, (list, tuple, range)) else (asked,))}
        flow.staying += [(labels, 2) for dim, labels in axes.items() if dim in asked]
    flow.set(out, reshaped(flow, axes, before, out.shape, trusted=True), weight=flow.is_weight(x))


@rule("aten::as_strided", "aten::as_strided_")
def as_strided(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Keep the channels where sizes and strides stay the same (a memory format); freeze them otherwise."""
    x = args[0]
    axes = dict(flow.axes(x))
    same = flow.shape_before == tuple(out.shape) and all(
        size == 1 or old == new for size, old, new in zip(out.shape, flow.stride_before, out.stride(), strict=True)
    )
    if not same:
        for labels in axes.values():
            flow.freeze(labels, "is read through strides written in the code")
        axes = {}
    flow.set(out, axes, weight=flow.is_weight(x))


@rule("aten::expand", "aten::expand_copy", "aten::repeat", "aten::tile")
def expand(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Repeat along dimensions: equal copies may be as many as the code makes of them."""
    x = args[0]
    offset = out.ndim - x.ndim
    own = flow.axes(x)
    axes: Axes = {}
    for dim, size in enumerate(out.shape):
        before = x.shape[dim - offset] if dim >= offset else 1
        labels = own.get(dim - offset)
        if labels is not None:
            axes[dim] = labels if size == before else np.tile(labels, size // before)
        elif before == 1 and size > 1:
            axes[dim] = flow.store.fresh(size)
            flow.copies.append((int(axes[dim][0]), int(axes[dim][-1]) + 1))
            flow.assume(axes[dim], "is repeated a fixed number of times", "follow")
    flow.set(out, axes, weight=flow.is_weight(x))


@rule("aten::repeat_interleave")
def repeat_interleave(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Repeat every index of one dimension in place."""
    x = args[0]
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    axes = dict(flow.axes(x))
    if not isinstance(args[1] if len(args) > 1 else None, int) or dim is None:
        flow.freeze_tensor(x, "is repeated by a tensor of counts")
        return
    if dim % x.ndim in axes:
        axes[dim % x.ndim] = np.repeat(axes[dim % x.ndim], args[1])
    flow.set(out, axes, weight=flow.is_weight(x))


@rule("aten::cat", "aten::concat", "aten::concatenate", "aten::_cat")
def cat(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Lay tensors side by side; along the other dimensions their channels join."""
    tensors = [t for t in args[0] if not (t.ndim == 1 and t.shape[0] == 0)]
    if not any(flow.axes(t) for t in tensors):
        return
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    axes: Axes = {}
    for d in {d for t in tensors for d in flow.axes(t) if d != dim}:
        labels = next(flow.axes(t)[d] for t in tensors if d in flow.axes(t))
        for t in tensors:
            own = flow.axes(t).get(d)
            if own is not None:
                flow.store.join(labels, own)
            elif t.shape[d] > 1:
                flow.freeze(labels, "is laid beside a tensor whose values there are no known channels")
        axes[d] = labels
    if any(dim in flow.axes(t) for t in tensors):
        parts = []
        for t in tensors:
            own = flow.axes(t).get(dim)
            parts.append(own if own is not None else flow.fixed(t.shape[dim], "is no known channel"))
        axes[dim] = np.concatenate(parts)
    flow.set(out, axes, weight=all(flow.is_weight(t) for t in tensors))


@rule("aten::stack")
def stack(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Lay tensors along a new dimension; their channels join."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    joined = flow.combine(list(args[0]), args[0][0].shape)
    axes = {d + (d >= dim): labels for d, labels in joined.items()}
    flow.set(out, axes, weight=all(flow.is_weight(t) for t in args[0]))


@rule("aten::slice", "aten::slice_copy", "aten::narrow")
def slice_(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Cut a range out of a dimension; whether its bounds follow the channels is found by trying."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else 0) % x.ndim
    axes = dict(flow.axes(x))
    labels = axes.get(dim)
    if labels is None and dim in flow.asked and x.shape[dim] > 1:
        flow.freeze(flow.asked[dim], "give their number as a bound of a dimension that loses nothing")
    if labels is not None:
        size = x.shape[dim]
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        start = max(start + size, 0) if start < 0 else min(start, size)
        step = args[4] if len(args) > 4 else 1
        index = np.arange(start, start + out.shape[dim] * step, step)
        axes[dim] = labels[index]
        if index.size == size:
            flow.assume(labels, _HARD_CODED, "follow", along={dim: labels})
        elif step == 1:
            _cut(flow, labels, [start, start + index.size], along={dim: labels})
        elif size % step == 0 and start < step and index.size == size // step:
            rows = labels.reshape(-1, step)
            flow.store.join(rows[:, :1], rows)
        else:
            flow.freeze(labels, "is read at every other index")
        if index.size == 1:
            del axes[dim]
    flow.set(out, axes, weight=flow.is_weight(x))


def _cut(
    flow: Flow, labels: Labels, bounds: Sequence[int], told: str = "bounds", along: Mapping[int, Labels] | None = None
) -> None:
    """Cut a dimension at indices; the code is taken to cut it at the same channels once some are gone.

    Where attributes of the module hold the width of each block, they follow and the blocks are free. Where one holds
    the whole width or that of equal blocks, it follows, and the blocks have to lose equal fractions; so they have
    where the code computes the cuts of the shape. Where these can't, and the cuts part what was laid side by side, the
    code may take the parts' own widths: then they are free as well.

    Args:
        flow: The run.
        labels: Labels of the dimension.
        bounds: Where it is cut.
        told: What the code gives: ``bounds``, the ``widths`` of all blocks, one ``width`` for all, or their ``number``.
        along: Where the labels lie, for sizes and bounds that are numbers of other channels.
    """
    blocks = [b for b in np.split(labels, bounds) if b.size]
    if len(blocks) < 2:
        return
    known: dict[str, Sequence[Any]] = {}
    if told in ("bounds", "widths"):
        known["widths"] = _widths(flow, blocks)
    if told in ("bounds", "width"):
        known["whole"] = flow.counts(labels.size)
    if told != "number":
        known["equal"] = flow.counts(blocks[0].size) if len({b.size for b in blocks}) == 1 else []
    options = [*(name for name, found in known.items() if found), "share"]
    inner = [b for b in bounds if 0 < b < labels.size]
    if told in ("bounds", "widths") and all(flow.store.are_apart(labels, b) for b in inner):
        options.append("parts")
    option = flow.assume(labels, "is cut at indices written in the code", *options, blocks=blocks, along=along)
    if option == "widths":
        for name, counted in known["widths"]:
            flow.count(name, counted)
        return
    if option in ("parts", "freeze"):
        return
    flow.share(blocks, "is cut into ranges in fixed proportion")
    for name in known.get(option, ()):
        flow.count(name, labels if option == "whole" else blocks[0])


def _widths(flow: Flow, blocks: Sequence[Labels]) -> list[tuple[str, Labels]]:
    """Return attributes that hold the blocks' widths, and what each counts; empty unless they explain all cuts.

    Of two blocks one is what the other leaves.
    """
    known = [flow.counts(block.size) for block in blocks]
    lists = {n.partition("[")[0] for n in known[0] if n.endswith("]")}
    whole = [name for name in lists if all(f"{name}[{i}]" in names for i, names in enumerate(known))]
    found = [(f"{name}[{i}]", block) for name in sorted(whole) for i, block in enumerate(blocks)]
    plain = [[n for n in names if not n.endswith("]")] for names in known]
    if len(blocks) == 2 and any(plain):
        explained = [(n, blocks[0]) for n in plain[0]] + [(n, blocks[1]) for n in plain[1] if n not in plain[0]]
    else:
        explained = [(n, b) for names, b in zip(plain, blocks, strict=True) for n in names] if all(plain) else []
    return found + explained


@rule("aten::split", "aten::split_with_sizes", "aten::split_copy", "aten::split_with_sizes_copy", "aten::unsafe_split",
      "aten::unsafe_split_with_sizes", "aten::chunk", "aten::unsafe_chunk", "aten::tensor_split")  # fmt: skip
def split(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Cut a dimension into ranges that follow one another."""
    x = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % x.ndim
    axes = flow.axes(x)
    labels = axes.get(dim)
    start = 0
    blocks = []
    for piece in out:
        own = dict(axes)
        if labels is not None:
            own[dim] = labels[start : start + piece.shape[dim]]
            blocks.append(own[dim])
            start += piece.shape[dim]
            if piece.shape[dim] == 1:
                del own[dim]
        flow.set(piece, own, weight=flow.is_weight(x))
    if labels is not None:
        if any(b.size == 1 for b in blocks):
            flow.freeze(labels, "is cut into single channels")
        else:
            number = getattr(flow.called, "__name__", "") in ("chunk", "unsafe_chunk", "tensor_split")
            told = "number" if number else "widths" if isinstance(args[1], (list, tuple)) else "width"
            if told == "width":  # as many pieces as there are channels for
                flow.measure(labels).taken = True
            _cut(flow, labels, np.cumsum([b.size for b in blocks[:-1]]).tolist(), told)


@rule("aten::flip")
def flip(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Reverse dimensions: what is left of the channels is reversed too."""
    x = args[0]
    dims = {d % x.ndim for d in args[1]}
    axes = {d: labels[::-1] if d in dims else labels for d, labels in flow.axes(x).items()}
    flow.set(out, axes, weight=flow.is_weight(x))


@rule("aten::_pack_padded_sequence", "aten::_pad_packed_sequence")
def pack_sequence(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Merge steps and examples into one dimension, or take them apart; features behind them stay as they are."""
    x = args[0]
    behind = x.ndim - out[0].ndim
    kept = {d: labels for d, labels in flow.axes(x).items() if d >= (2 if behind > 0 else 1)}
    flow.freeze_tensor(x, "are steps or examples of a packed sequence", [d for d in flow.axes(x) if d not in kept])
    flow.set(out[0], {d - behind: labels for d, labels in kept.items()})
    for tensor in out[1:]:
        flow.set(tensor, {})


@rule("aten::roll")
def roll(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Shift a dimension around: exact where both parts lose the same fraction, and the shift follows."""
    x, shifts = args[:2]
    dims = args[2] if len(args) > 2 else []
    axes = dict(flow.axes(x))
    if not dims:
        flow.freeze_tensor(x, "is rolled over all its elements")
        return
    for shift, dim in zip(shifts, dims, strict=True):
        labels = axes.get(dim % x.ndim)
        if labels is not None:
            start = -shift % labels.size
            _cut(flow, labels, [start])
            axes[dim % x.ndim] = np.roll(labels, shift)
    flow.set(out, axes, weight=flow.is_weight(x))


@rule("aten::constant_pad_nd", "aten::pad")
def pad(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Add constant positions at the ends: those are as many as the code says, and are kept."""
    x, widths = args[:2]
    axes = dict(flow.axes(x))
    for dim in list(axes):
        back = x.ndim - 1 - dim
        low, high = widths[2 * back : 2 * back + 2] if 2 * back < len(widths) else (0, 0)
        if low < 0 or high < 0:
            flow.freeze(axes.pop(dim), "is cut at its ends by a fixed number of channels")
        elif low or high:
            reason = "is padded with a number of channels written in the code"
            axes[dim] = np.concatenate([flow.fixed(low, reason), axes[dim], flow.fixed(high, reason)])
    flow.set(out, axes, weight=flow.is_weight(x))


@rule("aten::pixel_shuffle", "aten::pixel_unshuffle")
def pixel_shuffle(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Exchange channels for space: the r·r channels of one position go together."""
    x = args[0]
    axes = dict(flow.axes(x))
    channel = x.ndim - 3
    flow.freeze_tensor(x, "is shuffled as if it were space", [channel + 1, channel + 2])
    labels = axes.get(channel)
    result = {d: v for d, v in axes.items() if d < channel}
    if labels is not None:
        if out.shape[channel] < x.shape[channel]:
            rows = labels.reshape(out.shape[channel], -1)
            flow.store.join(rows[:, :1], rows)
            result[channel] = np.ascontiguousarray(rows[:, 0])
        else:
            result[channel] = np.repeat(labels, out.shape[channel] // x.shape[channel])
    flow.set(out, {d: v for d, v in result.items() if out.shape[d] > 1})


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Interleave g blocks of channels: the channels at one place of every block go together."""
    x, groups = args[:2]
    axes = dict(flow.axes(x))
    labels = axes.get(1)
    if labels is not None:
        if is_loose(flow, labels):
            axes[1] = loosely(flow, labels, groups)
        else:
            block = labels.reshape(groups, -1)
            flow.store.join(block[:1], block)
            axes[1] = block.T.reshape(-1)
    flow.set(out, axes)


@rule("aten::unfold", "aten::unfold_copy")
def unfold(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Slide a window along one dimension, which must be space; the window becomes a last dimension."""
    x, dim = args[0], args[1] % args[0].ndim
    flow.freeze_tensor(x, "is cut into windows as if it were space", [dim])
    flow.set(out, {d: labels for d, labels in flow.axes(x).items() if d != dim})


@rule("aten::glu")
def glu(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Gate the first half of a dimension by the second: the channels of both halves join in pairs."""
    x = args[0]
    dim = (args[1] if len(args) > 1 else -1) % x.ndim
    axes = dict(flow.axes(x))
    if dim in axes:
        first, second = np.split(axes[dim], 2)
        flow.store.join(first, second)
        axes[dim] = first
        if first.size == 1:
            flow.freeze(axes.pop(dim), "is gated by its only partner")
    flow.set(out, axes)


@rule("aten::im2col")
def im2col(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Gather windows into channels: every channel stands k_h·k_w times in a row."""
    x = args[0]
    channel = x.ndim - 3
    flow.freeze_tensor(x, "is cut into windows as if it were space", [channel + 1, channel + 2])
    axes = {d: labels for d, labels in flow.axes(x).items() if d < channel}
    labels = flow.axes(x).get(channel)
    if labels is not None:
        axes[channel] = np.repeat(labels, prod(args[1]))
    elif x.shape[channel] == 1:
        axes = {d: v for d, v in axes.items() if d != channel}
    flow.set(out, axes)


@rule("aten::col2im")
def col2im(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Add windows up into space: the k_h·k_w rows of one channel go together."""
    x = args[0]
    channel = x.ndim - 2
    flow.freeze_tensor(x, "is folded as if it were space", [x.ndim - 1])
    axes = {d: labels for d, labels in flow.axes(x).items() if d < channel}
    labels = flow.axes(x).get(channel)
    if labels is not None and out.shape[out.ndim - 3] > 1:
        rows = labels.reshape(out.shape[out.ndim - 3], -1)
        flow.store.join(rows[:, :1], rows)
        axes[out.ndim - 3] = np.ascontiguousarray(rows[:, 0])
    elif labels is not None:
        flow.freeze(labels, "is folded into a single channel")
    flow.set(out, axes)
