"""What both sides of a comparison are made of, and how their outputs differ."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.pruning import comparison
from secateur.pruning.comparison import compare_outputs, doubled


class Tied(nn.Module):
    """Tied, frozen and integer tensors, and a recurrent layer, which keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.one.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(self.norm(self.two(self.one(x))))[0]
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [Tied, lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1))])
def test_a_copy_in_fp64_is_as_the_plain_way_makes_it(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = build().eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found, wanted = doubled(network), copy.deepcopy(network).double()
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert found.state_dict()[name].dtype == value.dtype
        assert torch.equal(found.state_dict()[name], value)
    for (name, a), b in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
    assert len(list(found.parameters())) == len(list(network.parameters()))
    x = torch.randn(5, 4, dtype=torch.float64) if isinstance(network, Tied) else torch.randn(1, 4, 5).double()
    assert torch.equal(found(x), wanted(x))
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in network.state_dict().items())


@pytest.mark.parametrize("at_once", [3, 1 << 18])
@pytest.mark.parametrize(
    ("want", "found", "error"),
    [
        ([1.0, -4.0, 2.0, 0.0], [1.0, -4.0, 2.0, 0.0], 0.0),
        ([1.0, -4.0, 2.0, 0.0], [1.5, -4.0, 2.0, 0.25], 0.125),
        ([math.inf, -4.0, 2.0, 0.0], [math.inf, -4.0, 3.0, 0.0], 0.25),
        ([math.inf, 1.0, 1.0, 1.0], [-math.inf, 1.0, 1.0, 1.0], math.inf),
        ([math.nan, 1.0, 1.0, 2.0], [math.nan, 1.0, 1.0, 3.0], math.inf),
        ([1.0, 1.0, 1.0, 2.0], [math.nan, 1.0, 1.0, 3.0], math.inf),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1e-40], 0.0),
        ([3 + 4j, 0, 0, 0], [3 + 4j, 0, 1j, 0], 0.2),
        ([True, False, True, True], [True, True, True, True], 1.0),
        ([], [], 0.0),
    ],
)
def test_outputs_differ_by_the_largest_gap_over_the_largest_value(
    want: list[complex], found: list[complex], error: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_PART", at_once)
    difference = compare_outputs([torch.tensor(want)], [torch.tensor(found)])
    assert difference.error == pytest.approx(error, abs=1e-9)
    assert difference.compared == 1


class Sometimes(nn.Module):
    """One reader of the channels runs on several images alone, and a layer outside the plan never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.several, self.unused = nn.Conv2d(8, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.head(y) + self.several(y) if len(x) > 1 else self.head(y)
        return out


def test_a_layer_of_the_plan_that_does_not_run_is_noted_and_another_is_not() -> None:
    model, inputs = Sometimes().eval(), torch.randn(2, 3, 4, 4)
    plan = sc.plan_removal(sc.trace(model, inputs), {"conv": [0, 5]})
    assert set(plan.kept_inputs) == {"head", "several"}
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, inputs).refused == ()
    check = sc.verify(model, small, plan, inputs[:1])
    assert check.exact
    assert check.refused == ("several: never runs in eval mode",)
