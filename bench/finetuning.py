"""Every criterion with and without compensation on a trained ResNet-20, after 1 and 3 epochs of fine-tuning.

    python -m bench.finetuning

Half of the internal filters of every block go, chosen and compensated as in ``bench.criteria``. Each epoch anneals the
learning rate from its peak to zero with an optimizer of its own, so the figure after one epoch is that of a run of one
epoch. The peak is the same for all cells, chosen on images held out of the training set. Finished cells are kept in a
JSON Lines file next to this script, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bench import criteria
from bench.sections import write_section
from secateur.checkpoint import write_atomic
from secateur.compensate import compensate
from secateur.data import Batches, DataBundle, load
from secateur.graph import ChannelGraph
from secateur.surgery import cut
from secateur.tracing import trace
from secateur.training import TrainingSettings, accelerator, evaluate, fit

RATIO, BATCH = 0.5, 128
REPORTED = (1, 3)
PEAKS = (0.01, 0.03, 0.1)
FIRST = ("none", "least squares everywhere")
STORE = criteria.ROOT / "bench" / "finetuning-resnet20.jsonl"


def settings(peak: float) -> TrainingSettings:
    """Return how every cell is trained."""
    return TrainingSettings(lr=peak, momentum=0.9, weight_decay=1e-4, schedule="cosine")


class Table:
    """The pruned networks of the table, and what they are trained on."""

    def __init__(self) -> None:
        self.model = criteria.trained("resnet20")
        chosen = np.random.default_rng(0).permutation(50_000)[: criteria.IMAGES]
        x, y = criteria.images("train", chosen)
        self.few = [(x[i : i + criteria.BATCH], y[i : i + criteria.BATCH]) for i in range(0, len(x), criteria.BATCH)]
        self.graph: ChannelGraph = trace(self.model, x[:2])
        self.data: DataBundle = load(f"cifar10:{criteria.SHARED / 'data' / 'cifar10'}")
        self.test: tuple[Tensor, Tensor] = criteria.images("test")
        self.scores: dict[str, dict[str, Tensor]] = {}

    def pruned(self, criterion: str, compensation: str) -> nn.Module:
        """Return the network of a cell, before any training."""
        plan = criteria.selection(self.model, self.graph, criterion, RATIO, self.few, self.scores)
        small = cut(self.model, plan)
        methods, options = criteria.COMPENSATIONS[compensation]
        if methods:
            compensate(self.model, small, plan, methods, self.few, graph=self.graph, **options)
        return small

    def epoch(self, model: nn.Module, number: int, peak: float) -> None:
        """Train for one epoch: the same order and augmentation of the images in every cell."""
        batches = Batches(self.data.train, BATCH, shuffle=True, augment=True, drop_last=True)
        runtime = accelerator("cpu", "bf16")
        fit(model, batches, epochs=1, settings=settings(peak), seed=0, stage=number, runtime=runtime)

    def peak(self) -> float:
        """Choose the peak by the accuracy on held-out images after one epoch of ``l1`` without compensation."""
        for line in read():
            if "peak" in line:
                return float(line["peak"])
        held = Batches(self.data.validation, 50)
        start, tried = self.pruned("l1", "none"), {}
        for rate in PEAKS:
            model = copy.deepcopy(start)
            self.epoch(model, 0, rate)
            tried[rate] = 100 * evaluate(model, held)
        best = max(PEAKS, key=lambda rate: tried[rate])
        append({"peak": best, "validation": {str(rate): round(value, 2) for rate, value in tried.items()}})
        return best

    def cell(self, criterion: str, compensation: str, peak: float, epochs: int, work: Path) -> dict[str, Any]:
        """Train one cell up to a number of epochs, from where an earlier call left it, and measure it."""
        start = time.process_time()
        model = self.pruned(criterion, compensation)
        done, kept = 0, work / f"{criterion}-{compensation.replace(' ', '-')}.safetensors"
        if kept.exists():
            with safe_open(kept, "pt") as file:
                done = int(file.metadata()["epochs"])
            if done <= epochs:
                model.load_state_dict(load_file(kept))
            else:
                done = 0
        for number in range(done, epochs):
            self.epoch(model, number, peak)
        work.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, save(model.state_dict(), {"epochs": str(epochs)}))
        return {
            "criterion": criterion,
            "compensation": compensation,
            "epochs": epochs,
            "accuracy": criteria.accuracy(model, *self.test),
            "cpu_seconds": round(time.process_time() - start, 1),
        }


def read() -> list[dict[str, Any]]:
    """Return what was measured so far."""
    return [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []


def key(line: dict[str, Any]) -> tuple[int, str, str]:
    """Return what tells one cell from another."""
    return line["epochs"], line["criterion"], line["compensation"]


def append(line: dict[str, Any]) -> None:
    """Add a line to what was measured."""
    with STORE.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def render() -> str:
    """Return the tables as Markdown."""
    lines = read()
    chosen = next(line for line in lines if "peak" in line)
    tried = ", ".join(f"{rate}: {value:.2f}" for rate, value in chosen["validation"].items())
    value = {key(line): line["accuracy"] for line in lines if "criterion" in line}
    columns = [name for name in criteria.COMPENSATIONS if any(cell[2] == name for cell in value)]
    missing = [name for name in criteria.COMPENSATIONS if name not in columns]
    text = [
        "## Criteria × compensation: resnet20, CIFAR-10, after fine-tuning",
        "",
        (
            f"Test accuracy in per cent (10,000 images, last epoch; unpruned 91.73) after {RATIO:.0%} of the internal "
            "filters of every block is removed, chosen and compensated on 512 training images, and then 1 and 3 epochs "
            "of training on 45,000 images, cropped and flipped: SGD, momentum 0.9, weight decay 1e-4, batches of "
            f"{BATCH}, in bf16 autocast. Each epoch anneals the learning rate by a cosine from {chosen['peak']} to 0, "
            "so the figure after one epoch is that of a run of one epoch. That peak is the best of those tried on the "
            f"5,000 images held out, after one epoch, with `l1` and no compensation ({tried}). One seed a cell: small "
            "differences say nothing. "
            + (f"Not measured: {', '.join(missing)}. " if missing else "")
            + "Written by `python -m bench.finetuning`."
        ),
    ]
    for epochs in REPORTED:
        measured = {(criterion, k): accuracy for (after, criterion, k), accuracy in value.items() if after == epochs}
        text += ["", f"### {epochs} epoch{'' if epochs == 1 else 's'}", "", *criteria.table(measured, columns)]
    return "\n".join(text)


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compensations", choices=criteria.COMPENSATIONS, nargs="+", default=list(FIRST))
    parser.add_argument(
        "--work", type=Path, default=criteria.ROOT / "runs" / "finetuning", help="for half-trained cells"
    )
    parser.add_argument("--results", type=Path, default=criteria.ROOT / "docs" / "results.md")
    parser.add_argument("--render-only", action="store_true", help="write the tables from the cells measured so far")
    arguments = parser.parse_args()
    if not arguments.render_only:
        torch.set_num_threads(1)
        table = Table()
        peak = table.peak()
        done = {key(line) for line in read() if "criterion" in line}
        # The comparisons that matter most come first, one epoch of all before the third of any.
        order = sorted(criteria.CRITERIA, key=lambda name: name.startswith("corrnet_"))
        for wanted in product(REPORTED, order, arguments.compensations):
            if wanted not in done:
                epochs, criterion, compensation = wanted
                append(table.cell(criterion, compensation, peak, epochs, arguments.work))
    write_section(arguments.results, "finetuning-resnet20", render())


if __name__ == "__main__":
    main()
