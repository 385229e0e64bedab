"""Surgery: what is cut, what follows, what stays; and what an optimizer keeps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.pruning import surgery
from secateur.pruning.surgery import carry_optimizer


class Net(nn.Module):
    """Convolution, norm, PReLU, depthwise, grouped, transposed and linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.PReLU(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.norm = nn.GroupNorm(3, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.act(self.bn(self.conv(x)))).relu()
        return self.head(self.norm(self.up(self.grouped(x).relu())).relu().mean((2, 3)))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def halved(model: nn.Module) -> tuple[sc.PruningPlan, nn.Module]:
    graph = sc.trace(model, X)
    generator = torch.Generator().manual_seed(1)
    scores = {g.name: torch.rand(g.size, generator=generator) for g in graph.groups}
    plan = sc.plan(graph, scores, sc.Target(channels=0.5), allocation="uniform")
    return plan, sc.apply(model, plan)


def test_attributes_say_what_the_tensors_hold() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    plan, small = halved(model)
    assert type(small) is Net
    assert (small.conv.in_channels, small.conv.out_channels) == (3, len(plan.kept_outputs["conv"]))
    assert small.depthwise.groups == small.depthwise.in_channels == small.conv.out_channels < 8
    assert small.grouped.groups == 2
    assert small.grouped.weight.shape[1] == small.grouped.in_channels // 2
    assert small.up.in_channels == small.grouped.out_channels
    assert small.norm.num_groups * 2 == small.norm.num_channels == small.up.out_channels == small.head.in_features
    assert small.bn.num_features == small.act.num_parameters == small.conv.out_channels
    assert sc.verify(model, small, plan, X).exact
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    rebuilt = Net()
    assert [tuple(t.shape) for t in sc.apply(rebuilt, plan).state_dict().values()] == [
        tuple(t.shape) for t in small.state_dict().values()
    ]


class InTwo(nn.Module):
    """Channels in two parts of sizes that it was told, back in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.widths, self.last = nn.Conv2d(3, 8, 1), (5, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.conv(x).split(self.widths, 1)
        return self.last(torch.cat([second, first.relu()], 1))


def test_a_part_of_a_split_may_be_left_empty(tmp_path: Path) -> None:
    model = InTwo().double()
    graph = sc.trace(model, X.double())
    plan = sc.plan_removal(graph, {"conv": [5, 6, 7]})
    small = sc.apply(model, plan)
    assert small.widths == (5, 0)
    assert sc.verify(model, small, plan, X.double()).exact
    sc.save(small, plan, tmp_path / "small.safetensors")
    assert torch.equal(sc.load(InTwo().double(), tmp_path / "small.safetensors")(X.double()), small(X.double()))


def test_every_kept_element_is_the_original_one() -> None:
    model = Net().eval()
    plan, small = halved(model)
    rows, columns = plan.kept_outputs["grouped"], plan.kept_inputs["grouped"]
    for i, row in enumerate(rows):
        block = row // 6
        own = [c - 4 * block for c in columns if c // 4 == block]
        assert torch.equal(small.grouped.weight[i], model.grouped.weight[row, own])
    kept = plan.kept_outputs["conv"]
    assert torch.equal(small.bn.running_var, model.bn.running_var[kept])
    assert torch.equal(small.depthwise.weight, model.depthwise.weight[kept])
    assert torch.equal(small.up.weight, model.up.weight[plan.kept_inputs["up"]][:, plan.kept_outputs["up"]])


def test_a_hollow_copy_is_the_cut_one_but_for_the_values_of_cut_weights() -> None:
    model = Net().eval()
    model.conv.weight.requires_grad_(False)
    plan, small = halved(model)
    copied = surgery.cut(model, plan, share=True, hollow=True)
    whole, hollow = small.state_dict(), copied.state_dict()
    for name, tensor in whole.items():
        assert (hollow[name].shape, hollow[name].dtype) == (tensor.shape, tensor.dtype)
        assert hollow[name].stride() == tensor.stride()
    for name in ("conv.weight", "bn.running_var", "up.weight"):
        assert torch.equal(hollow[name], torch.zeros_like(whole[name]))
    assert torch.equal(copied.head.bias, small.head.bias)
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in small.parameters()]


def test_frozen_stay_frozen_tied_stay_tied_hooks_and_mode_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.first = nn.Conv2d(6, 6, 3, padding=1)
            self.second = nn.Conv2d(6, 6, 3, padding=1)
            self.second.weight = self.first.weight
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.second(self.first(x).relu())).mean((2, 3)))

    model = Tied().train()
    model.stem.weight.requires_grad_(False)
    seen: list[int] = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    seen.clear()
    plan, small = halved(model)
    seen.clear()
    assert small.second.weight is small.first.weight
    assert small.first.weight.shape[:2] == (3, 3)
    assert not small.stem.weight.requires_grad
    assert small.first.weight.requires_grad
    assert small.training
    small(X)
    assert seen == [1]
    assert sc.verify(model, small, plan, X).exact


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
        lambda p: torch.optim.Adam(p, lr=1e-2),
        lambda p: torch.optim.AdamW([{"params": list(p), "lr": 1e-3}], lr=1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    ],
)
def test_an_optimizer_goes_on(build: object) -> None:
    model = Net()
    optimizer = build(model.parameters())  # type: ignore[operator]
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    plan, small = halved(model)
    carried = carry_optimizer(optimizer, model, small, plan)
    assert [g["lr"] for g in carried.param_groups] == [g["lr"] for g in optimizer.param_groups]
    rows = plan.kept_outputs["conv"]
    for key, value in optimizer.state[model.conv.weight].items():
        found = carried.state[small.conv.weight][key]
        if isinstance(value, Tensor) and value.ndim == 4:
            assert torch.equal(found, value[rows])
            block = optimizer.state[model.grouped.weight][key]
            own = carried.state[small.grouped.weight][key]
            first = plan.kept_outputs["grouped"][0]
            assert torch.equal(own[0], block[first, [c for c in plan.kept_inputs["grouped"] if c < 4]])
        else:
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(value))
    before = small.conv.weight.detach().clone()
    small(X).square().sum().backward()
    carried.step()
    assert not torch.equal(small.conv.weight, before)


def test_factors_of_an_optimizer_s_state_are_cut_where_their_parameter_is() -> None:
    model = Net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    plan, small = halved(model)
    carried = carry_optimizer(optimizer, model, small, plan)
    states = {n: (optimizer.state[p], carried.state[small.get_parameter(n)]) for n, p in model.named_parameters()}
    rows, columns = plan.kept_outputs["conv"], plan.kept_inputs["head"]
    before, after = states["conv.weight"]
    assert all(torch.equal(after[key], before[key][rows]) for key in ("row_var", "col_var"))
    before, after = states["head.weight"]
    assert torch.equal(after["row_var"], before["row_var"])
    assert torch.equal(after["col_var"], before["col_var"][:, columns])
    assert torch.equal(states["bn.bias"][1]["variance"], states["bn.bias"][0]["variance"][rows])
    assert torch.equal(after["step"], before["step"])
    grouped = states["grouped.weight"][1]
    assert grouped["row_var"].shape == (*small.grouped.weight.shape[:3], 1)
    small(X).square().sum().backward()
    carried.step()


@pytest.mark.parametrize("state", [torch.zeros(8, 8), [torch.zeros(8, 3), torch.zeros(8)]])
def test_optimizer_state_of_another_shape_than_the_parameter_is_refused(state: object) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.conv.weight]["preconditioner"] = state
    plan, small = halved(model)
    with pytest.raises(sc.PlanError, match=r"preconditioner of conv\.weight is .* nothing tells how to cut it"):
        carry_optimizer(optimizer, model, small, plan)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = Net()
    plan, small = halved(model)
    with pytest.raises(sc.PlanError, match="none of the model's"):
        carry_optimizer(torch.optim.SGD(Net().parameters(), lr=0.1), model, small, plan)


def test_moving_averages_of_the_weights_are_cut_alike() -> None:
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model)
    plan, small = halved(model)
    cut_average = sc.apply(average.module, plan)
    for a, b in zip(cut_average.state_dict().values(), small.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Remembering(nn.Module):
    """Keeps what it computed from its weights until the mode is set, as several of timm's attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.gain = nn.Parameter(torch.arange(8.0))
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        """Forget."""
        super().train(mode)
        self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scale by what is kept."""
        if "gain" not in self.kept:
            self.kept["gain"] = self.gain[:, None, None].exp().detach()
        return self.conv(x) * self.kept["gain"]


def test_what_was_computed_from_the_whole_weights_is_not_kept() -> None:
    model = nn.Sequential(Remembering(), nn.Conv2d(8, 2, 1)).eval()
    model[0].train()  # modes are kept, whatever is forgotten
    x = torch.randn(2, 3, 4, 4)
    graph = sc.trace(model, x)
    model(x)
    plan = sc.plan_removal(graph, {graph.groups[0].name: [0, 3]})
    small = sc.apply(model, plan)
    assert model[0].kept
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert small(x).shape == model(x).shape
    assert sc.verify(model, small, plan, x).exact


class TrainOnly(nn.Module):
    """A head of layers of all kinds that train mode alone runs, whose code asks the last for its width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)
        self.conv, self.each = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.up, self.each_up = nn.ConvTranspose2d(24, 8, 1), nn.ConvTranspose2d(8, 8, 1, groups=8)
        self.fc = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        if not self.training:
            out: Tensor = self.head(x)
            return out
        y = self.each_up(self.up(self.each(self.conv(x))))
        return self.head(x), self.fc(y.view(-1, self.fc.in_features))


def test_layers_of_train_mode_alone_count_the_channels_that_they_have() -> None:
    model, x = TrainOnly().eval(), torch.randn(2, 3, 8, 8)
    graph = sc.trace(model, x)
    assert {"a", "conv", "up"} <= {group.name for group in graph.groups}
    plan = sc.plan_removal(graph, {g.name: list(range(g.size // 2)) for g in graph.groups})
    small = sc.apply(model, plan)
    assert (small.conv.in_channels, small.conv.out_channels) == (8, 6)
    assert (small.each.in_channels, small.each.out_channels, small.each.groups) == (6, 12, 6)
    assert (small.up.in_channels, small.up.out_channels) == (12, 4)
    assert (small.each_up.in_channels, small.each_up.out_channels, small.each_up.groups) == (4, 4, 4)
    assert small.fc.in_features == 4 * 36
    assert [t.shape for t in small.train()(x)] == [(2, 4, 6, 6), (2, 5)]
    assert sc.verify(model, small, plan, x).exact


@pytest.mark.parametrize(
    "build",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
        lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
def test_a_scheduler_goes_on_with_the_carried_optimizer(build: object) -> None:
    def rates(pruned: bool) -> list[tuple[float, float]]:
        model, found = Net(), []
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = build(optimizer)  # type: ignore[operator]
        for epoch in range(8):
            if pruned and epoch == 4:
                plan, small = halved(model)
                optimizer = carry_optimizer(optimizer, model, small, plan)
                scheduler.optimizer = optimizer
            optimizer.step()
            scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
            (group,) = optimizer.param_groups
            found.append((group["lr"], group["momentum"]))
        return found

    assert rates(True) == rates(False)
    assert len(set(rates(True))) > 2


def test_averages_are_pruned_by_the_plan_of_their_network_and_go_on() -> None:
    model = Net()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        with torch.no_grad():
            model.conv.weight.add_(1.0)
        averaged.update_parameters(model)
    plan, small = halved(model)
    pruned = sc.apply(averaged, plan)
    assert type(pruned) is AveragedModel
    assert pruned.n_averaged == 3
    expected = sc.apply(averaged.module, plan).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pruned.module.state_dict().items())
    before = pruned.module.conv.weight.detach().clone()
    pruned.update_parameters(small)
    assert torch.allclose(pruned.module.conv.weight, (before + small.conv.weight) / 2)
    assert averaged.module.conv.out_channels == 8
    # A plan that was made for the wrapper itself has its names.
    own, _ = halved(averaged.eval())
    assert "module.conv" in own.kept_outputs
    assert sc.apply(averaged, own).module.conv.out_channels < 8
