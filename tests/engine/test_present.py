"""The graph of what is left, and the plan of the next round, against cuts and traces of the network itself."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.criteria import weights
from secateur.engine.present import difference, remaining
from secateur.graph.steps import steps
from secateur.pruning.surgery import cut
from tests import oracle
from tests.cases import CASES
from tests.criteria.networks import NETWORKS

# Some networks do on purpose what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def traced(name: str) -> tuple[nn.Module, Any, sc.ChannelGraph]:
    source = CASES[name] if name in CASES else NETWORKS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = oracle.randomise(source.build()).eval()
    inputs = oracle.doubled(source.inputs() if callable(source.inputs) else source.inputs)
    return model, inputs, sc.trace(model, inputs)


def choice(graph: sc.ChannelGraph, share: float, seed: int) -> dict[str, list[int]]:
    """Choose a share of the steps that every exact group can take, in a random order."""
    generator = np.random.default_rng(seed)
    chosen = {}
    for group in graph.groups:
        found = steps(group, generator.permutation(group.size).tolist()) if group.exact else []
        taken = [channel for step in found[: round(share * len(found))] for channel in step]
        if taken:
            chosen[group.name] = sorted(taken)
    return chosen


def in_original(removed: list[int], local: list[int], size: int) -> list[int]:
    alive = [channel for channel in range(size) if channel not in removed]
    return sorted([*removed, *(alive[channel] for channel in local)])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i % 8 else []) for i, n in enumerate([*NETWORKS, *CASES])]
)
def test_two_rounds_cut_what_one_plan_cuts(name: str) -> None:
    model, _, graph = traced(name)
    first = choice(graph, 0.4, 1)
    before = sc.plan_removal(graph, first)
    middle = cut(model, before)
    present = remaining(graph, before)
    sizes = {tensor: tuple(value.shape) for tensor, value in middle.named_parameters()}
    assert {tensor: present.shapes[tensor] for tensor in sizes} == sizes
    second = choice(present, 0.7, 2)
    everything = {
        group.name: in_original(first.get(group.name, []), second.get(group.name, []), group.size)
        for group in graph.groups
    }
    after = sc.plan_removal(graph, everything)
    step = difference(present, before, after)
    assert {group: sorted(channels) for group, channels in step.removed.items()} == second
    small, expected = cut(middle, step), cut(model, after)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], value, rtol=1e-12, atol=1e-12, msg=key)
    for path, module in expected.named_modules():
        for attribute in ("in_channels", "out_channels", "in_features", "out_features", "groups", "num_features"):
            assert getattr(small.get_submodule(path), attribute, 0) == getattr(module, attribute, 0), (path, attribute)


@pytest.mark.parametrize("name", [*NETWORKS, "residual_stage", "dense_block", "shuffle_between_groups", "chunk_halves"])
def test_what_is_left_is_made_and_read_where_it_was(name: str) -> None:
    """Filters and readers of the channels left, found by the graph of what is left, are slices of the original's."""
    model, _, graph = traced(name)
    before = sc.plan_removal(graph, choice(graph, 0.5, 3))
    middle, present = cut(model, before), remaining(graph, before)
    for whole, group in zip(graph.groups, present.groups, strict=True):
        left = [channel for channel in range(whole.size) if channel not in before.removed.get(whole.name, [])]
        assert group.size == len(left)
        made, kept = weights.making(model, graph, whole), weights.making(middle, present, group)
        for one, other in zip(made, kept, strict=True):
            # The original with everything zeroed that was removed: what is left of a filter are its other weights.
            filters, found = one.filters(one.weight(model), whole.size), other.filters(other.weight(middle), group.size)
            for row, channel in enumerate(left):
                apart = found[row].detach()[:, None] - torch.cat([filters[channel].detach(), filters.new_zeros(1)])
                assert float(apart.abs().min(1).values.max()) < 1e-12
        read, still = weights.reading(model, graph, whole), weights.reading(middle, present, group)
        for one, other in zip(read, still, strict=True):
            counts = (one.table >= 0).sum(1)[torch.isin(one.channels, torch.tensor(left))]
            assert (other.table >= 0).sum(1).tolist() == counts.tolist()


@pytest.mark.parametrize(
    "name", ["residual_stage", "dense_block", "chunk_halves", "c2f", "masked", "grouped_transposed"]
)
def test_a_trace_of_what_is_left_finds_the_same(name: str) -> None:
    model, inputs, graph = traced(name)
    before = sc.plan_removal(graph, choice(graph, 0.3, 4))
    present, again = remaining(graph, before), sc.trace(cut(model, before), inputs)
    assert [(g.name, g.size, g.constraint) for g in present.groups] == [
        (g.name, g.size, g.constraint) for g in again.groups
    ]
    for one, other in zip(present.groups, again.groups, strict=True):
        for member, same in zip(one.members, other.members, strict=True):
            assert (member.tensor, member.dim, member.role) == (same.tensor, same.dim, same.role)
            pairs = sorted(zip(member.positions.tolist(), member.channels.tolist(), strict=True))
            assert pairs == sorted(zip(same.positions.tolist(), same.channels.tolist(), strict=True))
    for port, same_port in zip(present.layers, again.layers, strict=True):
        assert (port.module, port.in_channels, port.out_channels, port.groups, port.macs) == (
            same_port.module, same_port.in_channels, same_port.out_channels, same_port.groups, same_port.macs
        )  # fmt: skip
