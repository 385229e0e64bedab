"""The channel graph of a network as it is after some rounds, and the plan of the next: read off the unpruned graph.

To remove channels of what is left is to remove more of the unpruned network, so its graph says all that a round asks.
A trace of the network that is left may find less: where a part of a cut vector has come down to one channel, or a
block of a grouped convolution has, nothing tells any more what its channels were.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from secateur.graph.channels import AttributeRule, ChannelGraph, ChannelGroup, LayerPort, Member, Staying
from secateur.graph.places import mask_at
from secateur.graph.plan import PruningPlan, masks

_Kept = dict[tuple[str, int], list[int]]
"""Tensor and dimension -> the positions that are left, in the order in which the network holds them."""


def remaining(graph: ChannelGraph, plan: PruningPlan) -> ChannelGraph:
    """Return the channel graph of the network that a plan leaves.

    Channels and positions are numbered anew, in the order in which they are left. Where any are gone, the result
    knows no shuffles; the plan of a round is :func:`difference`.

    Args:
        graph: Of the unpruned network.
        plan: Made of that graph.
    """
    if not any(plan.removed.values()):
        return graph
    gone, kept = masks(graph, plan.removed), _kept(graph, plan)
    groups = tuple(_left_of(group, gone[i], graph, kept) for i, group in enumerate(graph.groups))
    shapes = {name: list(shape) for name, shape in graph.shapes.items()}
    for i, group in enumerate(graph.groups):
        for member in group.members:
            shapes[member.tensor][member.dim] -= int(gone[i][member.channels].sum()) // member.blocks
    return replace(
        graph,
        groups=groups,
        layers=tuple(_port(port, plan, gone) for port in graph.layers),
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        attributes=tuple(_attribute(rule, gone) for rule in graph.attributes),
        shuffles=(),
    )


def difference(present: ChannelGraph, before: PruningPlan, after: PruningPlan) -> PruningPlan:
    """Return the plan that leads from the network of one plan to that of another, which removes more.

    Args:
        present: The graph of the network of ``before``, see :func:`remaining`.
        before: For the unpruned network.
        after: For the unpruned network; it removes whatever ``before`` does.
    """
    tensors: dict[str, dict[int, list[int]]] = {}
    for name, dims in after.kept_tensors.items():
        was = before.kept_tensors.get(name, {})
        for dim, kept in dims.items():
            if kept != was.get(dim):
                tensors.setdefault(name, {})[dim] = _within(was.get(dim), kept)
    attributes = {
        module: changed
        for module, values in after.attributes.items()
        if (changed := {k: v for k, v in values.items() if before.attributes.get(module, {}).get(k) != v})
    }
    return PruningPlan(
        kept_outputs=_layers_within(before.kept_outputs, after.kept_outputs),
        kept_inputs=_layers_within(before.kept_inputs, after.kept_inputs),
        kept_tensors=tensors,
        blocks={name: count for name, count in after.blocks.items() if name in tensors},
        attributes=attributes,
        magnitudes={
            name: (direction, dim)
            for name, (direction, dim) in after.magnitudes.items()
            if set(tensors.get(direction, ())) - {dim}
        },
        removed={
            name: going
            for name, channels in after.removed.items()
            if (going := _channels_within(before.removed.get(name, []), channels))
        },
        shapes={name: present.shapes[name] for name in after.shapes},
    )


def _channels_within(before: list[int], after: list[int]) -> list[int]:
    """Return the channels that go after those that went before, numbered among those that these left."""
    new = sorted(set(after) - set(before))
    return [int(c) for c in np.asarray(new, dtype=np.int64) - np.searchsorted(sorted(before), new)]


def _within(was: list[int] | None, kept: list[int]) -> list[int]:
    """Number indices of the unpruned network by their places among those that were left of it before."""
    if was is None:
        return kept
    place = {index: i for i, index in enumerate(was)}
    return [place[index] for index in kept]


def _layers_within(before: dict[str, list[int]], after: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: _within(before.get(name), kept) for name, kept in after.items() if kept != before.get(name)}


def _kept(graph: ChannelGraph, plan: PruningPlan) -> _Kept:
    found = {(name, dim): kept for name, dims in plan.kept_tensors.items() for dim, kept in dims.items()}
    for port in graph.layers:
        if not port.owned:
            continue
        transposed = port.kind == "conv_transposed"
        for kept, dim in (
            (plan.kept_outputs.get(port.module), int(transposed)),
            (plan.kept_inputs.get(port.module), int(not transposed)),
        ):
            if kept is not None:
                found.setdefault((f"{port.module}.weight".lstrip("."), dim), kept)
        if port.module in plan.kept_outputs:
            found.setdefault((f"{port.module}.bias".lstrip("."), 0), plan.kept_outputs[port.module])
    return found


def _left_of(group: ChannelGroup, gone: np.ndarray, graph: ChannelGraph, kept: _Kept) -> ChannelGroup:
    left = ~gone
    number = np.where(left, np.cumsum(left) - 1, -1)
    schedule = group.schedule
    if schedule is not None:
        lost_so_far = np.bincount(group.blocks[gone], minlength=schedule.shape[1])
        schedule = schedule[(schedule > lost_so_far).any(1)] - lost_so_far
    staying = [Staying(number[s.channels[left[s.channels]]], s.least) for s in group.staying]
    return replace(
        group,
        size=int(left.sum()),
        members=tuple(_member(member, left, number, graph, kept) for member in group.members),
        blocks=group.blocks[left],
        removable=group.removable[left],
        schedule=schedule,
        staying=tuple(staying),
    )


def _member(member: Member, left: np.ndarray, number: np.ndarray, graph: ChannelGraph, kept: _Kept) -> Member:
    own = left[member.channels]
    positions = member.positions[own]
    if (places := kept.get((member.tensor, member.dim))) is not None:
        place = np.full(graph.shapes[member.tensor][member.dim] * member.blocks, -1, dtype=np.int64)
        place[places] = np.arange(len(places))
        positions = place[positions]
    return replace(member, positions=positions, channels=number[member.channels[own]], order=None)


def _port(port: LayerPort, plan: PruningPlan, gone: list[np.ndarray]) -> LayerPort:
    inputs, in_group, in_channel = _side(
        port.in_channels,
        port.in_group,
        port.in_channel,
        plan.kept_inputs.get(port.module) if port.owned else None,
        gone,
    )
    outputs, out_group, out_channel = _side(
        port.out_channels, port.out_group, port.out_channel, plan.kept_outputs.get(port.module) if port.owned else None,
        gone,
    )  # fmt: skip
    depthwise = port.groups == port.in_channels > 1
    return replace(
        port, in_channels=inputs, out_channels=outputs, groups=inputs if depthwise else port.groups, in_group=in_group,
        in_channel=in_channel, out_group=out_group, out_channel=out_channel, in_order=None, out_order=None,
    )  # fmt: skip


def _attribute(rule: AttributeRule, gone: list[np.ndarray]) -> AttributeRule:
    left, groups, channels = _side(len(rule.group), rule.group, rule.channel, None, gone)
    assert groups is not None
    assert channels is not None
    return replace(rule, value=rule.value - len(rule.group) + left, group=groups, channel=channels)


def _side(
    count: int, groups: np.ndarray | None, channels: np.ndarray | None, kept: list[int] | None, gone: list[np.ndarray]
) -> tuple[int, np.ndarray | None, np.ndarray | None]:
    """Return the number of channels on one side of a layer that are left, and which they are."""
    if groups is None or channels is None:
        return count, None, None
    away = mask_at(groups, channels, gone)
    places = np.flatnonzero(~away) if kept is None else np.asarray(kept, dtype=np.int64)
    groups, channels = groups[places], channels[places].copy()
    for g in np.unique(groups[groups >= 0]).tolist():
        own = groups == g
        channels[own] -= np.cumsum(gone[g])[channels[own]]
    return len(places), groups, channels
