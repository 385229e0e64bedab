"""What both sides of a comparison are made of."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from secateur.verification import _sums, _weights, doubled


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
        sums, count = _sums(laid_out, dim)
        rows = x.double().movedim(dim, 0).reshape(shape[dim], math.prod(shape) // shape[dim])
        assert count == rows.shape[1]
        assert torch.allclose(sums.double(), rows @ _weights(count), atol=1e-5)
