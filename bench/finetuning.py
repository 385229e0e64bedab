"""Every criterion with and without compensation on a trained ResNet-20, after 1 and 3 epochs of fine-tuning.

    python -m bench.finetuning

Half of the internal filters of every block go, chosen and compensated as in ``bench.criteria``. Each epoch anneals the
learning rate from its peak to zero with an optimizer of its own, so the figure after one epoch is that of a run of one
epoch. Each column has a peak of its own, chosen on images held out of the training set. Finished cells are kept in
``bench/results/finetuning-resnet20.jsonl``, so an interrupted run goes on where it was; processes may share the
columns. From there they get into ``docs/results.md``, as ``python -m bench.pages`` writes it.

Recalibrated batch norms (``bn``) differ from the others in their running statistics alone. Training reads the batch's
own, and an epoch of 351 steps leaves 0.9^351 < 1e-16 of the old ones: those columns are the same networks as without.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bench import criteria
from bench.rows import Row, Store
from bench.sections import Section
from secateur.checkpoint import write_atomic
from secateur.compensation import compensate
from secateur.data import Batches, DataBundle, load
from secateur.graph.channels import ChannelGraph
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace
from secateur.training.arithmetic import Arithmetic
from secateur.training.evaluation import evaluate
from secateur.training.stages import TrainingSettings, accelerator, fit

RATIO, BATCH = 0.5, 128
REPORTED = (1, 3)
PEAKS = (0.003, 0.01, 0.03)
TRAINED_AS = {name: name.removesuffix("bn").removesuffix(" + ") or "none" for name in criteria.COMPENSATIONS}
"""The column whose trained networks are also a column's: recalibration doesn't outlast an epoch."""
COLUMNS = tuple(dict.fromkeys(TRAINED_AS.values()))
STORE = Store("finetuning-resnet20.jsonl", ("compensation", "criterion", "epochs", "peak", "rate"))


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
        options: dict[str, Any] = {"runtime": accelerator("cpu"), "arithmetic": Arithmetic("bf16")}
        fit(model, batches, epochs=1, settings=settings(peak), seed=0, stage=number, **options)

    def try_peaks(self, compensation: str) -> None:
        """Measure, on the images held out, one epoch of ``l1`` with a compensation from every peak."""
        held = Batches(self.data.validation, 50)
        known = {line["rate"] for line in STORE.read() if "rate" in line and line["compensation"] == compensation}
        for rate in sorted(set(PEAKS) - known):
            model = self.pruned("l1", compensation)
            self.epoch(model, 0, rate)
            keep({"compensation": compensation, "rate": rate, "validation": round(100 * evaluate(model, held), 2)})

    def cell(self, criterion: str, compensation: str, peak: float, epochs: int, work: Path) -> Row:
        """Train one cell up to a number of epochs, from where an earlier call left it, and measure it."""
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
            "peak": peak,
            "accuracy": criteria.accuracy(model, *self.test),
        }


def tried(lines: list[Row]) -> dict[str, dict[float, float]]:
    """Return column -> peak -> accuracy on the images held out, of the columns tried with every peak."""
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        if "rate" in line:
            found.setdefault(line["compensation"], {})[line["rate"]] = line["validation"]
    return {name: rates for name, rates in found.items() if set(rates) >= set(PEAKS)}


def peaks(lines: list[Row]) -> dict[str, float]:
    """Return the best peak of each column."""
    return {name: max(rates, key=lambda r: rates[r]) for name, rates in tried(lines).items()}


def measured(lines: list[Row]) -> dict[tuple[int, str, str], Row]:
    """Return the line of every cell that was trained from the peak of its column."""
    peak = peaks(lines)
    return {
        (line["epochs"], line["criterion"], line["compensation"]): line
        for line in lines
        if "criterion" in line and line["peak"] == peak.get(line["compensation"])
    }


def keep(line: Row) -> None:
    """Add a line to what was measured."""
    STORE.keep(line)
    print(line, flush=True)


def render() -> str:
    """Return the tables as Markdown."""
    lines = STORE.read()
    cells, rates, peak = measured(lines), tried(lines), peaks(lines)
    mixed = [f"`{criterion}` {name}" for (_, criterion, name), line in cells.items() if "bf16_epochs" in line]
    columns = [name for name, as_ in TRAINED_AS.items() if any(cell[2] == as_ for cell in cells)]
    missing = [name for name in TRAINED_AS if name not in columns]
    text = [
        "## Criteria × compensation: resnet20, CIFAR-10, after fine-tuning",
        "",
        (
            f"Test accuracy in per cent (10,000 images, last epoch; unpruned 91.73) after {RATIO:.0%} of the internal "
            "filters of every block is removed, chosen and compensated on 512 training images, and then 1 and 3 epochs "
            "of training on 45,000 images, cropped and flipped: SGD, momentum 0.9, weight decay 1e-4, batches of "
            f"{BATCH}, in bf16 autocast. Each epoch anneals the learning rate by a cosine from the column's peak to 0, "
            "so the figure after one epoch is that of a run of one epoch. The peak is the best of those tried on the "
            "5,000 images held out, after one epoch, with `l1` (below). One seed a cell: small differences say "
            "nothing. Recalibrated batch norms differ in their running statistics alone, which training does not read "
            "and an epoch replaces, so those columns are the trained networks of the columns without. "
            + (f"Not measured: {', '.join(missing)}. " if missing else "")
            + (f"Epochs 2 and 3 of these ran in fp32: {', '.join(mixed)}. " if mixed else "")
            + "Written by `python -m bench.finetuning`."
        ),
        "",
        "| peak learning rate | " + " | ".join(str(rate) for rate in PEAKS) + " | chosen |",
        "|---|" + "---|" * (len(PEAKS) + 1),
    ]
    for name in (name for name in columns if name in peak):
        text.append(f"| {name} | " + " | ".join(f"{rates[name][rate]:.2f}" for rate in PEAKS) + f" | {peak[name]} |")
    for epochs in REPORTED:
        shown = {
            (criterion, name): cells[epochs, criterion, as_]["accuracy"]
            for criterion in criteria.CRITERIA
            for name, as_ in TRAINED_AS.items()
            if (epochs, criterion, as_) in cells
        }
        text += ["", f"### {epochs} epoch{'' if epochs == 1 else 's'}", "", *criteria.table(shown, columns)]
    return "\n".join(text)


SECTION = Section("results.md", "finetuning-resnet20", render)


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compensations", choices=COLUMNS, nargs="+", default=list(COLUMNS))
    parser.add_argument(
        "--work", type=Path, default=criteria.ROOT / "runs" / "finetuning", help="for half-trained cells"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table()
    for compensation in arguments.compensations:
        table.try_peaks(compensation)
    peak, done = peaks(STORE.read()), measured(STORE.read())
    # One epoch of every cell before the third of any.
    for epochs, criterion, compensation in product(REPORTED, criteria.CRITERIA, arguments.compensations):
        if (epochs, criterion, compensation) not in done:
            keep(table.cell(criterion, compensation, peak[compensation], epochs, arguments.work))
    SECTION.write()


if __name__ == "__main__":
    main()
