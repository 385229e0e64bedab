"""The coupled channels of a network: what can be removed together, and what can't be removed and why.

A :class:`ChannelGraph` is plain data: names, integers and index arrays. It holds no tensor and no reference to
the model, so it can be printed, compared and stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.graph.places import IndexArray
from secateur.graph.shuffles import Order, Shuffle


class Role(StrEnum):
    """What a parameter or buffer does with the channels of a group."""

    PRODUCER = "producer"
    """Its slices create the channels: dimension 0 of a convolution's weight."""
    CONSUMER = "consumer"
    """Its slices read the channels: dimension 1 of the next convolution's weight."""
    FOLLOWER = "follower"
    """It holds one value a channel on the way: biases, batch-norm weights and statistics, PReLU, layer scale."""


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
    positions: IndexArray = field(repr=False)
    channels: IndexArray = field(repr=False)
    blocks: int = 1
    read: bool = False
    """Whether the code reads channels along this dimension: of every consumer, and of a producer whose weight is tied
    to a consumer's."""
    order: Order | None = field(default=None, repr=False)
    """How ``positions`` lie behind a shuffle; None where none moves them."""


@dataclass(frozen=True, eq=False)
class Staying:
    """Channels of a group of which some have to stay, no matter which.

    With fewer, code would squeeze away a dimension of size 1, or do something else since one number of channels equals
    another.
    """

    channels: IndexArray
    least: int
    """How many of them have to stay."""


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels coupled across layers: channel ``i`` is removed from all members at once, or from none.

    A channel is the smallest thing that can be removed. In a producer it is mostly one filter, and several where these
    can only be removed together (filters that a shuffle interleaves, filters of one attention head). ``blocks[i]`` is
    the number of the block that channel ``i`` is in: all blocks must lose the same fraction of their channels (grouped
    convolution, a cut into halves). ``removable[i]`` is False for a channel that must stay.
    """

    name: str
    """Name of the first producer module in execution order."""
    size: int
    members: tuple[Member, ...] = field(repr=False)
    blocks: IndexArray = field(repr=False)
    removable: NDArray[np.bool_] = field(repr=False)
    exact: bool = True
    """False where removal can't equal zeroing (a norm or softmax over the channels themselves)."""
    reason: str = ""
    """Why the group is inexact; empty when it is exact."""
    schedule: IndexArray | None = field(default=None, repr=False)
    """How many channels each block has lost after each step, shape ``(steps, blocks)``; None where every block loses
    the same fraction, as all can but those behind a shuffle that is cut into halves of odd length."""
    staying: tuple[Staying, ...] = field(default=(), repr=False)
    """Sets of channels some of which have to stay."""
    least: int = 1
    """How many channels have to stay: with fewer, code that computes with their number fails or does something else."""
    multiple: int = 1
    """Channels are removed in multiples of this: code asks for the remainder of their number."""

    @property
    def quota(self) -> IndexArray:
        """How many channels each block loses in one step, where no schedule says otherwise."""
        return quotas(self.blocks, self.multiple)

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members with role PRODUCER, in execution order."""
        return tuple(m for m in self.members if m.role is Role.PRODUCER)

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members with role CONSUMER, in execution order."""
        return tuple(m for m in self.members if m.role is Role.CONSUMER)

    @property
    def constraint(self) -> str:
        """The rule that a selection has to keep, in words; empty when channels are free."""
        rules = []
        if self.schedule is not None:
            rules.append(f"{self.schedule.shape[1]} blocks lose channels in {len(self.schedule)} given steps")
        elif self.blocks.size and self.blocks.max() > 0:
            rules.append(f"equal fractions of {int(self.blocks.max()) + 1} blocks")
        fixed = self.size - int(self.removable.sum())
        if fixed:
            rules.append(f"{fixed} channels fixed")
        least = max(self.least, *(s.least for s in self.staying if len(s.channels) == self.size), 0)
        if least > 2:
            rules.append(f"at least {least} channels stay")
        if self.multiple > 1:
            rules.append(f"channels go in multiples of {self.multiple}")
        return ", ".join(rules)


def quotas(blocks: IndexArray, multiple: int = 1) -> IndexArray:
    """Return how many channels each block loses in one step: the smallest counts in proportion to the blocks' sizes.

    Their sum is a multiple of the number given.

    >>> quotas(np.array([0, 0, 1, 1, 1, 1])), quotas(np.array([0, 0, 1, 1, 1, 1]), multiple=2)
    (array([1, 2]), array([2, 4]))
    """
    sizes = np.bincount(blocks)
    smallest = np.asarray(sizes // np.gcd.reduce(sizes), dtype=np.int64)
    together = int(smallest.sum())
    return smallest * (math.lcm(together, multiple) // together)


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
class Window:
    """How a convolution goes over space: what its time depends on besides its numbers of channels."""

    space: tuple[int, ...]
    """Sizes of its input beyond batch and channels."""
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]


@dataclass(frozen=True)
class InputShape:
    """A tensor of the example inputs, without its values."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it, such as ``float32``."""


@dataclass(frozen=True, eq=False)
class LayerPort:
    """One call of a convolution or linear layer: which channel of which group each of its input and output channels is.

    Counts are those of the unpruned network. ``in_group[i]`` is the index into ``ChannelGraph.groups`` of input channel
    ``i``, or -1 where it stays; ``in_channel[i]`` is its channel in that group. Both are None where all stay.
    """

    module: str
    kind: str
    """``conv``, ``conv_transposed``, ``linear``, or ``registered`` for a layer class that the user registered."""
    weight: str
    """Qualified name of the weight, or of a parameter that it is computed from."""
    owned: bool
    """Whether ``module`` is itself a convolution or linear layer; False where its code calls the function."""
    in_channels: int
    out_channels: int
    groups: int
    kernel: int
    """Number of kernel positions, k_h·k_w."""
    positions: int
    """Number of positions at which the kernel is applied in one call, w_o·h_o times the batch."""
    batch: int
    in_group: IndexArray | None = None
    in_channel: IndexArray | None = None
    out_group: IndexArray | None = None
    out_channel: IndexArray | None = None
    in_order: Order | None = None
    """How the input channels lie behind a shuffle; None where none moves them."""
    out_order: Order | None = None
    parts: tuple[str, ...] = ()
    """Names of all parameters and buffers that the weight is computed from, where it is not the layer's parameter."""
    window: Window | None = None
    """Of a plain convolution; None otherwise."""

    @property
    def name(self) -> str:
        """The layer's name: its module; where code calls the function, the weight, or the layer that has the weight."""
        owner, _, leaf = self.weight.rpartition(".")
        return self.module if self.owned or not self.weight else owner if leaf == "weight" and owner else self.weight

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of the unpruned call, for all its examples."""
        if self.kind == "registered":
            return 0
        return self.in_channels // self.groups * self.out_channels * self.kernel * self.positions


@dataclass(frozen=True)
class Magnitude:
    """A weight that is computed as g·v/‖v‖ (weight norm): g has to shrink as ‖v‖ does, for g/‖v‖ to stay the same."""

    tensor: str
    """Qualified name of g."""
    direction: str
    """Qualified name of v."""
    dim: int
    """Dimension along which v has a norm for each index; the norm runs over the others."""


@dataclass(frozen=True, eq=False)
class AttributeRule:
    """An attribute of a module that counts channels or blocks of them, and has to follow their number."""

    module: str
    name: str
    value: int
    """The attribute's value in the unpruned network."""
    group: IndexArray
    """Index of the group of each thing counted, or -1; see ``LayerPort``."""
    channel: IndexArray


@dataclass(frozen=True, eq=False, repr=False)
class ChannelGraph:
    """What :func:`secateur.trace` found: the groups that can be pruned, and what can't, each with its reason."""

    groups: tuple[ChannelGroup, ...]
    refused: tuple[Refusal, ...]
    layers: tuple[LayerPort, ...]
    """Every call of a convolution or linear layer, in execution order."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer of the model, by qualified name."""
    parameters: frozenset[str]
    """Names of those that are parameters."""
    module_types: dict[str, str]
    """Class name of every module."""
    batch: int = 1
    """Number of examples in the inputs that the model was traced on."""
    notes: tuple[str, ...] = ()
    """What the user should know of the trace, such as layers that never run."""
    attributes: tuple[AttributeRule, ...] = ()
    """Attributes that follow numbers of channels, besides those that surgery reads off the weights of layers."""
    magnitudes: tuple[Magnitude, ...] = ()
    """The weights under weight norm."""
    shuffles: tuple[Shuffle, ...] = ()
    """Every shuffle, behind those that its own order names."""
    inputs: Any = None
    """The example inputs, as they were given, with an :class:`InputShape` in place of each tensor."""

    def group(self, name: str) -> ChannelGroup:
        """Return the group of that name.

        Raises:
            KeyError: If the graph has no such group.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def layer_of(self, member: Member) -> str:
        """Return the name of the layer that a member belongs to; of its module, or its own, where it is of no layer."""
        found = next((port.name for port in self.layers if port.weight == member.tensor), member.module)
        return found or member.tensor

    def share_of_macs(self, group: ChannelGroup) -> float:
        """Return the share of the network's MACs that would go with all the group's channels.

        They lie in the layers that make or read the channels, each counted by its filters, and the slices of filters,
        that go. A layer between two groups counts for both, so that the shares of all groups sum up to more than 1.
        """
        index, gone = self.groups.index(group), 0.0
        for port in self.layers:
            made, read = (0.0 if g is None else float((g == index).mean()) for g in (port.out_group, port.in_group))
            depthwise = port.groups > 1 and port.groups == port.in_channels  # one filter reads one channel
            gone += port.macs * (made if depthwise else 1 - (1 - made) * (1 - read))
        return gone / max(sum(p.macs for p in self.layers), 1)

    def __repr__(self) -> str:
        channels = sum(group.size for group in self.groups)
        return f"ChannelGraph({len(self.groups)} groups, {channels} channels, {len(self.refused)} refusals)"

    def __str__(self) -> str:
        """Return the groups as a table, then what can't be pruned and why; of many, those that matter most."""
        return self.table(_MOST_GROUPS, _MOST_REFUSALS)

    def table(self, groups: int | None = None, refusals: int | None = None) -> str:
        """Return the groups as a table, then what can't be pruned and why.

        Args:
            groups: How many groups to show, those with the largest share of MACs; all when None.
            refusals: How many refusals, and how many notes; all when None.
        """
        header = ("group", "size", "MACs", "constraint", "producers", "consumers")
        rows = [header]
        shares = [self.share_of_macs(group) for group in self.groups]
        shown = sorted(sorted(range(len(shares)), key=lambda i: -shares[i])[:groups])
        for group, part in ((self.groups[i], shares[i]) for i in shown):
            rule = group.constraint if group.exact else ", ".join(filter(None, ("inexact", group.constraint)))
            producers = list(dict.fromkeys(self.layer_of(m) for m in group.producers))
            consumers = list(dict.fromkeys(self.layer_of(m) for m in group.consumers))
            rows.append(
                (group.name, str(group.size), f"{part:.1%}", rule or "-", _listed(producers), _listed(consumers))
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if len(shown) < len(shares):
            lines.append(f"... and {len(shares) - len(shown)} groups with less; print(graph.table()) shows all")
        if shown:
            lines.append(f"MACs: {MACS_OF_A_GROUP}")
        channels = sum(g.size for g in self.groups)
        lines.append(f"{len(self.groups)} groups, {channels} channels; {len(self.refused)} reasons why others stay:")
        for refusal in self.refused[:refusals]:
            where = ", ".join(filter(None, (refusal.module, refusal.source)))
            at = f" ({where})" if where else ""
            lines.append(f"  {_listed(list(refusal.tensors))}: {refusal.operator}{at}: {refusal.reason}")
        if (left := len(self.refused) - len(self.refused[:refusals])) > 0:
            lines.append(f"  ... and {left} more in graph.refused")
        lines.extend(f"  note: {note}" for note in self.notes[:refusals])
        return "\n".join(lines)


MACS_OF_A_GROUP = "the share that goes with all the group's channels; a layer between two groups counts for both"
"""What tables call :meth:`ChannelGraph.share_of_macs`."""
_MOST_GROUPS, _MOST_REFUSALS = 14, 5


def _listed(names: list[str], most: int = 2) -> str:
    """Return the first names, and how many more there are."""
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "-"
