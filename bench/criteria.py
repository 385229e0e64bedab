"""Every criterion with every compensation on a trained CIFAR ResNet, without any fine-tuning.

    python -m bench.criteria --network resnet20

The internal filters of every block (the first convolution's) lose the same fraction. Criteria and compensation see 512
training images, without labels unless the criterion is of labels or gradients. Accuracy is that of all 10,000 test
images. Finished cells are kept in ``bench/results/criteria-NETWORK.jsonl``, so an interrupted run goes on where it was;
from there they get into ``docs/results.md``, as ``python -m bench.pages`` writes it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.rows import Store
from bench.sections import Section
from secateur.compensation import compensate
from secateur.criteria import Returns, get, scoring
from secateur.errors import RunError
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.models import MODELS
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SECATEUR_SHARED", ROOT.parent / "shared"))
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
IMAGES, BATCH = 512, 128
STORES = {
    network: Store(f"criteria-{network}.jsonl", ("compensation", "criterion", "ratio"))
    for network in ("resnet20", "resnet56")
}
CRITERIA: dict[str, dict[str, Any]] = {
    "l1": {},
    "redundancy": {},
    "cshe": {},
    "corrnet": {"threshold": 0.0},
    "fpgm": {},
    "chip": {},
    "taylor": {},
    "hrank": {},
    "l2": {},
    "corrnet_successive": {"threshold": -1.0},
    "corrnet_su": {},
    "cfp": {},
    "random": {},
}
BY_SCORE = ("corrnet_su",)
"""Criteria whose selection may stop short of the budget; their lowest scores go instead, which spends it exactly."""
COMPENSATIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "none": ([], {}),
    "least squares": (["least_squares"], {}),
    "least squares everywhere": (["least_squares"], {"everywhere": True}),
    "merge": (["merge"], {}),
    "bn": (["bn"], {}),
    "merge + bn": (["merge", "bn"], {}),
}


def images(split: str, choose: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 images, normalised as the weights were trained, and labels."""
    pixels, labels = [], []
    for file in sorted((SHARED / "data" / "cifar10").glob(f"{split}-*.parquet")):
        table = pq.read_table(file)
        pixels += [cell["bytes"] for cell in table.column("img").to_pylist()]
        labels += table.column("label").to_pylist()
    chosen = range(len(pixels)) if choose is None else choose.tolist()
    raw = np.stack([np.asarray(Image.open(io.BytesIO(pixels[i])).convert("RGB")) for i in chosen])
    x = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255
    return (x - MEAN) / STD, torch.tensor([labels[i] for i in chosen])


def trained(network: str) -> nn.Module:
    """Return a network with its published weights, in eval mode."""
    model = MODELS[network]()
    weights = load_file(SHARED / "weights" / f"cifar10-{network}.safetensors")
    # The published weights lack the counters of batches, which play no part in evaluation.
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(counters | weights)
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in per cent."""
    model.eval().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    right = sum(int((model(x[i : i + 50]).argmax(1) == y[i : i + 50]).sum()) for i in range(0, len(x), 50))
    return 100 * right / len(x)


def selection(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str,
    ratio: float,
    train: list[Any],
    scores: dict[str, dict[str, Tensor]],
) -> PruningPlan:
    """Plan the removal of exactly so much of the internal filters of every block; scores are kept for other ratios."""
    options = CRITERIA[criterion]
    groups = {group.name: group for group in graph.groups if re.search(r"layer\d\.\d+\.conv1$", group.name)}
    counts = {name: int(ratio * group.size) for name, group in groups.items()}
    if criterion in BY_SCORE or get(criterion).returns is Returns.SCORES:
        if criterion not in scores:
            scores[criterion] = scoring.score(model, graph, criterion, train, groups=list(counts), **options)
        found = scores[criterion]
        removed = {name: list(scoring.lowest(groups[name], found[name], count)) for name, count in counts.items()}
    else:
        chosen = scoring.select(model, graph, criterion, counts, train, **options)
        removed = {name: list(selected.removed) for name, selected in chosen.items()}
    for name, channels in removed.items():
        if len(channels) != counts[name]:
            raise RunError(f"{criterion}, {name}: {len(channels)} channels selected, {counts[name]} asked for.")
    return plan_removal(graph, removed)


def cells(ratios: list[float], compensations: list[str]) -> Iterator[tuple[float, str, str]]:
    """Yield every cell of the table, the ones asked about most first."""
    wanted = [(r, c, k) for k in compensations for c in CRITERIA for r in ratios]
    first = [cell for cell in wanted if cell[1] in ("l1", "redundancy")]
    yield from first
    yield from (cell for cell in wanted if cell not in first)


def measure(
    model: nn.Module,
    graph: ChannelGraph,
    wanted: Iterator[tuple[float, str, str]],
    store: Store,
    train: list[Any],
    test: tuple[Tensor, Tensor],
) -> None:
    """Measure the cells that the store lacks, and append each to it."""
    done = {(c["ratio"], c["criterion"], c["compensation"]) for c in store.read()}
    scores: dict[str, dict[str, Tensor]] = {}
    plans: dict[tuple[float, str], PruningPlan] = {}
    for ratio, criterion, compensation in wanted:
        if (ratio, criterion, compensation) in done:
            continue
        if (ratio, criterion) not in plans:
            plans[ratio, criterion] = selection(model, graph, criterion, ratio, train, scores)
        plan = plans[ratio, criterion]
        small = cut(model, plan)
        methods, options = COMPENSATIONS[compensation]
        if methods:
            compensate(model, small, plan, methods, train, graph=graph, **options)
        cell = {
            "ratio": ratio,
            "criterion": criterion,
            "compensation": compensation,
            "accuracy": accuracy(small, *test),
        }
        store.keep(cell)
        print(cell, flush=True)


def table(value: dict[tuple[str, str], float], columns: list[str]) -> list[str]:
    """Return the lines of a table of criteria × compensation; a criterion of which nothing is known has no row."""
    lines = ["| criterion | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for criterion in CRITERIA:
        row = [f"{value[criterion, k]:.2f}" if (criterion, k) in value else "not measured" for k in columns]
        if any(cell != "not measured" for cell in row):
            lines.append(f"| `{criterion}` | " + " | ".join(row) + " |")
    return lines


def render(network: str) -> str:
    """Return the table as Markdown."""
    found = STORES[network].read()
    baseline = next((c["accuracy"] for c in found if c["criterion"] == "unpruned"), float("nan"))
    lines = [
        f"## Criteria × compensation: {network}, CIFAR-10, no fine-tuning",
        "",
        (
            f"Test accuracy in per cent (10,000 images; unpruned {baseline:.2f}) after the given fraction of the "
            f"internal filters of every block is removed. Criteria and compensation see {IMAGES} training images; "
            f"`taylor` and `corrnet_su` alone read their labels. "
            f"Written by `python -m bench.criteria --network {network}`."
        ),
    ]
    for ratio in sorted({c["ratio"] for c in found if c["ratio"]}):
        value = {(c["criterion"], c["compensation"]): c["accuracy"] for c in found if c["ratio"] == ratio}
        columns = [k for k in COMPENSATIONS if any(key[1] == k for key in value)]
        lines += ["", f"### {ratio:.0%} removed", "", *table(value, columns)]
    return "\n".join(lines)


SECTIONS = {network: Section("results.md", f"criteria-{network}", partial(render, network)) for network in STORES}


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=STORES, default="resnet20")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--compensations", choices=COMPENSATIONS, nargs="+", default=list(COMPENSATIONS))
    arguments = parser.parse_args()
    store = STORES[arguments.network]
    torch.set_num_threads(1)
    model = trained(arguments.network)
    chosen = np.random.default_rng(0).permutation(50_000)[:IMAGES]
    x, y = images("train", chosen)
    train = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, IMAGES, BATCH)]
    test = images("test")
    if not store.read():
        store.keep({"ratio": 0, "criterion": "unpruned", "compensation": "none", "accuracy": accuracy(model, *test)})
    wanted = cells(arguments.ratios, arguments.compensations)
    measure(model, trace(model, x[:2]), wanted, store, train, test)
    SECTIONS[arguments.network].write()


if __name__ == "__main__":
    main()
