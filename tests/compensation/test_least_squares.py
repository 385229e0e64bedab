"""Least squares against torch.linalg.lstsq on materialised inputs, and its guarantees."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.compensation import apply, compensate
from secateur.compensation.least_squares import NormalEquations, refit, unfold
from secateur.errors import CriterionError, DataError, PlanError, UsageError
from secateur.graph.plan import PruningPlan
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace
from tests.criteria.networks import NETWORKS


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def removal(model: nn.Module, x: Tensor, removed: dict[str, list[int]]) -> PruningPlan:
    return plan_removal(trace(model, x), removed)


CONVOLUTIONS: list[tuple[Any, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3), (7, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", groups=2), (5, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 5)),
    (nn.Conv2d(4, 6, 2, padding="same"), (5, 4)),
    (nn.Conv1d(4, 6, 4, stride=3, padding=1), (11,)),
    (nn.Conv3d(4, 6, (1, 2, 3), padding=1), (3, 4, 5)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("layer", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("share", [None, 0.4])
def test_unfolded_inputs_times_weights_are_the_layers_outputs(
    layer: Any, size: tuple[int, ...], share: float | None
) -> None:
    layer = layer.double()
    x = drawn(0, 3, 4, *size)
    y = layer(x)
    total = math.prod(y.shape[2:])
    at = None if share is None else torch.randperm(total)[: max(1, int(share * total))].sort().values
    rows = unfold(layer, x, at)
    weight = layer.weight.reshape(layer.groups, -1, rows.shape[2])
    made = (rows @ weight.mT).movedim(0, 1).flatten(1) + layer.bias
    expected = y.flatten(2) if at is None else y.flatten(2)[:, :, at]
    torch.testing.assert_close(made, expected.movedim(1, 2).reshape(-1, 6))


def chain(reader: nn.Module, *after: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), reader, *after).double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_without_a_penalty_it_is_the_least_squares_solution(bias: bool, groups: int) -> None:
    model = chain(nn.Conv2d(6, 4, 3, bias=bias, groups=groups))
    x = drawn(1, 12, 3, 10, 10)
    plan = removal(model, x, {"0": [1, 4]})
    small = cut(model, plan)
    refit(model, small, plan, x.split(5), ridge=0.0, exact=True)
    wanted = model(x).detach().movedim(1, -1).reshape(-1, 4)
    rows = unfold(small[2], torch.relu(small[0](x)).detach(), None)  # type: ignore[index]
    rows = torch.cat((rows, torch.ones_like(rows[..., :1])), 2) if bias else rows
    for block in range(groups):
        outputs = slice(block * 4 // groups, (block + 1) * 4 // groups)
        best = torch.linalg.lstsq(rows[block], wanted[:, outputs]).solution
        weight = small[2].weight.detach()[outputs].flatten(1)  # type: ignore[index, union-attr, operator]
        torch.testing.assert_close(weight.T, best[: weight.shape[1]], rtol=1e-6, atol=1e-8)
        if bias:
            torch.testing.assert_close(small[2].bias.detach()[outputs], best[-1], rtol=1e-6, atol=1e-8)  # type: ignore[index, union-attr, operator]


def test_a_redundant_channel_leaves_no_residual() -> None:
    model = chain(nn.Conv2d(6, 4, 3, padding=1))
    with torch.no_grad():  # channel 5 is what 1 and 2 give together, behind the ReLU
        model[0].weight[:3] = model[0].weight[:3].abs()
        model[0].bias[:3] = 1.0
        model[0].weight[5] = 0.5 * model[0].weight[1] + 2 * model[0].weight[2]
        model[0].bias[5] = 2.5
    x = drawn(1, 16, 3, 8, 8).abs()
    plan = removal(model, x, {"0": [5]})
    small = cut(model, plan)
    (entry,) = refit(model, small, plan, [x], ridge=1e-9, exact=True)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    assert entry.before is not None
    assert entry.after is not None
    assert entry.after < 1e-10 < 1e-2 < entry.before


def test_proportional_channels_give_what_merging_gives() -> None:
    model = chain(nn.Conv2d(6, 4, 3))
    with torch.no_grad():
        model[0].weight[4] = 0.6 * model[0].weight[1]
        model[0].bias[4] = 0.6 * model[0].bias[1]
    x = drawn(1, 16, 3, 9, 9)
    graph = trace(model, x)
    plan = plan_removal(graph, {"0": [4]})
    merged = apply(model, plan, "merge", graph=graph, example_inputs=x)
    fitted = apply(model, plan, "least_squares", [x], ridge=1e-9, exact=True)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-11, atol=1e-11)
    for name, value in fitted.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("samples", [1, 2, 20])
def test_the_error_is_never_above_that_of_plain_dropping(ridge: float, samples: int) -> None:
    model = chain(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    x = drawn(1, samples, 3, 8, 8)
    plan = removal(model, x, {"0": [0, 3], "2": [1]})
    small = cut(model, plan)
    dropped = cut(model, plan)
    report = refit(model, small, plan, [x], ridge=ridge, exact=True)
    assert [e.module for e in report] == ["2", "5"]
    for entry in report:
        assert entry.before is not None
        assert entry.after is not None
        assert entry.after <= entry.before + 1e-9
    first = [(m[:3](x) - model[:3](x)[:, plan.kept_outputs["2"]]).square().sum() for m in (small, dropped)]  # type: ignore[index]
    assert first[0] <= first[1] * (1 + 1e-9)
    if ridge == 1e6:  # only the biases, which bear no penalty, are refitted
        for place in (2, 5):
            torch.testing.assert_close(small[place].weight, dropped[place].weight, rtol=1e-3, atol=1e-5)  # type: ignore[index]


def test_each_layer_is_fitted_to_what_the_layers_before_it_feed_it() -> None:
    model = chain(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    x = drawn(1, 20, 3, 9, 9)
    plan = removal(model, x, {"0": [0, 3], "2": [1]})
    small = cut(model, plan)
    report = refit(model, small, plan, [x], ridge=0.0, exact=True)
    fed = unfold(small[4], small[:4](x).detach(), None)[0]  # type: ignore[index]
    fed = torch.cat((fed, torch.ones(len(fed), 1, dtype=torch.float64)), 1)
    wanted = model(x).detach().movedim(1, -1).reshape(-1, 2)
    residual = (wanted - fed @ torch.linalg.lstsq(fed, wanted).solution).square().sum() / wanted.square().sum()
    assert report[1].after == pytest.approx(float(residual), rel=1e-6)
    assert float((small(x) - model(x)).square().sum() / model(x).square().sum()) == pytest.approx(
        float(residual), rel=1e-6
    )


def test_everywhere_refits_what_lost_no_input_too() -> None:
    model = chain(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    x = drawn(1, 20, 3, 9, 9)
    plan = removal(model, x, {"0": [0, 3, 5]})
    small, more = cut(model, plan), cut(model, plan)
    assert [e.module for e in refit(model, small, plan, [x], exact=True)] == ["2"]
    assert [e.module for e in refit(model, more, plan, [x], exact=True, everywhere=True)] == ["2", "4"]
    errors = [float((m(x) - model(x)).square().sum()) for m in (more, small)]
    assert errors[0] < errors[1]


def deep(seed: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    layers = [module for _ in range(4) for module in (nn.Conv2d(4, 4, 3), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).double().eval(), drawn(seed, 12, 4, 9, 9)


class Changing:
    """Batches in another order every time they are read."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.passes = x, 0

    def __iter__(self) -> Any:
        self.passes += 1
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.passes))
        return iter(self.x[order].split(5))


def test_the_original_is_run_once_and_the_result_is_that_of_running_it_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep(3)
    plan = removal(model, x, {name: [1] for name in ("0", "2", "4")})
    kept, beside = cut(model, plan), cut(model, plan)
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    refit(model, kept, plan, x.split(5), everywhere=True, positions=3)
    assert len(runs) == 3  # one pass of three batches
    # A mark that never repeats makes every pass look like other data.
    monkeypatch.setattr("secateur.compensation.least_squares._mark", lambda _: object())
    runs.clear()
    refit(model, beside, plan, x.split(5), everywhere=True, positions=3)
    assert len(runs) > 3 * 4
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, beside.state_dict()[name], rtol=0, atol=0)


def test_outputs_that_do_not_fit_the_memory_are_kept_for_fewer_layers_a_pass() -> None:
    model, x = deep(4)
    plan = removal(model, x, {name: [1] for name in ("0", "2", "4")})
    small, tight = cut(model, plan), cut(model, plan)
    refit(model, small, plan, x.split(5), exact=True, ridge=0.1)
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    # Outputs of 12 images in fp64: "2" 3 channels of 25 places, 7200 bytes; "4" 3 of 9, 2592; "6" 4 of 1, 384.
    refit(model, tight, plan, x.split(5), exact=True, ridge=0.1, memory=9000)
    assert len(runs) == 2 * 3  # "2" in a pass of three batches, "4" and "6" in another
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, tight.state_dict()[name], rtol=0, atol=0)


def test_data_in_another_order_every_time_are_fitted_batch_by_batch() -> None:
    model, x = deep(5)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 2 * model[0].weight[2], 2 * model[0].bias[2]  # type: ignore[index, operator, union-attr]
    plan = removal(model, x, {"0": [1]})
    small, data = cut(model, plan), Changing(x)
    refit(model, small, plan, data, everywhere=True, exact=True, ridge=0.0)
    assert data.passes > 3
    torch.testing.assert_close(small(x), model(x))


def test_moments_of_batches_add_up_to_those_of_all() -> None:
    rows, wanted, given = drawn(0, 2, 30, 3), drawn(1, 30, 4), drawn(2, 30, 4)
    whole, parts = (NormalEquations.empty(2, 3, 4, torch.device("cpu")) for _ in range(2))
    whole.update(rows, wanted, given)
    for i in (0, 10, 20):
        parts.update(rows[:, i : i + 10], wanted[i : i + 10], given[i : i + 10])
    for a, b in zip(vars(whole).values(), vars(parts).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    expected = rows[1].T @ (wanted - given)[:, 2:]
    torch.testing.assert_close(whole.errors[1], expected)


class Twice(nn.Module):
    """One head called on two maps, a depthwise reader, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Conv2d(6, 2, 1)
        self.tied, self.other = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.depthwise(x))
        return (
            self.head(x).mean((2, 3))
            + self.head(y).mean((2, 3))
            + self.tied(x).mean((2, 3))
            + self.other(y).mean((2, 3))
        )


def test_where_it_is_not_defined_the_layer_is_left_alone_with_a_reason() -> None:
    torch.manual_seed(0)
    model = Twice().double().eval()
    x = drawn(0, 8, 3, 9, 9)
    plan = removal(model, x, {"stem": [2]})
    small = cut(model, plan)
    report = compensate(model, small, plan, "least_squares", [x], exact=True)
    reasons = {e.module: e.reason for e in report.skipped}
    assert reasons["depthwise"].startswith("depthwise: every output reads one channel")
    assert reasons["tied"] == "its weight is shared with other"
    (head,) = [e for e in report if e.applied]
    assert head.module == "head"
    assert head.after is not None
    assert head.before is not None
    assert head.after < head.before
    assert "skipped" in str(report)
    transposed = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2)).double().eval()
    plan = removal(transposed, x, {"0": [2]})
    (entry,) = refit(transposed, cut(transposed, plan), plan, [x])
    assert entry.reason == "least squares is not defined for ConvTranspose2d"
    plain = chain(nn.Conv2d(6, 4, 3))
    plan = removal(plain, x, {"0": [2]})
    (entry,) = refit(plain, cut(plain, plan), plan, [x], memory=1000)
    assert "more than" in entry.reason


def test_outputs_that_lost_more_than_channels_are_left_alone_and_named() -> None:
    torch.manual_seed(0)
    network = NETWORKS["mixed_positions"]
    model, x = network.build().double().eval(), network.inputs.double()
    plan = removal(model, x, {"stem": [1], "t1": [0, 4]})
    small, plain = cut(model, plan), cut(model, plan)
    report = {entry.module: entry for entry in refit(model, small, plan, [x], exact=True)}
    assert not report["t2"].applied  # its rows are channels of which one is gone
    assert report["t2"].reason.startswith("removed channels lie along other dimensions of its outputs")
    assert torch.equal(small.get_parameter("t2.weight"), plain.get_parameter("t2.weight"))
    assert report["head"].applied
    alone = removal(model, x, {"t1": [0, 4]})
    (entry,) = refit(model, cut(model, alone), alone, [x], exact=True)
    assert (entry.module, entry.applied) == ("t2", True)


def test_fewer_samples_than_inputs_is_said() -> None:
    model = chain(nn.Flatten(), nn.Linear(6 * 36, 3))
    x = drawn(0, 4, 3, 8, 8)
    plan = removal(model, x, {"0": [2]})
    small = cut(model, plan)
    (entry,) = refit(model, small, plan, [x])
    assert entry.reason.startswith("4 observations of 181 inputs")
    assert bool(torch.isfinite(small(x)).all())


def test_bad_data_and_requests_are_refused_in_one_line() -> None:
    model = chain(nn.Conv2d(6, 4, 3))
    x = drawn(0, 4, 3, 8, 8)
    plan = removal(model, x, {"0": [2]})
    small = cut(model, plan)
    with pytest.raises(DataError, match="the data are empty"):
        refit(model, small, plan, [])
    with pytest.raises(DataError, match="must be read 2 times"):
        refit(model, small, plan, iter([x]))
    with pytest.raises(DataError, match="does not fit the model"):
        refit(model, small, plan, [x[:, :2]])
    with pytest.raises(CriterionError, match="2: NaN or infinity in its outputs at batch 1"):
        refit(model, small, plan, [x * float("nan")])
    with pytest.raises(UsageError, match="ridge -1"):
        refit(model, small, plan, [x], ridge=-1)
    with pytest.raises(PlanError, match="two models"):
        refit(small, small, plan, [x])
    with pytest.raises(UsageError, match=r"unknown compensation 'ls'. Known: merge, least_squares, bn"):
        apply(model, plan, "ls", [x])
    with pytest.raises(UsageError, match="needs data"):
        apply(model, plan, "least_squares")
    with pytest.raises(UsageError, match="merge undoes least_squares before it"):
        apply(model, plan, "least_squares,merge", [x])
    with pytest.raises(UsageError, match="ridge is an option of least_squares"):
        apply(model, plan, "bn", [x], ridge=1)
