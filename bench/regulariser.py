"""What the correlation regulariser costs a training step: ResNet-56 with and without it, side by side.

    python -m bench.regulariser

Steps with and without are taken in turn, and the ratios of neighbouring steps are what counts, so that whatever else
the machine does falls on both; on the CPU the time is the processor's. The episode is CFP's: one, two and four pairs a
layer in the three stages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import secateur as sc
from bench.sections import write_section
from secateur.engine import CorrelationRegulariser
from secateur.engine.pairing import eligible, select_pairs
from secateur.models import MODELS

ROOT = Path(__file__).resolve().parent.parent


def measure(name: str, batch: int, steps: int, device: str) -> str:
    """Time training steps in turn and say what came of it."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device).train()
    inputs, target = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    graph = sc.trace(model, inputs[:1])
    pairs = {
        group.name: select_pairs(model, graph, group, max(1, round(group.size / 16)), share="mean", signed=False)
        for group in eligible(graph)
    }
    regulariser = CorrelationRegulariser(model, graph, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(regularised: bool) -> None:
        loss = F.cross_entropy(model(inputs), target)
        if regularised:
            loss = loss + regulariser()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def seconds(run: Callable[[], object]) -> float:
        clock = time.process_time if device == "cpu" else time.perf_counter
        _wait(device)
        started = clock()
        run()
        _wait(device)
        return clock() - started

    ratios, plain, alone = [], [], []
    for turn in range(steps + 2):
        first, second = (seconds(lambda which=which: step(which)) for which in (turn % 2 == 1, turn % 2 == 0))
        without, with_it = (second, first) if turn % 2 else (first, second)
        if turn >= 2:  # the first steps are the slowest
            ratios.append(with_it / without)
            plain.append(without)
        alone.append(seconds(lambda: regulariser().backward()))
    quarters = statistics.quantiles(ratios, n=4)
    step_ms, own_ms = 1000 * statistics.median(plain), 1000 * statistics.median(alone)
    return (
        f"## What the correlation regulariser costs a training step: {name}\n\n"
        f"{sum(map(len, pairs.values()))} pairs in {len(pairs)} groups, batch of {batch}, {device}, "
        f"{torch.get_num_threads()} thread. A step takes {step_ms:.0f} ms, the regulariser and its gradient "
        f"{own_ms:.1f} ms, {100 * own_ms / step_ms:.1f}% of it. Whole steps with it, over their neighbours without: "
        f"{statistics.median(ratios):.3f} (median of {steps}, quartiles {quarters[0]:.3f} and {quarters[2]:.3f}). "
        "Written by `python -m bench.regulariser`."
    )


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet56", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    text = measure(chosen.model, chosen.batch, chosen.steps, chosen.device)
    print(text)
    write_section(chosen.results, "regulariser", text)


if __name__ == "__main__":
    main()
