"""A channel's sums tell it from others, however a tensor is laid out, and also inside torch's maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.pruning.readings import _weights, sums


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
        assert torch.allclose(found.double(), rows @ _weights(count, torch.float64, rows.device).T, atol=1e-5)


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
