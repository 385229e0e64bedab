"""What a network's code does with channels is tried: what is offered is exact, and no more is kept than must be."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.tracing.trial import attempt, search
from tests.cases import CASES
from tests.cases.table import Net, conv

pytestmark = pytest.mark.filterwarnings("ignore")


def helper(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Code outside any module that looks at a count."""
    return x.relu() if layer.out_channels == 8 else x.sigmoid()


def scripted(x: Tensor) -> Tensor:
    """Read a size where nobody can see it."""
    return x / x.size(1)


CODE: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    "size read": (lambda m, x: x / x.shape[1], False),
    "size() read": (lambda m, x: x * x.size(1), False),
    "size() of all": (lambda m, x: x * x.size()[1], False),
    "size kept whole": (lambda m, x: (lambda shape: x * shape[1])(x.shape), False),
    "length read": (lambda m, x: x * len(x[0]), False),
    "elements counted": (lambda m, x: x / x.numel(), False),
    "stride read": (lambda m, x: x * x.stride(0), False),
    "parameter's size read": (lambda m, x: x * m.one.weight.shape[0], False),
    "other sizes read": (lambda m, x: x + x.shape[-2:][0] * x.shape[0] * x.size(2), True),
    "written sizes": (lambda m, x: x.view(-1, 8, 6, 6), False),
    "open sizes": (lambda m, x: x.view(2, -1, 36).mean(2)[..., None, None] + x, True),
    "written groups": (lambda m, x: F.conv2d(x, m.depthwise, groups=8), False),
    "written norm": (lambda m, x: F.layer_norm(x, (8, 6, 6)), False),
    "copies by number": (lambda m, x: x + torch.ones(1).to(x).expand(8).view(8, 1, 1), False),
    "copies by what is there": (lambda m, x: x + m.one.bias.view(1, -1, 1, 1).expand(-1, -1, -1, -1), True),
    "numpy": (lambda m, x: torch.from_numpy(x.detach().numpy().copy()), False),
    "lists": (lambda m, x: torch.tensor(x.tolist(), dtype=x.dtype), False),
    "attribute read by a function": (lambda m, x: helper(x, m.one), False),
    "own operator": (lambda m, x: torch.ops.aten.relu.default(x), True),
    "scripted": (lambda m, x: torch.jit.script(scripted)(x), False),
    "pad positions": (lambda m, x: F.pad(x, pad=(1, 1)), True),
    "pad channels": (lambda m, x: F.pad(input=x, pad=(0, 0, 0, 0, 1, 1))[:, 1:-1], True),
    "slice positions": (lambda m, x: x[:, :, ::2, 1:][..., 1:], True),
    "slice channels": (lambda m, x: x * x[:, :1], False),
    "pick by a list": (lambda m, x: x[:, [0, 1, 2, 3, 4, 5, 6, 7]], False),
    "group norm of a number": (lambda m, x: F.group_norm(x, 2), False),
    "multiply matrices": (lambda m, x: x + (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean(), False),
    "like another": (lambda m, x: x + torch.zeros_like(x), True),
    "joined and flattened": (lambda m, x: torch.cat([x, 2 * x + 1], 1).clamp(0, 6)[:, : x.shape[1]], True),
}  # fmt: skip
"""What may be done with a layer's channels, and whether they can go all the same."""


def exact_half(model: nn.Module, inputs: Any) -> sc.ChannelGraph:
    """Trace, cut about half of every group, and hold the result against the oracle."""
    graph = sc.trace(model, inputs)
    steps = {g.name: sc.graph.steps.steps(g, range(g.size)) for g in graph.groups if g.exact}
    removed = {name: [c for step in found[: len(found) // 2 + 1] for c in step] for name, found in steps.items()}
    plan = sc.plan_removal(graph, removed)
    assert sc.verify(model, sc.apply(model, plan), plan, inputs).exact
    return graph


@pytest.mark.parametrize("name", CODE)
def test_what_code_may_do_with_channels_is_tried(name: str) -> None:
    code, goes = CODE[name]
    torch.manual_seed(0)
    net = Net(lambda m, x: m.head(code(m, m.one(x))), one=conv(3, 8), head=conv(8, 4))
    net.depthwise = nn.Parameter(torch.randn(8, 1, 1, 1))
    graph = exact_half(net.double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert ("one" in [g.name for g in graph.groups if g.exact]) is goes, graph


class Counting(nn.Module):
    """Looks at a layer's count where it is told to, in a method that calls nothing of torch."""

    def __init__(self, ask: bool) -> None:
        super().__init__()
        self.conv, self.ask = nn.Conv2d(8, 8, 1), ask

    def wide(self) -> bool:
        """Look."""
        return self.conv.out_channels == 8

    def forward(self, x: Tensor) -> Tensor:
        """Branch on it."""
        return self.conv(x).relu() if self.ask and self.wide() else self.conv(x)


@pytest.mark.parametrize("ask", [True, False])
def test_a_layers_count_keeps_its_channels_where_the_code_that_asks_runs(ask: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Counting(ask), nn.Conv2d(8, 2, 1)).double().eval()
    graph = exact_half(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert [g.name for g in graph.groups] == (["0"] if ask else ["0", "1.conv"])


class Auxiliary(nn.Module):
    """A head that runs in train mode only, as a flag of the module's own tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)
        self.both = True

    def train(self, mode: bool = True) -> Auxiliary:
        """Set the flag."""
        self.both = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Run one head or two."""
        x = self.conv(x)
        return self.head(x) + self.other(x) if self.both else self.head(x)


def test_layers_of_train_mode_are_seen_whatever_tells_the_mode() -> None:
    model = Auxiliary()
    graph = sc.trace(model, torch.zeros(1, 3, 4, 4))
    readers = {member.module for group in graph.groups for member in group.members}
    assert {"conv", "head", "other"} <= readers
    assert not graph.notes


def test_the_width_of_other_channels_is_told_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many trials as a network needs in which nothing fails."""
    case = CASES["attention_by_the_inputs_width"]
    attempts = []
    once = search.attempt
    monkeypatch.setattr(search, "attempt", lambda *args: attempts.append(once(*args)) or attempts[-1])
    sc.trace(case.build(), case.inputs())
    assert attempts == [None]


def test_a_part_of_a_group_may_be_given_the_width_of_others() -> None:
    """The part stays, and so do the others; the rest of the group goes."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.widths = [4, 6]
            self.wide, self.other = conv(3, 10), conv(3, 4)
            self.left, self.right, self.third = conv(4, 3), conv(6, 3), conv(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.wide(x).relu().split(self.widths, 1)
            other = self.other(x)
            n, width, height, _ = other.shape
            out: Tensor = self.left(a.reshape(n, width, height, -1)) + self.right(b) + self.third(other)
            return out

    graph = sc.trace(Parts(), torch.randn(2, 3, 6, 5))
    assert {g.name: int(g.removable.sum()) for g in graph.groups} == {"wide": 6}
    reasons = {t: r.reason for r in graph.refused for t in r.tensors}
    assert "is given the number of other channels" in reasons["wide.weight"]
    assert "gives the number of these channels" in reasons["other.weight"]


def test_what_code_keeps_of_a_shape_is_a_plain_number_to_others() -> None:
    kept: list[int] = []  # where no run's end puts it back

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            kept[:] = [x.shape[1], x.size(1) // 2, 3 * x.size()[1], x.shape[1] + 1, x.shape.numel()]
            return x

    sc.trace(Keeps(), torch.zeros(1, 3, 2, 2))
    assert kept == [8, 4, 24, 9, 32]
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):  # dumped on this very line
        assert [type(value) for value in other] == [int] * 5
        assert other == kept


class Masked(nn.Module):
    """Counts what a mask lets through, over as many channels as the features have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.a(x).relu() * mask
        number = mask.expand_as(x).sum((1, 2, 3), keepdim=True)
        out: Tensor = self.b(x.sum((2, 3), keepdim=True) / number)
        return out


class PartialConv(nn.Conv2d):
    """Convolution of what is known, which says what is known then (inpainting): two tensors, two kernels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.register_buffer("ones", torch.ones_like(self.weight))
        self.window = inputs * 9

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        assert isinstance(self.ones, Tensor)
        known = F.conv2d(mask, self.ones, None, 1, 1)
        ratio = self.window / (known + 1e-8)
        known = known.clamp(0, 1)
        assert self.bias is not None
        bias = self.bias.view(1, self.out_channels, 1, 1)
        raw = F.conv2d(x * mask, self.weight, self.bias, 1, 1)
        return ((raw - bias) * ratio * known + bias) * known, known


class Inpainting(nn.Module):
    """Partial convolutions one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = PartialConv(3, 16), PartialConv(16, 16), PartialConv(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = self.a(x, mask)
        x, mask = self.b(x.relu(), mask)
        out: Tensor = self.c(x.relu(), mask)[0]
        return out


class ScaledByFanIn(nn.Module):
    """A kernel scaled by its width in the code, and layers behind it that have nothing to do with that."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.a = conv(3, 16)
        self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3))
        self.rest = nn.Sequential(*(nn.Sequential(conv(16, 16), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(depth)))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x).relu(), self.kernel / math.sqrt(self.kernel.shape[1] * 9), padding=1)
        out: Tensor = self.out(self.rest(x.relu()).mean((2, 3)))
        return out


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
KNOWN = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()


@pytest.mark.parametrize(
    ("build", "inputs", "offered"),
    [
        (Masked, (IMAGE, KNOWN[:, :1]), []),
        (Inpainting, (IMAGE, KNOWN), None),
        (lambda: ScaledByFanIn(4), IMAGE, ["kernel", *(f"rest.{i}.0" for i in range(4))]),
        (lambda: ScaledByFanIn(14), IMAGE, ["kernel", *(f"rest.{i}.0" for i in range(14))]),
    ],
    ids=["mask", "partial convolution", "scale", "scale, deep"],
)
def test_what_depends_on_the_width_is_kept_and_what_does_not_is_offered(
    build: Callable[[], nn.Module], inputs: object, offered: list[str] | None
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    graph = sc.trace(model, inputs)
    if offered is not None:
        assert [g.name for g in graph.groups] == offered
    plan = sc.plan_removal(graph, {g.name: list(range(g.size // 2)) for g in graph.groups})
    assert sc.verify(model, sc.apply(model, plan), plan, inputs).exact


class Repeated(nn.Module):
    """The same block many times, whose code fixes the width in its middle."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        block = Net(lambda m, x: m.b(m.a(x).view(-1, 12, 6, 6)) + x, a=conv(8, 12), b=conv(12, 8))
        self.stem, self.head = conv(3, 8), conv(8, 4)
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def test_a_block_that_fails_is_tried_once_however_often_it_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []
    once = search.attempt
    monkeypatch.setattr(search, "attempt", lambda *args: attempts.append(1) or once(*args))
    counts = []
    for depth in (2, 16):
        attempts.clear()
        graph = sc.trace(Repeated(depth).eval(), torch.randn(2, 3, 6, 6))
        assert [g.name for g in graph.groups] == ["stem"]
        counts.append(len(attempts))
    assert counts[0] == counts[1]


def test_groups_of_one_size_lose_different_numbers_in_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds only where all lose the same has to fail."""
    lost: list[list[int]] = []
    run = attempt._run

    def noted(trials: Any, grouping: Any, chosen: Any, plan: Any, compared: bool) -> Any:
        lost.append([len(channels) for channels in plan.removed.values()])
        return run(trials, grouping, chosen, plan, compared)

    monkeypatch.setattr(attempt, "_run", noted)
    sc.trace(nn.Sequential(conv(3, 24), conv(24, 24), conv(24, 24), conv(24, 4)).eval(), torch.randn(2, 3, 6, 6))
    assert len(set(lost[0])) == 3


def test_a_division_by_zero_that_the_code_catches_does_not_hide_another_divisor() -> None:
    def guarded(m: Net, x: Tensor) -> Tensor:
        x = m.one(x)
        width = x.shape[1]
        x = x.relu() if width % 4 == 0 else x
        try:
            return m.head(x * (width % 0))
        except ZeroDivisionError:
            return m.head(x)

    graph = sc.trace(Net(guarded, one=conv(3, 8), head=conv(8, 3)).eval(), torch.randn(2, 3, 6, 6))
    assert [group.constraint for group in graph.groups] == ["channels go in multiples of 4"]
