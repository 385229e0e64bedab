"""A forward in fp64 of a network that stays in its own precision, and as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.graph.plan import PruningPlan
from secateur.network.precision import in_double
from secateur.pruning.comparison import outputs
from secateur.pruning.masking import zeroed


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
    assert {t.dtype for t in (*network.parameters(), network.calls)} == {torch.float32}
    assert not network.calls
    assert [t.dtype for t in found] == [torch.float64] * 5 + [torch.int64]
    assert all(torch.allclose(a, b.double(), atol=1e-5) for a, b in zip(found[:4], plain[:4], strict=True))
    network.double()
    exact = network.norm(network.up(network.conv(images))).relu() + 1e-9
    rows = exact.flatten(2).transpose(1, 2)
    wanted = (exact, network.lstm(rows)[0], network.attend(rows, rows, rows)[0])
    assert all(torch.allclose(a, b, atol=1e-13, rtol=0) for a, b in zip(found, wanted, strict=False))
    assert not torch.allclose(plain[0].double(), exact, atol=1e-13, rtol=0)
    assert torch.equal(found[3][:, 1:], rows[:, :-1])


class Counting(nn.Module):
    """Reads a buffer as a kernel, then writes into it; adds to its weight for evaluation, and subtracts it again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(4, 3))
        self.weight = nn.Parameter(torch.randn(2, 4))

    def train(self, mode: bool = True) -> Counting:
        if mode != self.training:
            self.weight.data += -0.1 if mode else 0.1
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(F.linear(x, self.kernel), self.weight)
        self.kernel += 1
        return out


PLAN = PruningPlan(reads={"kernel": {0: [1, 2]}, "weight": {1: [1, 2]}})


@pytest.mark.parametrize("around", [lambda network: in_double(), lambda network: zeroed(network, PLAN)])
def test_tensors_are_put_back_as_they_were_though_operators_read_others(
    around: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    network = Counting()
    before, places = copy.deepcopy(network.state_dict()), [t.data_ptr() for t in network.state_dict().values()]
    with around(network):
        outputs(network, torch.randn(5, 3))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [t.data_ptr() for t in network.state_dict().values()] == places
