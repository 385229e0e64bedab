"""Runs that skip what lies before the first change give, bit for bit, what whole runs give; and they do skip it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.compensation import replay
from secateur.compensation.cells import Cells
from secateur.compensation.replay import Calls
from tests.cases import Case, Net, one_in


def by_whole_runs(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> sc.Sensitivity:
    with monkeypatch.context() as patch:
        patch.setattr(Calls, "before", lambda self, changed: None)
        return sc.sensitivity(*args, **kwargs)


def batch_of(case: Case) -> Any:
    inputs = case.inputs()
    return inputs if isinstance(inputs, dict) else (inputs,)


@pytest.mark.filterwarnings("ignore")  # what torch says of old layers is no business of this test
@pytest.mark.parametrize("case", one_in(5), ids=lambda case: case.name)
def test_tables_are_those_of_whole_runs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = case.build().eval()
    graph = sc.trace(model, case.inputs())
    data = [batch_of(case), batch_of(case)]
    options: dict[str, Any] = {"levels": 2, "inexact": True}
    table = sc.sensitivity(model, graph, data, **options)
    whole = by_whole_runs(monkeypatch, model, graph, data, **options)
    assert repr(table.to_dict()) == repr(whole.to_dict())  # a damage may be NaN, which equals nothing
    assert table.damage.keys() == {group.name for group in graph.groups}


def chain(**parts: nn.Module) -> Net:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(6, 6, 3), "c": nn.Conv2d(6, 5, 3), **parts}

    def forward(self: Net, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu_()).relu_()).mean((2, 3))

    return Net(forward, **parts)


DATA = [torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def test_what_lies_before_a_group_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain().eval()
    graph = sc.trace(model, DATA[0])
    runs = 0
    original = nn.Conv2d._conv_forward

    def counted(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal runs
        runs += weight is model.a.weight  # which its cut copies share
        return original(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    sc.sensitivity(model, graph, DATA, levels=5, groups=["b"])
    # Of the first layer: twice for the reference, twice for the moments, once for the calls, once for what follows each
    # layer, twice to keep its outputs, once to compare with a whole run; never for any of the five widths.
    assert runs == 9


def test_outermost_calls_are_skipped_and_none_that_hold_a_change() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    batch = next(sc.criteria.feature_maps.batches(DATA, "cpu"))
    calls = replay.observe(model, batch)
    assert calls.before(["1.1"]) == replay.Skip(("0", "1.0"), "1.1")
    assert calls.before(["1.0", "1.1"]) == replay.Skip(("0",), "1.0")
    assert calls.before(["0.0"]) is None
    assert calls.before([]) is None
    model[0][0].register_forward_hook(lambda *_: None)
    assert replay.observe(model, batch).before(["1.0"]) == replay.Skip(("0",), "1.0")
    model[0].register_forward_hook(lambda *_: None)
    assert replay.observe(model, batch).before(["1.0"]) == replay.Skip(("0.1",), "1.0")


def keeps_its_input_on_the_side(self: Net, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.c(self.b(y) * self.a.seen.mean()).mean((2, 3))


def uses_what_a_module_has_changed_in_place(self: Net, x: Tensor) -> Tensor:
    y = self.a(x)
    self.act(y)
    return self.c(self.b(y)).mean((2, 3))


def writes_into_what_was_kept(self: Net, x: Tensor) -> Tensor:
    y = self.a(x)
    z = self.c(self.b(y)).mean((2, 3))
    y.zero_()
    return z


class Seeing(nn.Conv2d):
    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)


@pytest.mark.parametrize(
    ("forward", "skips"),
    [
        (keeps_its_input_on_the_side, False),
        (uses_what_a_module_has_changed_in_place, False),
        (writes_into_what_was_kept, True),
    ],
)
def test_odd_networks_give_what_whole_runs_give(forward: Any, skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(a=Seeing(3, 6, 3), act=nn.ReLU(inplace=True)).eval()
    model.body = forward
    graph = sc.trace(model, DATA[0])
    found: list[bool] = []
    by_parts = Cells._by_parts

    def watched(*args: Any) -> Any:
        damage = by_parts(*args)
        found.append(damage is not None)
        return damage

    monkeypatch.setattr(Cells, "_by_parts", watched)
    table = sc.sensitivity(model, graph, DATA, levels=3, groups=["b"])
    assert table == by_whole_runs(monkeypatch, model, graph, DATA, levels=3, groups=["b"])
    assert found == [skips]
    assert min(table.damage["b"].values()) > 0
