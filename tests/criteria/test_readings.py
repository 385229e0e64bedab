"""Where feature maps are seen when layers read a group unequally, against maps taken by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.criteria import feature_maps
from secateur.criteria.moments import Moments
from secateur.criteria.readings import readings, unseen, watching
from secateur.graph.channels import ChannelGraph
from secateur.tracing.tracing import trace
from tests.cases.table import Net, conv, pooled
from tests.criteria.networks import NETWORKS, X

X64 = X.double()


def traced(name: str) -> tuple[Any, ChannelGraph]:
    torch.manual_seed(0)
    model = NETWORKS[name].build().double().eval()
    return model, trace(model, X64)


def slow(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and second moments of maps ``(N, C, *spatial)``, one observation after the other."""
    rows = maps.detach().flatten(2).movedim(1, 2).reshape(-1, maps.shape[1])
    second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows:
        second += torch.outer(row, row)
    return rows.mean(0), second / len(rows)


def observed(model: nn.Module, graph: ChannelGraph, group: str) -> Moments:
    found = feature_maps.observe(model, graph, X64.split(4), [group], exact=True)[group]
    for matrix in (found.second, found.covariance, found.correlation):
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-9 * float(matrix.trace())
    return found


def check(found: Moments, maps: Tensor) -> None:
    mean, second = slow(maps)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.second, second)
    torch.testing.assert_close(found.covariance, second - torch.outer(mean, mean), atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_an_input_that_holds_every_channel_is_the_observation() -> None:
    model, graph = traced("cross_stage")
    assert [r.module for r in readings(model, graph, graph.group("stem"))] == ["head"]
    a, b = model.stem(X64).relu().chunk(2, 1)
    check(observed(model, graph, "stem"), torch.cat([a, b + model.side(b)], 1))


@torch.no_grad()
def test_of_channels_held_several_times_the_first_copy_counts() -> None:
    model, graph = traced("c2f")
    check(observed(model, graph, "cv1"), model.cv1(model.stem(X64)).relu())
    model, graph = traced("ghost_of_half")
    check(observed(model, graph, "primary"), model.primary(X64).relu())
    model, graph = traced("flattened_unequally")
    maps = F.adaptive_avg_pool2d(model.stem(X64).relu(), 2)
    check(observed(model, graph, "stem"), maps)
    (reading,) = readings(model, graph, graph.group("stem"))
    flat = torch.cat([maps, maps[:, 6:].square()], 1).flatten(1)
    assert torch.equal(reading.maps(flat, model.out), maps)


@torch.no_grad()
def test_channels_read_by_layers_apart_are_seen_together_where_their_maps_are_of_one_shape() -> None:
    model, graph = traced("halves_apart")
    check(observed(model, graph, "stem"), model.stem(X64).relu())


@torch.no_grad()
def test_channels_at_two_scales_are_never_seen_together() -> None:
    model, graph = traced("halves_at_two_scales")
    found = observed(model, graph, "stem")
    a, b = model.stem(X64).relu().chunk(2, 1)
    for own, maps in ((slice(0, 6), a), (slice(6, 12), F.max_pool2d(b, 2))):
        mean, second = slow(maps)
        torch.testing.assert_close(found.mean[own], mean)
        torch.testing.assert_close(found.second[own, own], second)
    assert not found.second[:6, 6:].any()
    assert not found.covariance[:6, 6:].any()


@torch.no_grad()
def test_copies_that_interleave_are_read_elsewhere() -> None:
    model, graph = traced("flattened_channels_last")
    assert [r.module for r in readings(model, graph, graph.group("stem"))] == ["side", "other"]
    a, b = F.adaptive_avg_pool2d(model.stem(X64).relu(), 2).chunk(2, 1)
    check(observed(model, graph, "stem"), torch.cat([a, b], 1))


@torch.no_grad()
def test_every_layer_that_reads_all_channels_counts_once_a_tensor() -> None:
    model, graph = traced("dense")
    assert [r.module for r in readings(model, graph, graph.group("stem"))] == ["one", "two", "out"]
    stem = model.stem(X64).relu()
    mean, _ = slow(stem)
    both = pooled(stem)
    found = observed(model, graph, "stem")
    count = 10 * 16 * 16
    # The last layer reads two copies of the pooled maps.
    expected = (2 * count * mean + 2 * both.sum(0)) / (2 * count + 20)
    torch.testing.assert_close(found.mean, expected)


def called_twice(m: Net, x: Tensor) -> Tensor:
    a, b = m.stem(x).relu().chunk(2, 1)
    return pooled(m.left(a) + m.right(b) + m.left(2 * a))


@torch.no_grad()
def test_of_a_layer_that_reads_a_part_several_times_the_first_input_counts() -> None:
    torch.manual_seed(0)
    model: Any = Net(called_twice, stem=conv(3, 8), left=conv(4, 5), right=conv(4, 5)).double().eval()
    graph = trace(model, X64)
    check(observed(model, graph, "stem"), model.stem(X64).relu())


def written_over(m: Net, x: Tensor) -> Tensor:
    a, b = m.stem(x).relu().chunk(2, 1)
    first = m.left(a)
    a.mul_(0)
    return pooled(first + m.right(b) + a.sum())


@torch.no_grad()
def test_parts_are_kept_as_they_were_read() -> None:
    torch.manual_seed(0)
    model: Any = Net(written_over, stem=conv(3, 8), left=conv(4, 5), right=conv(4, 5)).double().eval()
    graph = trace(model, X64)
    group = next(group for group in graph.groups if group.name == "stem")
    seen: list[Tensor] = []
    with watching(model, graph, [group], lambda _, maps, channels: seen.append(maps)):
        model(X64)
    (maps,) = seen
    torch.testing.assert_close(maps, model.stem(X64).relu())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "group", "reason"),
    [
        (
            "functional_head",
            "second",
            "the maps of 10 of its 10 channels can't be seen, as code applies head.weight to",
        ),
        ("functional_convolution", "first", "the maps of 8 of its 8 channels can't be seen, as code applies kernel to"),
        ("read_in_half", "second", "the maps of 6 of its 12 channels can't be seen, as code applies matrix to them"),
        ("recurrent", "second", "the maps of 8 of its 8 channels can't be seen, as code applies lstm.weight_ih_l0 to"),
    ],
)
def test_why_maps_cant_be_seen(name: str, group: str, reason: str) -> None:
    model, graph = traced(name)
    assert unseen(model, graph, graph.group(group)).startswith(reason)
    assert not any(unseen(model, graph, other) for other in graph.groups if other.name != group)
