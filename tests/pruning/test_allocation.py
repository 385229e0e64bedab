"""Allocation by a table: costs as sums of products, the knapsack against brute force, and plans that meet a target."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur as sc
from secateur.errors import UsageError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.graph.steps import steps
from secateur.pruning.allocation import Choices, allocate, choices, costs_of, knapsack
from secateur.pruning.limits import totals
from tests.cases import CASES, Case
from tests.pruning.test_planning import GRAPH, SIZES, scores

KINDS = ("macs", "params", "memory", "channels")


@dataclass
class Table:
    """Damage that was made up."""

    sizes: dict[str, int]
    damage: dict[str, dict[int, float]] = field(default_factory=dict)


def made_up(graph: ChannelGraph, seed: int) -> Table:
    """Damage that grows faster the more is gone, at five widths of each group."""
    draw = np.random.default_rng(seed)
    table = Table({g.name: g.size for g in graph.groups})
    for group in graph.groups:
        able = totals(group)
        at = sorted({able[i] for i in np.linspace(0, len(able) - 1, 5).round().astype(int)}) if able else []
        scale, power = draw.uniform(0.1, 2.0), draw.uniform(1.0, 3.0)
        table.damage[group.name] = {n: scale * (n / group.size) ** power for n in at}
    return table


def counted(graph: ChannelGraph, what: str, removed: dict[str, list[int]]) -> float:
    if what == "channels":
        return sum(g.size - len(removed.get(g.name, ())) for g in graph.groups)
    count = {"macs": cost.macs, "params": cost.parameters, "memory": cost.run_time_memory}[what]
    return count(graph, PruningPlan(removed=removed))


def is_even(graph: ChannelGraph) -> bool:
    """Tell whether every dimension and every layer's call holds each channel of a group equally often."""
    sides = [s for port in graph.layers for s in ((port.in_group, port.in_channel), (port.out_group, port.out_channel))]
    for of_group, of_channel in sides:
        for i, group in enumerate(graph.groups if of_group is not None else ()):
            held = np.bincount(of_channel[of_group == i], minlength=group.size)
            if len(set(held.tolist())) > 1:
                return False
    members = ((np.bincount(m.channels, minlength=g.size)) for g in graph.groups for m in g.members)
    return all(len(set(held.tolist())) == 1 for held in members)


@pytest.mark.parametrize("what", KINDS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_costs_are_those_of_plans(what: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    removed, counts = {}, np.zeros(len(GRAPH.groups))
    for i, group in enumerate(GRAPH.groups):
        counts[i] = draw.choice([0, *totals(group)])
        removed[group.name] = list(range(int(counts[i])))
    expected = counted(GRAPH, what, {name: gone for name, gone in removed.items() if gone})
    assert float(costs_of(GRAPH, what)(counts)) == pytest.approx(expected, rel=1e-12)


def cases() -> list[Any]:
    return [pytest.param(case, id=case.name) for case in CASES.values() if case.expectation == "exact"][::12]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", cases())
def test_costs_are_those_of_plans_of_other_networks(case: Case) -> None:
    """All channels of a group go, but for those that have to stay, and any number of them where that is even."""
    graph = sc.trace(case.build().eval(), case.inputs())
    if not is_even(graph):
        pytest.skip("a layer reads only some of a group's channels, so that it matters which go")
    removed: dict[str, list[int]] = {}
    for group in graph.groups:
        found = steps(group, range(group.size))
        gone = [c for step in found[: max(1, len(found) // 2)] for c in step]
        if gone:
            removed[group.name] = sorted(gone)
    counts = np.array([len(removed.get(g.name, ())) for g in graph.groups], dtype=float)
    for what in KINDS:
        found_cost = float(costs_of(graph, what)(counts))
        assert found_cost == pytest.approx(counted(graph, what, removed), rel=1e-9), what


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_knapsack_is_solved_exactly(data: Any) -> None:
    groups = data.draw(st.integers(1, 4))
    savings, damage = [], []
    for _ in range(groups):
        options = data.draw(st.integers(1, 4))
        savings.append(np.array([0, *data.draw(st.lists(st.integers(0, 40), min_size=options, max_size=options))]))
        harm = data.draw(st.lists(st.integers(0, 9), min_size=options, max_size=options))
        damage.append(np.array([0.0, *harm]))
    need = data.draw(st.sampled_from([1, 16, 32, 64]))
    ways = list(product(*(range(len(s)) for s in savings)))
    enough = [w for w in ways if sum(int(s[p]) for s, p in zip(savings, w, strict=True)) >= need]
    picked = knapsack(savings, damage, need)
    if not enough:
        assert picked == [int(s.argmax()) for s in savings]
        return

    def harm_of(way: Any) -> float:
        return sum(float(d[p]) for d, p in zip(damage, way, strict=True))

    assert tuple(picked) in enough
    assert harm_of(picked) == min(map(harm_of, enough))


def test_damage_never_falls_where_more_goes() -> None:
    table = Table({"a": 8}, {"a": {2: 0.5, 4: 0.25, 6: 2.0}})
    found = choices(table, "a", 8, range(1, 8))
    assert found.removed.tolist() == [0, 1, 2, 3, 4, 5, 6]  # nothing is assumed of 7, which was not measured
    assert found.damage.tolist() == [0.0, 0.25, 0.5, 0.5, 0.5, 1.25, 2.0]


@pytest.mark.parametrize("what", ["macs", "params", "channels", "memory"])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(2))
def test_a_plan_by_a_table_meets_its_target_at_nearly_the_least_damage(what: str, fraction: float, seed: int) -> None:
    table = made_up(GRAPH, seed)
    target = sc.Target(**{what: fraction})
    plan = sc.plan(GRAPH, scores(seed), target, allocation=table)
    assert target.removed(GRAPH, plan) >= fraction
    own = [choices(table, g.name, g.size, totals(g)) for g in GRAPH.groups]
    grid = np.array(list(product(*(one.removed.tolist() for one in own))), dtype=float)
    costs = costs_of(GRAPH, what, target.setting.get("batch", 1))
    whole = float(costs(np.zeros(len(own))))
    enough = grid[costs(grid) <= (1 - fraction) * whole * (1 + 1e-12)]

    def damage(counts: np.ndarray) -> np.ndarray:
        return sum(np.interp(counts[..., i], one.removed, one.damage) for i, one in enumerate(own))

    given_up = np.array([len(plan.removed.get(g.name, ())) for g in GRAPH.groups], dtype=float)
    assert float(damage(given_up)) <= 1.05 * float(damage(enough).min()) + 1e-12


def test_limits_hold_with_a_table() -> None:
    table = made_up(GRAPH, 0)
    options: dict[str, Any] = {"round_to": 4, "skip": ["hidden"], "max_ratio": {"inner": 0.5}, "ratios": {"mix": 0.25}}
    plan = sc.plan(GRAPH, scores(), sc.Target(macs=0.4), allocation=table, **options)
    left = {name: size - len(plan.removed.get(name, ())) for name, size in SIZES.items()}
    assert left["hidden"] == SIZES["hidden"]
    assert left["mix"] == 12
    assert left["inner"] >= 12
    assert all(n % 4 == 0 for n in left.values())
    assert sc.Target(macs=0.4).removed(GRAPH, plan) >= 0.4


def test_a_target_out_of_reach_is_refused_with_what_is_possible() -> None:
    with pytest.raises(sc.PlanError, match=r"cannot remove 0.99 of the macs; all that may go is 0\.\d"):
        sc.plan(GRAPH, scores(), sc.Target(macs=0.99), allocation=made_up(GRAPH, 0), skip=["stem"])


def test_a_table_of_another_network_is_refused() -> None:
    other = made_up(GRAPH, 0)
    other.sizes["inner"] += 1
    with pytest.raises(sc.PlanError, match="inner: the allocation's table knows 25 channels of it, and it has 24"):
        sc.plan(GRAPH, scores(), sc.Target(macs=0.3), allocation=other)
    with pytest.raises(sc.UsageError, match="allocation: expected normalized, global, uniform or a table"):
        sc.plan(GRAPH, scores(), sc.Target(macs=0.3), allocation="best")  # type: ignore[arg-type]


def test_all_that_may_go_goes_where_that_is_too_little() -> None:
    found = [choices(made_up(GRAPH, 0), g.name, g.size, totals(g)) for g in GRAPH.groups]
    costs = costs_of(GRAPH, "macs")
    start = np.zeros(len(found))
    removed = allocate(GRAPH, costs, found, start, 2 * float(costs(start)))
    assert removed.tolist() == [one.removed[-1] for one in found]


def stairs(seed: int) -> tuple[list[np.ndarray], Any]:
    """Make up a chain of layers whose times grow with widths in and out by uneven stairs."""
    draw = np.random.default_rng(seed)
    grids = [np.cumsum(np.cumsum(draw.integers(0, 4, (5, 5)), 0), 1) + 1.0 for _ in range(len(GRAPH.groups) + 1)]

    def costs(removed: np.ndarray) -> np.ndarray:
        left = [np.floor(4 - removed[..., i] + 1e-9).astype(int) for i in range(len(GRAPH.groups))]
        whole = np.full_like(left[0], 4)
        ends = zip([whole, *left], [*left, whole], grids, strict=True)
        return np.asarray(sum(grid[a, b] for a, b, grid in ends), dtype=float)

    return grids, costs


@given(seed=st.integers(0, 100_000), share=st.floats(0.1, 0.9))
@settings(max_examples=40, deadline=None)
def test_times_by_stairs_are_allocated_at_nearly_the_least_damage(seed: int, share: float) -> None:
    _, costs = stairs(seed)
    draw = np.random.default_rng(seed + 1)
    harm = [np.concatenate(([0.0], np.cumsum(draw.uniform(0.1, 1.0, 4)))) for _ in GRAPH.groups]
    found = [Choices(g.name, np.arange(5), own) for g, own in zip(GRAPH.groups, harm, strict=True)]
    start = np.zeros(len(found))
    grid = np.array(list(product(range(5), repeat=len(found))), dtype=float)
    times = costs(grid)
    whole, least = float(costs(start)), float(times.min())
    budget = whole - share * (whole - least)
    removed = allocate(GRAPH, costs, found, start, whole - budget)
    damage = sum(own[grid[:, i].astype(int)] for i, own in enumerate(harm))
    mine = sum(float(own[int(removed[i])]) for i, own in enumerate(harm))
    assert float(costs(removed)) <= budget * (1 + 1e-12)
    assert mine <= 1.25 * float(damage[times <= budget].min()) + 1e-9


def test_a_misspelt_allocation_and_a_misspelt_option_say_what_is_meant():
    with pytest.raises(UsageError, match=r"found 'uniforn'; did you mean uniform\?"):
        sc.Options(allocation="uniforn")
    with pytest.raises(UsageError, match=r"^round_too: no such option; did you mean round_to\?$"):
        sc.Options(round_too=4)
    assert dataclasses.replace(sc.Options(round_to=4), min_channels=2) == sc.Options(round_to=4, min_channels=2)
    assert pickle.loads(pickle.dumps(sc.Options(skip="a"))) == sc.Options(skip=("a",))
