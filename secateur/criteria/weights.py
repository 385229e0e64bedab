"""A group's weights as matrices: the filters that make its channels, and the weights that read them.

A layer is a module, however its weight comes about: as a parameter, by a parametrization (weight norm, a low-rank
update) or under a mask of :mod:`torch.nn.utils.prune`. What is arranged here is the weight that its forward applies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.errors import CriterionError
from secateur.graph.channels import ChannelGraph, ChannelGroup, LayerPort, Member
from secateur.graph.places import IndexArray

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
READERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class Slices:
    """The slices of one weight that make a group's channels, or that read them.

    Positions count the layer's channels: in a weight of several blocks, dimension 1 holds those of one block.
    """

    module: str
    """The module that has the weight: the layer itself, or where code calls the function, whichever holds it."""
    attribute: str
    """The weight's name there."""
    layer: str
    """The layer's name in the graph, see :attr:`secateur.graph.channels.LayerPort.name`."""
    called: bool
    """Whether the module is a convolution or linear layer that is called, so that its inputs can be seen."""
    dim: int
    blocks: int
    channels: Tensor
    """The channels that the weight makes or reads, ascending, shape ``(c,)``."""
    table: Tensor
    """Their positions, ascending, shape ``(c, q)``; -1 fills up where a channel has fewer than q."""

    def weight(self, model: nn.Module) -> Tensor:
        """Return the weight as the next forward applies it."""
        return weight_of(model.get_submodule(self.module), self.attribute)

    def filters(self, weight: Tensor, size: int) -> Tensor:
        """Arrange a weight by channel, shape ``(size, F)``; zeros where a channel has fewer positions, or none.

        Where every channel has one position, in order, nothing is copied.
        """
        return self.spread(rows_of(weight, self.dim, self.blocks), size)

    def spread(self, rows: Tensor, size: int) -> Tensor:
        """Arrange rows of positions ``(P, n)`` by channel, shape ``(size, q·n)``; zeros as in :meth:`filters`."""
        return self._by_channel(rows, size, 0).reshape(size, -1)

    def reading(self, weight: Tensor, size: int) -> Tensor:
        """Arrange a weight that reads the channels, shape ``(R, size, q·K)``; zeros as in :meth:`filters`."""
        planes = planes_of(weight, self.dim, self.blocks)
        return self._by_channel(planes, size, 1).reshape(len(planes), size, -1)

    def places(self, which: Tensor) -> Tensor:
        """Return the positions of some of the rows of ``table``, as :meth:`select` takes them."""
        return self.table[which].flatten()

    def select(self, weight: Tensor, places: Tensor, count: int) -> Tensor:
        """Return the filters of ``count`` rows of ``table``, one a row, at the cost of those only."""
        if self.blocks > 1:
            rows, width = weight.shape[0] // self.blocks, weight.shape[1]
            apart = weight.reshape(self.blocks, rows, width, -1)
            return apart[places // width, :, places % width].reshape(count, -1)
        return weight.index_select(self.dim, places).movedim(self.dim, 0).reshape(count, -1)

    def _by_channel(self, values: Tensor, size: int, dim: int) -> Tensor:
        """Give each channel its positions along a dimension, ``(…, P, …)`` to ``(…, size · q, …)``."""
        count, q = self.table.shape
        flat = self.table.flatten()
        if len(flat) != values.shape[dim] or not bool((flat == torch.arange(len(flat))).all()):
            values = values.index_select(dim, flat.clamp(min=0).to(values.device))
            if bool((flat < 0).any()):
                shape = [-1 if d == dim else 1 for d in range(values.dim())]
                values = values * (flat >= 0).to(values).view(shape)
        if count == size:
            return values
        at = (self.channels[:, None] * q + torch.arange(q)).flatten().to(values.device)
        result = values.new_zeros(*values.shape[:dim], size * q, *values.shape[dim + 1 :])
        return result.index_copy_(dim, at, values)


def planes_of(weight: Tensor, dim: int, blocks: int) -> Tensor:
    """View a weight, or anything of its shape, as ``(R, P, K)``.

    P are the positions along ``dim`` and K those of the kernel; R are the channels on the weight's other side, in a
    weight of several blocks those of one block.
    """
    if blocks > 1:
        rows, width = weight.shape[0] // blocks, weight.shape[1]
        apart = weight.reshape(blocks, rows, width, -1)
        return apart.movedim(1, 0).reshape(rows, blocks * width, -1)
    turned = weight.movedim(dim, 1)
    return turned.reshape(*turned.shape[:2], -1)


def rows_of(weight: Tensor, dim: int, blocks: int) -> Tensor:
    """View a weight as one row a position along ``dim``, ``(P, R·K)``."""
    planes = planes_of(weight, dim, blocks).movedim(1, 0)
    return planes.reshape(len(planes), -1)


def weight_of(module: nn.Module, attribute: str = "weight") -> Tensor:
    """Return a module's weight as its next forward applies it.

    Under a mask of :mod:`torch.nn.utils.prune` the attribute itself holds what the last forward applied.

    Raises:
        CriterionError: If the module has no such tensor.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == attribute:
            masked: Tensor = hook.apply_mask(module)  # type: ignore[no-untyped-call]
            return masked
    value = getattr(module, attribute, None)
    if not isinstance(value, Tensor):
        raise CriterionError(
            f"{type(module).__name__}.{attribute}: the model has no such tensor. Trace the model that is to be scored."
        )
    return value


@contextmanager
def computed_kept(model: nn.Module) -> Iterator[None]:
    """Put back computed weights, of masks or weight norm: a forward leaves some with gradients, which no copy takes."""
    held = [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for own, name, value in held:
            own[name] = value


def is_computed(module: nn.Module, attribute: str = "weight") -> bool:
    """Tell whether a weight is computed from others at each forward, so that nothing can be written into it."""
    return attribute not in module._parameters


def positions_of(member: Member) -> tuple[Tensor, Tensor]:
    """Arrange a member's positions by channel, see :class:`Slices`."""
    return _arranged(member.positions, member.channels)


def _arranged(positions: IndexArray, channels: IndexArray) -> tuple[Tensor, Tensor]:
    order = np.lexsort((positions, channels))
    found, counts = np.unique(channels, return_counts=True)
    table = np.full((len(found), int(counts.max()) if len(counts) else 0), -1, dtype=np.int64)
    table[np.arange(table.shape[1])[None, :] < counts[:, None]] = positions[order]
    return torch.from_numpy(found.astype(np.int64)), torch.from_numpy(table)


def making(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> list[Slices]:
    """Return the slices that make a group's channels, in execution order; biases and the like are none."""
    return _slices(model, graph, group, group.producers, makes=True)


def reading(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> list[Slices]:
    """Return the slices that read a group's channels, in execution order."""
    return _slices(model, graph, group, group.consumers, makes=False)


def _slices(
    model: nn.Module, graph: ChannelGraph, group: ChannelGroup, members: Iterable[Member], *, makes: bool
) -> list[Slices]:
    index = graph.groups.index(group)
    found: dict[tuple[str, str], Slices] = {}
    for member in members:
        path, attribute = owner(model, member.tensor)
        port = _port(graph, index, member.tensor, path, makes)
        layer = None if port is None else model.get_submodule(port.module)
        if port is not None and isinstance(layer, READERS):
            found.setdefault((port.module, "weight"), _of_layer(port, layer, index, makes))
        elif (path, attribute) not in found and _is_like(
            weight_of(model.get_submodule(path), attribute), graph, member
        ):
            channels, table = positions_of(member)
            name = graph.layer_of(member)
            found[path, attribute] = Slices(path, attribute, name, False, member.dim, member.blocks, channels, table)
    return list(found.values())


def _is_like(weight: Tensor, graph: ChannelGraph, member: Member) -> bool:
    """Tell whether a tensor is a weight, or of those that it is computed from the one with its layout."""
    return weight.dim() > 1 and tuple(weight.shape) == graph.shapes[member.tensor]


def owner(model: nn.Module, tensor: str) -> tuple[str, str]:
    """Return the path of the module and the name of a weight, given the name of what it is or is computed from."""
    path, parametrized, rest = f".{tensor}".partition(".parametrizations.")
    if parametrized:
        return path[1:], rest.partition(".")[0]
    path, _, leaf = tensor.rpartition(".")
    plain = leaf.removesuffix("_orig").removesuffix("_mask")
    return path, plain if isinstance(vars(model.get_submodule(path)).get(plain), Tensor) else leaf


def _port(graph: ChannelGraph, index: int, tensor: str, path: str, makes: bool) -> LayerPort | None:
    """Return the call of a layer that has a tensor and makes or reads a group's channels with it."""
    for port in graph.layers:
        if port.owned and (port.weight == tensor or port.module == path):
            groups = port.out_group if makes else port.in_group
            if groups is not None and bool((groups == index).any()):
                return port
    return None


def _of_layer(port: LayerPort, layer: nn.Module, index: int, makes: bool) -> Slices:
    groups, channels = (port.out_group, port.out_channel) if makes else (port.in_group, port.in_channel)
    assert groups is not None
    assert channels is not None
    at = np.flatnonzero(groups == index)
    dim = 0 if makes else 1
    if isinstance(layer, TRANSPOSED):
        dim = 1 - dim
    blocks = int(getattr(layer, "groups", 1)) if dim == 1 else 1
    found, table = _arranged(at, channels[at])
    return Slices(port.module, "weight", port.name, True, dim, blocks, found, table)


def producers(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> tuple[Tensor, ...]:
    """Return each producer's filters, ``(C, F_m)``; a channel that a producer lacks has a row of zeros."""
    found = making(model, graph, group)
    return tuple(slices.filters(slices.weight(model).detach(), group.size) for slices in found)


def filters(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> Tensor:
    """Return the filters of each channel, of all producers side by side, ``(C, F)``; of one, its own weight's view."""
    found = producers(model, graph, group)
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def consumers(model: nn.Module, graph: ChannelGraph, group: ChannelGroup) -> tuple[Tensor, ...]:
    """Return the weights that read the channels, ``(C_out, C, K)`` a consumer.

    In a grouped convolution C_out counts the outputs of one block, since no output reads more than one.
    """
    found = reading(model, graph, group)
    return tuple(slices.reading(slices.weight(model).detach(), group.size) for slices in found)
