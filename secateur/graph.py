"""The coupled channels of a network: what can be removed together, and what can't be removed and why.

A :class:`ChannelGraph` is plain data: names, integers and index arrays. It holds no tensor and no reference to
the model, so it can be printed, compared and stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IndexArray = NDArray[np.int64]


class Role(StrEnum):
    """What a parameter or buffer does with the channels of a group."""

    PRODUCER = "producer"
    """Its slices create the channels: dimension 0 of a convolution's weight, and of its bias."""
    CONSUMER = "consumer"
    """Its slices read the channels: dimension 1 of the next convolution's weight."""
    FOLLOWER = "follower"
    """It holds one value a channel on the way: batch-norm weights and statistics, PReLU, layer scale."""


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one parameter or buffer, on which a group's channels lie.

    ``positions[i]`` along the dimension belongs to channel ``channels[i]`` of the group. A channel may own several
    positions (a flattened feature map read by a linear layer) or none (a consumer that reads a slice).

    Where ``blocks > 1`` (a grouped convolution's weight as a consumer), positions count the *layer's input
    channels*, not the weight's second dimension, which holds only one block of them.
    """

    tensor: str
    """Qualified name of the parameter or buffer, e.g. ``layer1.0.conv1.weight``."""
    module: str
    """Qualified name of the module that owns it, e.g. ``layer1.0.conv1``; empty for the model itself."""
    dim: int
    role: Role
    positions: IndexArray
    channels: IndexArray
    blocks: int = 1


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels coupled across layers: channel ``i`` is one filter in every producer, and is removed from all members.

    ``units[i]`` numbers the unit of channel ``i``: channels of one unit can only be removed together (channels that
    a shuffle interleaves, the attention head that a channel belongs to). ``blocks[i]`` numbers its block: every
    block must keep the same number of channels (grouped convolution). ``removable[i]`` is False for a channel that
    must stay.
    """

    name: str
    """Name of the first producer module in execution order."""
    size: int
    members: tuple[Member, ...]
    units: IndexArray
    blocks: IndexArray
    removable: NDArray[np.bool_]
    exact: bool = True
    """False where removal can't equal zeroing (a norm or softmax over the channels themselves)."""
    reason: str = ""
    """Why the group is inexact; empty when it is exact."""

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members with role PRODUCER, weights before biases of the same module."""
        return tuple(m for m in self.members if m.role is Role.PRODUCER)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members with role CONSUMER, in execution order."""
        return tuple(m for m in self.members if m.role is Role.CONSUMER)

    @property
    def constraint(self) -> str:
        """The rule that a selection has to keep, in words; empty when channels are free."""
        rules = []
        if self.blocks.size and self.blocks.max() > 0:
            rules.append(f"equal counts in {int(self.blocks.max()) + 1} blocks")
        units = int(np.unique(self.units).size)
        if units < self.size:
            rules.append(f"{units} whole units")
        fixed = self.size - int(self.removable.sum())
        if fixed:
            rules.append(f"{fixed} channels fixed")
        return ", ".join(rules)


@dataclass(frozen=True)
class Refusal:
    """Something that can't be pruned, and why."""

    operator: str
    """The ATen operator that froze the channels, e.g. ``aten.sort.default``; or ``model input``, ``model output``."""
    module: str
    """Path of the module in whose forward it ran."""
    source: str
    """``file:line`` of the user's own code that called it; empty where none is known."""
    reason: str
    tensors: tuple[str, ...] = ()
    """Names of the parameters whose channels are fixed by it."""


@dataclass(frozen=True)
class LayerShape:
    """What one call of a convolution or linear layer computes, for counting its cost."""

    module: str
    kind: str
    """``conv``, ``conv_transposed`` or ``linear``."""
    in_channels: int
    out_channels: int
    groups: int
    kernel: int
    """Number of kernel positions, k_h·k_w."""
    positions: int
    """Number of output positions for one call, w_o·h_o times the batch."""
    batch: int
    weight: str = ""
    """Qualified name of the weight."""


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """What :func:`secateur.trace` found: the groups that can be pruned, and what can't, each with its reason."""

    groups: tuple[ChannelGroup, ...]
    refused: tuple[Refusal, ...]
    layers: tuple[LayerShape, ...]
    """Every call of a convolution or linear layer, in execution order."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer of the model, by qualified name."""
    module_types: dict[str, str]
    """Class name of every module that owns a parameter or buffer."""
    notes: tuple[str, ...] = ()
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def group(self, name: str) -> ChannelGroup:
        """Return the group of that name.

        Raises:
            KeyError: If the graph has no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)
