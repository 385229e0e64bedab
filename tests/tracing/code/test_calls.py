"""A graph handed out without a trial pruning: then the trial, had it been run, would have passed."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.pruning.verification import verify
from secateur.tracing import recording, tracing
from secateur.tracing.flow import Flow
from secateur.tracing.grouping import group_channels
from secateur.tracing.trial import attempt, search
from tests.cases import CASES, Case
from tests.cases.table import Net, conv

pytestmark = pytest.mark.filterwarnings("ignore")


def run(model: nn.Module, inputs: object) -> recording.Recording:
    """Record one run of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recording.record(model, inputs, tracing._functions(model), {})


def recorded(model: nn.Module, inputs: object) -> Flow:
    """Let labels flow through a model once."""
    return run(model, inputs).flow


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_what_is_certain_passes_its_trial(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.build(), case.inputs()
    whole = run(model, inputs)
    if whole.flow.certain:
        types = {name: type(module).__name__ for name, module in model.named_modules()}
        trials = attempt.Trials(model, inputs, [], whole)
        assert search.failing(trials, group_channels(whole.flow, types, (), 1)) == []


def test_cases_of_both_kinds_are_there() -> None:
    kinds = [recorded(case.build(), case.inputs()).certain for case in CASES.values()]
    assert 40 < sum(kinds) < len(kinds) - 40


TEXTBOOK = (
    "resnet18 resnext50_32x4d mobilenet_v2 densenet121 squeezenet1_1 regnet_y_400mf efficientnet_b0 mobilenet_v3_small "
    "vgg11_bn convnext_tiny"
)


@pytest.mark.parametrize("name", TEXTBOOK.split())
def test_textbook_networks_need_no_trial(name: str) -> None:
    flow = recorded(zoo.get_model(name, weights=None), torch.zeros(1, 3, 64, 64))
    assert flow.certain, flow.doubt


def helper(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Code outside any module that looks at a count."""
    return x.relu() if layer.out_channels == 8 else x.sigmoid()


class Counting(nn.Module):
    """A module whose own method looks at a count, and calls nothing of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def wide(self) -> bool:
        """Look."""
        return self.conv.out_channels == 8

    def forward(self, x: Tensor) -> Tensor:
        """Branch on it."""
        return self.conv(x).relu() if self.wide() else self.conv(x)


DEPENDENT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "size read": lambda m, x: x / x.shape[1],
    "size() read": lambda m, x: x * x.size(1),
    "size() of all": lambda m, x: x * x.size()[1],
    "length read": lambda m, x: x * len(x[0]),
    "elements counted": lambda m, x: x / x.numel(),
    "stride read": lambda m, x: x * x.stride(0),
    "parameter's size read": lambda m, x: x * m.one.weight.shape[0],
    "written sizes": lambda m, x: x.view(-1, 8, 6, 6),
    "written groups": lambda m, x: F.conv2d(x, m.depthwise, groups=8),
    "written norm": lambda m, x: F.layer_norm(x, (8, 6, 6)),
    "copies by number": lambda m, x: x + torch.ones(1).expand(8).view(8, 1, 1),
    "numpy": lambda m, x: torch.from_numpy(x.detach().numpy().copy()),
    "lists": lambda m, x: torch.tensor(x.tolist()),
    "attribute read by a function": lambda m, x: helper(x, m.one),
    "own operator": lambda m, x: torch.ops.aten.relu.default(x),
    "scripted": lambda m, x: torch.jit.script(scripted)(x),
}  # fmt: skip


def scripted(x: Tensor) -> Tensor:
    """Read a size where nobody can see it."""
    return x / x.size(1)


@pytest.mark.parametrize("name", DEPENDENT)
def test_code_that_may_count_channels_needs_one(name: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(DEPENDENT[name](m, m.one(x)))

    model = Net(forward, one=conv(3, 8), head=conv(8, 4), depthwise=nn.Parameter(torch.ones(8, 1, 1, 1)))
    assert not recorded(model, torch.zeros(1, 3, 6, 6)).certain


def test_a_method_that_counts_channels_needs_one() -> None:
    assert not recorded(
        nn.Sequential(nn.Conv2d(3, 8, 1), Counting(), nn.Conv2d(8, 2, 1)), torch.zeros(1, 3, 4, 4)
    ).certain


def test_what_leaves_channels_alone_needs_none() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.one(x)
        x = torch.cat([x, 2 * x + 1], 1).clamp(0, 6)
        return m.head(x.flatten(2).mean(2).view(x.size(0), -1))

    flow = recorded(Net(forward, one=conv(3, 8), head=nn.Linear(16, 4)), torch.zeros(2, 3, 6, 6))
    assert flow.certain, flow.doubt


def unpack_and_use(x: Tensor) -> Tensor:
    """Use the number of channels."""
    n, c, h, w = x.shape
    return x * c + n * h * w


def unpack_and_leave(x: Tensor) -> Tensor:
    """Use the others."""
    n, _c, h, w = x.shape
    return x + n * h * w


def unpack_and_close_over(x: Tensor) -> Tensor:
    """Let an inner function use it."""
    n, c, h, w = x.shape
    return (lambda: x * c)() + n * h * w


def unpack_size(x: Tensor) -> Tensor:
    """Use the others of size()."""
    n, _, h, w = x.size()
    return x + n * h * w


def keep_whole(x: Tensor) -> Tensor:
    """Keep the shape for later."""
    shape = x.shape
    return x * shape[1]


def subscript_by_name(x: Tensor) -> Tensor:
    """Take the size that a variable says."""
    which = 1
    return x * x.shape[which]


SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "positions": (lambda x: x + x.shape[-2:][0], True),
    "batch": (lambda x: x + x.shape[0], True),
    "positions of size()": (lambda x: x + x.size()[2:][1], True),
    "all but the batch": (lambda x: x + x.shape[1:][1], False),
    "channels": (lambda x: x * x.shape[1], False),
    "channels from the end": (lambda x: x * x.shape[-3], False),
    "every other": (lambda x: x * x.shape[::2][0], True),
    "unpacked and used": (unpack_and_use, False),
    "unpacked and left": (unpack_and_leave, True),
    "unpacked for an inner function": (unpack_and_close_over, False),
    "unpacked from size()": (unpack_size, True),
    "kept whole": (keep_whole, False),
    "subscript in a variable": (subscript_by_name, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_used_of_a_shape_decides(name: str) -> None:
    function, safe = SHAPES[name]
    flow = recorded(
        Net(lambda m, x: m.head(function(m.one(x))), one=conv(3, 8), head=conv(8, 4)), torch.zeros(1, 3, 6, 6)
    )
    assert flow.certain is safe, flow.doubt


CALLS: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    "pad positions": (lambda m, x: F.pad(x, (1, 1, 2, 0)), True),
    "pad positions, by keyword": (lambda m, x: F.pad(x, pad=(1, 1)), True),
    "pad all by keyword": (lambda m, x: F.pad(input=x, pad=(0, 0, 0, 0, 1, 1)), False),
    "pad channels": (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)), False),
    "slice positions": (lambda m, x: x[:, :, ::2, 1:], True),
    "slice positions from the end": (lambda m, x: x[..., 1:], True),
    "one image": (lambda m, x: x[0], True),
    "slice channels": (lambda m, x: x[:, :4], False),
    "pick a channel": (lambda m, x: x * x[:, 0:1], False),
    "pick by a list": (lambda m, x: x[:, [0, 1, 2, 3, 4, 5, 6, 7]], False),
    "insert a dimension": (lambda m, x: x[:, None].squeeze(1), False),
    "expand by what is there": (lambda m, x: x + m.one.bias.view(1, -1, 1, 1).expand(-1, -1, -1, -1), True),
    "expand by a number": (lambda m, x: x + m.one.bias.view(1, -1, 1, 1).expand(-1, 8, 6, 6), False),
    "group norm of a layer": (lambda m, x: m.norm(x), True),
    "group norm of a number": (lambda m, x: F.group_norm(x, 2), False),
    "instance norm of a layer": (lambda m, x: m.instances(x), True),
    "multiply matrices": (lambda m, x: x + (x.flatten(2) @ x.flatten(2).transpose(1, 2)).mean(), True),
    "like another": (lambda m, x: x + torch.zeros_like(x), True),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_decide(name: str) -> None:
    function, safe = CALLS[name]
    model = Net(
        lambda m, x: m.head(function(m, m.one(x))),
        one=conv(3, 8),
        head=nn.LazyConv2d(4, 1),
        norm=nn.GroupNorm(2, 8),
        instances=nn.InstanceNorm2d(8, affine=True),
    )
    inputs = torch.zeros(2, 3, 6, 6)
    model(inputs)
    flow = recorded(model, inputs)
    assert (flow.doubt is None) is safe, flow.doubt


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
    graph = tracing.trace(model, torch.zeros(1, 3, 4, 4))
    readers = {member.module for group in graph.groups for member in group.members}
    assert {"conv", "head", "other"} <= readers
    assert not graph.notes


class Seldom(Counting):
    """A module that looks at a count where it is told to."""

    def __init__(self, ask: bool) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return super().forward(x) if self.ask else self.conv(x)


@pytest.mark.parametrize("ask", [True, False])
def test_code_that_counts_channels_calls_for_one_where_it_runs(ask: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Seldom(ask), nn.Conv2d(8, 2, 1))
    flow = recorded(model, torch.zeros(1, 3, 4, 4))
    assert flow.certain is not ask, flow.doubt
    assert sys.getprofile() is None


def test_under_a_profiler_code_that_may_run_counts_as_run() -> None:
    def ignore(frame: object, event: str, arg: object) -> None:
        pass

    before = sys.getprofile()
    sys.setprofile(ignore)
    try:
        flow = recorded(nn.Sequential(nn.Conv2d(3, 8, 1), Seldom(False)), torch.zeros(1, 3, 4, 4))
        found = sys.getprofile()
    finally:
        sys.setprofile(before)
    assert not flow.certain
    assert found is ignore


class SeldomAuxiliary(Auxiliary):
    """Looks at a count in train mode only."""

    def wide(self) -> bool:
        """Look."""
        return self.other.in_channels == 8

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return super().forward(x).relu() if self.both and self.wide() else super().forward(x)


def test_code_that_counts_channels_in_train_mode_alone_calls_for_one() -> None:
    assert recorded(Auxiliary(), torch.zeros(1, 3, 4, 4)).certain
    assert not recorded(SeldomAuxiliary(), torch.zeros(1, 3, 4, 4)).certain


def test_the_width_of_other_channels_is_told_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many trials as a network needs in which nothing fails."""
    case = CASES["attention_by_the_inputs_width"]
    attempts = []
    once = search.attempt
    monkeypatch.setattr(search, "attempt", lambda *args: attempts.append(once(*args)) or attempts[-1])
    tracing.trace(case.build(), case.inputs())
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

    graph = tracing.trace(Parts(), torch.randn(2, 3, 6, 5))
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

    tracing.trace(Keeps(), torch.zeros(1, 3, 2, 2))
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
    graph = tracing.trace(model, inputs)
    if offered is not None:
        assert [g.name for g in graph.groups] == offered
    plan = plan_removal(graph, {g.name: list(range(g.size // 2)) for g in graph.groups})
    assert verify(model, cut(model, plan), plan, inputs).exact
