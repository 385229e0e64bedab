"""Which trials are made, and what they see: layers of either mode, groups that lose different numbers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.tracing.trial import attempt, search
from tests.cases import CASES
from tests.cases.table import Net, conv


class Flagged(Net):
    """Has a flag of its own that tells the mode."""

    def train(self, mode: bool = True) -> Flagged:
        self.both = mode
        return super().train(mode)


def test_layers_of_train_mode_are_seen_whatever_tells_the_mode() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.head(x) + m.other(x) if m.both else m.head(x)

    graph = sc.trace(Flagged(forward, conv=conv(3, 8), head=conv(8, 2), other=conv(8, 2)), torch.zeros(1, 3, 4, 4))
    assert {"conv", "head", "other"} <= {member.module for group in graph.groups for member in group.members}
    assert not graph.notes


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each of the trials found that a trace makes."""
    found: list[Any] = []
    once = search.attempt
    monkeypatch.setattr(search, "attempt", lambda *given: found.append(once(*given)) or found[-1])
    return found


def test_the_width_of_other_channels_is_told_without_a_trial(attempts: list[Any]) -> None:
    """As many trials as a network needs in which nothing fails."""
    case = CASES["attention_by_the_inputs_width"]
    sc.trace(case.build(), case.inputs())
    assert attempts == [None]


def test_a_block_that_fails_is_tried_once_however_often_it_is_repeated(attempts: list[Any]) -> None:
    block = Net(lambda m, x: m.b(m.a(x).view(-1, 12, 6, 6)) + x, a=conv(8, 12), b=conv(12, 8))
    counts = []
    for depth in (2, 16):
        blocks = [copy.deepcopy(block) for _ in range(depth)]
        graph = sc.trace(nn.Sequential(conv(3, 8), *blocks, conv(8, 4)).eval(), torch.randn(2, 3, 6, 6))
        assert [g.name for g in graph.groups] == ["0"]
        counts.append(len(attempts))
    assert counts[1] == 2 * counts[0]


def test_what_code_keeps_of_a_shape_is_a_plain_number_to_others() -> None:
    kept: list[int] = []  # where no run's end puts it back

    def keeps(m: Net, x: Tensor) -> Tensor:
        x = m.conv(x)
        kept[:] = [x.shape[1], x.size(1) // 2, 3 * x.size()[1], x.shape[1] + 1, x.shape.numel()]
        return x

    sc.trace(Net(keeps, conv=conv(3, 8)), torch.zeros(1, 3, 2, 2))
    assert kept == [8, 4, 24, 9, 32]
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):  # dumped on this very line
        assert [type(value) for value in other] == [int] * 5
        assert other == kept


def test_groups_of_one_size_lose_different_numbers_in_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds only where all lose the same has to fail."""
    lost: list[list[int]] = []
    run = attempt._run

    def noted(*given: Any) -> Any:
        lost.append([len(channels) for channels in given[3].removed.values()])
        return run(*given)

    monkeypatch.setattr(attempt, "_run", noted)
    sc.trace(nn.Sequential(conv(3, 24), conv(24, 24), conv(24, 24), conv(24, 4)).eval(), torch.randn(2, 3, 6, 6))
    assert len(set(lost[0])) == 3


def test_failures_without_a_line_to_show_are_not_found_one_by_one(attempts: list[Any]) -> None:
    def scaled(m: Net, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = layer(x) * 0.25 ** (1 / len(layer.weight))
        return m.head(x)

    layers = nn.ModuleList([conv(3 if i == 0 else 8, 8) for i in range(8)])
    graph = sc.trace(Net(scaled, layers=layers, head=conv(8, 4)).eval(), torch.randn(2, 3, 6, 6))
    assert not graph.groups
    assert len(attempts) < 16
