"""Rules for operators that cut a dimension into ranges: whether the cuts follow the channels is found by trying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from secateur.tracing.call import Call
from secateur.tracing.labels import Axes, Labels
from secateur.tracing.rules.movement import HARD_CODED
from secateur.tracing.rules.registry import rule


def _cut(
    call: Call, labels: Labels, bounds: Sequence[int], told: str = "bounds", along: Mapping[int, Labels] | None = None
) -> None:
    """Cut a dimension at indices; the code is taken to cut it at the same channels once some are gone.

    Where attributes of the module hold the width of each block, they follow and the blocks are free. Where one holds
    the whole width or that of equal blocks, it follows, and the blocks have to lose equal fractions; so they have
    where the code computes the cuts of the shape. Where these can't, and the cuts part what was laid side by side, the
    code may take the parts' own widths: then they are free as well.

    Args:
        call: The operator call.
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
        known["widths"] = _widths(call, blocks)
    if told in ("bounds", "width"):
        known["whole"] = call.counts(labels.size)
    if told != "number":
        known["equal"] = call.counts(blocks[0].size) if len({b.size for b in blocks}) == 1 else []
    options = [*(name for name, found in known.items() if found), "share"]
    inner = [b for b in bounds if 0 < b < labels.size]
    if told in ("bounds", "widths") and all(call.labels.store.are_apart(labels, b) for b in inner):
        options.append("parts")
    option = call.assume(labels, "is cut at indices written in the code", *options, blocks=blocks, along=along)
    if option == "widths":
        for name, counted in known["widths"]:
            call.count(name, counted)
    elif option in ("whole", "equal", "share"):
        call.share(blocks, "is cut into ranges in fixed proportion")
        for name in known.get(option, ()):
            call.count(name, labels if option == "whole" else blocks[0])
        if told == "number" and len({b.size for b in blocks}) == 1:
            call.follow_unread(blocks[0])


def _widths(call: Call, blocks: Sequence[Labels]) -> list[tuple[str, Labels]]:
    """Return attributes that hold the blocks' widths, and what each counts; empty unless they explain all cuts.

    Of two blocks one is what the other leaves.
    """
    known = [call.counts(block.size) for block in blocks]
    lists = {n.partition("[")[0] for n in known[0] if n.endswith("]")}
    whole = [name for name in lists if all(f"{name}[{i}]" in names for i, names in enumerate(known))]
    found = [(f"{name}[{i}]", block) for name in sorted(whole) for i, block in enumerate(blocks)]
    plain = [[n for n in names if not n.endswith("]")] for names in known]
    if len(blocks) == 2 and any(plain):
        explained = [(n, blocks[0]) for n in plain[0]] + [(n, blocks[1]) for n in plain[1] if n not in plain[0]]
    else:
        explained = [(n, b) for names, b in zip(plain, blocks, strict=True) for n in names] if all(plain) else []
    return found + explained


@rule("aten::slice", "aten::slice_copy", "aten::narrow", keeps_weights=True)
def slice_(
    call: Call, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Axes:
    """Cut a range out of a dimension; whether its bounds follow the channels is found by trying."""
    dim %= x.ndim
    axes = dict(call.axes(x))
    labels = axes.get(dim)
    size, length = x.shape[dim], call.out.shape[dim]
    if labels is None:
        if dim in call.asked and size > 1:
            call.freeze(call.asked[dim], "give their number as a bound of a dimension that loses nothing")
        return axes
    first = start or 0
    first = max(first + size, 0) if first < 0 else min(first, size)
    axes[dim] = labels[np.arange(first, first + length * step, step)]
    if length == size:
        call.assume(labels, HARD_CODED, "follow", along={dim: labels})
    elif step == 1:
        _cut(call, labels, [first, first + length], along={dim: labels})
    elif size % step == 0 and first < step and length == size // step:
        call.join_rows(labels.reshape(-1, step))
    else:
        call.freeze(labels, "is read at every other index")
    if length == 1:
        del axes[dim]
    return axes


@rule("aten::split", "aten::split_with_sizes", "aten::split_copy", "aten::split_with_sizes_copy", "aten::unsafe_split",
      "aten::unsafe_split_with_sizes", "aten::chunk", "aten::unsafe_chunk", "aten::tensor_split",
      keeps_weights=True)  # fmt: skip
def split(call: Call, x: Tensor, sizes: Any, dim: int = 0) -> list[Axes]:
    """Cut a dimension into ranges that follow one another."""
    dim %= x.ndim
    axes = call.axes(x)
    labels = axes.get(dim)
    if labels is None:
        return [axes for _ in call.out]
    bounds = np.cumsum([piece.shape[dim] for piece in call.out])[:-1].tolist()
    blocks = np.split(labels, bounds)
    if any(block.size == 1 for block in blocks):
        call.freeze(labels, "is cut into single channels")
    else:
        number = getattr(call.function, "__name__", "") in ("chunk", "unsafe_chunk", "tensor_split")
        told = "number" if number else "widths" if isinstance(sizes, (list, tuple)) else "width"
        if told == "width":  # as many pieces as there are channels for
            call.found.measure(labels)
        _cut(call, labels, bounds, told)
    others = {d: own for d, own in axes.items() if d != dim}
    return [others | ({dim: block} if block.size > 1 else {}) for block in blocks]


@rule("aten::roll", keeps_weights=True)
def roll(call: Call, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Axes:
    """Shift a dimension around: exact where both parts lose the same fraction, and the shift follows."""
    axes = dict(call.axes(x))
    if not dims:
        call.freeze_tensor(x, "is rolled over all its elements")
        return {}
    for shift, dim in zip(shifts, dims, strict=True):
        labels = axes.get(dim % x.ndim)
        if labels is not None:
            _cut(call, labels, [-shift % labels.size])
            axes[dim % x.ndim] = np.roll(labels, shift)
    return axes
