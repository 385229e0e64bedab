"""Networks that give a class to every pixel: loss, metric, and a run from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.cli.commands import main
from secateur.data.masks import IGNORED
from secateur.errors import DataError
from secateur.training.dense import AUXILIARY, DenseLoss, MeanIoU
from secateur.training.evaluation import evaluate
from tests.data.test_masks import squares

NETWORK = """
from torch import nn


def conv(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = conv(3, 16), conv(16, 32)
        self.up, self.head = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 3, 1)

    def forward(self, x):
        import torch

        first = self.down(x)
        deep = self.up(self.deep(nn.functional.max_pool2d(first, 2)))
        return {"out": self.head(torch.cat([first, deep], 1))}


def net():
    return Dense()
"""


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (3, 5, 6), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORED
    return torch.randn(3, 4, 5, 6, generator=generator), target


def test_the_loss_is_the_mean_over_pixels_that_count() -> None:
    scores, target = drawn()
    terms = [
        -float(scores[n, :, i, j].log_softmax(0)[target[n, i, j]])
        for n in range(3)
        for i in range(5)
        for j in range(6)
        if target[n, i, j] != IGNORED
    ]
    expected = sum(terms) / len(terms)
    assert float(DenseLoss()(scores, target)) == pytest.approx(expected, rel=1e-5)
    both = DenseLoss()({"out": scores, "aux": scores}, target)
    assert float(both) == pytest.approx((1 + AUXILIARY) * expected, rel=1e-5)
    assert float(DenseLoss()(scores, torch.full_like(target, IGNORED))) == 0


def test_the_metric_is_the_slow_count() -> None:
    scores, target = drawn()
    target[target == 3] = 0
    scores[:, 3] = -math.inf  # nothing is taken for a class that is nowhere
    metric = MeanIoU(("a", "b", "c", "d"))
    for n in range(3):
        metric.update({"out": scores[n : n + 1]}, target[n : n + 1])
    found = float(metric.compute())
    taken, ious = scores.argmax(1), {}
    for c, name in enumerate("abc"):
        counts = target != IGNORED
        hit = ((taken == c) & (target == c) & counts).sum()
        union = (((taken == c) | (target == c)) & counts).sum()
        ious[name] = float(hit / union)
    assert found == pytest.approx(sum(ious.values()) / 3)
    assert metric.details["classes"] == {name: {"IoU": pytest.approx(value)} for name, value in ious.items()}
    right = ((taken == target) & (target != IGNORED)).sum() / (target != IGNORED).sum()
    assert metric.details["pixels"] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (torch.zeros(3, 4), r"the network returned shape \(3, 4\)"),
        ({"scores": torch.zeros(3, 4, 5, 6)}, "the network returned NoneType"),
        (torch.zeros(3, 4, 2, 3), "scores 3x2 pixels, and the masks have 6x5"),
    ],
)
def test_an_output_without_scores_of_each_pixel_is_one_line(output: Any, text: str) -> None:
    _, target = drawn()
    with pytest.raises(DataError, match=text):
        DenseLoss()(output, target)
    with pytest.raises(DataError, match=text):
        MeanIoU(("a", "b", "c", "d")).update(output, target)


def test_another_number_of_classes_and_no_pixel_are_one_line() -> None:
    scores, target = drawn()
    with pytest.raises(DataError, match="scores 4 classes, and the data have 3"):
        MeanIoU(("a", "b", "c")).update(scores, target)
    with pytest.raises(DataError, match="not one pixel counts"):
        evaluate(torch.nn.Identity(), [(scores, torch.full_like(target, IGNORED))], MeanIoU(("a", "b", "c", "d")))


@pytest.mark.slow
def test_a_network_for_masks_is_compressed_evaluated_and_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> dict[str, Any]:
        status = main([*words, "--json"])
        said = capsys.readouterr()
        assert status == 0, said.err
        found: dict[str, Any] = json.loads(said.out)
        return found

    squares(tmp_path / "data", {"train": 96, "test": 24})
    (tmp_path / "net.py").write_text(NETWORK)
    model, data = f"{tmp_path / 'net.py'}:net", f"masks:{tmp_path / 'data'}"
    folder = tmp_path / "run"
    report = run(
        "compress", model, "--data", data, "--macs", "0.5", "--baseline", "epochs=12", "--baseline", "lr=0.05",
        "--set", "final_epochs=4", "--run-dir", str(folder),
    )  # fmt: skip
    assert report["final"]["macs"] <= 0.5 * report["baseline"]["macs"]
    assert report["final"]["test"] > 0.6
    values = run("evaluate", model, "--weights", str(folder / "model.safetensors"), "--data", data)
    assert values["mIoU"] == pytest.approx(report["final"]["test"])
    assert set(values["classes"]) == {"ground", "square", "disc"}
    run("prune", model, "--weights", str(folder / "baseline.safetensors"), "--data", data, "--macs", "0.4",
        "--out", str(tmp_path / "small.safetensors"))  # fmt: skip
