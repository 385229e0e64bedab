"""A group's weights as matrices: the filters that make its channels, and the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.criteria.feature_maps import positions_of
from secateur.errors import CriterionError
from secateur.graph.channels import ChannelGroup, Magnitude, Member

Magnitudes = tuple[Magnitude, ...]


def arrange(tensor: Tensor, member: Member, size: int) -> Tensor:
    """Arrange a weight by channel, shape ``(size, F)``; zeros where a channel has fewer positions, or none."""
    channels, table = positions_of(member)
    by_position = tensor.movedim(member.dim, 0).flatten(1)
    picked = by_position[table.clamp(min=0).to(tensor.device)]
    picked = picked * (table >= 0).to(picked)[..., None]
    result = tensor.new_zeros((size, picked[0].numel() if len(picked) else 0))
    result[channels.to(tensor.device)] = picked.flatten(1)
    return result


def producing_weights(
    model: nn.Module, group: ChannelGroup, magnitudes: Magnitudes = ()
) -> list[tuple[Tensor, Member]]:
    """Return the weights that make a group's channels, the model's own tensors but for weight norm.

    Raises:
        CriterionError: If there is none.
    """
    weights = _weights(model, group.producers, magnitudes)
    if not weights:
        raise CriterionError(f"{group.name}: no producer has filters. Leave the group out.")
    return weights


def _weights(model: nn.Module, members: Iterable[Member], magnitudes: Magnitudes) -> list[tuple[Tensor, Member]]:
    """Return the weights among some members; for a v of weight norm the weight g·v/‖v‖, and nothing for its g."""
    gains = {m.tensor for m in magnitudes}
    computed = {m.direction: m for m in magnitudes}
    found = []
    for member in members:
        tensor = _tensor(model, member.tensor)
        if tensor.dim() < 2 or member.tensor in gains:
            continue
        if (by := computed.get(member.tensor)) is not None:
            tensor = torch._weight_norm(tensor.detach(), _tensor(model, by.tensor).detach(), by.dim)
        found.append((tensor, member))
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(module), attribute)
    if not isinstance(value, Tensor):
        raise CriterionError(f"{name}: the model has no such tensor. Trace the model that is to be scored.")
    return value


def producers(model: nn.Module, group: ChannelGroup, magnitudes: Magnitudes = ()) -> tuple[Tensor, ...]:
    """Return each producer's filters, ``(C, F_m)``; a channel that a producer lacks has a row of zeros."""
    found = producing_weights(model, group, magnitudes)
    return tuple(arrange(tensor.detach(), member, group.size) for tensor, member in found)


def filters(model: nn.Module, group: ChannelGroup, magnitudes: Magnitudes = ()) -> Tensor:
    """Return the filters of each channel, of all producers side by side, ``(C, F)``."""
    return torch.cat(producers(model, group, magnitudes), 1)


def consumers(model: nn.Module, group: ChannelGroup, magnitudes: Magnitudes = ()) -> tuple[Tensor, ...]:
    """Return the weights that read the channels, ``(C_out, C, K)`` a consumer.

    In a grouped convolution C_out counts the outputs of one block, since no output reads more than one.
    """
    found = _weights(model, group.consumers, magnitudes)
    return tuple(_reading_weights(tensor.detach(), member, group.size) for tensor, member in found)


def _reading_weights(tensor: Tensor, member: Member, size: int) -> Tensor:
    if member.blocks > 1 and member.dim == 1:
        # (C_out, C_in/g, ...) -> (C_in, C_out/g, ...): every input position with the outputs of its own block.
        out, width = tensor.shape[0] // member.blocks, tensor.shape[1]
        by_input = tensor.reshape(member.blocks, out, width, -1).movedim(2, 1).reshape(member.blocks * width, out, -1)
    else:
        # (C_in, C_out, ...)
        by_input = tensor.movedim(member.dim, 0)
        by_input = by_input.reshape(len(by_input), by_input.shape[1], -1)
    channels, table = positions_of(member)
    picked = by_input[table.clamp(min=0).to(tensor.device)] * (table >= 0).to(by_input)[..., None, None]
    read = picked.permute(2, 0, 1, 3).flatten(2)
    result = tensor.new_zeros((read.shape[0], size, read.shape[2]))
    result[:, channels.to(tensor.device)] = read
    return result
