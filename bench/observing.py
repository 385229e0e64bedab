"""How much longer streamed moments take than plain forwards: resnet50 at 224×224, all groups; docs/results.md.

python -m bench.observing
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

from bench.sections import write_section
from secateur.criteria.feature_maps import POSITIONS, observe
from secateur.tracing.tracing import trace

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Time forwards without and with observation, in turn, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval()
    images = torch.randn(arguments.images, 3, 224, 224)
    graph = trace(model, images[:1])

    @torch.no_grad()
    def plain() -> None:
        model(images)

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    plain()
    observe(model, graph, [images])
    rounds = [(seconds(plain), seconds(lambda: observe(model, graph, [images]))) for _ in range(arguments.repeats)]
    forward, observed = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    text = (
        "## Streamed moments of feature maps: resnet50, 224×224\n\n"
        f"All {len(graph.groups)} channel groups in one pass, {POSITIONS} positions of each map, batch of "
        f"{arguments.images}, one CPU thread, median of {arguments.repeats}: plain forward {forward:.2f} s, with "
        f"observation {observed:.2f} s, {ratio:.2f} times as long (median of the ratios of neighbouring runs). "
        "Written by `python -m bench.observing`."
    )
    print(text)
    write_section(arguments.results, "observing", text)


if __name__ == "__main__":
    main()
