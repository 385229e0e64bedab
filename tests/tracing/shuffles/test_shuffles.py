"""Shuffled streams, followed once more in lists of names: what is left, in which order, and in how many steps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from tests import oracle
from tests.cases.reordering import stage
from tests.cases.table import conv

Name = tuple[str, int]
"""A filter: the layer that makes it, and its number."""


def traced(half: int, units: int) -> tuple[Any, Any, Any, Any]:
    """Return a stage in fp64, its inputs, its graph, and the group of its stream."""
    torch.manual_seed(0)
    model, inputs = (
        oracle.randomise(stage(half, units, False, conv(2 * half, 4))).eval(),
        oracle.doubled(torch.randn(2, 3, 6, 5)),
    )
    graph = sc.trace(model, inputs)
    return model, inputs, graph, graph.group("left")


def follow(units: int, left: dict[str, list[Name]]) -> tuple[list[list[Name]], list[Name]]:
    """Run the stage on names: what each unit works on, and what the head reads."""

    def riffle(names: list[Name]) -> list[Name]:
        first, second = names[: len(names) // 2], names[len(names) // 2 :]
        assert len(first) == len(second)
        return [name for pair in zip(first, second, strict=True) for name in pair]

    stream, read = riffle(left["left"] + left["right"]), []
    for unit in range(units):
        middle = (len(stream) + 1) // 2  # chunk
        read.append(stream[middle:])
        stream = riffle(stream[:middle] + left[f"units.{unit}.body.3"])
    return read, stream


def makers(group: Any) -> dict[Name, int]:
    """Return the channel of every filter that makes the stream."""
    return {(m.module, int(p)): int(c) for m in group.producers for p, c in zip(m.positions, m.channels, strict=True)}


@pytest.mark.parametrize(("half", "units"), [(7, 2), (10, 3), (12, 4), (29, 5)])
def test_what_is_left_is_what_each_layer_read_in_the_order_of_the_pruned_stream(half: int, units: int) -> None:
    model, inputs, graph, group = traced(half, units)
    channel_of = makers(group)
    layers = sorted({layer for layer, _ in channel_of})
    whole, whole_end = follow(units, {layer: [(layer, i) for i in range(half)] for layer in layers})
    rng = np.random.default_rng(half)
    for row in group.schedule:
        gone = [c for b, n in enumerate(row) for c in rng.permutation(np.flatnonzero(group.blocks == b))[:n].tolist()]
        kept = {name for name, channel in channel_of.items() if channel not in gone}
        read, end = follow(units, {layer: sorted(n for n in kept if n[0] == layer) for layer in layers})
        plan = sc.plan_removal(graph, {"left": gone})
        for unit, names in enumerate(read):
            assert set(names) == kept & set(whole[unit])
            positions = plan.kept_inputs[f"units.{unit}.body.0"]
            assert [whole[unit][p] for p in positions] == names
        assert [whole_end[p] for p in plan.kept_inputs["head"]] == end
        assert oracle.judge(model, sc.apply(model, plan), plan, oracle.fresh(inputs, 1)).exact


def test_a_plan_follows_the_schedule_keeps_its_order_in_json_and_has_no_choice_beside() -> None:
    model, inputs, graph, group = traced(10, 3)
    scores = {g.name: torch.rand(g.size, generator=torch.Generator().manual_seed(1)) for g in graph.groups}
    for fraction in (0.2, 0.5, 0.7):
        plan = sc.plan(graph, scores, sc.Target(macs=fraction))
        counts = np.bincount(group.blocks[plan.removed["left"]], minlength=int(group.blocks.max()) + 1)
        assert (group.schedule == counts).all(1).any()
        again = sc.PruningPlan.from_dict(json.loads(plan.to_json()))
        assert again.kept_inputs == plan.kept_inputs
        assert sc.verify(model, sc.apply(model, again), again, inputs).exact
    assert any(kept != sorted(kept) for kept in plan.kept_inputs.values())
    with pytest.raises(sc.PlanError, match="the nearest that they can is"):
        sc.plan_removal(graph, {"left": [0]})
    assert "given steps" in group.constraint
