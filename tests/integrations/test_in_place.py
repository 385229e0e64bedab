"""A network pruned in place: everyone who holds a part of it, or its parameters, goes on with what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import secateur as sc
from secateur.errors import CheckpointError, PlanError, UsageError
from secateur.integrations.in_place import Schedule, prune_in_place

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.list = [self.twice]  # what a module holds beside its table of modules
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.list[0](self.twice(x)).relu()
        out: Tensor = self.last(x).mean((2, 3))
        return out


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Net(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x))
        return out


def trained(kind: Any, **options: Any) -> tuple[Whole, Any]:
    torch.manual_seed(0)
    whole = Whole()
    optimizer = kind([{"params": whole.net.parameters(), "lr": 0.05}, {"params": whole.head.parameters()}], **options)
    step(whole, optimizer)
    return whole, optimizer


def step(whole: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    whole(X).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "wrapped"),
    [(torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, False), (torch.optim.Adam, {"lr": 0.01}, True)],
)
def test_the_same_objects_go_on_as_a_new_network_with_a_carried_optimizer_would(
    kind: Any, options: dict[str, Any], wrapped: bool
) -> None:
    whole, optimizer = trained(kind, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    held = dict(whole.named_modules())
    result = sc.prune(whole.net, X, sc.Target(channels=0.5))

    # The same in another way: a network and an optimizer of its own, as a loop of one's own would carry them.
    other, single = trained(kind, **options)
    alone = kind(other.net.parameters(), **{**options, "lr": 0.05})
    alone.state = {p: s for p, s in single.state.items() if p in set(other.net.parameters())}
    expected = sc.carry_optimizer(alone, other.net, result.model, result.plan)

    given = Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer
    prune_in_place(whole.net, result.model, result.plan, [given])
    assert dict(whole.named_modules()) == held
    assert whole.net.stem is held["net.stem"]
    assert whole.net.stem.out_channels == 4
    assert whole.net.list[0] is whole.net.twice or vars(whole.net.list[0]) is vars(whole.net.twice)
    assert whole.net.state_dict().keys() == result.model.state_dict().keys()
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in whole.parameters()]
    assert set(optimizer.state) == set(whole.parameters())
    for p, q in zip(whole.net.parameters(), expected.param_groups[0]["params"], strict=True):
        assert optimizer.state[p].keys() == expected.state[q].keys()
        for key, value in expected.state[q].items():
            assert torch.equal(optimizer.state[p][key], value), key
    before = whole.net.stem.weight.clone()
    step(whole, given)
    scheduler.step()
    assert not torch.equal(before, whole.net.stem.weight)
    assert optimizer.param_groups[0]["lr"] == 0.025
    whole.eval()
    assert not any(m.training for m in whole.modules())


def test_an_average_is_cut_and_what_cannot_be_leaves_everything_as_it_was() -> None:
    whole, optimizer = trained(torch.optim.SGD, lr=0.01, momentum=0.9)
    average = AveragedModel(whole)
    result = sc.prune(whole.net, X, sc.Target(channels=0.5))
    whole_state = {name: value.clone() for name, value in whole.state_dict().items()}
    optimizer.state[whole.net.stem.weight]["strange"] = torch.zeros(3, 5)
    with pytest.raises(PlanError, match="strange"):
        prune_in_place(whole.net, result.model, result.plan, [optimizer], [average.module.net])
    assert all(torch.equal(value, whole_state[name]) for name, value in whole.state_dict().items())
    assert average.module.net.stem.out_channels == 8
    del optimizer.state[whole.net.stem.weight]["strange"]
    prune_in_place(whole.net, result.model, result.plan, [optimizer], [average.module.net])
    average.update_parameters(whole)
    kept = result.plan.kept_outputs["stem"]
    assert torch.equal(average.module.net.stem.weight, (whole_state["net.stem.weight"][kept] * 2) / 2)


def test_a_schedule_prunes_once_and_is_restored_on_a_fresh_network_alone() -> None:
    torch.manual_seed(0)
    schedule = Schedule({1: sc.Target(channels=0.25), 2: sc.Target(channels=0.5)}, X, {"method": "l1"})
    net = Net()
    assert [schedule.prune(epoch, net, []) for epoch in (0, 1, 1, 2)] == [False, True, False, True]
    assert net.stem.out_channels < 6
    state = schedule.state(net)

    fresh, again = Net(), Schedule({1: sc.Target(channels=0.25)}, X, {})
    again.restore(state, fresh)
    assert again.done == [1, 2]
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(X), net.eval()(X))
    again.restore(state, fresh)  # what was pruned so already stays as it is
    with pytest.raises(CheckpointError, match="otherwise, or further"):
        again.restore({"done": [], "plans": state["plans"][:1]}, fresh)
    with pytest.raises(CheckpointError, match="holds no plans"):
        again.restore({"done": [1]}, Net())
    with pytest.raises(CheckpointError, match="has no such tensor"):
        again.restore(state, nn.Conv2d(3, 8, 3))


@pytest.mark.parametrize("targets", [{-1: sc.Target(macs=0.5)}, {"1": sc.Target(macs=0.5)}, {1: 0.5}])
def test_a_schedule_of_anything_else_is_refused(targets: Any) -> None:
    with pytest.raises(UsageError, match="maps epochs"):
        Schedule(targets, X, {})
