"""Every option means the same in ``prune`` and in ``compress``: one round without training leaves the same widths."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.engine import compress
from secateur.graph.cost import layer_costs
from tests.engine.nets import Residual, Small, digits


class Grouped(nn.Module):
    """Groups of a convolution lose equal fractions, and a layer norm couples the last features inexactly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.second = nn.Conv2d(8, 16, 3, groups=2)
        self.hidden = nn.Linear(16, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        out: Tensor = self.head(torch.relu(self.norm(self.hidden(x))))
        return out


BATCHES = [(x, y) for x, y in zip(*(t.split(40) for t in (digits(80)[0].x, digits(80)[0].y)), strict=True)]
VALIDATION = [next(iter(digits()[1]))]
INPUTS = VALIDATION[0][0][:1]
ONCE: dict[str, Any] = {"rounds": 1, "finetune_epochs": 0, "final_epochs": 0, "precision": "fp32"}
MACS = sc.Target(macs=0.4)

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "params": {"target": sc.Target(params=0.3)},
    "channels": {"target": sc.Target(channels=0.4)},
    "round_to": {"round_to": 4},
    "min_channels": {"min_channels": 5, "target": sc.Target(macs=0.25)},
    "max_ratio": {"max_ratio": 0.45, "target": sc.Target(macs=0.3)},
    "max_ratio by pattern": {"max_ratio": {"*": 0.75, "Conv2d": 0.5}, "target": sc.Target(macs=0.3)},
    "ratios": {"ratios": {"*": 0.5}, "target": None},
    "ratios and target": {"ratios": {"Linear": 0.25}, "target": sc.Target(macs=0.3), "inexact": True},
    "skip": {"skip": ["Linear"], "target": sc.Target(macs=0.3)},
    "uniform": {"allocation": "uniform"},
    "global": {"allocation": "global"},
    "sensitivity": {"allocation": "sensitivity"},
    "inexact": {"inexact": True, "target": sc.Target(params=0.4)},
}
"""One case an option at least; a target of its own takes the place of 40% of the MACs."""
METHODS = ("auto", "l1", "corrnet", "cshe")
QUICK = ("none", "round_to", "ratios and target")
CASES = [
    pytest.param(
        net, method, name, id=f"{net.__name__}-{method}-{name}",
        marks=() if name in (QUICK if net is Small else ()) or (net is Small and method == "l1")
        else pytest.mark.slow,
    )
    for net in (Small, Residual, Grouped)
    for method in METHODS
    for name in OPTIONS
    # The table in full for two methods; of the others what concerns how a criterion is asked.
    if (method in ("auto", "l1") or name in QUICK) and (net is not Residual or name != "ratios and target")
]  # fmt: skip


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def widths_of(model: nn.Module, plan: sc.PruningPlan) -> dict[str, int]:
    return {layer.module: layer.out_channels for layer in layer_costs(sc.trace(model, INPUTS), plan)}


def test_every_option_has_a_case() -> None:
    named = {name for options in OPTIONS.values() for name in options}
    assert named == {"target", *(f.name for f in fields(sc.Options))}


@pytest.mark.parametrize(("kind", "method", "name"), CASES)
def test_prune_and_compress_follow_an_option_alike(kind: type[nn.Module], method: str, name: str) -> None:
    model = network(kind)
    request = {"target": MACS, **OPTIONS[name]}
    once = sc.prune(model, INPUTS, data=BATCHES, method=method, **request)
    assert once.plan.removed
    run = compress(
        model, method, train=BATCHES, validation=VALIDATION, example_inputs=INPUTS, compensate=(), **request, **ONCE
    )
    assert len(run.history) == 1
    assert run.plan.removed == once.plan.removed
    assert run.report["final"]["widths"] | once.report["widths"]["after"] == run.report["final"]["widths"]
    for part in ("allocation", "selection"):
        assert run.report["parts"].get(part) == once.report["parts"].get(part)


def test_what_a_threshold_selects_is_the_same() -> None:
    model, threshold = network(Small), {"threshold": 0.9}
    once = sc.prune(model, INPUTS, MACS, data=BATCHES, method="corrnet", method_options=threshold)
    run = compress(
        model,
        "corrnet",
        train=BATCHES,
        validation=VALIDATION,
        target=MACS,
        criterion=threshold,
        **{**ONCE, "max_rounds": 1},
    )
    assert run.plan.removed == once.plan.removed
    assert not MACS.removed(once.graph, once.plan) >= 0.4, "the threshold is to spare some"


@pytest.mark.parametrize("method", ["l1", "auto", "cfp"])
@pytest.mark.parametrize(
    "name",
    [
        *("round_to", "ratios"),
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("min_channels", "max_ratio", "max_ratio by pattern", "skip")
        ),
    ],
)
def test_limits_hold_over_several_rounds(method: str, name: str) -> None:
    model = network(Small)
    request = {"target": MACS, **OPTIONS[name]}
    settings = {"linear": True, "fraction": 0.1, "optimise_epochs": 0} if method == "cfp" else {"rounds": 3}
    result = compress(
        model, method, train=BATCHES, validation=VALIDATION, **request, **{**ONCE, "rounds": (), **settings}
    )
    assert len(result.history) > 1 or (method, name) == ("cfp", "round_to")  # whose first step is a large one
    graph = sc.trace(model, INPUTS)
    assert request["target"] is None or request["target"].removed(graph, result.plan) >= request["target"].fraction
    for group in graph.groups:
        kept = group.size - len(result.plan.removed.get(group.name, ()))
        if name == "round_to":
            assert kept % 4 == 0 or kept == group.size
        elif name == "min_channels":
            assert kept >= 5
        elif name == "max_ratio":
            assert kept >= group.size * 0.55
        elif name == "max_ratio by pattern":
            assert kept >= group.size * (0.5 if group.name.startswith("conv") else 0.25)
        elif name == "skip":
            assert kept == group.size or group.name.startswith("conv")
        else:
            assert kept == group.size // 2


def test_a_multiple_that_is_measured_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.deploy.timing import RoundToChoice
    from secateur.engine import by_scores

    offered: dict[int, dict[str, int]] = {}

    def fastest(pruned: Any, inputs: Any, **_: Any) -> RoundToChoice:
        for n in (1, 4):
            offered[n] = {k: m.out_channels for k, m in pruned(n).named_modules() if isinstance(m, nn.Conv2d)}
        return RoundToChoice(4, "contiguous", {(4, "contiguous"): 0.5}, {})

    monkeypatch.setattr(by_scores, "choose_round_to", fastest)
    model = network(Small)
    result = compress(model, "l1", train=BATCHES, validation=VALIDATION, target=MACS, round_to="auto", **ONCE)
    plain = sc.prune(model, INPUTS, MACS, method="l1", round_to=4)
    assert result.plan.removed == plain.plan.removed
    assert offered[4] == {k: n for k, n in plain.report["widths"]["after"].items() if k in offered[4]}
    assert offered[1] != offered[4]


def test_a_group_that_a_ratio_fixes_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.engine import choosing

    measured: list[list[str]] = []

    def seen(*given: Any, groups: list[str], **options: Any) -> Any:
        measured.append(list(groups))
        return sc.sensitivity(*given, groups=groups, **options)

    monkeypatch.setattr(choosing, "sensitivity", seen)
    model = network(Small)
    request: dict[str, Any] = {"ratios": {"conv1": 0.5}, "max_ratio": {"fc1": 0}}
    sc.prune(model, INPUTS, MACS, data=BATCHES, **request)
    compress(model, train=BATCHES, validation=VALIDATION, target=MACS, **request, **ONCE)
    assert measured == [["conv2"], ["conv2"]]
