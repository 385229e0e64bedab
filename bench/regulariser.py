"""What the correlation regulariser costs a training step: ResNet-56 with and without it, side by side.

Usage: ``python -m bench.regulariser [--batch 128] [--steps 10] [--model resnet56] [--threads 1] [--device cpu]``.

Steps with and without are taken in turn, so that whatever else the machine does falls on both; medians are
compared.
The episode is CFP's: one, two and four pairs a layer in the three stages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch.nn import functional as F

import secateur as sc
from secateur.engine import CorrelationRegulariser
from secateur.engine.pairing import eligible, select_pairs
from secateur.models import MODELS


def measure(model_name: str, batch: int, steps: int, device: str) -> dict[str, object]:
    """Time training steps in turn and return the medians."""
    torch.manual_seed(0)
    model = MODELS[model_name]().to(device).train()
    inputs, target = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    graph = sc.trace(model, inputs[:1])
    pairs = {
        group.name: select_pairs(model, graph, group, max(1, round(group.size / 16)), share="mean", signed=False)
        for group in eligible(graph)
    }
    regulariser = CorrelationRegulariser(model, graph, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    times: dict[bool, list[float]] = {False: [], True: []}
    alone: list[float] = []
    for step in range(steps + 2):
        for regularised in (False, True) if step % 2 else (True, False):
            _wait(device)
            started = time.perf_counter()
            loss = F.cross_entropy(model(inputs), target)
            if regularised:
                loss = loss + regulariser()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _wait(device)
            if step >= 2:
                times[regularised].append(time.perf_counter() - started)
        started = time.perf_counter()
        regulariser().backward()
        _wait(device)
        alone.append(time.perf_counter() - started)
    plain, with_it = statistics.median(times[False]), statistics.median(times[True])
    return {
        "model": model_name, "batch": batch, "device": device, "threads": torch.get_num_threads(),
        "groups": len(pairs), "pairs": sum(map(len, pairs.values())), "step_ms": round(1000 * plain, 2),
        "step_with_regulariser_ms": round(1000 * with_it, 2),
        "regulariser_alone_ms": round(1000 * statistics.median(alone), 2),
        "overhead_percent": round(100 * (with_it / plain - 1), 2),
        "overhead_from_alone_percent": round(100 * statistics.median(alone) / plain, 2),
    }  # fmt: skip


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description="cost of the correlation regulariser")
    parser.add_argument("--model", default="resnet56", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(json.dumps(measure(chosen.model, chosen.batch, chosen.steps, chosen.device)))


if __name__ == "__main__":
    main()
