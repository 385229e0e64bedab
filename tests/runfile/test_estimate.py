"""How long a run takes is told before it begins: its schedule counted, its speeds timed, nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.cli.commands import main
from secateur.cli.console import Steps
from secateur.data import load
from secateur.models import MODELS
from secateur.runfile import config, estimate

DIGITS = {"model": "lenet5", "data": "digits", "baseline": {"epochs": 3}}
RECIPES = Path(__file__).parents[2] / "recipes"


def build(**changes: Any) -> config.RunConfig:
    return config.build(DIGITS | changes)


@pytest.mark.parametrize(
    ("given", "rounds"),
    [
        # Singh et al. 2020, ResNet-56: 1, 2 and 4 pairs a round take 16, 32, 64 to 10, 20, 38 in 6, 6 and 6.5 rounds.
        ("resnet56_cifar10_cfp_10_20_38", 7),
        ("resnet56_cifar10_cfp_8_16_27", 10),
        ("lenet5_mnist_cfp", 13),
        ("vgg16_cifar10_cfp_80", 9),
        ("resnet56_cifar10_corrnet", 3),
        ("resnet56_cifar10_cfp", None),
    ],
)
def test_rounds_follow_from_widths_or_a_share(given: str, rounds: int | None) -> None:
    run = config.load(RECIPES / f"{given}.yaml")
    with torch.device("meta"):
        network = MODELS[run.model](**run.model_options) if run.settings.widths else nn.Identity()
    assert estimate.rounds_of(run, network) == rounds


@pytest.mark.slow
def test_the_schedule_is_counted_as_the_engine_goes_through_it(tmp_path: Path) -> None:
    from secateur.runfile import configured_run

    settings = {"widths": [{"conv1": 10, "conv2": 25}, {"conv1": 8, "conv2": 20}], "rounds": [1, 1], "final_epochs": 1}
    run = build(
        method="cfp", settings=settings | {"finetune_epochs": 1, "correlation_target": None},
        baseline={"epochs": 1}, run_dir=str(tmp_path / "run"), data_options={"train_size": 200},
    )  # fmt: skip
    trained, _ = estimate.schedule(run, load("digits", train_size=200), estimate.rounds_of(run, nn.Identity()) or 0)

    with Steps(quiet=True) as steps:
        result = configured_run.start(run, steps)
    assert trained == result.report["images"] + 200  # and the baseline's epoch
    assert estimate.schedule(build(method="auto", target={"macs": 0.5}), load("digits"), 1)[0] == (3 + 8) * 1077


def test_an_estimate_says_what_bounds_it_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    words = ["compress", "lenet5", "--data", "digits", "--macs", "0.5", "--estimate"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bound"] == ("reading" if told["reading"] < told["training"] else "computing")
    assert told["rounds"] == 1
    expected = told["training_images"] / min(told["reading"], told["training"])
    expected += told["measured_images"] / min(told["reading"], told["measuring"])
    assert told["hours"] == pytest.approx(expected / 3600)
    assert list(tmp_path.iterdir()) == []
    assert main([*words[:-3], "--estimate", "--quiet"]) == 0
    assert "the tolerance decides how many" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_of_imagenet_counts_imagenets_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import imagenet

    monkeypatch.setattr(estimate, "SECONDS", 0.0)
    found = imagenet.dry_run("resnet50_imagenet_cfp", 32, 64, batch_size=2)
    assert found.rounds == 5
    assert found.training_images == (5 * 2 + 30) * (imagenet.TRAIN - round(0.02 * imagenet.TRAIN))
    assert found.hours > 0
    assert found.workers > 0
