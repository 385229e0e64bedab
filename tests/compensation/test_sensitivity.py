"""What each group's loss does: a cell against cutting, refitting and measuring by hand; files; and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.compensation.sensitivity import refined
from secateur.graph.steps import steps
from tests.pruning.test_planning import Net


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def images(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 4, 4, generator=generator) for _ in range(count)]


MODEL, DATA = network(), images()
GRAPH = sc.trace(MODEL, DATA[0])


def by_hand(group: str, removed: list[int]) -> tuple[nn.Module, sc.PruningPlan]:
    """Cut a group alone, and refit what reads it on every position."""
    plan = sc.plan_removal(GRAPH, {group: removed})
    return sc.apply(MODEL, plan, compensate="least_squares", data=DATA, exact=True), plan


@torch.no_grad()
def divergence(small: nn.Module) -> float:
    p = torch.cat([MODEL(x) for x in DATA]).double().div(4).softmax(1)
    q = torch.cat([small(x) for x in DATA]).double().div(4).softmax(1)
    return float((p * (p / q).log()).sum() / len(p))


# Of ``stem`` a later reader is fed what an earlier one, refitted, makes: there the moments of the unpruned network
# are near those of the pruned one, not equal.
@pytest.mark.parametrize(("group", "near"), [("inner", 1e-4), ("mix", 1e-4), ("hidden", 1e-4), ("stem", 0.6)])
def test_a_cell_is_what_cutting_refitting_and_measuring_give(group: str, near: float) -> None:
    scores = {g.name: torch.arange(g.size).float() for g in GRAPH.groups}
    table = sc.sensitivity(MODEL, GRAPH, DATA, scores=scores, levels=4, groups=[group])
    assert table.measure == "kl"
    assert table.images == 24
    (own,) = table.damage.values()
    ends = steps(GRAPH.group(group), range(GRAPH.group(group).size))
    assert len(own) == min(4, len(ends))
    for count, damage in own.items():
        removed = [c for step in ends for c in step][:count]
        small, _ = by_hand(group, sorted(removed))
        assert damage == pytest.approx(divergence(small), rel=near, abs=1e-7), count


def test_a_cell_of_a_layer_without_a_bias_has_the_running_mean_take_up_its_shift() -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(24, 5)).eval()
    graph = sc.trace(model, DATA[0])
    scores = {g.name: torch.arange(g.size).float() for g in graph.groups}
    before = model[3].running_mean.clone()
    table = sc.sensitivity(model, graph, DATA, scores=scores, levels=2, groups=["0"])
    assert torch.equal(model[3].running_mean, before)
    small = sc.apply(model, sc.plan_removal(graph, {"0": [0, 1, 2, 3]}), "least_squares", DATA, exact=True)
    assert float((small[3].running_mean - before).abs().max()) > 0.01
    p, q = (torch.cat([net(x) for x in DATA]).double().div(4).softmax(1) for net in (model, small))
    assert table.damage["0"][4] == pytest.approx(float((p * (p / q).log()).sum() / len(p)), rel=1e-3)


def test_a_refined_table_knows_more_around_the_widths_planned() -> None:
    scores = {g.name: torch.arange(g.size).float() for g in GRAPH.groups}
    table = sc.sensitivity(MODEL, GRAPH, DATA, scores=scores, levels=3, groups=["inner", "hidden"])
    assert list(table.damage["inner"]) == [8, 15, 23]
    assert list(table.damage["hidden"]) == [4, 7, 11]
    plan = sc.plan_removal(GRAPH, {"inner": list(range(15))})
    found = refined(MODEL, GRAPH, DATA, table, plan, scores=scores)
    assert list(found.damage["inner"]) == [8, 11, 15, 19, 23]  # halfway to 8 and to 23
    assert list(found.damage["hidden"]) == [2, 4, 7, 11]  # halfway from 0 to 4
    everything = sc.sensitivity(MODEL, GRAPH, DATA, scores=scores, levels=23, groups=["inner"]).damage["inner"]
    assert found.damage["inner"] == {count: everything[count] for count in found.damage["inner"]}
    between = sc.plan_removal(GRAPH, {"inner": list(range(10))})
    assert list(refined(MODEL, GRAPH, DATA, table, between, scores=scores).damage["inner"]) == [8, 9, 10, 12, 15, 23]
    with pytest.raises(sc.PlanError, match="measured with other weights"):
        refined(network().train().requires_grad_(False).half().float(), GRAPH, DATA, table, plan)
    with pytest.raises(sc.UsageError, match="refine it as it was"):
        refined(MODEL, GRAPH, DATA[:2], table, plan, scores=scores)


def test_the_network_is_left_as_found() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    sc.sensitivity(model, GRAPH, DATA, levels=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    whole = sc.sensitivity(MODEL, GRAPH, DATA, levels=3)
    path = tmp_path / "table.json"

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.sensitivity(MODEL, GRAPH, DATA, levels=3, path=path, progress=stop)
    half = sc.Sensitivity.load(path)
    assert len(half.damage) == 2
    seen: list[int] = []
    resumed = sc.sensitivity(MODEL, GRAPH, DATA, levels=3, path=path, progress=lambda done, of: seen.append(done))
    assert seen[0] == 2
    assert resumed == whole == sc.Sensitivity.load(path)


def test_a_file_of_other_weights_data_or_options_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = sc.sensitivity(MODEL, GRAPH, DATA, levels=2, path=path)
    other = network()
    with torch.no_grad():
        other.head.bias += 1  # type: ignore[union-attr,operator]
    asked: list[tuple[nn.Module, list[Tensor], int]] = [(other, DATA, 2), (MODEL, images(2), 2), (MODEL, DATA, 3)]
    for model, data, levels in asked:
        with pytest.raises(sc.UsageError, match="a table of another network, other data or options"):
            sc.sensitivity(model, GRAPH, data, levels=levels, path=path)
    table.require_of(MODEL)
    with pytest.raises(sc.PlanError, match="measured with other weights"):
        table.require_of(other)
    path.write_text('{"format_version": 1, "damage": 3}')
    with pytest.raises(sc.UsageError, match="no table of sensitivity"):
        sc.Sensitivity.load(path)
    with pytest.raises(sc.UsageError, match="can't be read"):
        sc.Sensitivity.load(tmp_path / "absent.json")


def test_outputs_that_are_no_logits_are_compared_by_their_squares() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            x = self.body(x).relu()
            return {"map": self.head(x), "count": len(x)}

    model = Two().eval()
    graph = sc.trace(model, DATA[0])
    table = sc.sensitivity(model, graph, DATA, levels=7)
    assert table.measure == "squared error"
    plan = sc.plan_removal(graph, {"body": [0]})
    small = sc.apply(model, plan, compensate="least_squares", data=DATA, exact=True)
    with torch.no_grad():
        wanted, found = (torch.cat([net(x)["map"] for x in DATA]) for net in (model, small))
    scores = {"body": torch.tensor([0.0, *range(1, 8)])}
    first = sc.sensitivity(model, graph, DATA, levels=7, scores=scores).damage["body"][1]
    pairs = zip(wanted.split(8), found.split(8), strict=True)
    per_batch = [(a - b).square().sum() / a.square().sum() for a, b in pairs]
    assert first == pytest.approx(float(torch.stack(per_batch).mean()), rel=1e-4)


def test_a_loss_of_ones_own_is_what_rises() -> None:
    labels = [torch.randint(5, (8,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    data = list(zip(DATA, labels, strict=True))
    loss = nn.functional.cross_entropy
    scores = {g.name: torch.arange(g.size).float() for g in GRAPH.groups}
    table = sc.sensitivity(MODEL, GRAPH, data, scores=scores, levels=2, loss=loss, groups=["inner"])
    assert table.measure == "loss"
    ((count, damage), _) = table.damage["inner"].items()
    small, _ = by_hand("inner", list(range(count)))
    with torch.no_grad():
        rise = [float(loss(small(x), y) - loss(MODEL(x), y)) for x, y in data]
    assert damage == pytest.approx(sum(rise) / 3, rel=1e-3, abs=1e-6)
    with pytest.raises(sc.UsageError, match="loss needs labels"):
        sc.sensitivity(MODEL, GRAPH, DATA, loss=loss)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(sc.UsageError, match="levels is 0"):
        sc.sensitivity(MODEL, GRAPH, DATA, levels=0)
    with pytest.raises(sc.DataError, match=r"empty|no data"):
        sc.sensitivity(MODEL, GRAPH, [])
    with pytest.raises(sc.DataError, match="does not fit the model"):
        sc.sensitivity(MODEL, GRAPH, [torch.randn(2, 4, 4, 4)])


class Kept:
    """Tables as others find them: through JSON; counts what was measured."""

    def __init__(self) -> None:
        self.tables: dict[str, str] = {}
        self.measured = 0

    def __call__(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.tables:
            self.measured += 1
            self.tables[name] = json.dumps(measure())
        return dict(json.loads(self.tables[name]))


def test_a_table_that_is_shared_is_measured_once_and_the_same() -> None:
    kept = Kept()
    alone = sc.sensitivity(MODEL, GRAPH, DATA, levels=2)
    plan = sc.plan(GRAPH, sc.score(MODEL, GRAPH, "l2"), sc.Target(macs=0.3), allocation=alone)
    finer = refined(MODEL, GRAPH, DATA, alone, plan)
    for _ in range(2):
        assert sc.sensitivity(MODEL, GRAPH, DATA, levels=2, share=kept) == alone
        assert refined(MODEL, GRAPH, DATA, alone, plan, share=kept) == finer
    assert kept.measured == 2


def test_a_table_of_anything_else_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    changed = copy.deepcopy(MODEL)
    with torch.no_grad():
        changed.stem.weight[0, 0, 0, 0] += 1  # type: ignore[operator]
    asked: list[tuple[nn.Module, list[Tensor], int]] = [
        (MODEL, DATA, 2), (changed, DATA, 2), (MODEL, DATA[:2], 2), (MODEL, DATA, 3)
    ]  # fmt: skip
    alone = [sc.sensitivity(model, GRAPH, data, levels=levels) for model, data, levels in asked]
    for own, (model, data, levels) in zip(alone, asked, strict=True):
        assert sc.sensitivity(model, GRAPH, data, levels=levels, share=kept) == own
    assert kept.measured == len(kept.tables) == 4
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)  # another order of sums
    sc.sensitivity(MODEL, GRAPH, DATA, levels=2, share=kept)
    assert kept.measured == 5
    # What stands under a table's name and is none of it is not believed.
    mine = asdict(alone[0])
    for wrong in (asdict(alone[1]), {}, {**mine, "damage": {}}, {**mine, "damage": {"stem": {"1": "x"}}}):
        assert sc.sensitivity(MODEL, GRAPH, DATA, levels=2, share=lambda name, measure, wrong=wrong: wrong) == alone[0]
