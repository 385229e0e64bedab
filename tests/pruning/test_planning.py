"""From scores to a plan: targets, constraints, contradictions, and the plan's JSON form."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.graph.cost import run_time_memory
from secateur.graph.plan import FORMAT_VERSION
from secateur.graph.steps import steps
from secateur.pruning import limits
from tests.cases import CASES, Case


class Net(nn.Module):
    """A residual block, a grouped convolution and a linear head on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.hidden = nn.Linear(16 * 16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(self.hidden(self.mix(x.relu()).relu().flatten(1)).relu())


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
GRAPH = sc.trace(Net().eval(), X)
SIZES = {g.name: g.size for g in GRAPH.groups}


def scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator) for g in GRAPH.groups}


def test_the_graph_is_the_one_drawn_by_hand() -> None:
    assert SIZES == {"stem": 16, "inner": 24, "mix": 16, "hidden": 12}
    assert [m.module for m in GRAPH.group("stem").producers] == ["stem", "outer"]
    assert [m.module for m in GRAPH.group("stem").consumers] == ["inner", "mix"]
    assert GRAPH.group("mix").constraint == "equal fractions of 4 blocks"


@pytest.mark.parametrize("what", ["macs", "params", "channels", "memory"])
@pytest.mark.parametrize("allocation", ["normalized", "global", "uniform"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_a_target_is_met_and_by_no_more_than_one_step(what: str, allocation: Any, fraction: float) -> None:
    target = sc.Target(**{what: fraction})
    plan = sc.plan(GRAPH, scores(), target, allocation=allocation)
    assert target.removed(GRAPH, plan) >= fraction
    model = Net().eval()
    small = sc.apply(model, plan)
    count = sum(p.numel() for p in small.parameters())
    assert count == sc.parameters(GRAPH, plan)
    assert sc.macs(sc.trace(small, X)) == sc.macs(GRAPH, plan)
    assert sc.verify(model, small, plan, X).exact


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), fraction=st.floats(0.05, 0.7))
def test_blocks_lose_alike_and_the_lowest_go_first(seed: int, fraction: float) -> None:
    values = scores(seed)
    plan = sc.plan(GRAPH, values, sc.Target(channels=fraction), allocation="uniform")
    for group in GRAPH.groups:
        gone = set(plan.removed.get(group.name, []))
        counts = [sum(group.blocks[c] == b for c in gone) for b in range(int(group.blocks.max()) + 1)]
        assert len(set(counts)) == 1
        for channel in gone:
            kept = [c for c in range(group.size) if c not in gone and group.blocks[c] == group.blocks[channel]]
            assert kept
            assert values[group.name][channel] <= min(values[group.name][c] for c in kept)


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_round_to_keeps_multiples_where_anything_goes(multiple: int) -> None:
    plan = sc.plan(GRAPH, scores(), sc.Target(channels=0.4), round_to=multiple)
    assert plan.removed
    for name, gone in plan.removed.items():
        assert (SIZES[name] - len(gone)) % multiple == 0


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("allocation", ["normalized", "global", "uniform"])
def test_a_rounded_plan_takes_from_no_group_what_the_target_can_spare(multiple: int, allocation: Any) -> None:
    for seed in range(5):
        values, target = scores(seed), sc.Target(macs=0.2 + 0.1 * seed)
        plan = sc.plan(GRAPH, values, target, round_to=multiple, allocation=allocation)
        assert target.removed(GRAPH, plan) >= target.fraction - 1e-9
        for name, gone in plan.removed.items():
            if GRAPH.group(name).constraint:  # whose channels go several at a time
                continue
            order = sorted(gone, key=lambda c, n=name: (float(values[n][c]), c))
            fewer = [n for n in range(len(gone)) if (SIZES[name] - n) % multiple == 0 or not n]
            less = sc.PruningPlan(removed={**plan.removed, name: sorted(order[: max(fewer)])})
            assert target.removed(GRAPH, less) < target.fraction


def test_ratios_are_exact_and_skipped_groups_lose_nothing() -> None:
    plan = sc.plan(GRAPH, scores(), ratios={"inner": 0.5, "hidden": 0.25})
    assert {name: len(gone) for name, gone in plan.removed.items()} == {"inner": 12, "hidden": 3}
    plan = sc.plan(GRAPH, scores(), sc.Target(channels=0.4), skip=["stem", "Linear"])
    assert set(plan.removed) <= {"inner", "mix"}
    plan = sc.plan(GRAPH, scores(), sc.Target(channels=0.3), min_channels=10, max_ratio=0.5)
    for name, gone in plan.removed.items():
        assert SIZES[name] - len(gone) >= max(10, SIZES[name] / 2)


class Nested(nn.Module):
    """Two stages, each a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Conv2d(8, 3, 1))
        self.second = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("pattern", ["second", "sec*", "Net"])
def test_a_module_stands_for_all_layers_in_it(pattern: str) -> None:
    graph = sc.trace(Nested().eval(), X)
    lowest = {g.name: torch.arange(1.0, g.size + 1) for g in graph.groups}
    inside = {g.name for g in graph.groups if g.name.startswith("second.")}
    plan = sc.plan(graph, lowest, sc.Target(channels=0.05), skip=[pattern])
    assert plan.removed
    assert not inside & set(plan.removed)
    plan = sc.plan(graph, lowest, ratios={pattern: 0.25})
    assert set(plan.removed) == inside
    plan = sc.plan(graph, lowest, sc.Target(channels=0.3), max_ratio={pattern: 0.25})
    assert all(len(plan.removed.get(name, ())) <= graph.group(name).size / 4 for name in inside)


def test_a_ratio_of_nothing_does_not_contradict_a_skip() -> None:
    assert sc.plan(GRAPH, scores(), ratios={"inner": 0, "stem": 0.5}, skip=["inner"]) == sc.plan(
        GRAPH, scores(), ratios={"stem": 0.5}
    )


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({}, sc.UsageError, "nothing is asked for"),
        ({"target": sc.Target(macs=0.999)}, sc.PlanError, "all that may go is"),
        ({"target": sc.Target(macs=0.5), "skip": ["nowhere"]}, sc.UsageError, "nowhere: no layer"),
        ({"target": sc.Target(macs=0.5), "round_to": 0}, sc.UsageError, "round_to"),
        ({"target": sc.Target(macs=0.5), "max_ratio": 0.0}, sc.UsageError, "max_ratio"),
        ({"target": sc.Target(macs=0.5), "round_to": "auto"}, sc.UsageError, "round_to: plan measures nothing"),
        ({"target": sc.Target(macs=0.5), "allocation": "best"}, sc.UsageError, "allocation"),
        ({"target": sc.Target(macs=0.5), "allocation": "sensitivity"}, sc.UsageError, "plan measures nothing"),
        ({"target": sc.Target(macs=0.5), "ratio": {}}, sc.UsageError, "ratio: no such option; did you mean ratios"),
        ({"ratios": {"inner": 1.5}}, sc.UsageError, "ratio of inner"),
        ({"ratios": {"inner": 0.5}, "skip": ["inner"]}, sc.UsageError, "contradicts skip 'inner'"),
        ({"ratios": {"inner": 0.5, "inn*": 0.25}}, sc.UsageError, "contradicts ratio"),
        ({"ratios": {"inner": 0.9}, "min_channels": 8}, sc.UsageError, "contradicts min_channels 8"),
        ({"target": sc.Target(macs=0.5), "max_ratio": {"inner": 1.5}}, sc.UsageError, "max_ratio of inner"),
        ({"target": sc.Target(macs=0.5), "max_ratio": {"nowhere": 0.5}}, sc.UsageError, "nowhere: no layer"),
        (
            {"target": sc.Target(macs=0.5), "max_ratio": {"inner": 0.5, "inn*": 0.25}},
            sc.UsageError,
            "inner: max_ratio 0.5 (by 'inner') contradicts max_ratio 0.25 (by 'inn*')",
        ),
        (
            {"ratios": {"inner": 0.5}, "max_ratio": {"Conv2d": 0.25}},
            sc.UsageError,
            "inner: ratio 0.5 (by 'inner') contradicts max_ratio 0.25 (by 'Conv2d')",
        ),
        ({"ratios": {"inner": 0.5}, "max_ratio": 0.25}, sc.UsageError, "(by 'inner') contradicts max_ratio 0.25;"),
        ({"ratios": {"*": 0.5}, "max_ratio": 0.25}, sc.UsageError, "ratio 0.5 contradicts max_ratio 0.25;"),
        (
            {"target": sc.Target(channels=0.2), "max_ratio": {"inner": 0.3}, "round_to": 16},
            sc.UsageError,
            "of 24 channels contradicts round_to 16: the group loses at least 8 channels (0.333) or none",
        ),
        (
            {"ratios": {"hidden": 0.3}, "round_to": 8},
            sc.UsageError,
            "hidden: ratio 0.3 (by 'hidden') of 12 channels contradicts round_to 8: the group loses at least 4",
        ),
        (
            {"ratios": {"hidden": 0.5}, "round_to": 32},
            sc.UsageError,
            "contradicts round_to 32: no number of channels that may go leaves a multiple",
        ),
        ({"ratios": {"head": 0.5}}, sc.UsageError, "head: ratio 0.5 (by 'head'), but its channels can't be removed"),
        ({"ratios": {"BatchNorm2d": 0.5}}, sc.UsageError, "names no channels that can be removed"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        sc.plan(GRAPH, scores(), **arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ratio_for_what_is_inexact_or_has_no_scores_is_refused() -> None:
    with pytest.raises(sc.UsageError, match=r"inner: ratio 0\.5 \(by 'inner'\), but the group has no scores"):
        sc.plan(GRAPH, {name: s for name, s in scores().items() if name != "inner"}, ratios={"inner": 0.5})
    case = CASES["layer_norm_channels_last"]
    graph = sc.trace(case.build().eval(), case.inputs())
    (group,) = [g for g in graph.groups if not g.exact]
    values = {g.name: torch.rand(g.size) for g in graph.groups}
    with pytest.raises(sc.UsageError, match=f"{group.name}: ratio .* can't equal zeroing .* pass inexact"):
        sc.plan(graph, values, ratios={group.name: 0.5})
    plan = sc.plan(graph, values, ratios={group.name: 0.5}, inexact=True)
    assert len(plan.removed[group.name]) == group.size // 2


def test_a_ratio_beyond_what_may_go_is_refused() -> None:
    removable = np.arange(24) < 8
    fixed = replace(
        GRAPH, groups=tuple(replace(g, removable=removable) if g.name == "inner" else g for g in GRAPH.groups)
    )
    assert len(sc.plan(fixed, scores(), ratios={"inner": 0.25}).removed["inner"]) == 6
    with pytest.raises(sc.UsageError, match=r"inner: ratio 0\.5 .* is 12; 8 can go \(0\.333\): 16 channels fixed"):
        sc.plan(fixed, scores(), ratios={"inner": 0.5})
    assert len(sc.plan(fixed, scores(), ratios={"*": 0.5}).removed["inner"]) == 8


def test_a_star_stands_for_what_no_other_pattern_names() -> None:
    given = {"ratios": {"*": 0.5, "inner": 0.25}, "max_ratio": {"hidden": 0.25}, "skip": ["mix"]}
    plan = sc.plan(GRAPH, scores(), **given)
    assert {name: len(gone) for name, gone in plan.removed.items()} == {"stem": 8, "inner": 6, "hidden": 3}
    only = sc.plan(GRAPH, scores(), sc.Target(channels=0.1), max_ratio={"*": 0, "inner": 0.5})
    assert set(only.removed) == {"inner"}
    rounded = sc.plan(GRAPH, scores(), ratios={"*": 0.3}, round_to=16, min_channels=8)
    assert {name: len(gone) for name, gone in rounded.removed.items()} == {}


def test_a_layer_in_two_groups_does_not_confuse_their_names() -> None:
    case = CASES["partial_residual"]
    graph = sc.trace(case.build().eval(), case.inputs())
    stem, body = graph.group("stem"), graph.group("block.body")
    assert {m.module for m in stem.producers} >= {"stem", "block.body"}
    values = {g.name: torch.arange(g.size).double() for g in graph.groups}
    plan = sc.plan(graph, values, ratios={"stem": 0.5, "block.body": 0.3})
    assert {name: len(gone) for name, gone in plan.removed.items()} == {
        "stem": int(0.5 * stem.size),
        "block.body": int(0.3 * body.size),
    }
    with pytest.raises(sc.UsageError, match="contradicts"):
        sc.plan(graph, values, ratios={"stem": 0.5, "block.bod*": 0.3})


def graphs() -> list[Any]:
    return [pytest.param(case, id=case.name) for case in CASES.values() if case.expectation == "exact"][::3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", graphs())
def test_every_group_loses_as_much_as_its_own_limit_lets_it(case: Case) -> None:
    """All that may go, against a search over every number of channels in exact arithmetic."""
    graph = sc.trace(case.build().eval(), case.inputs())
    groups = [g for g in graph.groups if g.exact]
    if any(limits.matches(g, other.name, graph) for g in graph.groups for other in groups if other is not g):
        pytest.skip("a layer makes channels of several groups, so that its name stands for all of them")
    rng = np.random.default_rng(0)
    values = {g.name: torch.from_numpy(rng.random(g.size)) for g in groups}
    for round_to, least in ((1, 1), (2, 1), (1, 3)):
        tenths = {g.name: int(rng.integers(0, 11)) for g in groups}
        skipped = {g.name for g in groups if rng.random() < 0.2}
        expected: dict[str, int] = {}
        beyond: dict[str, int] = {}
        for group in groups:
            order = sorted(range(group.size), key=lambda c, n=group.name: float(values[n][c]))
            lost = 0
            counts = np.cumsum([len(s) for s in steps(group, order)]).tolist()
            beyond[group.name] = 2 * counts[-1] - counts[-2] if len(counts) > 1 else group.size
            for count in counts:
                fits = count <= Fraction(tenths[group.name], 10) * group.size and group.size - count >= least
                if fits and (group.size - count) % round_to == 0:
                    lost = count
            if round_to > 1 and tenths[group.name] > 0 and lost == 0:
                tenths[group.name] = 0  # a contradiction, which is for the tests above
            if group.name not in skipped and lost:
                expected[group.name] = lost
        caps = {name: n / 10 for name, n in tenths.items()}
        options: Any = {"max_ratio": caps, "round_to": round_to, "min_channels": least, "skip": sorted(skipped)}
        total = sum(expected.values())
        if not total:
            continue
        target = sc.Target(channels=total / sum(g.size for g in graph.groups))
        for allocation in ("normalized", "global", "uniform"):
            plan = sc.plan(graph, values, target, allocation=allocation, **options)
            assert {name: len(gone) for name, gone in plan.removed.items()} == expected
        with pytest.raises(sc.PlanError, match="all that may go"):
            sc.plan(graph, values, sc.Target(channels=target.fraction + 1e-6), **options)
        # As ratios, the same numbers hold whatever the target; a ratio beyond all that may go is an error.
        within = {g.name for g in groups if Fraction(tenths[g.name], 10) * g.size < beyond[g.name]}
        ratios = {
            name: min(n / 10, 0.9) for name, n in tenths.items() if name in expected and name in within and n < 10
        }
        if ratios and least == 1:
            plan = sc.plan(graph, values, ratios=ratios, round_to=round_to)
            assert {name: len(gone) for name, gone in plan.removed.items()} == {n: expected[n] for n in ratios}


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(sc.PlanError, match="inner: 24 channels need as many scores"):
        sc.plan(GRAPH, scores() | {"inner": torch.rand(5)}, sc.Target(macs=0.5))
    values = torch.rand(24)
    values[3] = float("nan")
    with pytest.raises(sc.PlanError, match="score of channel 3 is not a number"):
        sc.plan(GRAPH, scores() | {"inner": values}, sc.Target(macs=0.5))


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ({"nowhere": [0]}, "no such group"),
        ({"inner": [24]}, "channel 24 does not exist"),
        ({"inner": [-1]}, "channel -1 does not exist"),
        ({"inner": list(range(24))}, "a layer keeps at least 1"),
        ({"mix": [0]}, "4 blocks have to lose equal fractions"),
    ],
)
def test_an_impossible_choice_is_refused(removed: dict[str, list[int]], says: str) -> None:
    with pytest.raises(sc.PlanError) as caught:
        sc.plan_removal(GRAPH, removed)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({}, "exactly one of macs, params, channels, memory and latency; found none"),
        ({"macs": 0.5, "params": 0.5}, "found macs, params"),
        ({"macs": 0.0}, "between 0 and 1; found 0.0"),
        ({"channels": 1.0}, "between 0 and 1; found 1.0"),
        ({"macs": 0.5, "batch": 8}, "batch says nothing of macs"),
        ({"memory": 0.5, "threads": 2}, "threads says nothing of memory"),
        ({"latency": 0.5, "runtime": "tflite"}, "runtime is onnxruntime or eager; found 'tflite'"),
        ({"latency": 0.5, "batch": 0}, "batch is a whole number from 1 up; found 0"),
    ],
)
def test_a_target_is_one_fraction_with_its_setting(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(sc.UsageError, match="target: .*" + re.escape(says)):
        sc.Target(**given_)


def test_a_target_is_made_again_from_what_was_given() -> None:
    target = sc.Target(latency=0.5, threads=2)
    assert target.setting == {"batch": 8, "runtime": "onnxruntime", "threads": 2}
    assert sc.Target(**target.to_dict()) == target
    assert target.to_dict() == {"latency": 0.5, "threads": 2}
    assert sc.Target(memory=0.5).setting == {"batch": 8}


def test_memory_is_counted_at_the_batch_asked_for() -> None:
    plan = sc.plan(GRAPH, scores(), sc.Target(memory=0.4, batch=16))
    left = [run_time_memory(GRAPH, p, 16) for p in (plan, None)]
    assert sc.Target(memory=0.4, batch=16).removed(GRAPH, plan) == 1 - left[0] / left[1] >= 0.4


@pytest.mark.parametrize("request_", [{"target": sc.Target(latency=0.5)}, {"round_to": "auto"}])
def test_times_are_asked_for_where_they_are_needed(request_: Any) -> None:
    with pytest.raises(sc.UsageError, match=r"pass costs=secateur\.latency\(model, graph\)"):
        sc.plan(GRAPH, scores(), **{"target": sc.Target(macs=0.5), **request_})


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_plan_survives_json(seed: int) -> None:
    plan = sc.plan(GRAPH, scores(seed), sc.Target(params=0.4))
    assert sc.PruningPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[]", "no pruning plan"),
        ('{"kept_outputs": {}}', "no format version"),
        (json.dumps({"version": FORMAT_VERSION + 1}), "newer"),
        (json.dumps({"version": 1, "extra": 0}), "extra: no such key"),
        (json.dumps({"version": 1, "kept_outputs": {"a": ["x"]}}), "damaged"),
        (json.dumps({"version": 1, "kept_outputs": 3}), "damaged"),
    ],
)
def test_a_damaged_plan_is_refused(text: str, says: str) -> None:
    with pytest.raises(sc.PlanError) as caught:
        sc.PruningPlan.from_json(text)
    assert says in str(caught.value)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = sc.plan_removal(GRAPH, {"inner": [0, 5]})
    with pytest.raises(sc.PlanError, match="no such tensor"):
        sc.apply(nn.Sequential(nn.Conv2d(3, 4, 3)), plan)
    small = sc.apply(Net(), plan)
    with pytest.raises(sc.PlanError, match="made for shape"):
        sc.apply(small, plan)


@pytest.mark.parametrize(
    "mask", [[True] + [False] * 15, np.arange(16) < 1, torch.arange(16) < 1], ids=["list", "numpy", "torch"]
)
def test_a_mask_is_no_list_of_channels(mask: Any) -> None:
    with pytest.raises(sc.PlanError, match=r"inner: a mask is given; give the indices .*mask\.nonzero\(\)"):
        sc.plan_removal(GRAPH, {"inner": mask})


def test_where_nothing_can_go_the_reason_is_told() -> None:
    x = torch.randn(1, 3, 6, 6)
    graph = sc.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    with pytest.raises(sc.PlanError, match="trace lists the reasons, such as: is returned by the model"):
        sc.plan(graph, {}, sc.Target(channels=0.3))


def test_options_given_whole_are_told_to_be_keywords() -> None:
    graph = sc.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)).eval(), torch.rand(1, 3, 8, 8))
    scores = sc.score(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)), graph, "l1")
    with pytest.raises(sc.UsageError, match="options: give the fields of Options as keywords, such as round_to=8"):
        sc.plan(graph, scores, sc.Target(macs=0.5), options=sc.Options(round_to=4))  # type: ignore[call-arg]
