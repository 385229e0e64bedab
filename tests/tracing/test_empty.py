"""Layers that a run reaches with tensors without elements: a detector's mask head where nothing was detected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests import oracle
from tests.cases.table import Net, conv
from tests.surroundings import X, pruned


def detector(head: nn.Module) -> Net:
    """Return a network that scores images, and looks closer at those above a threshold."""

    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.trunk(x)
        scores = m.score(features.mean((2, 3)))[:, 0]
        return scores, m.head(features[scores > m.threshold])

    trunk = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU())
    return Net(forward, trunk=trunk, score=nn.Linear(8, 1), head=head, threshold=float("inf"))


def prefix() -> Net:
    """Return a head that reads the first channels, as many as are written in the code."""
    return Net(lambda m, x: m.out(m.conv(x)[:, :4]), conv=conv(8, 8), out=conv(4, 2))


def looping() -> Net:
    """Return a head that looks at the examples one by one."""

    def forward(m: Net, x: Tensor) -> Tensor:
        maps = m.conv(m.inner(x))
        found = torch.zeros(len(x), 6, dtype=x.dtype)
        for i in range(len(x)):
            found[i] = maps[i].amax((1, 2))
        return found

    return Net(forward, inner=conv(8, 8), conv=conv(8, 6))


class Plain(nn.BatchNorm2d):
    """Batch norm by the operator itself, as older code calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.1, self.eps, False
        )


def normed(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Return a mask head of convolutions with batch norm."""
    return nn.Sequential(conv(8, 8), norm(8), nn.ReLU(), conv(8, 6), norm(6), nn.ReLU(), conv(6, 2))


@pytest.mark.parametrize(
    ("build", "groups", "kept"),
    [
        (normed, ["trunk.0", "head.0", "head.3"], ""),
        (lambda: normed(Plain), ["trunk.0", "head.0", "head.3"], ""),
        (prefix, ["trunk.0"], "head.conv"),
        (looping, ["trunk.0", "head.inner"], "head.conv"),
    ],
)
def test_what_sees_nothing_goes_with_what_it_reads_or_is_kept(
    build: Callable[[], nn.Module], groups: list[str], kept: str
) -> None:
    x = torch.randn(2, 3, 4, 4).double()
    model = oracle.randomise(detector(build()))
    graph, plan, small = pruned(model, x)
    assert [group.name for group in graph.groups] == groups
    if kept:
        assert any("without elements" in r.reason for r in graph.refused if f"{kept}.weight" in r.tensors)
    else:
        assert {m.tensor for m in graph.group("head.0").members} >= {"head.1.weight", "head.1.running_var"}
        assert any(note.startswith("head.0: ") and "without elements" in note for note in graph.notes)
        assert any("without elements" in said for said in sc.verify(model, small, plan, x).refused)
    model.threshold = small.threshold = float("-inf")
    assert oracle.judge(model, small, plan, x).exact
    assert len(small(x)[1]) == 2


def test_a_batch_of_no_examples_shows_nothing() -> None:
    graph = sc.trace(nn.Sequential(conv(3, 8), nn.ReLU()), X[:0])
    assert not graph.groups
    assert graph.notes[0].startswith("0: reads tensors without elements")
