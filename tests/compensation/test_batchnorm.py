"""Recalibrated running moments are averages over the batches, and nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from secateur.compensation import apply
from secateur.compensation.batchnorm import recalibrate
from secateur.errors import DataError
from secateur.pruning.planning import plan_removal
from secateur.tracing.tracing import trace


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers).double()


def test_moments_are_the_mean_over_batches_each_normalised_by_its_own() -> None:
    model = network().train()
    data = [drawn(s, 6, 3, 7, 7) for s in range(3)]
    expected: list[list[Tensor]] = [[], [], [], []]
    for x in data:
        first = model[0](x).detach()
        normal = nn.functional.batch_norm(
            first, None, None, model[1].weight, model[1].bias, training=True, eps=model[1].eps
        )
        second = model[4](torch.relu(normal)).detach()  # dropout is off
        for place, y in ((0, first), (2, second)):
            expected[place].append(y.mean((0, 2, 3)))
            expected[place + 1].append(y.var((0, 2, 3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = recalibrate(model, data)
    assert [e.module for e in report] == ["1", "5"]
    for norm, place in ((model[1], 0), (model[5], 2)):
        torch.testing.assert_close(norm.running_mean, torch.stack(expected[place]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack(expected[place + 1]).mean(0))
        assert norm.momentum == 0.1
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert ("running" in name or "tracked" in name) or torch.equal(value, before[name])


def test_a_shrunken_layer_gets_moments_that_fit_it() -> None:
    model = network().eval()
    data = [drawn(s, 8, 3, 7, 7) for s in range(2)]
    recalibrate(model, data)
    graph = trace(model, data[0])
    plan = plan_removal(graph, {"0": [0, 2]})
    plain, fitted = apply(model, plan), apply(model, plan, "bn", data)
    x = torch.cat(data)
    plain.eval()
    fitted.eval()
    error = [float(m(x).detach().mean((0, 2, 3)).abs().max()) for m in (plain, fitted)]
    assert error[1] < 0.02 < error[0], "outputs of a batch norm without bias have mean 0"


def test_failures_leave_the_moments_as_they_were() -> None:
    model = network()
    good = drawn(0, 4, 3, 7, 7)
    for data, message in (
        ([], "the data are empty"),
        ([good, good[:, :1]], "batch 2 .* does not fit"),
        ([good * float("nan")], "variance is not finite"),
        ([drawn(0, 1, 3, 5, 5)], "batch 1 .* does not fit the model: Expected more than 1 value per channel"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(DataError, match=message):
            recalibrate(model, data)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert model[1].momentum == 0.1


def test_batch_norms_without_running_moments_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).double()
    (entry,) = recalibrate(model, [drawn(0, 2, 3, 4, 4)])
    assert not entry.applied
    assert entry.reason == "it keeps no running moments"
