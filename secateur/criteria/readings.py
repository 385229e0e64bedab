"""Where the feature maps of a group can be seen: at the inputs of the layers that read it.

Layers may read a group unequally: one reads every channel, another only half of them, a third some of them twice
(C2f, cross-stage blocks, ghost modules). What is counted together has to come from one set of observations, or second
moments are moments of nothing: they need not even be positive semi-definite. So the rule is:

- an input that holds every channel of the group at once is an observation of the group, and nothing else is;
- where there is no such input, each channel is taken where it is first read. Channels of different layers are seen
  together, image by image and position by position, where their maps are of one shape; otherwise they are never seen
  together, and their covariance is 0.

Where an input holds some channels more often than others, the first copy of each is that of the group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria import weights
from secateur.graph.channels import ChannelGraph, ChannelGroup

Callback = Callable[[str, Tensor, Tensor | None], None]
"""Called with the group's name, its maps ``(N, c, *spatial)``, and their channels (None = all, in order)."""


@dataclass(frozen=True)
class Reading:
    """How one layer reads a group: channel ``channels[i]`` at input positions ``positions[i]``."""

    module: str
    channels: Tensor
    """Shape ``(c,)``."""
    positions: Tensor
    """Shape ``(c, q)``: q > 1 where a feature map was flattened, or is held several times."""

    def maps(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Take the channels out of the layer's input, shape ``(N, c, *spatial)``.

        A map that was flattened comes back as a matrix, as nearly square as its number of positions allows.
        """
        if isinstance(layer, nn.Linear):
            x = x[None] if x.dim() == 1 else x
            x = x.movedim(-1, 1)
        elif x.dim() == len(layer.kernel_size) + 1:  # type: ignore[arg-type]
            x = x[None]
        count, q = self.positions.shape
        flat = self.positions.flatten().to(x.device)
        if len(flat) == x.shape[1] and bool((flat == torch.arange(len(flat), device=x.device)).all()):
            picked = x
        else:
            picked = x.index_select(1, flat)
        if q == 1:
            return picked
        height = max(h for h in range(1, int(q**0.5) + 1) if q % h == 0)
        return picked.reshape(len(x), count, height, q // height, *x.shape[2:])


def readings(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> list[Reading]:
    """Return the readings at which the group's feature maps are seen, by the rule of this module.

    Either every one of them holds all channels, or each channel is in one at most; see :func:`unseen`.
    """
    found: list[Reading] = []
    for slices in weights.reading(model, graph, group):
        if slices.called:
            found += _copies(slices)
    whole = [reading for reading in found if len(reading.channels) == group.size]
    if whole:
        return whole
    taken = torch.zeros(group.size, dtype=torch.bool)
    parts = []
    for reading in found:
        new = ~taken[reading.channels]
        if bool(new.any()):
            parts.append(Reading(reading.module, reading.channels[new], reading.positions[new]))
            taken[reading.channels] = True
    return parts


def _copies(slices: weights.Slices) -> list[Reading]:
    """Divide what a layer reads into inputs of its own for the channels that it holds more often than others."""
    counts = (slices.table >= 0).sum(1)
    levels = torch.unique(counts).tolist()
    found = []
    for start, end in zip([0, *levels], levels, strict=False):
        own = counts >= end
        table = slices.table[own, start:end]
        offsets = table - table[:, :1]
        if len(levels) > 1 and not bool((offsets == offsets[0]).all()):
            return []  # a flattened map whose copies interleave: nothing tells which positions are the first copy's
        found.append(Reading(slices.module, slices.channels[own], table))
    return found


def unseen(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> str:
    """Say why a group's feature maps can't be seen; empty where they can."""
    seen = {int(c) for reading in readings(model, graph, group) for c in reading.channels}
    missing = group.size - len(seen)
    if not missing:
        return ""
    others = dict.fromkeys(
        f"{slices.module}.{slices.attribute}".lstrip(".")
        for slices in weights.reading(model, graph, group)
        if not slices.called
    )
    if others:
        why = f"code applies {', '.join(others)} to them without calling a convolution or linear layer"
    else:
        why = "no convolution or linear layer reads them"
    return f"the maps of {missing} of its {group.size} channels can't be seen, as {why}"


@contextmanager
def watching(
    model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], callback: Callback
) -> Iterator[None]:
    """Hand every feature map of the groups to a callback whenever the model runs; see the rule of this module.

    A group that is seen in parts is handed over at the end of each run, and of a layer that runs several times the
    first input counts.
    """
    with ExitStack() as stack:
        for group in groups:
            found = readings(model, graph, group)
            whole = any(len(reading.channels) == group.size for reading in found)
            seen: list[tuple[weakref.ref[Tensor], int]] = []
            parts: dict[int, Tensor] = {}
            for number, reading in enumerate(found):
                layer = model.get_submodule(reading.module)
                if whole:
                    hook = _observing(group, reading, layer, seen, callback)
                else:
                    hook = _keeping(reading, layer, number, parts)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if found and not whole:
                stack.callback(model.register_forward_pre_hook(lambda *_, parts=parts: parts.clear()).remove)
                end = _joining(group, found, parts, callback)
                stack.callback(model.register_forward_hook(end).remove)
        yield


def _observing(
    group: ChannelGroup,
    reading: Reading,
    layer: nn.Module,
    seen: list[tuple[weakref.ref[Tensor], int]],
    callback: Callback,
) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        # Two layers that read one tensor see one feature map; a tensor written to in between is another one.
        seen[:] = [(ref, version) for ref, version in seen if ref() is not None]
        now = -1 if x.is_inference() else x._version
        if any(ref() is x and version == now for ref, version in seen):
            return
        seen.append((weakref.ref(x), now))
        callback(group.name, reading.maps(x.detach(), layer), None)

    return hook


def _keeping(reading: Reading, layer: nn.Module, number: int, parts: dict[int, Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if number not in parts:
            x = args[0] if args else kwargs["input"]
            # A clone, since what follows in the forward may write into it.
            parts[number] = reading.maps(x.detach(), layer).clone()

    return hook


def _joining(
    group: ChannelGroup, found: Sequence[Reading], parts: dict[int, Tensor], callback: Callback
) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, maps in parts.items():
            by_shape.setdefault((len(maps), *maps.shape[2:]), []).append(number)
        for numbers in by_shape.values():
            channels, order = torch.cat([found[number].channels for number in numbers]).sort()
            maps = torch.cat([parts[number] for number in numbers], 1)
            maps = maps.index_select(1, order.to(maps.device))
            callback(group.name, maps, None if len(channels) == group.size else channels.to(maps.device))
        parts.clear()

    return hook
