"""Laws that every network keeps, held on random compositions of the table's patterns."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from tests import oracle
from tests.generator import Network, example, networks
from tests.network.test_state import fingerprint, same, surroundings

# Some networks do on purpose what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def modules_are_loaded() -> None:
    """Trace once: what torch imports at the first run changes the process's warning filters."""
    sc.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).double(), example())


def chosen(graph: Any, ratio: float, seed: int) -> dict[str, list[int]]:
    """Choose random channels of every exact group."""
    rng = np.random.default_rng(seed)
    picked = {g.name: oracle.select(g, ratio, rng) for g in graph.groups if g.exact}
    return {name: channels for name, channels in picked.items() if channels}


def trace_leaves_the_network_alone(network: Network, seed: int) -> None:
    """Parameters, buffers, modes, gradients, hooks, random state and switches are as they were."""
    network.train(seed % 2 == 0)
    network.double()
    before, around = fingerprint(network), surroundings()
    sc.trace(network, example())
    assert same(before, fingerprint(network)) == []
    assert same(around, surroundings()) == []


def every_plan_is_exact(network: Network, seed: int) -> None:
    """What the graph offers can be planned, of all groups and of each, and the result equals the masked original."""
    model = oracle.randomise(network, seed).eval()
    graph = sc.trace(model, example())
    alone = [{name: channels} for name, channels in chosen(graph, 0.4, seed).items()]
    for removed in (chosen(graph, 0.3, seed), chosen(graph, 0.75, seed), *alone):
        plan = sc.plan_removal(graph, removed)
        verdict = oracle.judge(model, sc.apply(model, plan), plan, example(seed + 1))
        note(f"removed {removed}; refused {graph.refused}")
        assert verdict.exact, f"{verdict.kind}: {verdict.detail}"


def the_stem_or_its_refusal_is_known(network: Network, seed: int) -> None:
    """Every convolution and linear layer is in a group, or named by a refusal: nothing is forgotten in silence."""
    graph = sc.trace(network.double().eval(), example(seed))
    known = {m.module for g in graph.groups for m in g.members}
    known |= {t.rpartition(".")[0] for r in graph.refused for t in r.tensors}
    # A single channel always stays, made or read: there is nothing to say of it.
    layers = [
        name
        for name, m in network.named_modules()
        if isinstance(m, (*oracle.CONVOLUTIONS, nn.Linear)) and max(m.weight.shape[:2]) > 1
    ]
    assert [n for n in layers if n not in known] == []


def save_then_load_is_identical(network: Network, seed: int) -> None:
    """A saved network, loaded into a freshly built original, has the same bits."""
    model = oracle.randomise(network, seed).eval()
    graph = sc.trace(model, example())
    plan = sc.plan_removal(graph, chosen(graph, 0.5, seed))
    small = sc.apply(model, plan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        sc.save(small, plan, path)
        loaded = sc.load(oracle.randomise(copy.deepcopy(model), seed + 1).eval(), path)
    ours, theirs = small.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    for a, b in zip(oracle.run(small, example(seed)), oracle.run(loaded, example(seed)), strict=True):
        assert torch.equal(a, b)


def twice_is_once_with_the_union(network: Network, seed: int) -> None:
    """Pruning, tracing again and pruning again gives the bits of one pruning with both selections."""
    model = oracle.randomise(network, seed).eval()
    graph = sc.trace(model, example())
    first = chosen(graph, 0.3, seed)
    plan = sc.plan_removal(graph, first)
    small = sc.apply(model, plan)
    again = sc.trace(small, example())
    where = {
        (m.tensor, m.dim, int(p)): (g.name, int(c))
        for g in graph.groups
        for m in g.members
        for p, c in zip(m.positions, m.channels, strict=True)
    }
    makers = {(m.tensor, m.dim) for g in graph.groups for m in g.producers}
    union: dict[str, set[int]] = {name: set(channels) for name, channels in first.items()}
    second: dict[str, list[int]] = {}
    for name, channels in chosen(again, 0.3, seed + 1).items():
        both = {n: set(c) for n, c in union.items()}
        if any((m.tensor, m.dim) not in makers for m in again.group(name).producers):
            # A depthwise convolution left with one channel is a plain one, and makes channels of its own.
            continue
        for member in again.group(name).producers:
            for p, c in zip(member.positions, member.channels, strict=True):
                if int(c) in channels:
                    kept = plan.kept_outputs.get(member.module)
                    if kept is None:
                        kept = plan.kept_tensors.get(member.tensor, {}).get(member.dim)
                    position = int(p) if kept is None else kept[int(p)]
                    group, channel = where[member.tensor, member.dim, position]
                    both.setdefault(group, set()).add(channel)
        # A grouped convolution left with one channel a block is depthwise, a shuffle left with one channel a row moves
        # nothing: it has lost the rule of the first graph. Where code counts, as many stay as were tried to.
        enough = all(graph.group(n).size - len(c) >= graph.group(n).least for n, c in both.items())
        if enough and all(_balanced(graph.group(n), c) for n, c in both.items()):
            union, second[name] = both, channels
    smaller = sc.apply(small, sc.plan_removal(again, second))
    once = sc.apply(model, sc.plan_removal(graph, {n: sorted(c) for n, c in union.items()}))
    note(f"first {first}, second {second}, union {union}")
    ours, theirs = smaller.state_dict(), once.state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def _balanced(group: Any, channels: set[int]) -> bool:
    sizes = np.bincount(group.blocks)
    gone = np.bincount(group.blocks[sorted(channels)], minlength=len(sizes))
    return len(set((gone / sizes).tolist())) == 1 and bool((gone < sizes).all())


def permuting_channels_permutes_groups(network: Network, seed: int) -> None:
    """Free channels of a group carry no order: permuted in all members, they give the same network and groups."""
    model = oracle.randomise(network, seed).eval()
    graph = sc.trace(model, example())
    permuted = copy.deepcopy(model)
    tensors = dict(permuted.named_parameters(remove_duplicate=False)) | dict(permuted.named_buffers())
    rng = np.random.default_rng(seed)
    order: dict[str, np.ndarray] = {}
    for group in graph.groups:
        if not group.exact or group.blocks.max() > 0:
            continue
        if any(np.bincount(m.channels, minlength=group.size).max() > 1 for m in group.producers):
            continue  # one channel is several filters, whose order within the channel is not known here
        signature = np.stack([np.bincount(m.channels, minlength=group.size) for m in group.members])
        new = np.arange(group.size)
        for kind in np.unique(signature, axis=1).T:
            alike = np.flatnonzero((signature == kind[:, None]).all(0))
            new[alike] = rng.permutation(alike)
        order[group.name] = new
        for member in group.members:
            _permute(tensors[member.tensor].data, member, new)
    assert oracle.difference(oracle.run(model, example(seed)), oracle.run(permuted, example(seed))).exact
    other = sc.trace(permuted, example())
    assert [(g.name, g.size, g.constraint) for g in other.groups] == [
        (g.name, g.size, g.constraint) for g in graph.groups
    ]
    # Channel i of the permuted network is channel new[i] of the original.
    removed = {n: c for n, c in chosen(graph, 0.4, seed).items() if n in order}
    moved = {n: sorted(int(i) for i in np.flatnonzero(np.isin(order[n], c))) for n, c in removed.items()}
    small = sc.apply(model, sc.plan_removal(graph, removed))
    small_permuted = sc.apply(permuted, sc.plan_removal(other, moved))
    assert oracle.difference(oracle.run(small, example(seed)), oracle.run(small_permuted, example(seed))).exact


def _permute(tensor: torch.Tensor, member: Any, new: np.ndarray) -> None:
    """Put the slices of channel ``new[i]`` where those of channel i are."""
    if member.blocks > 1:
        raise AssertionError("a grouped layer's inputs have blocks, so its group is not free")
    at = [np.sort(member.positions[member.channels == c]) for c in range(len(new))]
    source = np.arange(tensor.shape[member.dim])
    for channel, other in enumerate(new):
        source[at[channel]] = at[int(other)]
    tensor.copy_(tensor.index_select(member.dim, torch.from_numpy(source)))


LAWS: list[Callable[[Network, int], None]] = [
    trace_leaves_the_network_alone,
    every_plan_is_exact,
    the_stem_or_its_refusal_is_known,
    save_then_load_is_identical,
    twice_is_once_with_the_union,
    permuting_channels_permutes_groups,
]


@pytest.mark.parametrize("examples", [8, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Callable[[Network, int], None], examples: int) -> None:
    """Try a law on so many random networks."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)

    @settings(max_examples=examples, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(network=networks(), seed=st.integers(0, 2**16))
    def attempt(network: Network, seed: int) -> None:
        law(network, seed)

    attempt()
