"""Weights are read with columns zeroed, whichever way their memory is viewed, and stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.graph.plan import PruningPlan
from secateur.network.precision import in_double
from secateur.pruning.masking import zeroed


class Weights(nn.Module):
    """Two kernels, which may lie in one piece of memory."""

    def __init__(self, *, together: bool) -> None:
        super().__init__()
        memory = torch.arange(1.0, 25.0)
        self.first = nn.Parameter(memory[:12].view(3, 4) if together else memory[:12].view(3, 4).clone())
        self.second = nn.Parameter(memory[12:].view(3, 4) if together else memory[12:].view(3, 4).clone())


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: F.linear(torch.eye(4), w),
    "data": lambda w: F.linear(torch.eye(4), w.data),
    "view of data": lambda w: F.linear(torch.eye(4), w.data.view(-1).view(3, 4)),
    "columns": lambda w: w.data[:, 1:3] * 1,
    "transposed": lambda w: w.data.t() @ torch.eye(3),
    "list": lambda w: torch.cat([w, w.detach()]),
    "keyword": lambda w: F.linear(input=torch.eye(4), weight=w),
}


@pytest.mark.parametrize("precision", [nullcontext, in_double])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_every_read_of_a_weight_sees_zeroed_columns(
    read: Callable[[Tensor], Tensor], together: bool, precision: Callable[[], AbstractContextManager[None]]
) -> None:
    model = Weights(together=together)
    plan = PruningPlan(reads={"first": {1: [0, 2]}, "second": {1: [1], 0: [0]}})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = {"first": torch.tensor([1.0, 0, 1, 0]).expand(3, 4), "second": torch.zeros(3, 4)}
    expected["second"][0, 1] = 1
    with torch.no_grad(), precision(), zeroed(model, plan):
        found = {name: read(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(found[name].float(), read((p * expected[name]).detach()))
        assert torch.equal(p, before[name])


def test_of_a_grouped_kernel_each_block_of_rows_loses_its_own_columns() -> None:
    model = nn.Conv2d(4, 2, 1, groups=2, bias=False)
    plan = PruningPlan(reads={"weight": {1: [0, 3]}}, blocks={"weight": 2})
    with torch.no_grad(), zeroed(model, plan):
        found = model.weight.flatten(1) * 1
    assert torch.equal(found != 0, torch.tensor([[True, False], [False, True]]))


def test_what_is_written_into_is_the_weight_itself() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad(), zeroed(model, PruningPlan(reads={"weight": {1: [0]}})):
        model.weight.fill_(3.0)
        found = model.weight * 1
    assert (model.weight == 3).all()
    assert torch.equal(found, torch.tensor([[3.0, 0.0], [3.0, 0.0]]))


def test_a_sparse_tensor_has_no_memory_to_look_at() -> None:
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad(), zeroed(model, PruningPlan(reads={"weight": {1: [0]}})):
        found = torch.sparse.mm(torch.eye(3).to_sparse(), model.weight.t())
    assert (found[0] == model.weight[:, 0]).all()
    assert not found[1:].any()
