"""Every recipe is a valid run, its reduced form is the same row, and it ends at the paper's MACs."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur import criteria
from secateur.data import DATASETS
from secateur.graph import cost
from secateur.models import MODELS
from secateur.models.detectors import DETECTORS
from secateur.pruning.planning import plan_removal
from secateur.runfile import config
from secateur.tracing.tracing import trace

ROOT = Path(__file__).parents[2] / "recipes"
FULL = sorted(ROOT.glob("*.yaml"))
REDUCED = sorted((ROOT / "cpu").glob("*.yaml"))
SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")

LENET = {(4, 5): 134_600, (3, 5): 112_200, (3, 4): 99_400, (2, 3): 67_400}
RESNET = {(10, 20, 38): 48_553_596, (9, 18, 36): 40_818_024, (8, 16, 27): 29_549_902}
REMOVED = {"vgg16_cifar10": {"80": 0.8036, "82": 0.8193}, "resnet50_imagenet": {"cfp": 0.496, "corrnet": 0.516}}
WEIGHTS = {"resnet50_imagenet_corrnet_params": 0.446}


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_row_has_both_forms_and_is_listed():
    assert [p.name for p in FULL] == [p.name for p in REDUCED]
    listed = re.findall(r"^\| `(\w+\.yaml)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [p.name for p in FULL]
    for widths in LENET:
        assert (ROOT / f"lenet5_mnist_cfp_{widths[0]}_{widths[1]}.yaml").is_file()
    for a, b, c in RESNET:
        assert (ROOT / f"resnet56_cifar10_cfp_{a}_{b}_{c}.yaml").is_file()


@pytest.mark.parametrize("path", FULL + REDUCED, ids=ids)
def test_a_recipe_names_what_exists(path):
    run = config.load(path)
    kind, _, place = run.data.partition(":")
    assert not Path(place).is_absolute()
    assert set(run.data_options) <= set(inspect.signature(DATASETS[kind]).parameters)
    if run.model in MODELS:
        assert set(run.model_options) <= set(inspect.signature(MODELS[run.model]).parameters)
    if run.method not in ("cfp", "auto"):
        assert run.method in criteria.names()
        assert not run.settings.criterion
    short = {"torchvision:ssdlite320_mobilenet_v3_large": "ssdlite"}
    assert path.stem.startswith(short.get(run.model, run.model.rpartition(":")[2]))
    assert run.run_dir == f"runs/{'cpu-' if path in REDUCED else ''}{path.stem}"
    assert ("noopt" in path.stem or run.method == "l1") == (run.settings.optimise == "none")
    if run.model in DETECTORS:
        assert set(run.model_options) <= {"base", "base_options", "base_weights", "last"}


@pytest.mark.parametrize("path", FULL, ids=ids)
def test_the_reduced_form_is_the_same_row_on_less(path):
    full, reduced = config.load(path), config.load(ROOT / "cpu" / path.name)
    for key in ("model", "model_options", "method", "target", "options"):
        assert getattr(reduced, key) == getattr(full, key)
    same = ("widths", "form", "optimise", "correlation_target", "internal_only", "order", "signed", "merge")
    for key in (*same, "criterion", "phases"):
        assert getattr(reduced.settings, key) == getattr(full.settings, key)
    # BCCD's 205 photographs are few enough.
    assert reduced.data.startswith("voc:") or reduced.data_options["train_size"] <= 10_000
    for key in ("optimise_epochs", "finetune_epochs", "final_epochs"):
        assert getattr(reduced.settings, key) <= min(2, getattr(full.settings, key))


def expected_macs(path: Path) -> list[int]:
    numbers = tuple(int(n) for n in re.findall(r"_(\d+)(?=_|$)", path.stem))
    if path.stem == "lenet5_mnist_cfp":
        return list(LENET.values())
    if path.stem == "lenet5_mnist_cfp_4_5":
        # Its hidden layer goes from 500 to 250, of 16·5 inputs and 10 outputs.
        return [LENET[numbers] - 250 * (16 * 5 + 10)]
    return [(LENET | RESNET)[numbers]]


WITH_WIDTHS = [p for p in FULL if config.load(p).settings.widths]


def test_all_rows_with_widths_are_checked():
    assert len(WITH_WIDTHS) == 1 + 4 + 2 + 3


@pytest.mark.parametrize("path", WITH_WIDTHS, ids=ids)
def test_widths_end_at_the_published_macs(path):
    run = config.load(path)
    model = MODELS[run.model](**run.model_options).eval()
    graph = trace(model, torch.zeros(1, 1, 28, 28) if run.model == "lenet5" else torch.zeros(1, 3, 32, 32))
    found = []
    for goal in run.settings.widths:
        removed = {}
        for module, width in goal.items():
            group = next(g for g in graph.groups if any(m.module == module for m in g.producers))
            assert group.name not in removed, f"{module} names a group for the second time"
            removed[group.name] = list(range(width, group.size))
        found.append(cost.macs(graph, plan_removal(graph, removed)))
    assert found == expected_macs(path)


def test_percentages_in_the_heads_are_the_true_ones():
    heads = {
        path: re.search(r"([\d,]+) of ([\d,]+) MACs,\n# ([\d.]+)% removed", path.read_text("utf-8")) for path in FULL
    }
    found = {path.stem: match for path, match in heads.items() if match is not None}
    assert len(found) == len(RESNET)
    for name, match in found.items():
        after, before = (int(match[i].replace(",", "")) for i in (1, 2))
        assert after == RESNET[tuple(map(int, name.split("_")[-3:]))]
        assert match[3] == f"{100 * (1 - after / before):.2f}"


def test_rows_begin_without_the_published_weights_too():
    for path in FULL:
        run = config.load(path, {"weights": "none"})
        assert run.weights is None
        assert run.baseline.epochs >= 15 or run.model.startswith("torchvision:resnet50")


def test_rows_with_a_target_have_the_papers():
    for path in FULL:
        run = config.load(path)
        for start, rows in REMOVED.items():
            row = path.stem.rpartition("_")[2]
            if path.stem.startswith(start) and row in rows:
                assert run.target is not None
                assert run.target.macs == rows[row]
    for name, share in WEIGHTS.items():
        target = config.load(ROOT / f"{name}.yaml").target
        assert target is not None
        assert target.params == share


@needs_shared
@pytest.mark.slow
def test_a_reduced_recipe_is_a_whole_run_of_the_command(tmp_path):
    command = [sys.executable, "-m", "secateur", "compress", "--config", ROOT / "cpu" / "lenet5_mnist_cfp.yaml"]
    options = ["--data", f"mnist:{SHARED / 'data'}", "--run-dir", tmp_path / "run"]
    done = subprocess.run([*command, *options], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert [m["macs"] for m in result["milestones"]] == list(LENET.values())
    # Far from the full schedule's, but no accident: chance is 0.1.
    assert result["final"]["test"] > 0.8
