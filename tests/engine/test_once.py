"""``sc.prune`` is the chain of the public steps: every option reaches its step, and bad requests are one line."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur import compensation
from secateur.compensation.sensitivity import refined
from secateur.deploy.timing import RoundToChoice
from secateur.engine import once
from secateur.errors import DataError, PlanError, SecateurError, UsageError, VerificationError
from secateur.pruning.options import OptionKeywords
from secateur.pruning.verification import VerificationReport
from secateur.training import evaluation
from tests.engine.nets import digits

BATCHES = list(digits(200)[0])
TEST = list(digits(200)[2])
INPUTS = BATCHES[0][0][:2]


class Net(nn.Module):
    """Two convolutions with batch norm, and a linear layer whose features a layer norm couples inexactly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.fc1 = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return self.fc2(torch.relu(self.norm(self.fc1(torch.relu(x).mean((2, 3))))))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net(torch.cat([x for x, _ in BATCHES]))  # moments of the batch norm
    return net.eval()


def span(filters: Tensor, power: float = 1.0) -> Tensor:
    return (filters.amax(1) - filters.amin(1)) ** power + filters[:, 0].abs()


def first_class(output: Tensor, target: Tensor) -> Tensor:
    return output[:, 0].square().mean()


def confidence(model: nn.Module, batches: Any) -> float:
    return float(torch.cat([model(x).softmax(1).amax(1) for x, _ in batches]).mean())


def chain(
    model: nn.Module,
    inputs: Tensor,
    target: sc.Target | None = None,
    *,
    data: Any = None,
    method: Any = "l1",
    method_options: Mapping[str, Any] | None = None,
    loss: Any = None,
    compensate: Any = None,
    test: Any = None,
    metric: Any = None,
    seed: int = 0,
    **limits: Any,
) -> tuple[nn.Module, sc.PruningPlan, dict[str, Any]]:
    """Take the steps one by one, as the README has them."""
    graph = sc.trace(model, inputs)
    options, threshold = dict(method_options or {}), {}
    if "threshold" in options:
        threshold = {"threshold": options.pop("threshold")}
    inexact = limits.get("inexact", False)
    scores = sc.score(model, graph, method, data, inexact=inexact, loss=loss, seed=seed, **options)
    plan = sc.plan(graph, scores, target, **limits)
    if threshold:
        counts = {name: len(channels) for name, channels in plan.removed.items()}
        found = sc.select(model, graph, method, counts, data, loss=loss, seed=seed, **options, **threshold)
        plan = sc.plan_removal(graph, {name: list(s.removed) for name, s in found.items()})
    small = sc.apply(model, plan)
    check = sc.verify(model, small, plan, inputs)
    done = None
    if compensate is not None:
        done = asdict(compensation.compensate(model, small, plan, compensate, data, example_inputs=inputs))
    widths = [{name: m.weight.shape[0] for name, m in net.named_modules() if name[:-1] in ("conv", "fc")}
              for net in (model, small)]  # fmt: skip
    report = {
        "before": {"macs": sc.macs(graph), "parameters": sum(p.numel() for p in model.parameters())},
        "after": {"macs": sc.macs(graph, plan), "parameters": sum(p.numel() for p in small.parameters())},
        "widths": {"before": widths[0], "after": widths[1]},
        "verification": asdict(check),
        "compensation": done,
    }
    if test is not None:
        report["before"]["test"], report["after"]["test"] = (
            evaluation.evaluate(m, test, metric) for m in (model, small)
        )
    return small, plan, report


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


MACS = sc.Target(macs=0.4)
OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("target", {"target": MACS}, {"target": sc.Target(params=0.2)}),
    ("data", {"method": "corrnet", "data": BATCHES[:1]}, {"data": BATCHES[1:3]}),
    ("method", {}, {"method": "random"}),
    ("method_options", {"method": span}, {"method_options": {"power": -1.0}}),
    ("method_options", {"method": "corrnet", "data": BATCHES}, {"method_options": {"threshold": 0.7}}),
    ("loss", {"method": "taylor", "data": BATCHES[:2]}, {"loss": first_class}),
    ("ratios", {}, {"ratios": {"conv1": 0.25}}),
    ("ratios", {"target": None, "ratios": {"conv1": 0.25}}, {"ratios": {"conv1": 0.5}}),
    ("max_ratio", {}, {"max_ratio": {"conv1": 0.25}}),
    ("skip", {}, {"skip": ["conv1"]}),
    ("round_to", {}, {"round_to": 4}),
    ("min_channels", {"target": sc.Target(macs=0.6)}, {"min_channels": 5}),
    ("allocation", {}, {"allocation": "uniform"}),
    ("inexact", {"target": sc.Target(channels=0.3)}, {"inexact": True}),
    ("compensate", {"method": "l1", "data": BATCHES}, {"compensate": "least_squares"}),
    ("compensate", {"method": "l1", "data": BATCHES}, {"compensate": ["merge", "bn"]}),
    ("test", {}, {"test": TEST}),
    ("metric", {"test": TEST}, {"metric": confidence}),
    ("seed", {"method": "random"}, {"seed": 1}),
]


@pytest.mark.parametrize(("name", "base", "change"), OPTIONS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(OPTIONS)])
def test_every_option_reaches_its_step(
    network: nn.Module, name: str, base: dict[str, Any], change: dict[str, Any]
) -> None:
    assert name in change
    base = {"target": MACS, "method": "l1", **base}
    before = copy.deepcopy(network.state_dict())
    without = sc.prune(network, INPUTS, **base)
    result = sc.prune(network, INPUTS, **{**base, **change})
    small, plan, report = chain(network, INPUTS, **{**base, **change})
    assert result.plan == plan
    assert same(result.model, small)
    assert {key: result.report[key] for key in report} == report
    assert asdict(result.check) == report["verification"]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    # Without the option the outcome is another, so one that is dropped on the way fails here.
    figures = [report[key] for key in ("before", "after")]
    assert [without.report[key] for key in ("before", "after")] != figures or not same(without.model, small)


def test_every_option_is_tried() -> None:
    parameters = {*inspect.signature(sc.prune).parameters, *OptionKeywords.__annotations__}
    assert parameters - {name for name, _, _ in OPTIONS} == {"model", "example_inputs", "steps", "options"}


def test_a_signature_names_every_option_with_its_kind() -> None:
    kinds = {f.name: f.type for f in fields(sc.Options)}
    assert {name: kind.__forward_arg__ for name, kind in OptionKeywords.__annotations__.items()} == kinds
    for name in ("plan", "prune"):
        assert str(inspect.signature(getattr(sc, name)).parameters["options"].annotation) == "Unpack[OptionKeywords]"


def test_auto_measures_the_network_pruned_to_the_same_target(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: dict[int, int] = {}

    def fastest(pruned: Callable[[int], Any], inputs: Any, **options: Any) -> RoundToChoice:
        assert inputs is INPUTS
        offered.update({n: pruned(n).conv1.out_channels for n in (1, 4)})
        return RoundToChoice(4, "channels_last", {(4, "channels_last"): 0.5}, {16: "too wide"})

    monkeypatch.setattr(once, "choose_round_to", fastest)
    result = sc.prune(network, INPUTS, MACS, method="l1", round_to="auto")
    assert offered == {n: chain(network, INPUTS, MACS, round_to=n)[0].conv1.out_channels for n in (1, 4)}
    assert result.plan == chain(network, INPUTS, MACS, round_to=4)[1]
    assert result.report["round_to"] == 4
    times = [{"round_to": 4, "memory_format": "channels_last", "ms": 500.0}]
    assert result.report["measured"] == {
        "memory_format": "channels_last", "times": times, "infeasible": {"16": "too wide"},
    }  # fmt: skip


def test_the_report_is_ready_for_json_and_names_method_and_metric(network: nn.Module) -> None:
    report = sc.prune(network, INPUTS, MACS, method=span, test=TEST, metric=confidence).report
    assert (report["method"], report["metric"]) == ("span", "confidence")
    assert (report["round_to"], report["measured"], report["compensation"]) == (1, None, None)
    assert json.loads(json.dumps(report, allow_nan=False))["widths"] == report["widths"]
    assert sc.prune(network, INPUTS, MACS).report["metric"] == "accuracy"


def test_data_that_can_be_read_only_once_are_read_by_every_step(network: nn.Module) -> None:
    options: dict[str, Any] = {"method": "corrnet", "compensate": "least_squares"}
    listed = sc.prune(network, INPUTS, MACS, data=BATCHES, test=TEST, **options)
    passing = sc.prune(network, INPUTS, MACS, data=iter(BATCHES), test=iter(TEST), **options)
    assert same(listed.model, passing.model)
    assert listed.report == passing.report


def test_steps_are_shown_in_their_order(network: nn.Module) -> None:
    log: list[tuple[str, str]] = []

    class Recorder:
        def __call__(self, step: str, done: int, total: int | None = None, note: str = "") -> None:
            log.append((f"{done} of {total}", step))

        @contextmanager
        def step(self, name: str) -> Iterator[None]:
            log.append(("begin", name))
            yield
            log.append(("end", name))

    options: dict[str, Any] = {"data": BATCHES, "compensate": "merge,bn", "test": TEST, "steps": Recorder()}
    sc.prune(network, INPUTS, MACS, method="l1", **options)
    names = ["tracing", "scoring by l1", "pruning", "verifying", "compensating by merge,bn", "evaluating", "evaluating"]
    assert log == [(what, name) for name in names for what in ("begin", "end")]
    log.clear()
    sc.prune(network, INPUTS, MACS, **options)
    assert log[2:5] == [(f"{done} of 2", "measuring sensitivity") for done in range(3)]


def test_auto_with_data_measures_allocates_and_refits(network: nn.Module) -> None:
    result = sc.prune(network, INPUTS, MACS, data=BATCHES)
    assert (result.report["method"], result.report["allocation"]) == ("auto: l2", "sensitivity")
    graph = sc.trace(network, INPUTS)
    table, scores = sc.sensitivity(network, graph, BATCHES), sc.score(network, graph, "l2")
    for _ in range(2):
        table = refined(network, graph, BATCHES, table, sc.plan(graph, scores, MACS, allocation=table))
    plan = sc.plan(graph, scores, MACS, allocation=table)
    assert result.plan == plan
    by_hand = sc.apply(network, plan, compensate="least_squares", data=BATCHES, everywhere=True)
    assert same(result.model, by_hand)
    again = sc.prune(network, INPUTS, MACS, data=BATCHES, allocation=table)
    assert same(again.model, result.model)
    with torch.no_grad():
        network.fc2.bias += 1  # type: ignore[union-attr,operator]
    with pytest.raises(PlanError, match="measured with other weights"):
        sc.prune(network, INPUTS, MACS, data=BATCHES, allocation=table)


def test_auto_without_data_goes_by_weights_and_each_part_can_be_set(network: nn.Module) -> None:
    bare = sc.prune(network, INPUTS, MACS)
    assert (bare.report["method"], bare.report["allocation"], bare.report["compensation"]) == (
        "auto: l2", "global", None,
    )  # fmt: skip
    assert bare.plan == sc.prune(network, INPUTS, MACS, method="l2", allocation="global").plan
    plain = sc.prune(network, INPUTS, MACS, data=BATCHES, compensate=())
    assert plain.report["compensation"] is None
    assert same(plain.model, sc.apply(network, plain.plan))
    evenly = sc.prune(network, INPUTS, MACS, data=BATCHES, allocation="uniform", compensate=())
    assert evenly.plan == sc.prune(network, INPUTS, MACS, method="l2", allocation="uniform").plan
    ratios = sc.prune(network, INPUTS, data=BATCHES, ratios={"conv1": 0.5})
    assert ratios.report["allocation"] == "normalized"
    assert ratios.model.conv1.out_channels == 4


ERRORS: list[tuple[dict[str, Any], type[SecateurError], str]] = [
    ({"target": None}, UsageError, "prune: how much? Give a target, such as Target(macs=0.5) (--macs), or ratios"),
    ({"target": sc.Target(macs=0.999)}, PlanError, "target: cannot remove 0.999 of the macs"),
    ({"method": "l3"}, UsageError, "unknown criterion 'l3'"),
    ({"method": 3}, UsageError, "prune: method: expected a criterion"),
    ({"method": "corrnet"}, UsageError, "prune: criterion corrnet looks at feature maps; give data=batches (--data"),
    ({"compensate": "bn"}, UsageError, "prune: compensation bn looks at feature maps; give data=batches (--data"),
    ({"compensate": "glue"}, UsageError, "unknown compensation 'glue'"),
    ({"compensate": ["bn", "merge"], "data": BATCHES}, UsageError, "Put merge first"),
    ({"method_options": {"power": 2}}, UsageError, "criterion l2: unknown option 'power'. It takes none."),
    ({"round_to": 0}, UsageError, "round_to: expected a whole number from 1 up, or 'auto'; found 0."),
    ({"round_to": "fast"}, UsageError, "or 'auto'; found 'fast'."),
    (
        {"method": "corrnet", "data": BATCHES, "method_options": {"threshold": 0.9}, "round_to": 4},
        UsageError,
        "round_to 4 can't hold what the option threshold selects; leave one of them out.",
    ),
    (
        {"method": "corrnet", "data": BATCHES, "method_options": {"threshold": 0.9}, "round_to": "auto"},
        UsageError,
        "round_to auto can't hold",
    ),
    ({"min_channels": 0}, UsageError, "min_channels: expected a whole number from 1 up; found 0."),
    ({"min_channels": "2"}, UsageError, "min_channels: expected a whole number from 1 up; found '2'."),
    ({"inexact": "no"}, UsageError, "inexact: is true or false; found 'no'."),
    ({"skip": [3]}, UsageError, "skip: is a list of patterns; found (3,)."),
    ({"ratios": 0.5}, UsageError, "ratios: are a mapping, pattern -> fraction; found 0.5."),
    ({"ratios": {"conv1": 1}}, UsageError, "ratio of conv1: the fraction to remove is in [0, 1); found 1."),
    ({"max_ratio": 0}, UsageError, "max_ratio: expected a fraction in (0, 1]; found 0."),
    ({"max_ratio": {"*": "half"}}, UsageError, "max_ratio of *: the fraction that may go is in [0, 1]; found 'half'."),
    ({"roundto": 8}, UsageError, "roundto: no such option; did you mean round_to?"),
    ({"metric": confidence}, UsageError, "prune: metric has nothing to be measured on; pass test=batches."),
    ({"ratios": {"conv1": 0.5}, "max_ratio": {"conv1": 0.2}}, UsageError, "contradicts max_ratio 0.2"),
    ({"skip": ["conv9"]}, UsageError, "conv9: no layer has this name or class"),
    ({"allocation": "loudest"}, UsageError, "allocation: expected normalized, global, uniform or a table"),
    ({"ratios": {"fc1": 0.5}}, UsageError, "pass inexact"),
    ({"method": "corrnet", "data": []}, DataError, "data"),
    ({"test": []}, DataError, "evaluation: the data is empty"),
]


@pytest.mark.parametrize(("options", "kind", "said"), ERRORS, ids=[said[:40] for _, _, said in ERRORS])
def test_a_bad_request_is_one_clear_line(
    network: nn.Module, options: dict[str, Any], kind: type[SecateurError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        sc.prune(network, INPUTS, **{"target": MACS, **options})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [number for number, (_, kind, _) in enumerate(ERRORS[:12]) if kind is UsageError])
def test_a_request_that_is_wrong_in_itself_is_refused_before_any_work(
    network: nn.Module, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "trace", lambda *_: pytest.fail("the network was traced"))
    with pytest.raises(UsageError):
        sc.prune(network, INPUTS, **{"target": MACS, **ERRORS[bad][0]})


class TwoModes(nn.Sequential):
    """Writes its width down where it runs in train mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        return self[1](x.view(len(x), 4, -1, 6) if self.training else x)


def test_a_network_that_fails_in_train_mode_is_no_result() -> None:
    with pytest.raises(VerificationError, match=r"^train mode: the pruned network fails, .* leave out the layers"):
        sc.prune(TwoModes(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)).eval(), INPUTS, sc.Target(channels=0.5))


def test_what_is_not_exact_is_no_result_unless_asked_for(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    inexact = VerificationReport(False, 0.25, 1e-9, "float64", 1, ("conv2", "fc1", "fc2"))
    monkeypatch.setattr(once, "verify", lambda *_: inexact)
    said = r"^the pruned network differs .* by 2\.5e-01 of its output \(conv2; fc1\); nothing was saved\."
    with pytest.raises(VerificationError, match=said):
        sc.prune(network, INPUTS, MACS)
    assert sc.prune(network, INPUTS, MACS, inexact=True).check is inexact
