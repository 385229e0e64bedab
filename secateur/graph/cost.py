"""What a network costs: multiply-accumulate operations, parameters and run-time memory, before and after a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from secateur.graph.channels import ChannelGraph, LayerPort
from secateur.graph.places import mask_at
from secateur.graph.plan import PruningPlan, masks

_BYTES = 4
"""Of a number in fp32."""


@dataclass(frozen=True)
class LayerCost:
    """The cost of one call of a convolution or linear layer, for one example."""

    module: str
    """The layer's name, see :attr:`secateur.graph.channels.LayerPort.name`."""
    in_channels: int
    out_channels: int
    macs: int
    """Multiply-accumulate operations: ``c_in / g · k_w · k_h · w_o · h_o · c_o`` (Singh et al. 2020, eqs. 1-2)."""
    feature_bytes: int
    """Bytes of its output in fp32: ``4 · w_o · h_o · c_o`` (eq. 4 at batch size 1)."""
    weight_bytes: int
    """Bytes of its weight in fp32: ``4 · k_w · k_h · c_in / g · c_o`` (eq. 5)."""


def _layer(port: LayerPort, batch: int, masks: list[np.ndarray]) -> LayerCost:
    in_channels = port.in_channels - int(mask_at(port.in_group, port.in_channel, masks).sum())
    out_channels = port.out_channels - int(mask_at(port.out_group, port.out_channel, masks).sum())
    depthwise = port.groups > 1 and port.groups == port.in_channels
    groups = in_channels if depthwise else port.groups
    fan_in = in_channels // groups
    weight = fan_in * out_channels * port.kernel
    positions = port.positions // batch
    return LayerCost(
        port.name,
        in_channels,
        out_channels,
        weight * positions,
        _BYTES * out_channels * positions,
        _BYTES * weight,
    )


def layer_costs(graph: ChannelGraph, plan: PruningPlan | None = None) -> list[LayerCost]:
    """Return the cost of every call of a convolution or linear layer, in execution order, for one example.

    Args:
        graph: The traced network.
        plan: A plan made for this graph; None for the network as it is.
    """
    group_masks = masks(graph, plan.removed if plan is not None else {})
    return [_layer(port, graph.batch, group_masks) for port in graph.layers if port.kind != "registered"]


def macs(graph: ChannelGraph, plan: PruningPlan | None = None) -> int:
    """Count multiply-accumulate operations for one example: the sum over convolutions and linear layers.

    Singh et al. 2020, eqs. 1-3, where they are called FLOPs. Biases, norms, activations and products of two
    activations (attention) are not counted, as there. Departures: none.
    """
    return sum(cost.macs for cost in layer_costs(graph, plan))


def parameters(graph: ChannelGraph, plan: PruningPlan | None = None) -> int:
    """Count the elements of all parameters, tied ones once."""
    sizes = {name: list(graph.shapes[name]) for name in graph.parameters}
    if plan is not None:
        for group, mask in zip(graph.groups, masks(graph, plan.removed), strict=True):
            for member in group.members:
                if member.tensor in sizes:
                    sizes[member.tensor][member.dim] -= int(mask[member.channels].sum()) // member.blocks
    return int(sum(np.prod(shape, dtype=np.int64) for shape in sizes.values()))


def run_time_memory(graph: ChannelGraph, plan: PruningPlan | None = None, batch_size: int = 1) -> int:
    """Return the total run-time memory TRM in bytes, fp32.

    Singh et al. 2020, eqs. 4-6 and 13: the sum over layers of ``4 · w_o · h_o · c_o · B`` for feature maps and
    ``4 · k_w · k_h · c_in · c_o`` for weights. Departures: none.
    """
    costs = layer_costs(graph, plan)
    return sum(c.feature_bytes * batch_size + c.weight_bytes for c in costs)
