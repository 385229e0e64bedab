"""The loop: phases, tolerance and revert, targets, widths, ablation, other criteria, and what is recorded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur import checkpoint
from secateur.engine import CompressResult, Engine, Event, Settings, compress, resume
from secateur.engine.by_pairs import Pairs
from secateur.errors import DataError, PlanError, RunError, SecateurError, UsageError
from secateur.graph.cost import layer_costs
from secateur.graph.steps import steps
from secateur.training import evaluation
from tests.criteria.networks import NETWORKS, Y
from tests.engine.nets import Residual, Small, digits, trained

TRAIN, VALIDATION, TEST = digits(200)
QUICK: dict[str, Any] = {
    "lr": 0.02, "finetune_epochs": 1, "optimise_epochs": 1, "precision": "fp32", "channels_last": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained()


def run(model: nn.Module, method: Any = "cfp", **options: Any) -> CompressResult:
    return compress(model, method, train=TRAIN, validation=VALIDATION, **{**QUICK, **options})


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def check(model: nn.Module, result: CompressResult) -> None:
    """What holds of every result."""
    graph = sc.trace(model, VALIDATION.x[:1])
    small = sc.trace(result.model, VALIDATION.x[:1])
    final = result.report["final"]
    assert type(result.model) is type(model)
    assert final["macs"] == sc.macs(graph, result.plan) == sc.macs(small)
    assert final["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert final["widths"] == {layer.module: layer.out_channels for layer in layer_costs(small)}
    assert final["validation"] == evaluation.evaluate(result.model, VALIDATION)
    assert result.report["verification"]["exact"]
    accepted: dict[str, set[int]] = {}
    for record in result.history:
        for name, channels in record["removed"].items():
            assert not set(channels) & accepted.get(name, set()), "a channel is removed twice"
            if record["accepted"]:
                accepted.setdefault(name, set()).update(channels)
    assert {name: sorted(channels) for name, channels in accepted.items()} == result.plan.removed


def test_widths_are_reached_as_a_chain(network: nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(network.state_dict())
    goals = ({"conv1": 5, "conv2": 6}, {"conv1": 4, "conv2": 6})
    result = run(network, widths=goals, rounds=(2, 1), test=TEST, final_epochs=1, run_dir=tmp_path / "run")
    check(network, result)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [m["widths"] | goal == m["widths"] for m, goal in zip(result.milestones, goals, strict=True)] == [True, True]
    assert [r["widths"]["conv1"] for r in result.history] == [6, 5, 4]
    assert [r["widths"]["conv2"] for r in result.history] == [8, 6, 6]
    for number, milestone in enumerate(result.milestones, 1):
        loaded = checkpoint.load(Small(), tmp_path / "run" / f"milestone-{number}.safetensors")
        assert evaluation.evaluate(loaded, TEST) == milestone["test"]
    # 1 of optimisation and 1 of fine-tuning a round, 1 at each goal; an early end takes less.
    assert result.report["images"] <= 200 * (3 * 2 + 2)


def test_episodes_are_recorded(network: nn.Module) -> None:
    result = run(network, widths={"conv1": 6, "conv2": 8}, correlation_target=None, optimise_epochs=2)
    for record in result.history:
        assert len(record["pairs"]) == sum(map(len, record["removed"].values()))
        for pair in record["pairs"]:
            assert pair["dropped"] in record["removed"][pair["group"]]
            assert pair["kept"] not in record["removed"][pair["group"]]
            assert pair["abs_rho_after"] > pair["abs_rho_before"]
        for name in record["removed"]:
            rhos = [p["abs_rho_before"] for p in record["pairs"] if p["group"] == name]
            assert record["abs_rho_before"][name] == pytest.approx(max(rhos), abs=1e-5)
    befores, tuned = [r["metric_before"] for r in result.history], [r["metric_tuned"] for r in result.history]
    assert befores == [result.report["baseline"]["validation"], *tuned[:-1]]
    assert [r["round"] for r in result.history] == list(range(1, len(result.history) + 1))


def test_optimisation_ends_at_the_correlation_target(network: nn.Module) -> None:
    options = {"widths": {"conv1": 7}, "optimise_epochs": 60, "finetune_epochs": 0, "lr": 0.05}
    early = run(network, correlation_target=0.9, **options)
    assert early.report["images"] < 60 * 200
    assert min(p["abs_rho_after"] for p in early.history[0]["pairs"]) >= 0.9


def test_ablation_sees_the_same_number_of_images(network: nn.Module) -> None:
    options = {"widths": {"conv1": 6, "conv2": 9}, "correlation_target": None, "optimise_epochs": 2}
    with_it, without = run(network, **options), run(network, optimise="none", **options)
    assert with_it.report["images"] == without.report["images"] == 3 * 200 * len(with_it.history)
    gains = [
        sum(p["abs_rho_after"] - p["abs_rho_before"] for r in result.history for p in r["pairs"])
        for result in (with_it, without)
    ]
    assert gains[0] > 2 * abs(gains[1])


@pytest.mark.parametrize("target", [sc.Target(macs=0.4), sc.Target(params=0.3), sc.Target(channels=0.35)])
def test_a_target_is_met_and_not_overshot(network: nn.Module, target: sc.Target) -> None:
    result = run(network, target=target, optimise_epochs=0, finetune_epochs=0, pairs=3)
    check(network, result)
    graph = sc.trace(network, VALIDATION.x[:1])
    assert target.removed(graph, result.plan) >= target.fraction
    assert all(record["accepted"] for record in result.history)
    last = result.history[-1]["removed"]
    if sum(map(len, last.values())) > 1:
        # Without any one channel of the last round the target is missed, or it was the one that met it.
        fewer = {name: set(c) for name, c in result.plan.removed.items()}
        kinds = []
        for name, channels in last.items():
            less = {n: sorted(c - {channels[-1]} if n == name else c) for n, c in fewer.items()}
            kinds.append(target.removed(graph, sc.plan_removal(graph, less)) < target.fraction)
        assert any(kinds)


def test_tolerance_rules_and_misses_are_reverted(network: nn.Module) -> None:
    baseline = evaluation.evaluate(network, VALIDATION)
    result = run(network, tolerance=3.0, pairs=2, optimise_epochs=0, test=TEST)
    check(network, result)
    assert result.report["baseline"]["validation"] == baseline
    for record in result.history:
        assert record["accepted"] == (record["metric_tuned"] >= baseline - 0.03 - 1e-9)
    accepted = [r for r in result.history if r["accepted"]]
    assert accepted
    assert result.report["final"]["validation"] == accepted[-1]["metric_tuned"] >= baseline - 0.03 - 1e-9
    phases = [r["phase"] for r in result.history]
    assert phases == sorted(phases)
    first = [r["accepted"] for r in result.history if r["phase"] == 1]
    assert first == [True] * (len(first) - 1) + [False]
    groups = [r["group"] for r in result.history if r["phase"] == 2]
    assert groups == sorted(groups, key=["conv1", "conv2"].index)
    for name in ("conv1", "conv2"):
        own = [r for r in result.history if r["phase"] == 2 and r["group"] == name]
        assert all(list(r["removed"]) == [name] for r in own)
        assert [r["accepted"] for r in own][:-1] == [True] * (len(own) - 1)


def test_an_impossible_tolerance_gives_the_original_back(network: nn.Module) -> None:
    def metric(model: nn.Module, _: Any) -> float:
        return float(model.get_parameter("conv1.weight").shape[0])

    def both(model: nn.Module, _: Any) -> float:
        return float(sum(p.numel() for p in model.parameters()))

    kept = run(network, metric=both, tolerance=0.0, finetune_epochs=0, optimise_epochs=0)
    assert same(kept.model, network)
    assert kept.plan.removed == {}
    assert [r["accepted"] for r in kept.history] == [False, False, False]
    only = run(network, metric=metric, tolerance=0.0, finetune_epochs=0, optimise_epochs=0)
    assert set(only.plan.removed) == {"conv2"}
    assert len(only.plan.removed["conv2"]) == 11


def test_only_phase_two(network: nn.Module) -> None:
    result = run(
        network, phases=(2,), tolerance=100, phase2_pairs=4, min_channels=3, optimise_epochs=0, finetune_epochs=0
    )
    assert [r["group"] for r in result.history] == ["conv1"] * 2 + ["conv2"] * 3
    assert result.report["final"]["widths"] | {"conv1": 3, "conv2": 3} == result.report["final"]["widths"]


@pytest.mark.parametrize("method", ["cfp", "l1"])
def test_no_group_loses_more_than_its_cap(network: nn.Module, method: str) -> None:
    sizes = {m: layer.out_channels for m, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    caps = {"*": 0.5, "conv1": 0.25}
    quick = {"tolerance": 100, "phases": (2,), "fraction": 0.25, "optimise_epochs": 0, "finetune_epochs": 0}
    final = run(network, method, max_ratio=caps, **quick).report["final"]["widths"]
    for name, size in sizes.items():
        if name in ("conv1", "conv2"):
            assert final[name] == size - int(caps.get(name, 0.5) * size)
    with pytest.raises(UsageError, match="contradicts min_channels or max_ratio"):
        run(network, method, max_ratio={"conv1": 0.1}, widths={"conv1": 1})


def test_same_seed_same_bits_other_seed_others(network: nn.Module) -> None:
    options = {"widths": {"conv1": 6, "conv2": 9}}
    first, again, other = (run(network, seed=seed, **options) for seed in (0, 0, 1))
    assert same(first.model, again.model)
    assert not same(first.model, other.model)


@pytest.mark.parametrize("method", ["l1", "corrnet", "cshe", "taylor", "random"])
def test_any_criterion_drives_the_loop(network: nn.Module, method: str) -> None:
    result = run(network, method, target=sc.Target(macs=0.3), criterion_batches=2)
    check(network, result)
    assert all(record["pairs"] == [] for record in result.history)


def test_corrnet_with_a_threshold_selects_for_itself_round_by_round(network: nn.Module) -> None:
    options: dict[str, Any] = {"criterion_batches": 2, "fraction": 0.25, "finetune_epochs": 0, "optimise_epochs": 0}
    result = run(network, "corrnet", target=sc.Target(macs=0.9), criterion={"threshold": 0.35}, **options)
    check(network, result)
    data = [batch for _, batch in zip(range(2), TRAIN, strict=False)]
    assert len(result.history) > 1
    # Nothing is left that correlates so much, and the run ends short of its target.
    assert result.report["final"]["macs"] > 0.1 * result.report["baseline"]["macs"]
    last = sc.trace(result.model, VALIDATION.x[:1])
    rest = sc.select(result.model, last, "corrnet", {"conv1": 1, "conv2": 1}, data, threshold=0.6)
    assert [s.removed for s in rest.values()] == [(), ()]


def test_a_threshold_out_of_reach_leaves_the_network_as_it_was(network: nn.Module) -> None:
    result = run(network, "corrnet", target=sc.Target(macs=0.5), criterion={"threshold": 1.0}, criterion_batches=2)
    assert result.history == []
    assert result.plan.removed == {}


def test_cshe_keeps_a_representative_of_each_cluster(network: nn.Module) -> None:
    result = run(
        network, "cshe", widths={"conv1": 5}, rounds=(1,), finetune_epochs=0, criterion={"budget": "representative"}
    )
    assert len(result.plan.removed["conv1"]) == 3


def test_lowest_l1_goes(network: nn.Module) -> None:
    result = run(network, "l1", widths={"conv1": 5}, rounds=(1,), finetune_epochs=0)
    norms = network.get_parameter("conv1.weight").detach().abs().flatten(1).sum(1)
    assert result.plan.removed == {"conv1": sorted(norms.argsort()[:3].tolist())}


def test_pairs_by_residual_drop_a_dead_filter_first(network: nn.Module) -> None:
    model = copy.deepcopy(network)
    with torch.no_grad():
        model.get_parameter("conv2.weight")[5] *= 1e-3
    options = {"widths": {"conv2": 11}, "rounds": (1,), "optimise_epochs": 0, "finetune_epochs": 0}
    assert run(model, order="residual", **options).plan.removed == {"conv2": [5]}
    assert run(model, **options).plan.removed != {"conv2": [5]}


def test_what_a_target_spares_of_the_last_round_scores_highest(network: nn.Module) -> None:
    result = run(network, "l1", target=sc.Target(macs=0.25), rounds=1, finetune_epochs=0, final_epochs=0, linear=False)
    assert len(result.history) == 1
    for name, channels in result.plan.removed.items():
        norms = network.get_parameter(f"{name}.weight").detach().abs().flatten(1).sum(1)
        assert 0 < len(channels) < 6, "the target must spare some, or the test shows nothing"
        assert set(channels) == set(norms.argsort()[: len(channels)].tolist())


def test_own_function_as_criterion(network: nn.Module) -> None:
    def late(filters: Tensor) -> Tensor:
        return -torch.arange(len(filters), dtype=torch.float64)

    result = run(network, late, widths={"conv1": 5}, rounds=(1,), finetune_epochs=0)
    assert result.plan.removed == {"conv1": [5, 6, 7]}


def test_streams_and_inner_layers() -> None:
    model = trained(net=Residual, epochs=2)
    result = run(model, target=sc.Target(channels=0.3), optimise_epochs=1)
    check(model, result)
    assert set(result.plan.removed) == {"stem", "inner"}
    inner = run(model, target=sc.Target(channels=0.2), internal_only=True, optimise_epochs=0)
    assert set(inner.plan.removed) == {"inner"}


def test_merging_a_duplicate_costs_nothing(network: nn.Module) -> None:
    model = copy.deepcopy(network)
    with torch.no_grad():
        for name in ("conv2.weight", "conv2.bias"):
            tensor = model.get_parameter(name)
            tensor[7] = tensor[4]
    options = {"widths": {"conv2": 11}, "rounds": (1,), "optimise_epochs": 0, "finetune_epochs": 0}
    merged, plain = run(model, merge=True, **options), run(model, **options)
    assert merged.plan.removed == plain.plan.removed
    model.eval()
    with torch.no_grad():
        outputs = [net.eval()(VALIDATION.x) for net in (model, merged.model, plain.model)]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_compensation_as_filters_go_keeps_accuracy(network: nn.Module) -> None:
    options: dict[str, Any] = {"widths": {"conv1": 3, "conv2": 5}, "rounds": (2,), "finetune_epochs": 0}
    plain = run(network, "l1", **options)
    moved = run(network, "l1", compensate="least_squares", compensate_options={"everywhere": True}, **options)
    check(network, moved)
    assert moved.plan.removed["conv1"] == plain.plan.removed["conv1"]
    assert moved.report["final"]["validation"] > plain.report["final"]["validation"] + 0.1
    done = moved.history[0]["compensated"]["least_squares"]
    assert done == {"conv2": "", "fc1": "", "fc2": ""}


def test_compensations_follow_one_another_and_are_recorded(network: nn.Module) -> None:
    result = run(network, widths={"conv1": 6}, rounds=(1,), compensate=["merge", "bn"], finetune_epochs=0)
    record = result.history[0]
    assert list(record["compensated"]) == ["merge", "bn"]
    assert record["compensated"]["bn"] == {"bn1": ""}
    again = run(network, widths={"conv1": 6}, rounds=(1,), compensate="merge,bn", finetune_epochs=0)
    assert same(result.model, again.model)


def test_distillation_and_other_training(network: nn.Module) -> None:
    result = run(
        network, widths={"conv1": 7}, distillation=0.5, optimizer="adam", lr=1e-3, schedule="cosine", clip_norm=1.0
    )
    check(network, result)


def test_counts_by_rule(network: nn.Module) -> None:
    def counts(**settings: Any) -> dict[str, int]:
        engine = Engine(network, "cfp", train=TRAIN, validation=VALIDATION, settings=Settings.of(settings))
        assert isinstance(engine.selection, Pairs)
        return engine.selection.counts(engine.init())

    assert counts(fraction=0.25) == {"conv1": 2, "conv2": 3}
    assert counts() == {"conv1": 1, "conv2": 1}
    assert counts(pairs=3) == {"conv1": 3, "conv2": 3}
    assert counts(pairs=[1, 2]) == {"conv1": 1, "conv2": 2}
    assert counts(pairs={"conv2": 5}) == {"conv1": 0, "conv2": 5}
    assert counts(pairs={"conv": 1, "conv2": 5}) == {"conv1": 1, "conv2": 5}, "the longest start counts"
    assert counts(linear=True, pairs={"fc": 2, "conv1": 1}) == {"conv1": 1, "conv2": 0, "fc1": 2}
    macs = {"conv1": 36 * 9 * 8, "conv2": 16 * 8 * 9 * 12}
    total = 0.25 * 20
    assert counts(pairs="macs", fraction=0.25) == {n: round(total * m / sum(macs.values())) for n, m in macs.items()}


@pytest.mark.parametrize("setting", [{"skip": ["convv1"]}, {"pairs": {"convv1": 2}}])
def test_a_name_that_names_nothing_is_refused(network: nn.Module, setting: dict[str, Any]) -> None:
    with pytest.raises(sc.UsageError, match=r"convv1: no layer has this name"):
        run(network, **setting)


def test_batches_may_be_keyword_arguments_with_labels(network: nn.Module) -> None:
    pairs = [list(split) for split in (TRAIN, VALIDATION)]
    named = [[{"x": x, "labels": y} for x, y in split] for split in pairs]
    results = [
        compress(network, "cfp", train=train, validation=validation, widths={"conv1": 6}, fraction=0.25, **QUICK)
        for train, validation in (pairs, named)
    ]
    assert same(results[0].model, results[1].model)


def test_linear_layers_where_asked(network: nn.Module) -> None:
    result = run(network, widths={"conv1": 7, "fc1": 10}, optimise_epochs=0, finetune_epochs=0)
    assert result.report["final"]["widths"] == {"conv1": 7, "conv2": 12, "fc1": 10, "fc2": 10}


def test_events_tell_what_is_going_on(network: nn.Module) -> None:
    events: list[Event] = []
    result = run(network, widths={"conv1": 7}, progress=events.append, final_epochs=1)
    assert [e.stage for e in events if e.kind == "stage"] == ["optimise", "finetune", "final"]
    assert [e.record for e in events if e.kind == "episode"] == result.history
    batches = [e for e in events if e.kind == "batch" and e.stage == "finetune"]
    assert [(e.batch, e.batches) for e in batches] == [(i, 5) for i in range(1, 6)]


def test_run_directory(network: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(network, widths={"conv1": 6}, test=TEST, run_dir=folder, describe={"data": "digits"})
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] == "digits"
    asked = Settings.of({**QUICK, "widths": {"conv1": 6}})
    assert Settings.of(config["settings"]) == asked.resolved(auto=False, bounded=False, teaches=True)
    assert sc.Options.of(config["options"]) == sc.Options()
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(result.history))
    report = json.loads((folder / "result.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    for part, name in (("baseline", "baseline"), ("final", "model")):
        assert report[part]["file_bytes"] == (folder / f"{name}.safetensors").stat().st_size
        assert sum(layer["macs"] for layer in report[part]["layers"]) == report[part]["macs"]
        assert report[part]["latency_ms"] > 0
    assert same(checkpoint.load(Small(), folder / "model.safetensors"), result.model)
    assert same(checkpoint.load(Small(), folder / "baseline.safetensors"), network)
    assert sc.PruningPlan.from_json((folder / "plan.json").read_text()) == result.plan
    written = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match="holds a finished run"):
        run(network, run_dir=folder)
    for name in ("before", "state.safetensors"):
        if name != "before":  # the result alone says that the run has finished
            shutil.rmtree(folder / "checkpoint")
            written = {file: content for file, content in written.items() if file.parent == folder}
            with pytest.raises(UsageError, match="holds a finished run"):
                run(network, run_dir=folder)
        again = resume(folder, Small(), train=TRAIN, validation=VALIDATION, test=TEST)
        assert same(again.model, result.model)
        assert again.report == report
        assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != "lock"} == {
            f: content for f, content in written.items() if f.name != "lock"
        }


def test_two_processes_never_share_a_run(network: nn.Module, tmp_path: Path) -> None:
    from secateur.engine import RunDirectory

    with RunDirectory(tmp_path), pytest.raises(RunError, match="another process is running here"):
        run(network, run_dir=tmp_path)


def test_resume_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        resume(tmp_path, Small(), train=TRAIN, validation=VALIDATION)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"finetune_epoch": 2}, UsageError, "finetune_epoch: no such setting; did you mean finetune_epochs"),
        ({"fraction": 1.5}, UsageError, r"fraction: is in \(0, 1\), found 1.5"),
        ({"form": "square"}, UsageError, "form: is one of paper"),
        ({"order": "norm"}, UsageError, "order: is one of correlation, residual"),
        ({"pairs": "share"}, UsageError, "pairs: is width"),
        ({"pairs": [1, 2, 4]}, UsageError, "one number for each of the widths"),
        ({"phases": [3]}, UsageError, "phases"),
        ({"rounds": 3}, UsageError, "rounds: are those of widths"),
        ({"method": "auto", "rounds": 3}, UsageError, "rounds: lead to a target, ratios or widths"),
        ({"rounds": [3, 2], "widths": {"conv1": 7}}, UsageError, "rounds: needs 1 numbers"),
        ({"lr": -1.0}, UsageError, "lr: must be above 0"),
        ({"lr": "fast"}, UsageError, "lr: expected float; found 'fast'"),
        ({"finetune_epochs": 1, "fraction": "2"}, UsageError, "fraction: expected float; found '2'"),
        ({"min_width": 2}, UsageError, "min_width: no such setting; it is min_channels .--min-channels. now"),
        ({"min_channels": "2"}, UsageError, "min_channels: expected a whole number from 1 up; found '2'"),
        ({"round_to": 0}, UsageError, "round_to: expected a whole number"),
        ({"roundto": 8}, UsageError, "roundto: no such setting; did you mean round_to"),
        ({"round_to": "auto"}, UsageError, "round_to: auto is measured on a plan, which cfp makes none of"),
        ({"method": "l1", "round_to": "auto"}, UsageError, "round_to: auto is measured on a plan; give a target"),
        ({"allocation": "uniform"}, UsageError, "allocation: cfp takes pairs of every layer in its place"),
        ({"method": "l1", "allocation": "loudest"}, UsageError, "allocation: expected normalized"),
        ({"method": "l1", "pairs": 3}, UsageError, "pairs: is cfp's, and the method is l1; set fraction"),
        ({"method": "auto", "phase2_pairs": 3}, UsageError, "phase2_pairs: is cfp's, and the method is auto"),
        ({"widths": {"conv1": 7}, "ratios": {"conv1": 0.5}}, UsageError, "ratios: widths are given as well"),
        ({"widths": {"conv1": 7}, "round_to": 2}, UsageError, "7 filters, which contradicts round_to 2"),
        ({"method": "l1", "ratios": {"conv1": 0.5}, "skip": "conv1"}, UsageError, "contradicts skip 'conv1'"),
        ({"method": "corrnet", "criterion": {"threshold": 0.9}, "round_to": 2}, UsageError, "round_to 2 can't hold"),
        ({"method": 5, "widths": {"conv1": 7}}, UsageError, "criterion: is a name, a Criterion or a function"),
        ({"metric": "accuracy"}, UsageError, "metric: is a torchmetrics.Metric or a function"),
        ({"validation": []}, DataError, "validation: the data is empty"),
        ({"validation": [x for x, _ in VALIDATION]}, DataError, "validation: a batch is a pair .* found Tensor"),
        ({"validation": [(x, y.float()) for x, y in VALIDATION]}, DataError, "accuracy needs class scores"),
        ({"tolerance": -1}, UsageError, "tolerance"),
        ({"widths": {"conv9": 3}}, UsageError, "conv9 has no filters .* groups are conv1, conv2, fc1"),
        ({"widths": {"conv1": 0}}, UsageError, "1 to 8 filters"),
        ({"widths": {"conv1": 3}, "target": sc.Target(macs=0.5)}, UsageError, "give one of them"),
        ({"target": sc.Target(macs=0.999), "optimise_epochs": 0, "finetune_epochs": 0}, RunError, "out of reach"),
        ({"method": "l1", "target": sc.Target(macs=0.999)}, PlanError, "cannot remove 0.999 of the macs; all that"),
        ({"skip": ["conv*", "fc*"]}, UsageError, "no group of filters"),
        ({"method": "l1", "skip": ["conv*", "fc*"]}, UsageError, "no group of filters"),
        ({"train": iter([])}, UsageError, "walked through only once"),
        ({"method": "nope", "widths": {"conv1": 7}}, UsageError, "unknown criterion 'nope'"),
        ({"method": "corrnet", "criterion": {"treshold": 0.9}}, UsageError, "unknown option 'treshold'"),
        ({"method": "l1", "criterion": {"threshold": 0.9}}, UsageError, "unknown option 'threshold'"),
        ({"criterion": {"threshold": 0.9}}, UsageError, "cfp takes no option 'threshold'"),
        ({"compensate": "glue"}, UsageError, "unknown compensation 'glue'"),
        ({"compensate": ["bn", "merge"]}, UsageError, "Put merge first"),
        ({"compensate_options": {"ridge": 1}}, UsageError, "are those of least_squares, not asked for"),
        ({"compensate": "least_squares", "compensate_options": {"rigde": 1}}, UsageError, "found 'rigde'"),
        ({"widths": {"conv1": 7}, "lr": 1e25}, RunError, "lower the learning rate"),
    ],
)
def test_bad_requests_are_one_clear_line(
    network: nn.Module, options: dict[str, Any], error: type[SecateurError], message: str
) -> None:
    call: Callable[..., Any] = compress
    with pytest.raises(error, match=message) as caught:
        call(network, **{"train": TRAIN, "validation": VALIDATION, "method": "cfp", **QUICK, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("guesses", [True, False])
def test_an_untrained_network_is_warned_of(network: nn.Module, guesses: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Small() if guesses else network
    if guesses:  # always the class that is rarest, so no more often right than by chance
        last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
        rarest = int(torch.bincount(torch.cat([y for _, y in VALIDATION]), minlength=10).argmin())
        nn.init.zeros_(last.weight)
        last.bias.data = torch.nn.functional.one_hot(torch.tensor(rarest), 10).float()
    Engine(model, "l1", train=TRAIN, validation=[(x, y % 10) for x, y in VALIDATION]).init()
    assert ("which is chance with 10 classes" in caplog.text) is guesses


# Networks that a round changes more than in width, and the user's own code


def over(name: str, **options: Any) -> CompressResult:
    found = NETWORKS[name]
    torch.manual_seed(0)
    settings = {"lr": 1e-4, "finetune_epochs": 1, "optimise_epochs": 1, "linear": True, **options}
    batch = (found.inputs, Y)
    return compress(found.build(), train=[batch], validation=[batch], example_inputs=found.inputs, **settings)


NARROW = [name for name, found in NETWORKS.items() if found.kind == "narrow"]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if name in ("mixed_depthwise", "shuffled") else pytest.mark.slow)
        for name in NARROW
        for method in ("cfp", "l1", "redundancy", "cshe")
    ],
)
def test_rounds_go_on_until_one_channel_is_left_in_each_part(name: str, method: str) -> None:
    found = NETWORKS[name]
    model = found.build()
    graph = sc.trace(model, found.inputs)
    most = sum(len(step) for group in graph.groups for step in steps(group, range(group.size)))
    share = 0.95 * most / sum(group.size for group in graph.groups)
    result = over(name, method=method, target=sc.Target(channels=share), fraction=0.2)
    assert len(result.history) >= 2
    assert sum(map(len, result.plan.removed.values())) >= 0.95 * most - 1e-9
    assert result.report["verification"]["exact"]
    for port in graph.layers:
        assert result.plan.kept_inputs.get(port.module, [0])
        assert result.plan.kept_outputs.get(port.module, [0])


def test_a_group_with_nothing_left_is_left_alone() -> None:
    result = over("grouped_to_the_last", method="l1", target=sc.Target(channels=0.7), fraction=0.3)
    assert len(result.plan.removed["a"]) == 4
    last = result.history[-1]["removed"]
    assert "a" not in last
    with pytest.raises(PlanError, match=r"cannot remove 0.9 of the channels; all that may go is 0.75"):
        over("grouped_to_the_last", method="l1", target=sc.Target(channels=0.9), fraction=0.3)


def test_a_group_that_a_criterion_is_not_defined_on_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    result = over("functional_head", method="redundancy", phases=(1,), max_rounds=3, fraction=0.2, tolerance=100)
    assert set(result.plan.removed) == {"first"}
    assert len(result.history) == 3
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("criterion redundancy: second: left out, as the maps of 10 of its 10 channels can't be")
    with pytest.raises(
        PlanError, match=r"cannot remove 0.9 of the channels; .* second is left alone: criterion redund"
    ):
        over("functional_head", method="redundancy", target=sc.Target(channels=0.9), fraction=0.3)
    with pytest.raises(
        RunError, match=r"the method is defined on none of the groups: second is left alone: .* such as l1"
    ):
        over("functional_head", method="redundancy", skip=("first",), tolerance=100)


COMPUTED = [name for name, found in NETWORKS.items() if found.kind == "computed"]


@pytest.mark.parametrize("name", [COMPUTED[0], *(pytest.param(n, marks=pytest.mark.slow) for n in COMPUTED[1:])])
def test_computed_weights_are_paired_and_trained_towards_each_other(name: str) -> None:
    result = over(name, method="cfp", phases=(1,), max_rounds=2, optimise_epochs=30, lr=0.05, tolerance=100)
    assert len(result.history) == 2
    before, after = result.history[0]["abs_rho_before"], result.history[0]["abs_rho_after"]
    assert all(after[group] > before[group] for group in before)
    assert result.report["verification"]["exact"]


def test_a_run_is_the_same_in_inference_mode_and_without_gradients(network: nn.Module) -> None:
    plain = run(network, "l1", phases=(1,), max_rounds=1, tolerance=100)
    with torch.inference_mode():
        first = run(network, "l1", phases=(1,), max_rounds=1, tolerance=100)
    with torch.no_grad():
        second = run(network, "l1", phases=(1,), max_rounds=1, tolerance=100)
    assert same(plain.model, first.model)
    assert same(plain.model, second.model)
    assert not any(p.is_inference() for p in first.model.parameters())


@pytest.mark.parametrize("name", [name for name, found in NETWORKS.items() if found.kind == "nested"])
def test_the_first_example_is_taken_out_of_any_nesting(name: str) -> None:
    found = NETWORKS[name]
    batch = (found.inputs, Y)
    if name == "takes_a_pair":  # a pair as the only argument
        batch = ((found.inputs[0],), Y)
    result = compress(
        found.build(), "l1", train=[batch], validation=[batch], phases=(1,), max_rounds=1, finetune_epochs=0,
        tolerance=100,
    )  # fmt: skip
    assert result.report["verification"]["exact"]
    assert result.history[0]["images"] == 0
