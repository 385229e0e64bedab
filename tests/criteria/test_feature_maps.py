"""Streamed moments of feature maps against one pass over everything, and what data are refused."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.criteria import feature_maps, scoring
from secateur.criteria.moments import Moments
from secateur.errors import CriterionError, DataError, UsageError
from secateur.tracing.tracing import trace

seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Residual(nn.Module):
    """A stream that two layers read at once, and another one later; a map that is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 4, 1)
        self.right = nn.Conv2d(6, 4, 3, padding=1)
        self.back = nn.Conv2d(4, 6, 1)
        self.out = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.back(torch.relu(self.left(x) + self.right(x))))
        return self.out(nn.functional.max_pool2d(x, 2).flatten(1))


@pytest.fixture
def network() -> Residual:
    torch.manual_seed(0)
    model = Residual().double().eval()
    model.norm.running_mean.copy_(torch.randn(6))  # type: ignore[union-attr]
    return model


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_moments_do_not_depend_on_the_batching(seed: int, sizes: list[int]) -> None:
    rows = drawn(seed, sum(sizes), 4) + 3
    whole, parts, merged = Moments.empty(4), Moments.empty(4), Moments.empty(4)
    whole.update(rows)
    for part in rows.split(sizes):
        parts.update(part)
        alone = Moments.empty(4)
        alone.update(part)
        merged.merge(alone)
    for found in (parts, merged):
        torch.testing.assert_close(found.second, whole.second, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.second, rows.T @ rows / len(rows), rtol=1e-10, atol=1e-10)


@given(seeds)
def test_correlation_is_numpys(seed: int) -> None:
    rows = drawn(seed, 30, 5) @ drawn(seed + 1, 5, 5) + 2
    found = Moments.empty(5)
    found.update(rows)
    rho = found.correlation
    np.testing.assert_allclose(rho, np.corrcoef(rows.T), atol=1e-9)
    assert torch.equal(rho, rho.T)
    assert rho.diagonal().tolist() == [1.0] * 5
    assert float(torch.linalg.eigvalsh(rho).min()) > -1e-9


@given(seeds, st.floats(-9, 9).filter(lambda a: abs(a) > 0.01), st.floats(-9, 9))
def test_correlation_keeps_only_the_sign_of_an_affine_map(seed: int, factor: float, shift: float) -> None:
    rows = drawn(seed, 40, 2)
    plain, mapped = Moments.empty(2), Moments.empty(2)
    plain.update(rows)
    mapped.update(torch.stack((factor * rows[:, 0] + shift, rows[:, 1]), 1))
    sign = 1 if factor > 0 else -1
    assert float(mapped.correlation[0, 1]) == pytest.approx(sign * float(plain.correlation[0, 1]), abs=1e-6)


def test_channels_seen_in_parts() -> None:
    rows, other = drawn(0, 20, 5), drawn(1, 30, 5)
    found = Moments.empty(5)
    found.update(rows[:, [0, 2]], torch.tensor([0, 2]))
    found.update(other[:, [1, 2]], torch.tensor([1, 2]))
    found.update(rows[:, [3, 4]], torch.tensor([3, 4]))
    assert found.count.diagonal().tolist() == [20, 30, 50, 20, 20]
    torch.testing.assert_close(found.second[3, 4], (rows[:, 3] * rows[:, 4]).mean())
    torch.testing.assert_close(found.second[2, 2], torch.cat((rows, other))[:, 2].square().mean())
    # 2 was seen with 0 and with 1, but not in the same observations: a mean over those that they share is no moment.
    assert found.together.long().sum(1).tolist() == [1, 1, 1, 2, 2]
    apart = [(0, 1), (0, 2), (1, 2), (0, 3), (2, 4)]
    assert all(float(found.second[i, j]) == float(found.covariance[i, j]) == 0.0 for i, j in apart)


@given(seeds, st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=6))
def test_moments_are_positive_semi_definite_whatever_was_seen_together(seed: int, parts: list[set[int]]) -> None:
    found = Moments.empty(6)
    for number, part in enumerate(parts):
        channels = torch.tensor(sorted(part))
        found.update(drawn(seed + number, 3 + number % 2, len(part)) + 1, channels)
    for matrix in (found.second, found.covariance, found.correlation):
        assert torch.equal(matrix, matrix.T)
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-9


def reference(model: Residual, data: list[Tensor]) -> dict[str, Tensor]:
    """Every observation of the stem's group and of the inner one, computed by hand."""
    stream, inner = [], []
    with torch.no_grad():
        for x in data:
            first = torch.relu(model.norm(model.stem(x)))
            middle = torch.relu(model.left(first) + model.right(first))
            last = nn.functional.max_pool2d(torch.relu(first + model.back(middle)), 2)
            stream += [first.movedim(1, -1).reshape(-1, 6), last.movedim(1, -1).reshape(-1, 6)]
            inner.append(middle.movedim(1, -1).reshape(-1, 4))
    return {"stem": torch.cat(stream), "left": torch.cat(inner)}


def test_maps_are_seen_where_they_are_read_once_a_tensor(network: Residual) -> None:
    data = [drawn(s, 2, 3, 8, 8) for s in range(3)]
    graph = trace(network, data[0])
    found = feature_maps.observe(network, graph, data, exact=True)
    assert set(found) == {"stem", "left"}
    for name, rows in reference(network, data).items():
        assert int(found[name].count[0, 0]) == len(rows)
        torch.testing.assert_close(found[name].second, rows.T @ rows / len(rows), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[name].mean, rows.mean(0), rtol=1e-10, atol=1e-10)


def test_sampling_is_seeded_and_near(network: Residual) -> None:
    data = [drawn(s, 8, 3, 8, 8) for s in range(8)]
    graph = trace(network, data[0])
    first, again, other = (feature_maps.observe(network, graph, data, positions=16, seed=s)["left"] for s in (0, 0, 1))
    assert torch.equal(first.cross, again.cross)
    assert not torch.equal(first.cross, other.cross)
    assert int(first.count[0, 0]) == 64 * 16
    exact = feature_maps.observe(network, graph, data, exact=True)["left"]
    assert float((first.second - exact.second).norm() / exact.second.norm()) < 0.1


def test_a_memory_budget_makes_several_passes(network: Residual) -> None:
    data = [drawn(0, 2, 3, 8, 8)]
    graph = trace(network, data[0])
    groups = list(graph.groups)
    assert [len(p) for p in feature_maps.passes(groups, lambda g: 16 * g.size**2, 16 * 36)] == [1, 1]
    small = feature_maps.observe(network, graph, data, exact=True, memory=1)
    large = feature_maps.observe(network, graph, data, exact=True)
    for name in large:
        assert torch.equal(small[name].cross, large[name].cross)
    with pytest.raises(DataError, match="must be read 2 times"):
        feature_maps.observe(network, graph, iter(data), memory=1)


def test_the_model_is_left_as_found(network: Residual) -> None:
    network.train()
    network.norm.eval()
    data = [drawn(0, 2, 3, 8, 8)]
    graph = trace(network, data[0])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.random.get_rng_state()
    feature_maps.observe(network, graph, data)
    assert network.training
    assert not network.norm.training
    assert all(not module._forward_pre_hooks for module in network.modules())
    assert torch.equal(random, torch.random.get_rng_state())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_batches_come_in_many_shapes() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    forms = [x, (x, y), [x, y], (x,), {"x": x, "labels": y}, ((x, x), y), ({"x": x}, y)]
    found = list(feature_maps.batches(forms, "cpu"))
    assert [len(b.args) for b in found] == [1, 1, 1, 1, 0, 2, 0]
    assert [list(b.kwargs) for b in found] == [[], [], [], [], ["x"], [], ["x"]]
    assert [b.labels is not None for b in found] == [False, True, True, False, True, True, True]
    assert {b.size for b in found} == {2}


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Scan:
    name: str
    image: Tensor
    size: int = dataclasses.field(init=False, default=0)


def test_examples_are_counted_in_any_nesting() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    nested = [
        ({"image": x},), (({"a": {"b": [x]}},), "note"), [[x, x]], Pair(x, x), Scan("one", x), (torch.tensor(0.5), [x]),
        ({"names": ["p", "q"], "scan": Scan("two", x)},), ([torch.zeros(3, 4, 5), torch.zeros(3, 6, 7)],),
    ]  # fmt: skip
    assert [b.size for b in feature_maps.batches([(inputs, y) for inputs in nested], "cpu")] == [2] * len(nested)
    (moved,) = feature_maps.batches([({"pair": Pair(x, x), "scan": Scan("one", x)}, y)], "meta")
    assert moved.kwargs["pair"].right.is_meta
    assert moved.kwargs["scan"].image.is_meta
    assert moved.kwargs["scan"].name == "one"
    (lone,) = feature_maps.batches([(torch.tensor(1.0), y)], "cpu")
    assert lone.size == 1


def test_batches_without_examples_are_refused() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(DataError, match="3 parts"):
        list(feature_maps.batches([(x, x, x)], "cpu"))
    with pytest.raises(DataError, match=r"batch 2: its inputs, a str, hold no tensor"):
        list(feature_maps.batches([(x, y), ("x", y)], "cpu"))
    with pytest.raises(DataError, match=r"batch 2 is empty: its first tensor has length 0"):
        list(feature_maps.batches([(x, y), ({"x": x[:0]}, y[:0])], "cpu"))


def test_bad_data_are_refused_in_one_line(network: Residual) -> None:
    x = drawn(0, 2, 3, 8, 8)
    graph = trace(network, x)
    with pytest.raises(DataError, match="the data are empty"):
        feature_maps.observe(network, graph, [])
    with pytest.raises(DataError, match=r"batch 2 with inputs of shape \[\(2, 1, 8, 8\)\] does not fit the model"):
        feature_maps.observe(network, graph, [x, x[:, :1]])
    with pytest.raises(CriterionError, match="NaN or infinity"):
        feature_maps.observe(network, graph, [x * float("nan")])
    with pytest.raises(UsageError, match="no group 'nowhere'"):
        feature_maps.observe(network, graph, [x], ["nowhere"])
    with pytest.raises(UsageError, match="positions is 0"):
        feature_maps.observe(network, graph, [x], positions=0)


def test_constant_channels_and_few_samples_have_a_stated_fallback(network: Residual) -> None:
    with torch.no_grad():
        network.norm.running_mean.zero_()  # type: ignore[union-attr]
        network.norm.weight[1] = 0.0
        network.norm.bias[1] = 0.0
        network.back.weight[1] = 0.0
        network.back.bias[1] = 0.0  # type: ignore[index]
    data = [drawn(0, 1, 3, 8, 8)]
    graph = trace(network, data[0])
    found = feature_maps.observe(network, graph, data, positions=1)["stem"]
    assert bool(found.constant[1])
    assert bool(torch.isfinite(found.correlation).all())
    for criterion in ("corrnet", "redundancy", "cshe", "hrank", "chip"):
        scores = scoring.score(network, graph, criterion, data)
        assert int(scores["stem"].argmin()) == 1, criterion


class Functional(nn.Module):
    """A layer that is never called: its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.first(x)), self.second.weight)


def test_maps_that_no_hook_sees_are_an_error_where_they_are_asked_for() -> None:
    model = Functional()
    x = torch.randn(5, 3)
    graph = trace(model, x)
    assert [g.name for g in graph.groups] == ["first"]
    reason = (
        r"first: the maps of 4 of its 4 channels can't be seen, as code applies second.weight to them without calling a"
    )
    with pytest.raises(CriterionError, match=reason):
        feature_maps.observe(model, graph, [x])


TWO_PROCESSES = """
import sys, torch
from torch import nn
import torch.distributed as dist
from secateur.criteria import feature_maps
from secateur.criteria import scoring
from secateur.compensation import apply
from secateur.pruning.planning import plan_removal
from secateur.tracing.tracing import trace

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
model = nn.Sequential(*layers).double()
data = [(torch.randn(n, 3, 6, 6, dtype=torch.float64), torch.arange(n) % 3) for n in (2, 5, 3, 4)]
graph = trace(model, data[0][0])
own = data[:1] if rank == 0 else data[1:]

def everything(batches):
    found = {k: (m.count, m.total, m.cross) for k, m in feature_maps.observe(model, graph, batches, exact=True).items()}
    for name in ("corrnet", "hrank", "taylor", "corrnet_su", "cshe"):
        found |= {f"{name}/{k}": v for k, v in scoring.score(model, graph, name, batches).items()}
    return found | refitted(batches)

def refitted(batches):
    plan = plan_removal(graph, {"0": [1], "2": [0, 3]})
    return dict(apply(model, plan, "least_squares", batches, exact=True).state_dict())

together = everything(own)
all_on_one = refitted(data if rank else [])
empty = feature_maps.observe(model, graph, own if rank else [], exact=True)
dist.destroy_process_group()
alone = everything(data)
assert together.keys() == alone.keys()
for key in alone:
    torch.testing.assert_close(together[key], alone[key], rtol=1e-10, atol=1e-10)
for key, value in all_on_one.items():
    torch.testing.assert_close(value, alone[key], rtol=1e-8, atol=1e-8)
assert int(empty["0"].count[0, 0]) == 12 * 16, "a process without data adds nothing"
"""


@pytest.mark.slow
def test_two_processes_see_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(TWO_PROCESSES)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(Path(feature_maps.__file__).parents[2]), "PATH": "", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
