"""What a run without values accepts, numbers have to accept; and it sees what numbers may miss."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.tracing import grouping
from secateur.tracing.assumptions import Assumptions
from secateur.tracing.program import Program
from secateur.tracing.recording import record
from secateur.tracing.trial import attempt
from secateur.tracing.trial.programs import can_tell
from tests import oracle
from tests.cases import CASES
from tests.cases.table import Net, conv
from tests.surroundings import pruned


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every network tried, and its program compared however small it is."""
    monkeypatch.setattr(attempt, "WORTH", -1)


def verdicts(monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: Any) -> list[tuple[bool, bool]]:
    """Trace; return of every trial whether the programs are the same, and whether the pruned network held.

    Where they are the same for a plan with inexact groups, that tells of the exact ones alone, which are tried next.
    """
    found: list[tuple[bool, bool]] = []
    run, tells = attempt._run, attempt._is_told_by_program
    told_of: tuple[Any, list[int]] | None = None

    def both(trials: Any, grouping: Any, chosen: Any, plan: Any, compared: bool) -> Any:
        nonlocal told_of
        small = attempt.cut(trials.model, plan, share=True, hollow=True)
        told = can_tell(trials.recording) and tells(trials, grouping, plan, small, Program())
        outcome = run(trials, grouping, chosen, plan, compared)
        found.append((told or told_of == (grouping, chosen), outcome is None))
        exact = [i for i in chosen if grouping.graph.groups[i].exact]
        told_of = (grouping, exact) if told and not compared else None
        return outcome

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(attempt, "_run", both)
        patch.setattr(attempt, "_is_told_by_program", lambda *_: False)
        sc.trace(model, inputs)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("always")
def test_what_programs_accept_numbers_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the table of patterns, with every wrong assumption on the way to the right one."""
    monkeypatch.setattr(grouping, "_contradicted", lambda *_: [])
    count: Counter[tuple[bool, bool]] = Counter()
    wrong = []
    for case in CASES.values():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = oracle.randomise(case.build())
        found = verdicts(monkeypatch, model, oracle.doubled(case.inputs()))
        wrong += [case.name for told, held in found if told and not held]
        count.update(found)
    assert not wrong
    assert count[True, True] >= 180
    assert count[False, False] >= 25


CODES: dict[str, Callable[[Net, Tensor, Tensor, Tensor], Tensor]] = {
    "chosen": lambda m, x, y, z: (y if y.shape[1] == 8 else z).relu() * (y + z),
    "constant": lambda m, x, y, z: y / torch.from_numpy(np.full((1,), float(y.shape[1]))),
    "moved": lambda m, x, y, z: y * x[:, :1, :, (at := int(y.shape[1]) // 8) : at + 1],  # nobody is told of a width
    "picked": lambda m, x, y, z: y * x[:, :1].select(3, y.shape[1] // 8).unsqueeze(3),
    "scaled": lambda m, x, y, z: y * y.shape[1] ** -0.5,
    "padded": lambda m, x, y, z: F.conv2d(y, m.kernel, dilation=1 + y.shape[1] // 8, padding="same"),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", CODES)
def test_code_that_computes_with_the_width_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where shapes and labels are the same, and whatever the values are: these networks give zeros alone."""
    layers = {"one": conv(3, 8), "two": conv(3, 8), "kernel": nn.Parameter(torch.randn(8, 8, 3, 3)), "head": conv(8, 3)}
    net = Net(lambda m, x: m.head(CODES[name](m, x, m.one(x), m.two(x))), **layers)
    nn.init.zeros_(net.head.weight)
    found = verdicts(monkeypatch, net.double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert not found[0][0]


class Compared(BaseException):
    """No exception that a trial takes for the model's own."""


def never(*_: Any) -> None:
    raise Compared


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no trial compare values."""
    monkeypatch.setattr(attempt, "compare", never)
    monkeypatch.setattr(attempt, "outputs", never)


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(64)])
def test_large_networks_are_tried_without_values(norm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program tells of inexact groups and exact ones at once."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        n, c, h, w = x.shape
        return m.head(m.hidden(m.norm(x.reshape(n, c, h * w).transpose(1, 2))).relu().mean(1))

    model = Net(forward, stem=conv(3, 64), norm=norm, hidden=nn.Linear(64, 56), head=nn.Linear(56, 4))
    cut, plans = attempt.cut, []
    monkeypatch.setattr(attempt, "cut", lambda *given, **options: plans.append(given) or cut(*given, **options))
    graph, _, _ = pruned(model, torch.randn(2, 3, 256, 192))
    exact = isinstance(norm, nn.Identity)
    assert sorted((g.size, g.exact) for g in graph.groups) == [(56, True), (64, exact)]
    assert len(plans) == 1 + exact  # how many have to stay of channels whose number the code reads is tried, too


@pytest.mark.usefixtures("without_values")
def test_sizes_that_the_code_gets_wrong_are_found_without_values() -> None:
    def fixed(m: Net, x: Tensor) -> Tensor:
        return m.head(m.stem(x).relu().reshape(2, 64, 256 * 192).mean(2))

    graph = sc.trace(Net(fixed, stem=conv(3, 64), head=nn.Linear(64, 4)).eval(), torch.randn(2, 3, 256, 192))
    assert not graph.groups
    assert any("shape '[2, 64, 49152]' is invalid" in refusal.reason for refusal in graph.refused)


def test_a_light_run_leaves_the_model_and_makes_zeros() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Conv2d(32, 8, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(4, 3, 96, 96)
    light, whole = record(model, images, Assumptions(), light=Program()), record(model, images, Assumptions())
    assert [(s.name, s.arguments) for s in light.program.steps] == [(s.name, s.arguments) for s in whole.program.steps]
    assert [[m[0] for m in s.made] for s in light.program.steps] == [
        [m[0] for m in s.made] for s in whole.program.steps
    ]
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_that_are_not_run_keep_shape_strides_and_identity(dtype: torch.dtype) -> None:
    aten, big = torch.ops.aten, torch.ones(600, 700, dtype=dtype)
    run = Program().shaped
    made = run(aten.mm.default, (big.t(), big), {})
    assert made.shape == (700, 700)
    assert not made.any()
    added = run(aten.add.Tensor, (made.t(), made.t()), {})
    assert added.stride() == (made.t() + made.t()).stride()
    added += 1
    assert run(aten.add_.Tensor, (added, made), {}) is added
    assert added.eq(1).all()
    first = run(aten.sort.default, (made, 1), {})
    assert [t.dtype for t in first] == [dtype, torch.int64]
    assert run(aten.add.Tensor, (big, big), {}).eq(2).all()
    assert run(aten.ones_like.default, (made,), {}).eq(1).all()
    with pytest.raises(RuntimeError):
        run(aten.add_.Tensor, (made, torch.ones(3, dtype=dtype)), {})


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.numpy().max(),
        lambda t: max(t.tolist()),
        lambda t: t.max().item(),
        lambda t: 1 - bool((t == 0).all()),
    ],
)
def test_a_loop_that_waits_for_a_value_is_run_with_values(read: Callable[[Tensor], float]) -> None:
    rounds: list[int] = []

    def until_positive(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        while not rounds[50:]:
            x = x.reshape(x.shape[0], x.shape[1], *x.shape[2:]) + 1
            rounds.append(1)
            if read(x.mean((1, 2, 3))) > 0:
                break
        return m.head(x.mean((2, 3)))

    with pytest.raises(Compared):
        sc.trace(Net(until_positive, stem=conv(3, 64), head=nn.Linear(64, 4)).eval(), torch.randn(2, 3, 256, 192))
    assert len(rounds) < 10


CACHE: dict[Any, Tensor] = {}
IMAGES = torch.randn(1, 3, 128, 128)


def wide(between: Callable[[Tensor], Tensor]) -> Net:
    """Return a network that is tried without values; something is done with the features."""
    CACHE.clear()
    layers = {"a": conv(3, 64), "b": conv(64, 64), "c": conv(64, 8)}
    return Net(lambda m, x: m.c(m.b(between(m.a(x).relu())).relu()), **layers).eval()


@pytest.mark.parametrize(
    ("noise", "goes"), [(torch.randn_like, False), (lambda x: torch.randn(1, 1, *x.shape[2:]), True)]
)
def test_random_numbers_with_channels_are_no_network_that_can_be_told(
    noise: Callable[[Tensor], Tensor], goes: bool
) -> None:
    graph = sc.trace(wide(lambda x: x + 0.1 * noise(x)), IMAGES)
    assert ("a" in {group.name for group in graph.groups}) is goes


def test_constants_that_the_code_keeps_have_their_values() -> None:
    def cached(x: Tensor) -> Tensor:
        if tuple(x.shape) not in CACHE:
            CACHE[tuple(x.shape)] = torch.ones_like(x) * 0.5
        return x * CACHE[tuple(x.shape)]

    graph = sc.trace(wide(cached), IMAGES)
    assert [g.name for g in graph.groups] == ["a", "b"]
    assert len(CACHE) > 1
    assert all(kept.eq(0.5).all() for kept in CACHE.values())


def test_features_that_the_code_keeps_are_spoilt_and_tell_nothing() -> None:
    def kept(x: Tensor) -> Tensor:
        CACHE.setdefault(tuple(x.shape), x)
        return x + 0 * x.reshape(x.shape[0], x.shape[1], *x.shape[2:])

    pruned(wide(kept), IMAGES)
    assert all(features.isnan().all() or features.any() for features in CACHE.values())


def until_any(x: Tensor) -> Tensor:
    """Wait for a value that is not zero."""
    for _ in range(10):
        if (x + 0).abs().max().item():
            return x
    raise AssertionError("values are needed")


def fails_without(x: Tensor) -> Tensor:
    """Invert a matrix, which of zeros can't be done."""
    gram = x.flatten(2) @ x.flatten(2).transpose(1, 2)
    return x + 0 * (gram + torch.eye(64) * gram.amax()).inverse().sum()


def kept_for_later(x: Tensor) -> Tensor:
    CACHE["features"] = x
    return x


@pytest.mark.parametrize("before", [torch.relu, until_any, fails_without, kept_for_later])
def test_layers_of_train_mode_are_seen(before: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Net, x: Tensor) -> object:
        x = m.a(x).relu()
        return (m.b(x), m.top(m.aux(before(x)))) if m.training else m.b(x)

    model = Net(forward, a=conv(3, 64), b=conv(64, 8), aux=conv(64, 32), top=conv(32, 8)).eval()
    images = torch.randn(1, 3, 192, 192)
    graph = sc.trace(model, images)
    offered = {"a": 64, "aux": 32} if before is not fails_without else {"aux": 32}  # it contracts the others
    assert {group.name: group.size for group in graph.groups} == offered
    plan = sc.plan_removal(graph, {name: list(range(0, size, 3)) for name, size in offered.items()})
    small = sc.apply(model, plan).train()
    assert [tuple(out.shape) for out in small(images)] == [(1, 8, 192, 192)] * 2


@pytest.mark.parametrize("held", ["weight", "bias", "running_mean", "running_var"])
def test_a_batch_norm_whose_numbers_are_too_few_fails_without_values_too(held: str) -> None:
    """In a run without values its shapes are told without asking PyTorch, which would have refused."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 3)).eval()
    images = torch.randn(4, 3, 96, 96)
    getattr(model[1], held).data = torch.ones(31)
    for light in (None, Program()):
        with pytest.raises(sc.TraceError, match="1"):
            record(model, images, Assumptions(), light=light)
