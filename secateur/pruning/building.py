"""A choice of channels becomes a plan: what stays of every tensor, and which attributes count how many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.errors import PlanError
from secateur.graph import shuffles
from secateur.graph.channels import ChannelGraph, ChannelGroup, LayerPort, Member
from secateur.graph.places import mask_at
from secateur.graph.plan import PruningPlan, Selection, masks
from secateur.graph.shuffles import Order, Ranks

Cut = tuple[Member, np.ndarray]
"""A dimension of a tensor, and which of its positions are removed; at least one is."""


def checked(group: ChannelGroup, chosen: Sequence[int]) -> list[int]:
    """Return the channels of a group to remove, ascending and each once.

    Raises:
        PlanError: If a channel does not exist or has to stay, or the choice breaks the group's constraint.
    """
    first = next(iter(chosen), None)
    if isinstance(first, bool) or str(getattr(first, "dtype", "")).endswith("bool"):
        raise PlanError(f"{group.name}: a mask is given; give the indices of the channels to remove, mask.nonzero().")
    name, size, channels = group.name, group.size, sorted({int(c) for c in chosen})
    if not channels:
        return channels
    if channels[0] < 0 or channels[-1] >= size:
        wrong = channels[-1] if channels[0] >= 0 else channels[0]
        raise PlanError(f"{name}: channel {wrong} does not exist; the group has {size}.")
    fixed = [c for c in channels if not group.removable[c]]
    if fixed:
        raise PlanError(f"{name}: channel {fixed[0]} can't be removed: it is coupled to one that has to stay.")
    if len(channels) == size:
        raise PlanError(f"{name}: cannot remove all {size} filters; a layer keeps at least 1.")
    if size - len(channels) < group.least:
        raise PlanError(
            f"{name}: cannot remove {len(channels)} of {size} channels: at least {group.least} have to stay, "
            "or the network's own code fails or does something else."
        )
    for some in group.staying:
        if (left := int(np.isin(some.channels, channels, invert=True).sum())) < some.least:
            raise PlanError(
                f"{name}: of {len(some.channels)} channels {some.least} have to stay, and {left} would: the code "
                "squeezes away a dimension of one index, or compares their number with another."
            )
    if len(channels) % group.multiple:
        raise PlanError(
            f"{name}: cannot remove {len(channels)} channels: they go in multiples of {group.multiple}, since the "
            "network's own code asks for the remainder of their number."
        )
    _check_blocks(group, channels)
    return channels


def _check_blocks(group: ChannelGroup, channels: list[int]) -> None:
    """Refuse a choice by which blocks don't lose equal fractions, or what a step of the group's schedule gives."""
    sizes = np.bincount(group.blocks)
    counts = np.bincount(group.blocks[channels], minlength=sizes.size)
    if group.schedule is not None:
        if not (counts == group.schedule).all(1).any():
            near = group.schedule[np.abs(group.schedule - counts).sum(1).argmin()].tolist()
            raise PlanError(
                f"{group.name}: its {sizes.size} blocks can't lose {counts.tolist()} channels; "
                f"the nearest that they can is {near}. Choose a step of the group's schedule."
            )
    elif (counts * sizes[0] != counts[0] * sizes).any():
        raise PlanError(
            f"{group.name}: its {sizes.size} blocks have to lose equal fractions ({group.constraint}); "
            f"found {counts.tolist()} of {sizes.tolist()}. Choose as many channels in every block."
        )


def build(graph: ChannelGraph, removed: Selection) -> PruningPlan:
    """Write down what a choice of channels leaves of a network.

    Args:
        graph: The traced network.
        removed: Group name -> channels to remove, which keep the group's constraint.

    Raises:
        PlanError: If a layer, which may read several groups, would lose all its channels, or a shuffle would mix rows
            of different lengths.
    """
    group_masks = masks(graph, removed)
    ranks = shuffles.ranks(graph.shuffles, group_masks)
    kept_outputs, kept_inputs = _kept_by_layers(graph, group_masks, ranks)
    cuts = [
        (member, positions)
        for group, mask in zip(graph.groups, group_masks, strict=True)
        for member in (group.members if mask.any() else ())
        if (positions := member.positions[mask[member.channels]]).size
    ]
    implied = _implied(graph.layers)
    others = [(member, positions) for member, positions in cuts if member.tensor not in implied]
    kept_tensors = _kept_of_tensors(graph, others, ranks)
    attributes: dict[str, dict[str, int]] = {}
    for rule in graph.attributes:
        if count := int(mask_at(rule.group, rule.channel, group_masks).sum()):
            attributes.setdefault(rule.module, {})[rule.name] = rule.value - count
    return PruningPlan(
        kept_outputs=kept_outputs,
        kept_inputs=kept_inputs,
        kept_tensors=kept_tensors,
        blocks={member.tensor: member.blocks for member, _ in others if member.blocks > 1},
        reads=_reads(graph, cuts, implied),
        # A norm of v shrinks where v loses positions along another dimension than the one that counts its norms.
        magnitudes={
            m.tensor: (m.direction, m.dim) for m in graph.magnitudes if set(kept_tensors.get(m.direction, ())) - {m.dim}
        },
        attributes=attributes,
        removed=removed,
        shapes={member.tensor: graph.shapes[member.tensor] for member, _ in cuts},
    )


def _kept_by_layers(
    graph: ChannelGraph, group_masks: list[np.ndarray], ranks: Ranks
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the output and the input channels that every layer which loses some keeps, by module name.

    Raises:
        PlanError: If a layer would lose all.
    """
    outputs: dict[str, list[int]] = {}
    inputs: dict[str, list[int]] = {}
    for port in graph.layers:
        for kept, group, channel, order in (
            (outputs, port.out_group, port.out_channel, port.out_order),
            (inputs, port.in_group, port.in_channel, port.in_order),
        ):
            mask = mask_at(group, channel, group_masks)
            if not port.owned or not mask.any():
                continue
            if mask.all():
                raise PlanError(f"{port.module}: cannot remove all {mask.size} channels; a layer keeps at least 1.")
            kept[port.module] = shuffles.arranged(np.flatnonzero(~mask), order, ranks).tolist()
    return outputs, inputs


def _implied(layers: Sequence[LayerPort]) -> set[str]:
    """Return the weights and biases of layers of their own: what stays of these, the layers' kept channels say."""
    owners = (port.module for port in layers if port.owned and port.weight == f"{port.module}.weight".lstrip("."))
    return {f"{owner}.{name}".lstrip(".") for owner in owners for name in ("weight", "bias")}


def _reads(graph: ChannelGraph, cuts: list[Cut], implied: set[str]) -> dict[str, dict[int, list[int]]]:
    """Return what stays of the tensors that code reads channels with outside a layer of its own."""
    outside = {name for port in graph.layers if not port.owned for name in (port.weight, *port.parts)}
    found: dict[str, dict[int, list[int]]] = {}
    for member, positions in cuts:
        if member.read and member.tensor in outside and (member.blocks == 1 or member.tensor not in implied):
            dims = found.setdefault(member.tensor, {})
            before = dims.get(member.dim, range(graph.shapes[member.tensor][member.dim] * member.blocks))
            dims[member.dim] = sorted(set(before) - set(positions.tolist()))
    return found


def _kept_of_tensors(graph: ChannelGraph, cuts: list[Cut], ranks: Ranks) -> dict[str, dict[int, list[int]]]:
    """Return what stays along every dimension that is cut; channels of several groups may lie on one."""
    by_dim: dict[tuple[str, int], list[Cut]] = {}
    for cut in cuts:
        by_dim.setdefault((cut[0].tensor, cut[0].dim), []).append(cut)
    kept: dict[str, dict[int, list[int]]] = {}
    for (tensor, dim), own in by_dim.items():
        size = graph.shapes[tensor][dim] * own[0][0].blocks
        stays = np.ones(size, dtype=bool)
        order = Order(np.full(size, -1), np.full(size, -1))
        for member, positions in own:
            stays[positions] = False
            if member.order is not None:
                order.shuffle[member.positions] = member.order.shuffle
                order.place[member.positions] = member.order.place
        kept.setdefault(tensor, {})[dim] = shuffles.arranged(np.flatnonzero(stays), order, ranks).tolist()
    return kept
