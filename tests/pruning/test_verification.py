"""What both sides of a comparison are made of."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.network.precision import in_double
from secateur.pruning import comparison
from secateur.pruning.comparison import compare_outputs, doubled, outputs
from secateur.pruning.readings import _weights, sums


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 5, 3, 4), 1), ((2, 3, 5), 2), ((5,), 0), ((5, 3, 4), 0), ((0, 5, 3), 1)]
)
def test_a_channel_is_summed_over_all_its_values(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    x = (10 * torch.randn(shape)).to(dtype)
    for laid_out in (x, x.mT.contiguous().mT if x.ndim > 1 else x):
        found, count = sums(laid_out, dim)
        rows = x.double().movedim(dim, 0).reshape(shape[dim], math.prod(shape) // shape[dim])
        assert count == rows.shape[1]
        assert torch.allclose(found.double(), rows @ _weights(count), atol=1e-5)


class Mapped(nn.Module):
    """Calls its layers one example at a time, inside a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda one: self.head(self.conv(one[None]).relu())[0])(x)


def test_layers_inside_a_map_are_verified() -> None:
    model, x = Mapped().eval(), torch.randn(2, 3, 7, 9)
    plan = sc.plan_removal(sc.trace(model, x), {"conv": [0, 3]})
    _weights.cache_clear()
    report = sc.verify(model, sc.apply(model, plan), plan, x)
    assert report.exact, report


class Rounding(nn.Module):
    """Asks for fp32 in many ways, and adds what fp32 can't hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(4, 3)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        x = self.norm(self.up(self.conv(x.float()))).relu_()
        x = x.to(self.conv.weight.dtype) + torch.zeros(x.shape, dtype=torch.float32) + 1e-9
        rows = x.flatten(2).transpose(1, 2)
        filled = torch.zeros(rows.shape)
        filled[:, 1:] = rows[:, :-1]
        attended, _ = self.attend(rows, rows, rows)
        return x, self.lstm(rows)[0], attended, filled, (x.mean() > 0).float(), x.argmax(1)


def test_operators_in_fp64_keep_what_fp32_can_not_hold() -> None:
    torch.manual_seed(0)
    network = Rounding().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain = outputs(network, images.float())
    with in_double():
        found = outputs(network, images)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert network.calls.dtype == torch.float32
    assert not network.calls
    assert [t.dtype for t in found] == [torch.float64] * 5 + [torch.int64]
    assert all(torch.allclose(a, b.double(), atol=1e-5) for a, b in zip(found[:4], plain[:4], strict=True))
    exact = network.norm.double()(network.up.double()(network.conv.double()(images))).relu() + 1e-9
    assert torch.allclose(found[0], exact, atol=1e-14, rtol=0)
    assert not torch.allclose(plain[0].double(), exact, atol=1e-14, rtol=0)
    rows = exact.flatten(2).transpose(1, 2)
    assert torch.allclose(found[1], network.lstm.double()(rows)[0], atol=1e-13, rtol=0)
    assert torch.allclose(found[2], network.attend.double()(rows, rows, rows)[0], atol=1e-13, rtol=0)
    assert torch.equal(found[3][:, 1:], rows[:, :-1])


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


class TwoModes(nn.Module):
    """Code that runs in train mode alone, with a size written in it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.size = [str(size)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        if self.training:
            x = x.view(len(x), int(self.size[0]), 6, 6)
        out: Tensor = self.b(x)
        return out


@pytest.mark.parametrize(("size", "exact"), [(8, False), (-1, True), (7, True)])
def test_a_network_that_can_not_be_trained_any_more_is_no_success(size: int, exact: bool) -> None:
    model, x = TwoModes(size).eval(), torch.randn(2, 3, 8, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = sc.plan_removal(sc.trace(model, x), {"a": [0, 3]})
    report = sc.verify(model, sc.apply(model, plan), plan, x)
    assert report.exact is report.trains is exact
    assert any("train mode: the pruned network fails" in note for note in report.refused) is not exact
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model.training
