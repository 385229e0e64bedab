"""A plan that was made for one network, applied to the part of another that holds its layers."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CheckpointError, PlanError, UsageError
from secateur.pruning.applied import plans_of

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def layers(width: int = 8) -> OrderedDict[str, nn.Module]:
    return OrderedDict(conv1=nn.Conv2d(3, width, 3), relu=nn.ReLU(), conv2=nn.Conv2d(width, 6, 3))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, layer in layers().items():
            self.add_module(name, layer)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.relu(self.conv1(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Whole(nn.Module):
    """Layers of the classifier, read by two others; or handed out, so that they all have to stay."""

    def __init__(self, width: int = 8, read: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(layers(width))
        self.one, self.other = (nn.Conv2d(6, 4, 1) for _ in range(2)) if read else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(x)
        return self.one(found), self.other(found)


class Coupled(Whole):
    """Adds another layer's map to the first's, so that both lose the same."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body.conv2(self.body.relu(self.body.conv1(x)) + self.beside(x))
        return self.one(found), self.other(found)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    net = Classifier().eval()
    graph = sc.trace(net, X)
    return sc.apply(net, sc.plan_removal(graph, {"conv1": [1, 4, 5], "conv2": [0, 3]}))


@pytest.mark.parametrize("make", [Whole, Coupled])
def test_what_reads_the_part_follows(make: type[Whole], small: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = make().eval()
    (plan,) = plans_of(small)
    cut = sc.apply(whole, plan, prefix="body", example_inputs=X)
    (found,) = plans_of(cut)
    assert found.kept_outputs["body.conv1"] == [0, 2, 3, 6, 7]
    assert found.kept_inputs["one"] == found.kept_inputs["other"] == [1, 2, 4, 5]
    assert not any("fc" in name for name in found.kept_inputs)
    assert sc.verify(whole, cut, found, X).exact
    if make is Coupled:
        assert found.kept_outputs["beside"] == found.kept_outputs["body.conv1"]

    sc.save(small, path=tmp_path / "small.safetensors")
    loaded = sc.load(whole, tmp_path / "small.safetensors", prefix="body", example_inputs=X)
    assert plans_of(loaded) == (found,)
    for name, value in loaded.body.state_dict().items():  # type: ignore[operator, union-attr]
        assert torch.equal(value, small.state_dict()[name])
    assert torch.equal(loaded.one.weight, whole.one.weight[:, [1, 2, 4, 5]])  # type: ignore[union-attr]
    sc.save(loaded, path=tmp_path / "whole.safetensors")
    again = sc.load(make(), tmp_path / "whole.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.eval()(X), loaded(X), strict=True))


def test_a_file_without_a_plan_fills_the_part(tmp_path: Path) -> None:
    net, whole = Classifier(), Whole()
    sc.save(net, path=tmp_path / "net.safetensors")
    loaded = sc.load(whole, tmp_path / "net.safetensors", prefix="body")
    assert torch.equal(loaded.body.conv2.weight, net.conv2.weight)  # type: ignore[union-attr]
    assert not torch.equal(whole.body.conv2.weight, net.conv2.weight)  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused_in_one_line(small: nn.Module, tmp_path: Path) -> None:
    (plan,) = plans_of(small)
    for whole, prefix, message in (
        (Whole(), "one", r"^one: holds no layer that the plan prunes, the first of which is conv1\.$"),
        (Whole(read=False), "body", r"^body.conv2: the plan removes channel 0, which has to stay in the whole network"),
        (
            Whole(width=9),
            "body",
            r"^body.conv1: the plan was made for a weight of shape \(8, 3, 3, 3\), .*\(9, 3, 3, 3\)",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            sc.apply(whole.eval(), plan, prefix=prefix, example_inputs=X)
    with pytest.raises(
        UsageError, match=r"^apply: what reads body is found by a trace; pass example_inputs=, or graph="
    ):
        sc.apply(Whole(), plan, prefix="body")
    path = tmp_path / "small.safetensors"
    sc.save(small, path=path)
    with pytest.raises(UsageError, match=r"the Whole given has no part 'bodi' to load into"):
        sc.load(Whole(), path, prefix="bodi", example_inputs=X)
    with pytest.raises(UsageError, match=r"what reads body is found by a trace; pass example_inputs="):
        sc.load(Whole(), path, prefix="body")
    with pytest.raises(
        CheckpointError, match=r"the plan doesn't fit the part body of the model given: body.conv2: the"
    ):
        sc.load(Whole(read=False).eval(), path, prefix="body", example_inputs=X)
    more = Whole().eval()
    more.body.add_module("norm", nn.BatchNorm2d(6))
    with pytest.raises(CheckpointError, match=r"not this Whole's body: 5 tensors of the model not in the file"):
        sc.load(more.eval(), path, prefix="body", example_inputs=X)
