"""Times of layers over widths: measured once, looked up and fitted as by hand, and plans that meet a target by them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import console
from secateur.cli.commands import app
from secateur.deploy.timing import layers, whole
from secateur.deploy.timing.layers import Layer
from secateur.deploy.timing.table import Grid, Lookup, ports_of
from secateur.engine import Engine, Settings
from secateur.engine.speed import in_time
from secateur.pruning.limits import totals
from tests.engine.nets import digits, trained
from tests.pruning.test_allocation import made_up

OVERHEAD, SCALE = 2e-4, 1.5


def seconds_of(layer: Layer, cell: tuple[int, int]) -> float:
    """What a layer takes in this world: a vector unit does eight channels at once."""
    wide, made = (8 * ceil(n / 8) for n in cell)
    if layer.window is None:
        return 1e-9 * layer.rows * wide * made
    blocks = wide if layer.groups == 0 else layer.groups
    return 1e-9 * layer.rows * prod(layer.window.space) * prod(layer.window.kernel) * wide * made / blocks


class World:
    """Stands in for this machine: counts what is measured, and takes the same time always."""

    def __init__(self) -> None:
        self.cells: list[Any] = []
        self.slower = 1.0
        """How much longer a network takes that isn't whole, which no layer tells."""

    def layer(self, layer: Layer, cells: Sequence[tuple[int, int]], threads: int) -> list[float]:
        self.cells += [(layer, cell) for cell in cells]
        return [seconds_of(layer, cell) for cell in cells]

    def network(self, networks: Sequence[nn.Module], inputs: Any, batch: int, *_: Any, **__: Any) -> list[list[float]]:
        return [[self.seconds(network, inputs, batch)] * 9 for network in networks]

    def seconds(self, network: nn.Module, inputs: Any, batch: int) -> float:
        graph = sc.trace(network, inputs)
        calls = [(Layer.of(p, batch, graph.batch), (p.in_channels, p.out_channels)) for p in ports_of(graph)]
        total = OVERHEAD + SCALE * sum(seconds_of(layer, cell) for layer, cell in calls if layer)
        return total * (1.0 if calls[0][1][1] == 32 else self.slower)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    made = World()
    monkeypatch.setitem(layers.TIMERS, "eager", made.layer)
    monkeypatch.setattr(whole, "whole", made.network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


class Net(nn.Module):
    """Two equal layers, a depthwise one, a grouped one and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 64, 1, groups=4)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(self.stem(x).relu()).relu()).relu()
        return self.head(self.grouped(self.depthwise(x).relu()).relu().mean((2, 3)))


torch.manual_seed(0)
NET = Net().eval()
X = torch.randn(2, 3, 8, 8)
GRAPH = sc.trace(NET, X)
SCORES = sc.score(NET, GRAPH, "l2")
EAGER: dict[str, Any] = {"runtime": "eager", "batch": 4}


@given(seed=st.integers(0, 1000))
def test_between_widths_times_are_bilinear(seed: int) -> None:
    draw = np.random.default_rng(seed)
    grids = []
    for _ in range(3):
        wide, made = (
            sorted(draw.choice(np.arange(1, 40), size, replace=False).tolist()) for size in (3, draw.integers(1, 5))
        )
        grids.append(Grid(wide, made, draw.uniform(1, 2, (len(wide), len(made))).tolist()))
    at = draw.integers(1, 45, (4, 2, 3)).astype(float)
    found = Lookup(grids)(at[:, 0], at[:, 1])
    for n in range(4):
        for i, grid in enumerate(grids):
            rows = [np.interp(at[n, 1, i], grid.made, row) for row in grid.seconds]
            assert found[n, i] == pytest.approx(np.interp(at[n, 0, i], grid.wide, rows), rel=1e-12)


def test_a_width_between_two_steps_takes_as_long_as_the_upper_one() -> None:
    lookup = Lookup([Grid([8, 16], [8, 16], [[1.0, 2.0], [3.0, 5.0]], (8, 8))])
    assert lookup(np.array([[9.0]]), np.array([[8.0]])).item() == 3.0
    assert lookup(np.array([[16.0]]), np.array([[10.0]])).item() == 5.0


def test_layers_of_one_shape_are_measured_once_and_kept(world: World, tmp_path: Path) -> None:
    table = sc.latency(NET, GRAPH, **EAGER)
    assert len(set(world.cells)) == len(world.cells)
    assert table.layers[1] == table.layers[2]
    count = len(world.cells)
    assert sc.latency(NET, GRAPH, **EAGER) == table
    assert len(world.cells) == count
    (kept,) = (tmp_path / "secateur").iterdir()
    assert json.loads(kept.read_bytes())["machine"] == table.machine
    sc.latency(NET, GRAPH, runtime="eager", batch=5)
    assert len(world.cells) == 2 * count
    kept.write_text("{")
    with pytest.raises(sc.UsageError, match=r"can't be read as times of layers .*; delete it"):
        sc.latency(NET, GRAPH, **EAGER)


def test_a_pass_takes_what_the_network_of_those_widths_does(world: World) -> None:
    table = sc.latency(NET, GRAPH, **EAGER)
    assert (table.overhead, table.scale) == pytest.approx((OVERHEAD, SCALE), rel=1e-6)
    assert table.seconds(GRAPH) == pytest.approx(world.seconds(NET, X, 4), rel=1e-9)
    costs = table.of(GRAPH)
    draw = np.random.default_rng(0)
    for _ in range(5):
        gone = {g.name: int(draw.choice([n for n in (0, *totals(g)) if g.size - n >= 8])) for g in GRAPH.groups}
        plan = sc.plan(GRAPH, SCORES, ratios={g.name: gone[g.name] / g.size for g in GRAPH.groups})
        gone = {name: len(channels) for name, channels in plan.removed.items()}
        counts = np.array([gone.get(g.name, 0) for g in GRAPH.groups], dtype=float)
        expected = world.seconds(sc.apply(NET, plan), X, 4)
        assert float(costs(counts)) == pytest.approx(table.seconds(GRAPH, plan), rel=1e-9)
        assert table.seconds(GRAPH, plan) == pytest.approx(expected, rel=1e-6)


def test_a_table_of_times_survives_a_file(world: World, tmp_path: Path) -> None:
    table = sc.latency(NET, GRAPH, **EAGER)
    table.save(tmp_path / "times.json")
    assert sc.Latency.load(tmp_path / "times.json") == table
    assert "eager, 1 threads" in str(table)
    (tmp_path / "times.json").write_text('{"format_version": 1}')
    with pytest.raises(sc.UsageError, match="no table of times"):
        sc.Latency.load(tmp_path / "times.json")
    with pytest.raises(sc.UsageError, match="can't be read: No such file"):
        sc.Latency.load(tmp_path / "nothing.json")


@pytest.mark.parametrize("allocation", ["normalized", "global", "uniform", "table"])
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_plan_meets_its_target_at_widths_that_pay(world: World, allocation: Any, fraction: float) -> None:
    table = sc.latency(NET, GRAPH, **EAGER)
    chosen = made_up(GRAPH, 0) if allocation == "table" else allocation
    plan = sc.plan(GRAPH, SCORES, sc.Target(latency=fraction), allocation=chosen, costs=table)
    assert table.seconds(GRAPH, plan) <= (1 - fraction) * table.seconds(GRAPH) * (1 + 1e-9)
    for name, gone in plan.removed.items():
        assert (GRAPH.group(name).size - len(gone)) % 8 == 0


def test_round_to_auto_leaves_widths_that_pay(world: World) -> None:
    table = sc.latency(NET, GRAPH, **EAGER)
    plan = sc.plan(GRAPH, SCORES, sc.Target(macs=0.5), round_to="auto", costs=table)
    assert plan.removed
    assert all((GRAPH.group(name).size - len(gone)) % 8 == 0 for name, gone in plan.removed.items())
    assert sc.Target(macs=0.5).removed(GRAPH, plan) >= 0.5


def test_what_cannot_be_had_is_refused_in_one_line(world: World) -> None:
    table = sc.latency(NET, GRAPH, **EAGER)
    with pytest.raises(sc.PlanError, match=r"0.99 of the latency, batch 8, .*; all that may go is 0\.\d+"):
        sc.plan(GRAPH, SCORES, sc.Target(latency=0.99), costs=table)
    with pytest.raises(sc.UsageError, match="threads is 2, and costs were measured with 1"):
        sc.plan(GRAPH, SCORES, sc.Target(latency=0.5, threads=2), costs=table)
    other = sc.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)).eval(), X)
    with pytest.raises(sc.PlanError, match="costs: these times are of another network"):
        sc.plan(other, {g.name: torch.rand(g.size) for g in other.groups}, sc.Target(latency=0.5), costs=table)
    for wrong, says in (
        ({"runtime": "tflite"}, "runtime is"),
        ({"batch": 0}, "batch is"),
        ({"threads": 0}, "threads is"),
    ):
        with pytest.raises(sc.UsageError, match=f"latency: {says}"):
            sc.latency(NET, GRAPH, **wrong)


def test_prune_measures_before_and_after(world: World) -> None:
    result = sc.prune(NET, X, sc.Target(latency=0.5, **EAGER), method="l2")
    told = result.report["latency"]
    assert told["measured"] == pytest.approx(told["predicted"], rel=1e-6)
    assert told["measured"] <= 0.5
    assert told["before"] == pytest.approx(world.seconds(NET, X, 4))
    assert not told["slower"]
    assert result.check.exact


def test_prune_with_data_measures_sensitivity_under_the_same_target(world: World) -> None:
    """The default with data: the table is refined around the widths that the times of layers lead to."""
    images = list(torch.rand(32, *X.shape[1:], generator=torch.Generator().manual_seed(1)).split(8))
    result = sc.prune(NET, X, sc.Target(latency=0.5, **EAGER), data=images)
    assert result.report["allocation"] == "sensitivity"
    assert abs(result.report["latency"]["measured"] / 0.5 - 1) <= 0.1
    assert result.check.exact


def test_prune_to_memory_tells_the_memory() -> None:
    report = sc.prune(NET, X, sc.Target(memory=0.4, batch=3), method="l2").report
    before, after = report["before"]["memory_bytes"], report["after"]["memory_bytes"]
    assert before == sc.graph.cost.run_time_memory(GRAPH, None, 3)
    assert after <= 0.6 * before


def test_a_prediction_that_fails_is_corrected(world: World) -> None:
    table = sc.latency(NET, GRAPH, **EAGER)
    target = sc.Target(latency=0.4, **EAGER)

    def plan(goal: sc.Target) -> sc.PruningPlan:
        return sc.plan(GRAPH, SCORES, goal, allocation="uniform", costs=table)

    world.slower = 1.4
    timed = in_time(NET, GRAPH, X, target, table, plan)
    assert timed.report["corrected_from"] > 0.6 * 1.1
    assert timed.report["measured"] < timed.report["corrected_from"]
    world.slower = 50.0
    with pytest.raises(sc.PlanError, match=r"cannot remove 0.4 of the latency; a plan that was to do that left \d"):
        in_time(NET, GRAPH, X, target, table, plan)


@pytest.mark.parametrize("power", [0.3, 2.5, 4.0])
def test_predictions_that_fail_unevenly_are_corrected_until_the_time_is_met(
    world: World, monkeypatch: pytest.MonkeyPatch, power: float
) -> None:
    """What is measured is no multiple of what is predicted, so that one correction goes too far."""
    table = sc.latency(NET, GRAPH, **EAGER)
    target = sc.Target(latency=0.4, **EAGER)
    seen: list[float] = []

    def network(networks: Sequence[nn.Module], inputs: Any, batch: int, *_: Any, **__: Any) -> list[list[float]]:
        whole, small = (world.seconds(one, inputs, batch) for one in networks)
        seen.append((small / whole) ** power)
        return [[1.0] * 9, [seen[-1]] * 9]

    monkeypatch.setattr("secateur.deploy.timing.whole.whole", network)
    timed = in_time(NET, GRAPH, X, target, table, lambda goal: sc.plan(GRAPH, SCORES, goal, costs=table))
    assert abs(seen[0] / 0.6 - 1) > 0.1
    assert timed.report["measured"] == min(seen, key=lambda left: abs(left - 0.6))
    assert abs(timed.report["measured"] / 0.6 - 1) <= 0.2  # this small network has few widths that pay
    assert abs(timed.report["measured"] / 0.6 - 1) < abs(seen[0] / 0.6 - 1)
    assert timed.report["corrected_from"] == seen[0]


def test_the_command_says_what_was_measured(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune", "lenet5", "--latency", "0.4", "--runtime", "eager", "--batch", "4", "--method", "l1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "time of a forward pass (eager, batch 4, 1 thread)" in said
    assert re.search(r"\d\d\.\d% left; asked 60\.0%, predicted \d\d\.\d% from the times of layers", said)
    told = {"runtime": "eager", "batch": 1, "threads": 2, "asked": 0.5, "predicted": 0.5, "measured": 1.2}
    console.show_latency({**told, "error": -0.58, "before": 0.01, "after": 0.012, "slower": True})
    shown = capsys.readouterr()
    assert "not faster than the original (eager, batch 1, 2 threads)" in " ".join((shown.out + shown.err).split())


AIM = sc.Target(latency=0.2, runtime="eager", batch=1000)


def compressed(target: sc.Target, **options: Any) -> Any:
    train, validation, _ = digits(100)
    given: dict[str, Any] = {"lr": 0.02, "precision": "fp32", "channels_last": False, "final_epochs": 1}
    return sc.compress(trained(), train=train, validation=validation, target=target, **{**given, **options})


@pytest.mark.usefixtures("world")
def test_compress_goes_to_a_target_of_latency_as_prune_does_and_trains(tmp_path: Path) -> None:
    network, (train, validation, _) = trained(), digits(100)
    result = compressed(AIM, run_dir=tmp_path)
    once = sc.prune(network, validation.x[:1], AIM, data=list(train))
    assert result.plan.removed == once.plan.removed
    assert result.report["latency"] == once.report["latency"]
    assert len(result.history) == 1
    assert result.report["images"] == 100
    assert json.loads((tmp_path / "result.json").read_text())["latency"]["asked"] == 0.8


@pytest.mark.usefixtures("world")
def test_a_run_to_a_target_of_latency_goes_on_by_the_times_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation, _ = digits(100)
    given: dict[str, Any] = {"train": train, "validation": validation, "target": AIM}
    engine = Engine(trained(), "l1", **given, settings=Settings(finetune_epochs=0))
    state = engine.step(engine.step(engine.init()))
    assert state.times is not None
    state.times = json.loads(json.dumps(state.times))
    monkeypatch.setattr(layers, "TIMERS", {})
    while not engine.finished(state):
        state = engine.step(state)
    assert state.latency is not None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "cfp"}, "cfp counts no latency; choose another method"),
        ({"rounds": (3,)}, "rounds: a target of latency is gone to in one round"),
        ({"widths": ({"conv1": 4},)}, "widths are given as well"),
    ],
)
def test_what_compress_can_not_bring_to_a_latency_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(sc.UsageError, match=re.escape(says)):
        compressed(AIM, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--latency", "0.5", "--macs", "0.5"], "--macs and --latency contradict each other"),
        (["--batch", "8"], "--batch: says how"),
        (["--macs", "0.5", "--threads", "2"], "threads says nothing of macs"),
        (["--latency", "0.5", "--runtime", "tflite"], "runtime is onnxruntime or eager; found 'tflite'"),
        (["--latency", "0.5", "--threads", "0"], "threads is a whole number from 1 up; found 0"),
    ],
)
def test_contradictions_on_the_command_line_are_one_line(options: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["prune", "lenet5", *options])
    assert isinstance(result.exception, sc.UsageError)
    assert says in str(result.exception)


def test_compress_takes_latency_on_the_command_line() -> None:
    command = ["compress", "lenet5", "--data", "digits", "--latency", "0.5", "--threads", "2", "--method", "cfp"]
    result = CliRunner().invoke(app, command)
    assert "cfp counts no latency" in str(result.exception)


def test_a_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(sc.UsageError, match="onnxruntime is not installed"):
        sc.latency(NET, GRAPH, cache=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_times_measured_here_fit_the_whole_network(runtime: str, tmp_path: Path) -> None:
    table = sc.latency(NET, GRAPH, batch=8, runtime=runtime, cache=tmp_path)
    assert all(seen > 0 for grid in table.grids for row in grid.seconds for seen in row)
    for seen, fitted in table.fit:
        assert fitted == pytest.approx(seen, rel=0.5)
