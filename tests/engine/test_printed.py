"""What results print is short, whatever the network: no walls of indices."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.graph.channels import MACS_OF_A_GROUP


class Deep(nn.Module):
    """As many groups as a ResNet-56 has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 if i == 0 else 8, 8, 1) for i in range(31))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def result() -> sc.PruneResult:
    torch.manual_seed(0)
    images = torch.randn(4, 1, 2, 2)
    test = [(images, torch.zeros(4, dtype=torch.long))]
    return sc.prune(Deep(), images, ratios={"*": 0.5}, test=test)


def test_results_print_in_25_lines_at_most(result: sc.PruneResult) -> None:
    scores = sc.score(result.model, sc.trace(result.model, torch.randn(1, 1, 2, 2)), "l1")
    damage = {group.name: {1: 0.1, 4: 0.2} for group in result.graph.groups}
    table = sc.Sensitivity(dict.fromkeys(damage, 8), damage, "kl", 4, 0)
    run = sc.CompressResult(result.model, result.plan, [], [], {"parts": result.report["parts"]})
    assert len(result.graph.groups) == 30
    for printed in (result, result.plan, result.check, result.graph, scores, table, run, result.graph.groups[0]):
        assert len(str(printed).splitlines()) <= 25
        assert max(map(len, str(printed).splitlines())) <= 160
        assert len(repr(printed)) <= 220
        assert "[" not in str(printed)
    assert len(result.graph.table().splitlines()) >= 30
    assert len(table.table().splitlines()) == 31
    assert scores == dict(scores)
    assert copy.deepcopy(scores).keys() == scores.keys()


def test_a_result_says_what_was_lost_and_how(result: sc.PruneResult) -> None:
    text = str(result)
    before, after = result.report["before"], result.report["after"]
    assert f"{before['macs']:,}" in text
    assert f"{after['macs']:,}" in text
    assert f"({after['parameters'] / before['parameters'] - 1:+.1%})" in text
    assert "accuracy, test: " in text
    assert "removed: 120 channels of 30 groups" in text
    assert "verified exact" in text


def test_ratios_alone_name_no_allocation(result: sc.PruneResult) -> None:
    assert "allocation" not in result.report["parts"]
    assert "allocation" not in str(result)


def test_the_macs_of_a_group_are_what_goes_with_its_channels(result: sc.PruneResult) -> None:
    graph = result.graph
    whole = sc.macs(graph)
    for group in graph.groups:
        half = sc.plan_removal(graph, {group.name: [0, 1, 2, 3]})
        assert 1 - sc.macs(graph, half) / whole == pytest.approx(graph.share_of_macs(group) / 2)
    assert f"MACs: {MACS_OF_A_GROUP}" in str(graph)
