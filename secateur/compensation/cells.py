"""Cells of a table of sensitivity: one group cut alone, what reads it refitted, and the outputs compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compensation import replay
from secateur.compensation.damage import Reference, floats
from secateur.compensation.following import observing
from secateur.compensation.least_squares import RIDGE, NormalEquations, by_weight, refusal, shrunk
from secateur.compensation.unfolding import draw_positions, unfold
from secateur.criteria import feature_maps
from secateur.criteria.feature_maps import Batch
from secateur.errors import DataError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut

ROWS = 1 << 14
"""So many unfolded inputs of a layer are enough: more tell hardly anything, and products of them take the time."""


class Cells:
    """What it takes to measure one group after the other."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        reference: Reference,
        wanted: Mapping[str, Sequence[Sequence[int]]],
    ) -> None:
        self.model, self.graph, self.reference, self.wanted = model, graph, reference, wanted
        self.moments: Mapping[str, Tensor] = {}
        """Of the inputs of the layers that read the groups to be measured."""
        self.calls = replay.observe(model, reference.held[0])
        with observing(model) as following:
            feature_maps.forward(model, reference.held[0], 1)
        self.norms = {name: own.norm for name, own in following.items()}
        """Layer -> the batch norm that takes up a shift of its outputs, if there is one."""

    def measured(self, group: ChannelGroup) -> dict[int, float]:
        """Return what removing channels of a group does, of each of the selections wanted."""
        smalls: dict[int, nn.Module] = {}
        changed: set[str] = set()
        for removed in self.wanted[group.name]:
            plan = plan_removal(self.graph, {group.name: removed})
            smalls[len(removed)] = self._small(plan)
            changed |= plan.kept_outputs.keys() | plan.kept_inputs.keys() | plan.attributes.keys()
            changed |= {name.rpartition(".")[0] for name in (*plan.kept_tensors, *plan.magnitudes)}
        skip = self.calls.before(changed)
        return (skip and self._by_parts(smalls, skip)) or self._by_whole_runs(smalls)

    def _small(self, plan: PruningPlan) -> nn.Module:
        """Cut the network, and refit what reads the group."""
        small = cut(self.model, plan, share=True)
        for name in shrunk(self.model, small, plan):
            if name in self.moments:
                norm = small.get_submodule(self.norms[name]) if self.norms.get(name) else None
                layers = self.model.get_submodule(name), small.get_submodule(name)
                _refit(*layers, norm, self.moments[name], plan, name)
        return small

    def _by_parts(self, smalls: Mapping[int, nn.Module], skip: replay.Skip) -> dict[int, float] | None:
        """Measure without running what lies before the group; None where a whole run would give something else."""
        sums = dict.fromkeys(smalls, 0.0)
        for i, batch in enumerate(self.reference.held):
            kept = replay.record(self.model, batch, i + 1, skip)
            for count, small in smalls.items():
                try:
                    with replay.skipping(small, kept):
                        output = feature_maps.forward(small, batch, i + 1)
                except DataError:  # the whole run will tell whether the skipping was to blame
                    return None
                if i == 0 and count == max(smalls):
                    found = floats(output)
                    whole = floats(feature_maps.forward(small, batch, 1))
                    if len(found) != len(whole) or not all(map(torch.equal, found, whole)):
                        return None
                sums[count] += self.reference.damage(i, output)
        return {count: total / self.reference.images for count, total in sums.items()}

    def _by_whole_runs(self, smalls: Mapping[int, nn.Module]) -> dict[int, float]:
        sums = dict.fromkeys(smalls, 0.0)
        for count, small in smalls.items():
            for i, batch in enumerate(self.reference.held):
                sums[count] += self.reference.damage(i, feature_maps.forward(small, batch, i + 1))
        return {count: total / self.reference.images for count, total in sums.items()}


def passes(
    model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], memory: int
) -> list[list[tuple[ChannelGroup, list[str]]]]:
    """Divide groups, with the layers that read each, so that the moments of those layers fit into memory."""
    tied = by_weight(model)
    found: dict[str, list[str]] = {}
    for group in groups:
        readers = dict.fromkeys(member.module for member in group.members if member.read)
        own = [name for name in readers if not refusal(name, model.get_submodule(name), tied, memory)]
        found[group.name] = own

    def need(group: ChannelGroup) -> int:
        return sum(_bytes(model.get_submodule(name)) for name in found[group.name])

    return [[(g, found[g.name]) for g in some] for some in feature_maps.passes(groups, need, memory)]


def _bytes(layer: nn.Module) -> int:
    blocks, width = _form(layer)
    return 8 * blocks * width * width


def _form(layer: Any) -> tuple[int, int]:
    """Return how many blocks a layer has, and how many unfolded inputs each, a constant 1 for the bias among them."""
    return getattr(layer, "groups", 1), layer.weight[0].numel() + 1


def input_moments(model: nn.Module, names: Iterable[str], held: Sequence[Batch]) -> dict[str, Tensor]:
    r"""Run the network once; return :math:`\sum z z^T` of layers' unfolded inputs, ``(blocks, D, D)``.

    Batches are multiplied in the network's own precision, which takes a fraction of the time, and summed in fp64.
    """
    names = list(dict.fromkeys(names))
    images = sum(batch.size for batch in held)
    positions = max(1, -(-ROWS // images))
    moments: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            layer = model.get_submodule(name)
            blocks, width = _form(layer)
            device = feature_maps.device_of(layer)
            moments[name] = torch.zeros(blocks, width, width, dtype=torch.float64, device=device)
            generator = torch.Generator().manual_seed(0)

            def see(
                layer: Any, args: Any, kwargs: Any, made: Tensor, name: str = name, generator: Any = generator
            ) -> None:
                rows = unfold(
                    layer, args[0] if args else kwargs["input"], draw_positions(layer, made, positions, generator)
                )
                rows = torch.cat((rows, rows.new_ones(*rows.shape[:2], 1)), 2)
                moments[name] += rows.mT @ rows

            stack.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
        for number, batch in enumerate(held, start=1):
            feature_maps.forward(model, batch, number)
    return moments


def _refit(layer: Any, small: Any, norm: Any, moments: Tensor, plan: PruningPlan, name: str) -> None:
    """Fit a cut layer, and the norm that takes up its shift, to what the whole one makes, by moments of its inputs."""
    blocks, width = _form(layer)
    bias = layer.bias is not None or norm is not None
    inputs = layer.weight.shape[1]
    taps = (width - 1) // inputs
    kept = torch.zeros(blocks * inputs, dtype=torch.bool)
    kept[plan.kept_inputs[name]] = True
    kept = kept.reshape(blocks, inputs).repeat_interleave(taps, 1)
    weight = layer.weight.detach().double().reshape(blocks, -1, inputs * taps)
    rows = torch.zeros(len(layer.weight), dtype=torch.bool)
    rows[plan.kept_outputs.get(name, list(range(len(rows))))] = True
    changes = []
    for block in range(blocks):
        own = moments[block]
        stays = torch.cat((kept[block], kept.new_full((1,), bias)))
        gone = torch.cat((~kept[block], kept.new_zeros(1)))
        outputs = weight[block][rows.reshape(blocks, -1)[block]][:, gone[:-1]]
        errors = own[stays][:, gone] @ outputs.mT
        error = (outputs @ own[gone][:, gone] * outputs).sum()
        equations = NormalEquations(own[stays][:, stays][None], errors[None], error, error, error, error)
        changes.append(equations.solve(RIDGE, bias)[0][0])
    change = torch.stack(changes)
    if bias:
        shift, change = change[:, -1].flatten(), change[:, :-1]
        if layer.bias is not None:
            small.bias = nn.Parameter(small.bias + shift.to(small.bias))
        else:
            norm.running_mean = norm.running_mean - shift.to(norm.running_mean)
    small.weight = nn.Parameter(small.weight + change.mT.reshape(small.weight.shape).to(small.weight))
