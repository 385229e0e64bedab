"""Merging: exact where the theory says so, and refused or approximate where it says so."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.compensation import apply, compensate
from secateur.compensation.merging import merge
from secateur.criteria import feature_maps
from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.models import resnet20
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace
from tests.criteria.networks import NETWORKS


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settle(norm: nn.BatchNorm2d) -> None:
    """Give a batch norm moments and weights that are nothing special."""
    with torch.no_grad():
        norm.running_mean.copy_(0.1 * drawn(1, norm.num_features))  # type: ignore[union-attr]
        norm.running_var.copy_(drawn(2, norm.num_features).square() + 0.1)  # type: ignore[union-attr]
        norm.weight.copy_(drawn(3, norm.num_features).abs() + 0.1)
        norm.bias.copy_(drawn(4, norm.num_features).abs())  # no channel is dead behind a ReLU


def chain(activation: nn.Module, reader: nn.Module, between: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation, between or nn.Identity(), reader]
    model = nn.Sequential(*layers).double().eval()
    settle(model[1])
    return model


def tie(model: nn.Sequential, p: int, k: int, alpha: float = 1.0, s: float = 1.0) -> None:
    """Make channel p of the first layer exactly s times channel k behind the batch norm (t = 0), with w_p = α w_k."""
    conv, norm = model[0], model[1]
    with torch.no_grad():
        conv.weight[p] = alpha * conv.weight[k]
        conv.bias[p] = alpha * conv.bias[k]
        norm.running_mean[p] = alpha * norm.running_mean[k]
        sigma = (norm.running_var + norm.eps).sqrt()
        norm.weight[p] = s / alpha * norm.weight[k] * sigma[p] / sigma[k]
        norm.bias[p] = s * norm.bias[k]


def removal(model: nn.Module, x: Tensor, removed: dict[str, list[int]]) -> tuple[ChannelGraph, PruningPlan]:
    graph = trace(model, x)
    return graph, plan_removal(graph, removed)


READERS: dict[str, Callable[[], tuple[nn.Module, nn.Module | None]]] = {
    "padded convolution": lambda: (nn.Conv2d(6, 4, 3, padding=1), None),
    "pooled convolution": lambda: (nn.Conv2d(6, 4, 2, bias=False), nn.MaxPool2d(2)),
    "transposed convolution": lambda: (nn.ConvTranspose2d(6, 4, 2), None),
    "grouped convolution": lambda: (nn.Conv2d(6, 4, 3, groups=2), None),
    "flattened linear": lambda: (nn.Linear(6 * 36, 4), nn.Flatten()),
    "pooled linear": lambda: (nn.Linear(6, 4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("alpha", "s"), [(1.0, 1.0), (2.5, 0.3), (-0.7, 1.4)])
def test_a_proportional_filter_merges_exactly_through_a_relu(name: str, alpha: float, s: float) -> None:
    reader, between = READERS[name]()
    model = chain(nn.ReLU(), reader, between)
    x = drawn(9, 2, 3, 8, 8)
    tie(model, 2, 0, alpha, s)
    removed = {"0": [2]}
    if name == "grouped convolution":  # the other block loses one too
        tie(model, 4, 3, alpha, s)
        removed = {"0": [2, 4]}
    graph, plan = removal(model, x, removed)
    expected = model(x)
    plain = cut(model, plan)
    assert float((plain(x) - expected).abs().max()) > 1e-3, "dropping it plainly must hurt, or the test shows nothing"
    before = copy.deepcopy(model.state_dict())
    report = compensate(model, plain, plan, "merge", graph=graph, example_inputs=x)
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    assert [(e.module, e.applied) for e in report] == [("0", True)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_called_by_keyword_merge_too() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = chain(nn.ReLU(), nn.Conv2d(6, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(input=x)
            return x

    model = ByKeyword().eval()
    tie(model.layers, 2, 0)
    x = drawn(9, 2, 3, 8, 8)
    graph, plan = removal(model, x, {"layers.0": [2]})
    plain = cut(model, plan)
    (entry,) = compensate(model, plain, plan, "merge", graph=graph, example_inputs=x)
    assert entry.applied
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_negative_factor_merges_only_where_no_activation_lies_between() -> None:
    x = drawn(9, 2, 3, 8, 8)
    for activation, exact in ((nn.Identity(), True), (nn.ReLU(), False)):
        model = chain(activation, nn.Conv2d(6, 4, 3))
        tie(model, 2, 0, alpha=1.5, s=-0.8)
        graph, plan = removal(model, x, {"0": [2]})
        small = apply(model, plan, "merge", graph=graph, example_inputs=x, pairs={"0": {2: 0}})
        difference = float((small(x) - model(x)).abs().max())
        assert (difference < 1e-12) is exact


def test_a_shift_goes_into_the_bias_where_nothing_lies_between() -> None:
    x = drawn(9, 2, 3, 8, 8)
    for reader, exact in (
        (nn.Conv2d(6, 4, 3), True),
        (nn.Conv2d(6, 4, 3, padding=1), False),
        (nn.Conv2d(6, 4, 3, bias=False), False),
    ):
        model = chain(nn.Identity(), reader)
        tie(model, 2, 0, alpha=1.5, s=0.8)
        with torch.no_grad():
            model[1].bias[2] += 0.7
        graph, plan = removal(model, x, {"0": [2]})
        small = cut(model, plan)
        (entry,) = compensate(model, small, plan, ["merge"], graph=graph, example_inputs=x)
        assert (float((small(x) - model(x)).abs().max()) < 1e-12) is exact
        assert ("the shift is left out" in entry.reason) is not exact


def test_the_formula_of_s_and_t() -> None:
    """With w_p = α w_k: s = α(γ_p/σ_p)(σ_k/γ_k) and t = β_p − sβ_k + (γ_p/σ_p)(αμ_k − μ_p), read off the weights."""
    model = chain(nn.Identity(), nn.Conv2d(6, 1, 1))
    alpha = 1.7
    with torch.no_grad():
        model[0].weight[2] = alpha * model[0].weight[0]
        model[0].bias.zero_()
    x = drawn(9, 1, 3, 5, 5)
    graph, plan = removal(model, x, {"0": [2]})
    merged, _ = merge(model, graph, plan, feature_maps.Batch((x,), {}, None, 1), {"0": {2: 0}})
    norm, weight = model[1], model[4].weight.flatten()
    sigma = (norm.running_var + norm.eps).sqrt()
    s = alpha * norm.weight[2] / sigma[2] * sigma[0] / norm.weight[0]
    t = (
        norm.bias[2]
        - s * norm.bias[0]
        + norm.weight[2] / sigma[2] * (alpha * norm.running_mean[0] - norm.running_mean[2])
    )
    torch.testing.assert_close(merged[4].weight.flatten()[0], weight[0] + s * weight[2])  # type: ignore[index, union-attr, operator]
    torch.testing.assert_close(merged[4].bias[0], model[4].bias[0] + t * weight[2])  # type: ignore[index, union-attr, operator]


def test_behind_a_relu_the_mean_shift_is_that_of_normal_maps() -> None:
    model = chain(nn.ReLU(), nn.Conv2d(6, 1, 1))
    with torch.no_grad():
        model[0].weight[2] += 2 * model[0].weight[0]
        model[1].bias[2] -= 1.5
    x = drawn(9, 1, 3, 5, 5)
    graph, plan = removal(model, x, {"0": [2]})
    merged, _ = merge(model, graph, plan, feature_maps.Batch((x,), {}, None, 1), {"0": {2: 0}})
    norm, conv, weight = model[1], model[0].weight.flatten(1), model[4].weight.flatten()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    s = (scale[2] * conv[2]) @ (scale[0] * conv[0]) / (scale[0] * conv[0]).square().sum()
    z = drawn(11, 2_000_000)
    offset = norm.bias + scale * (model[0].bias - norm.running_mean)
    k = norm.bias[0] + norm.weight[0] * z
    expected = (torch.relu(s * k + offset[2] - s * offset[0]) - s * torch.relu(k)).mean()
    shift = (merged[4].bias - model[4].bias)[0] / weight[2]  # type: ignore[index, union-attr, operator]
    assert abs(float(expected)) > 0.05
    assert float(shift) == pytest.approx(float(expected), abs=3e-3)


class Stream(nn.Module):
    """A residual stream that two blocks write to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        self.down, self.up, self.upnorm = nn.Conv2d(5, 4, 1), nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.upnorm(self.up(torch.relu(self.down(x)))))
        return self.head(x)


def test_coupled_channels_merge_when_all_producers_agree() -> None:
    torch.manual_seed(0)
    model = Stream().double().eval()
    settle(model.norm)
    settle(model.upnorm)
    for conv, norm in ((model.stem, model.norm), (model.up, model.upnorm)):
        tie(nn.Sequential(conv, norm) if conv.bias is not None else _with_bias(conv, norm), 3, 1, alpha=2.0, s=0.6)
    x = drawn(5, 2, 3, 4, 4)
    graph, plan = removal(model, x, {"stem": [3]})
    small = apply(model, plan, "merge", graph=graph, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def _with_bias(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    """Show a convolution without a bias as one whose bias is zero."""
    stand_in = nn.Module()
    stand_in.weight = conv.weight  # type: ignore[assignment]
    stand_in.bias = torch.zeros(len(conv.weight), dtype=torch.float64)  # type: ignore[arg-type, assignment]
    return nn.Sequential(stand_in, norm)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.relu(self.depthwise(torch.relu(self.expand(x)))))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Depthwise(), "depthwise is depthwise: two filters in a row"),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.SiLU(), nn.Conv2d(6, 2, 1)), "does not commute with scaling"),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.PReLU(6), nn.Conv2d(6, 2, 1)), r"1 \(PReLU\) treats every channel"),
        (
            nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)),
            "2 does not follow one of its filters directly",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 2, 1)),
            r"1 \(BatchNorm2d\) treats every channel",
        ),
    ],
)
def test_where_it_is_not_defined_the_group_is_left_alone_with_a_reason(model: nn.Module, reason: str) -> None:
    model = model.double().eval()
    x = drawn(0, 2, 3, 6, 6)
    graph = trace(model, x)
    name = graph.groups[0].name
    plan = plan_removal(graph, {name: [1]})
    small = cut(model, plan)
    plain = small(x)
    report = compensate(model, small, plan, "merge", graph=graph, example_inputs=x)
    assert torch.equal(small(x), plain)
    assert re.search(reason, report.skipped[0].reason), report.skipped[0].reason


UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def transposed(dims: int, between: nn.Module) -> nn.Sequential:
    """A grouped transposed convolution of four blocks of three channels, each block reading two."""
    torch.manual_seed(0)
    layers = (CONV[dims](3, 8, 1), nn.ReLU(), UP[dims](8, 12, 2, 2, groups=4), between, CONV[dims](12, 5, 1))
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_filters_in_blocks_along_dimension_1_merge(dims: int) -> None:
    model = transposed(dims, nn.ReLU())
    layer = model[2]
    for block in range(4):  # channel 3b + 2 is a multiple of 3b, whose filter reads the same two inputs
        inputs = slice(2 * block, 2 * block + 2)
        layer.weight[inputs, 2] = 0.7 * layer.weight[inputs, 0]
        layer.bias[3 * block + 2] = 0.7 * layer.bias[3 * block]
    x = drawn(9, 2, 3, *[4] * dims)
    graph, plan = removal(model, x, {"2": [2, 5, 8, 11]})
    small = cut(model, plan)
    assert float((small(x) - model(x)).abs().max()) > 1e-3
    (entry,) = compensate(model, small, plan, "merge", graph=graph, example_inputs=x)
    assert entry.applied
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_channels_that_a_transposed_layer_reads_in_blocks_merge_within_them() -> None:
    model = transposed(2, nn.ReLU())
    first = model[0]
    for p, k in ((1, 0), (3, 2), (5, 4), (7, 6)):
        first.weight[p], first.bias[p] = 1.5 * first.weight[k], 1.5 * first.bias[k]
    x = drawn(9, 2, 3, 4, 4)
    graph, plan = removal(model, x, {"0": [1, 3, 5, 7]})
    small = apply(model, plan, "merge", graph=graph, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    # A twin in another block is no partner: other outputs read it.
    first.weight[1], first.bias[1] = first.weight[2], first.bias[2]
    graph, plan = removal(model, x, {"0": [1, 3, 5, 7]})
    merged, _ = merge(model, graph, plan, feature_maps.Batch((x,), {}, None, 2))
    rows = first.weight.flatten(1)
    s = max(0.0, float(rows[1] @ rows[0] / rows[0].square().sum()))
    torch.testing.assert_close(merged[2].weight[0], model[2].weight[0] + s * model[2].weight[1])
    torch.testing.assert_close(merged[2].weight[2], model[2].weight[2] + 1.5 * model[2].weight[3])


class Twins(nn.Module):
    """Filters of two blocks that are alike and look at different channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1, groups=2)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.stem(x).relu()))


def test_filters_of_two_blocks_are_no_partners_however_alike() -> None:
    torch.manual_seed(0)
    model = Twins().double().eval()
    layer = model.grouped
    layer.weight[0] = layer.weight[4]  # the same numbers in the other block
    layer.weight[3] = layer.weight[1]
    x = drawn(9, 2, 3, 4, 4)
    graph, plan = removal(model, x, {"grouped": [0, 3]})
    merged, _ = merge(model, graph, plan, feature_maps.Batch((x,), {}, None, 2))
    before, after = model.head.weight.flatten(1), merged.head.weight.flatten(1)
    for p, twin in ((0, 4), (3, 1)):
        own = [k for k in range(6) if k // 3 == p // 3 and k not in (0, 3)]
        rows = layer.weight.flatten(1)
        best = max(own, key=lambda k: float((rows[p] @ rows[k]).abs() / rows[k].norm()))
        s = rows[p] @ rows[best] / rows[best].square().sum()
        torch.testing.assert_close(after[:, best], before[:, best] + s * before[:, p])
        assert not torch.allclose(after[:, twin], before[:, twin] + before[:, p])


@pytest.mark.parametrize("name", ["weight_normed", "masked", "low_rank"])
def test_a_reader_whose_weight_is_computed_is_left_alone_and_named(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, x = network.build().double().eval(), network.inputs.double()
    graph, plan = removal(model, x, {"0": [1, 2], "2": [3]})
    small, plain = cut(model, plan), cut(model, plan)
    report = compensate(model, small, plan, ["merge", "least_squares"], [x], graph=graph, example_inputs=x)
    reasons = {(entry.method, entry.module): entry.reason for entry in report.skipped}
    assert "is computed at each forward" in reasons["merge", "0"]
    assert "is computed at each forward" in reasons["least_squares", "2"]
    for value, expected in zip(small[2].state_dict().values(), plain[2].state_dict().values(), strict=True):
        assert torch.equal(value, expected)


def test_filters_without_a_partner_are_dropped_plainly() -> None:
    model = chain(nn.ReLU(), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6, 27).reshape(6, 3, 3, 3))
        model[0].weight[1] = -model[0].weight[0]
    x = drawn(9, 2, 3, 8, 8)
    graph, plan = removal(model, x, {"0": [1]})
    small, plain = cut(model, plan), cut(model, plan)
    (entry,) = compensate(model, small, plan, "merge", graph=graph, example_inputs=x)
    assert not entry.applied
    assert "1 of 1 filters have no partner" in entry.reason
    assert torch.equal(small(x), plain(x))


def test_bad_requests_are_refused() -> None:
    model = chain(nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = drawn(9, 2, 3, 8, 8)
    graph, plan = removal(model, x, {"0": [1]})
    with pytest.raises(UsageError, match="needs an example"):
        apply(model, plan, "merge", graph=graph)
    with pytest.raises(UsageError, match="pair 0 -> 2 does not lead from a removed to a kept"):
        apply(model, plan, "merge", graph=graph, example_inputs=x, pairs={"0": {0: 2}})


def test_what_a_padding_shortcut_hands_on_is_named_as_lost() -> None:
    torch.manual_seed(0)
    model = resnet20(streams=(4, 6, 8), stem=4).double().eval()
    x = drawn(9, 1, 3, 8, 8)
    graph, plan = removal(model, x, {"conv1": [1], "layer1.0.conv1": [2]})
    _, report = merge(model, graph, plan, feature_maps.Batch((x,), {}, None, 1))
    notes = {entry.module: entry.reason for entry in report}
    assert "layer2.0.shortcut hands them on to other channels, which is lost" in notes["conv1"]
    assert "hands them on" not in notes["layer1.0.conv1"]
