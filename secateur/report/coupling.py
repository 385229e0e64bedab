"""Where a channel graph's groups lie among the layers: one row a layer, one strand a group, as in a version history.

A strand runs from the first row that its group touches to the last. Strands share a lane where they do not overlap, so
that a chain of two hundred layers needs two lanes, and a dense block as many as it has layers.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from secateur.graph.channels import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from secateur.graph.channels import ChannelGraph, Member


@dataclass(frozen=True)
class Row:
    """One layer: a convolution or linear layer however often it is called, or another maker or reader of channels."""

    module: str
    """Qualified name of the module, or of a parameter that is no layer's."""
    kind: str
    """Class of the module."""
    in_channels: int | None
    out_channels: int | None
    macs: float
    """Share of all MACs."""
    refusals: tuple[int, ...]
    """Places in ``graph.refused`` of the refusals that fix channels of the layer."""


@dataclass
class Mark:
    """The members of a group at one place: the parts of modules that make, read or follow its channels."""

    role: Role
    row: int
    between: bool
    """Whether the members lie below the row, before the next, as a norm does."""
    members: list[Member] = field(default_factory=list)


@dataclass(frozen=True)
class Strand:
    """One group."""

    group: int
    """The group's place in ``graph.groups``."""
    lane: int
    marks: list[Mark]

    @property
    def top(self) -> float:
        """Where the strand begins, in rows."""
        return min(height(mark) for mark in self.marks)

    @property
    def bottom(self) -> float:
        """Where the strand ends, in rows."""
        return max(height(mark) for mark in self.marks)


@dataclass(frozen=True)
class Coupling:
    """The whole picture, in rows and lanes."""

    rows: list[Row]
    strands: list[Strand]

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return max((strand.lane for strand in self.strands), default=-1) + 1


def height(mark: Mark) -> float:
    """Return how far down a mark lies, in rows."""
    return mark.row + (1.0 if mark.between else 0.5)


def lay_out(graph: ChannelGraph) -> Coupling:
    """Place every member of every group on a row and a lane.

    Args:
        graph: The traced network.

    Returns:
        Rows in execution order, and a strand for each group in the order of ``graph.groups``.
    """
    owners = {port.weight: port.name for port in graph.layers}
    order = _order(graph, owners)
    names = sorted((name for name, place in order.items() if place.row), key=order.__getitem__)
    row_of = {name: i for i, name in enumerate(names)}
    places = [order[name] for name in names]
    strands: list[Strand] = []
    ends: list[float] = []
    for index, group in enumerate(graph.groups):
        marks: dict[tuple[Role, int, bool], Mark] = {}
        for member in group.members:
            name = _name(member, owners)
            between = name not in row_of
            row = max(bisect_left(places, order[name]) - 1, 0) if between else row_of[name]
            marks.setdefault((member.role, row, between), Mark(member.role, row, between)).members.append(member)
        placed = Strand(index, 0, list(marks.values()))
        lane = next((i for i, end in enumerate(ends) if end < placed.top), len(ends))
        ends[lane : lane + 1] = [placed.bottom]
        strands.append(Strand(index, lane, placed.marks))
    return Coupling(_rows(graph, names), strands)


@dataclass(frozen=True, order=True)
class _Place:
    """The place of a layer, or of another module with members, in the order of execution."""

    layer: int
    """Number of the layer, or of the last layer before the module."""
    number: int = 0
    """0 for a layer; from 1 up for other modules, in their order."""
    row: bool = True
    """Whether the layer or module has a row of its own."""


def _order(graph: ChannelGraph, owners: dict[str, str]) -> dict[str, _Place]:
    """Order the layers by their first call, and every other module with members after the layer that it follows."""
    order: dict[str, _Place] = {}
    for port in graph.layers:
        order.setdefault(port.name, _Place(len(order)))
    after: dict[str, int] = {}
    rows: set[str] = set()
    for group in graph.groups:
        # Members stand in execution order, so a member belongs to the latest layer before it.
        last = -1
        for member in group.members:
            name = _name(member, owners)
            if name in order:
                last = max(last, order[name].layer)
                continue
            # A module that runs in train mode alone follows the module that was placed before it.
            last = after[name] = max(after.get(name, last), last)
            if member.role is not Role.FOLLOWER:
                rows.add(name)  # it makes or reads channels and is no layer: a recurrent module, an embedding
    for number, (name, last) in enumerate(after.items(), 1):
        order[name] = _Place(last, number, name in rows)
    return order


def _name(member: Member, owners: dict[str, str]) -> str:
    """Return the name of the layer or module that a member belongs to; its own where there is none."""
    if member.tensor in owners:
        return owners[member.tensor]
    module = member.module.partition(".parametrizations.")[0]
    return module or member.tensor


def _rows(graph: ChannelGraph, names: Sequence[str]) -> list[Row]:
    total = sum(port.macs for port in graph.layers) or 1
    macs: dict[str, int] = {}
    channels: dict[str, tuple[int, int]] = {}
    weights: dict[str, set[str]] = {}
    for port in graph.layers:
        name = port.name
        macs[name] = macs.get(name, 0) + port.macs
        channels.setdefault(name, (port.in_channels, port.out_channels))
        weights.setdefault(name, set()).add(port.weight)
    rows = []
    for name in names:
        own = weights.get(name, {name})
        refusals = tuple(
            i
            for i, refusal in enumerate(graph.refused)
            if any(tensor in own or tensor.rpartition(".")[0] == name for tensor in refusal.tensors)
        )
        inside, outside = channels.get(name, (None, None))
        kind = graph.module_types.get(name, "parameter")
        rows.append(Row(name, kind, inside, outside, macs.get(name, 0) / total, refusals))
    return rows
