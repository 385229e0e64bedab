"""The law over the table: what is offered is exact, what is expected is offered, what is refused says why."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.graph.steps import steps
from tests import oracle
from tests.cases import CASES, Case
from tests.cases.table import Net, conv

# Some networks do on purpose what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore")

RATIOS = (0.25, 0.5, 0.8)

MIXING = """
    dynamic_convolution unit_length_over_channels control_flow_on_features convolutional_block_attention
    sum_over_channels flat_maximum cosine_similarity
"""
"""Cases whose channels take part in one another's results, though nothing normalises them."""


@functools.cache
def traced(name: str) -> tuple[nn.Module, Any, Any]:
    """Build a case in fp64 with random values, and trace it."""
    case = CASES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = oracle.randomise(case.build())
    inputs = oracle.doubled(case.inputs())
    return model, inputs, sc.trace(model, inputs)


def offered(graph: Any, producer: str, *, inexact: bool = True) -> int:
    """Count the filters of a layer or raw parameter that some group offers to remove.

    A depthwise layer's filters follow the channels that it reads, so followers count as well as producers.
    """
    positions: set[int] = set()
    for group in graph.groups:
        if not (group.exact or inexact):
            continue
        for member in group.members:
            if member.role != "consumer" and producer in (member.module, member.tensor):
                free = group.removable[member.channels]
                positions.update(int(p) for p in member.positions[free])
    return len(positions)


def selection(graph: Any, ratio: float, seed: int, exact: bool = True) -> dict[str, list[int]]:
    """Choose random channels of every group that is marked as asked."""
    rng = np.random.default_rng(seed)
    chosen = {g.name: oracle.select(g, ratio, rng) for g in graph.groups if g.exact == exact}
    return {name: channels for name, channels in chosen.items() if channels}


def test_table_is_broad() -> None:
    assert len(CASES) >= 80
    assert {c.expectation for c in CASES.values()} == {"exact", "inexact", "refused", "open"}


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_case(case: Case) -> None:
    """Everything that holds of a case, in one test, so that the case is traced once."""
    outputs_are_never_offered(case)
    finds_what_can_be_pruned(case)
    refuses_with_its_reason(case)
    marks_inexact_groups(case)
    pruned_equals_masked_original(case)
    if case.prunable:
        all_that_may_go_can(case)
    inexact_groups_equal_a_norm_over_the_kept_channels(case)


def outputs_are_never_offered(case: Case) -> None:
    """No filter of a layer that gives the network's output is offered."""
    _, _, graph = traced(case.name)
    for layer in case.outputs:
        assert offered(graph, layer) == 0, f"{layer} gives the network's output"


def finds_what_can_be_pruned(case: Case) -> None:
    """As many filters are offered as expected."""
    _, _, graph = traced(case.name)
    found = {producer: offered(graph, producer, inexact=False) for producer in case.prunable}
    short = {p: (found[p], least) for p, least in case.prunable.items() if found[p] < least}
    assert not short, f"offered, expected: {short}; refusals: {graph.refused}"


def refuses_with_its_reason(case: Case) -> None:
    """What has to stay is not offered, and listed with the reason."""
    _, _, graph = traced(case.name)
    for producer, fragment in case.refused.items():
        assert offered(graph, producer) == 0
        listed = [r for r in graph.refused if any(t == producer or t.startswith(f"{producer}.") for t in r.tensors)]
        assert listed, f"nothing is listed for {producer}: {graph.refused}"
        texts = " ".join(f"{r.operator} {r.module} {r.source} {r.reason}" for r in listed)
        assert fragment in texts


def test_refusal_names_the_failing_line() -> None:
    _, _, graph = traced("hard_coded_view")
    places = [r.source.rpartition(":") for r in graph.refused if "programs.py" in r.source]
    lines = [Path(path).read_text().splitlines()[int(number) - 1] for path, _, number in places]
    assert any("x.view(-1, 6 * 48)" in line for line in lines)


def marks_inexact_groups(case: Case) -> None:
    """Groups whose removal can't equal zeroing are marked."""
    _, _, graph = traced(case.name)
    for producer in case.inexact:
        for group in graph.groups:
            if any(producer in (m.module, m.tensor) for m in group.producers):
                assert not group.exact
                assert group.reason


def check(case: Case, removed: dict[str, list[int]], seed: int) -> None:
    """Cut what is given, and hold the result against the masked original."""
    model, inputs, graph = traced(case.name)
    plan = sc.plan_removal(graph, removed)
    small = sc.apply(model, plan)
    verdict = oracle.judge(model, small, plan, oracle.fresh(inputs, seed), modes=case.modes)
    assert verdict.exact, f"{verdict.kind}: {verdict.detail}; removed {removed}"
    for name, kept in plan.kept_outputs.items():
        layer = small.get_submodule(name)
        assert getattr(layer, "out_channels", getattr(layer, "out_features", len(kept))) == len(kept)
    assert sc.verify(model, small, plan, inputs).exact


def pruned_equals_masked_original(case: Case) -> None:
    """Random selections of every group are cut exactly."""
    _, _, graph = traced(case.name)
    chosen = [(selection(graph, ratio, seed), seed) for seed, ratio in enumerate(RATIOS)]
    for removed, seed in chosen:
        if removed:
            check(case, removed, seed)
    free = [g for g in graph.groups if g.exact and g.removable.all() and not g.constraint and g.size > 4]
    assert all(removed for removed, _ in chosen) or (not free and (graph.refused or graph.groups or graph.notes))


def all_that_may_go_can(case: Case) -> None:
    """Down to as few channels as a group says that have to stay: code may do something else below some width."""
    _, _, graph = traced(case.name)
    check(case, {g.name: [c for step in steps(g, range(g.size)) for c in step] for g in graph.groups if g.exact}, 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES.values() if c.prunable], ids=lambda case: case.name)
def test_one_group_at_a_time(case: Case) -> None:
    _, _, graph = traced(case.name)
    groups = [group for group in graph.groups if group.exact]
    assert groups or case.inexact
    for group in groups:
        for ratio in (0.2, 0.9):
            if channels := oracle.select(group, ratio, np.random.default_rng(7)):
                check(case, {group.name: channels}, 5)


def inexact_groups_equal_a_norm_over_the_kept_channels(case: Case) -> None:
    """Only cases that mix channels have inexact groups; where a norm mixes them, it is that of the kept ones."""
    model, inputs, graph = traced(case.name)
    inexact = selection(graph, 0.5, 3, exact=False)
    assert not inexact or case.normalising or case.name in MIXING.split()
    for name, channels in inexact.items():
        plan = sc.plan_removal(graph, {name: channels})
        small = sc.apply(model, plan)
        verdict = oracle.judge(model, small, plan, oracle.fresh(inputs, 5), norms=True)
        assert graph.group(name).reason
        if any(isinstance(m, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) for m in model.modules()):
            assert verdict.exact, f"{verdict.kind}: {verdict.detail}; removed {channels} of {name}"
        else:
            assert verdict.kind in ("exact", "wrong-channel"), f"{verdict.kind}: {verdict.detail}"


@pytest.mark.parametrize(
    "name", ["dense_block_before_groups", "chunk_halves", "slice_half_of_shape", "mixed_convolution", "dual_path"]
)
def test_every_layer_keeps_a_filter(name: str) -> None:
    model, inputs, graph = traced(name)
    for group in graph.groups:
        for member in group.members:
            gone = sorted(set(member.channels.tolist()))
            if len(gone) < group.size:
                with pytest.raises(sc.PlanError):
                    sc.plan_removal(graph, {group.name: gone})
    scores = {g.name: torch.arange(g.size, 0, -1).double() for g in graph.groups}
    plan = sc.plan(graph, scores, sc.Target(channels=0.4))
    small = sc.apply(model, plan)
    assert all(p.numel() for p in small.parameters())
    assert oracle.judge(model, small, plan, oracle.fresh(inputs, 1)).exact


@pytest.mark.parametrize(("name", "layer"), [("residual_projection", "conv2"), ("dense_block", "transition")])
@pytest.mark.parametrize("wrong", [[1, 0], [0, 0]], ids=["swapped", "forgotten"])
def test_a_wrong_channel_is_seen(name: str, layer: str, wrong: list[int]) -> None:
    model, inputs, graph = traced(name)
    plan = sc.plan_removal(graph, selection(graph, 0.5, 0))
    small = sc.apply(model, plan)
    weight = small.get_submodule(layer).weight.data
    weight[:, [0, 1]] = weight[:, wrong].clone()
    check = sc.verify(model, small, plan, inputs)
    assert not check.exact
    assert check.max_error > 1e-6
    assert oracle.judge(model, small, plan, inputs).kind == "wrong-channel"


def near_ties(m: Net, x: torch.Tensor) -> list[torch.Tensor]:
    """Sort by what rounding decides, beside an output that can be compared."""
    x = m.conv2(m.conv1(x).relu()).relu()
    scores = (1e16 * m.head(x).flatten(1)).sin()
    return [scores.argsort(1), m.other(x)]


def test_outputs_that_jump_under_rounding_ban_nothing() -> None:
    net = Net(near_ties, conv1=conv(3, 12), conv2=conv(12, 10), head=conv(10, 4), other=conv(10, 2))
    model, inputs = oracle.randomise(net), oracle.doubled(torch.rand(2, 3, 8, 6))
    graph = sc.trace(model, inputs)
    assert offered(graph, "conv1") == 12
    assert offered(graph, "conv2") == 10
    plan = sc.plan_removal(graph, selection(graph, 0.5, 0))
    small = sc.apply(model, plan)
    check = sc.verify(model, small, plan, inputs)
    assert check.exact
    assert any("jump" in text for text in check.refused)
    for layer in ("conv2", "head", "other"):
        wrong = copy.deepcopy(small)
        wrong.get_submodule(layer).bias.data[0] += 0.1
        assert not sc.verify(model, wrong, plan, inputs).exact, layer


def ties(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Return features in the order of scores that come in equal pairs, of which rounding decides the first.

    The features that scores are made of are saturated: no small change of the inputs shows.
    """
    x = m.norm((m.conv1(x) * 1e6).clamp(0, 1).amax((2, 3)))
    order = torch.cat([m.head(x), m.mirrored(x.flip(1))], 1).argsort(1)
    return torch.cat([m.conv2(x), -m.conv2(x)], 1).gather(1, order)


def test_ties_that_no_change_of_the_inputs_shows_ban_nothing() -> None:
    layers = {"head": nn.Linear(37, 20), "mirrored": nn.Linear(37, 20), "conv2": nn.Linear(37, 20)}
    net = Net(ties, conv1=conv(3, 37), norm=nn.BatchNorm1d(37), **layers)
    model, inputs = oracle.randomise(net), oracle.doubled(torch.rand(2, 3, 8, 6))
    model.mirrored.weight.data = model.head.weight.data.flip(1)
    model.mirrored.bias.data = model.head.bias.data.clone()
    graph = sc.trace(model, inputs)
    assert offered(graph, "conv1") == 37
    plan = sc.plan_removal(graph, selection(graph, 0.5, 0))
    small = sc.apply(model, plan)
    fresh = oracle.fresh(inputs, 1)
    assert oracle.judge(model, small, plan, fresh).kind == "wrong-channel"
    assert oracle.ties(model, small, plan, fresh)
    assert sc.verify(model, small, plan, fresh).exact
    small.conv2.weight.data[0] = small.conv2.weight.data[1]
    assert not oracle.ties(model, small, plan, fresh)
    assert not sc.verify(model, small, plan, fresh).exact


def test_outputs_that_jump_excuse_no_others() -> None:
    def divided(m: Net, x: torch.Tensor) -> list[torch.Tensor]:
        order, other = near_ties(m, x)
        return [order, other / m.conv2.out_channels]

    net = Net(divided, conv1=conv(3, 12), conv2=conv(12, 10), head=conv(10, 4), other=conv(10, 2))
    graph = sc.trace(oracle.randomise(net), oracle.doubled(torch.rand(2, 3, 8, 6)))
    assert offered(graph, "conv1") == 12
    assert offered(graph, "conv2") == 0


def test_recovered_plan_is_the_plan() -> None:
    model, _, graph = traced("resnext_block")
    plan = sc.plan_removal(graph, selection(graph, 0.5, 2))
    recovered = oracle.recover(model, sc.apply(model, plan))
    assert recovered.kept_outputs == {n: list(k) for n, k in plan.kept_outputs.items()}
    assert recovered.kept_inputs == {n: list(k) for n, k in plan.kept_inputs.items()}
