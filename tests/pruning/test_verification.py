"""The report of a verification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


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
