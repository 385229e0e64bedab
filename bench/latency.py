"""Targets of latency: what was asked for, predicted by times of layers, and measured on the whole network.

    python -m bench.latency                                   # all; rows that were measured are left out
    python -m bench.latency --networks resnet56 --runtimes eager --threads 1

Half the time of a pass at batch 8, three tenths of it at batch 1 in eager mode; and half the MACs at widths that pay
(``round_to="auto"``) in ONNX Runtime, against the speed-up in theory. Weights are freshly drawn, channels of the lowest
l2 go first, how many by the scores' own ranking (``normalized``): time depends on none of them. Original and pruned
network are timed in turns, nine rounds; one thread by processor time, as other work may run beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

import secateur as sc
from bench.rows import Store
from bench.sections import Section
from secateur.deploy.timing import environment
from secateur.deploy.timing.whole import whole
from secateur.engine.speed import in_time
from secateur.models import resnet56

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet56": (resnet56, 32),
    "resnet50": (torchvision.models.resnet50, 224),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, 224),
}
STORE = Store("latency.jsonl", ("network", "runtime", "threads", "batch", "target"))
TARGETS = (("eager", 8, "latency=0.5"), ("eager", 1, "latency=0.3"), ("onnxruntime", 8, "latency=0.5"))
ROUNDED = ("onnxruntime", 8, "macs=0.5")


COLUMNS = (
    "network", "runs in", "threads", "batch", "target", "asked", "predicted", "measured", "error", "MACs left",
    "of theory",
)  # fmt: skip
MEANING = (
    "Time of a forward pass that is left: asked for, predicted by times of layers, and measured on the whole network, "
    "original and pruned in turns. `of theory` is the measured speed-up over that of the MACs."
)


def measure(name: str, runtime: str, threads: int, batch: int, target: str) -> dict[str, Any]:
    """Prune a network to a target, and time it against the original."""
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model, inputs = build().eval(), torch.randn(batch, 3, size, size)
    graph = sc.trace(model, inputs[:1])
    scores = sc.score(model, graph, "l2")
    start = time.perf_counter()
    costs = sc.latency(model, graph, batch=batch, runtime=runtime, threads=threads, example_inputs=inputs)
    row: dict[str, Any] = {
        "network": name, "runtime": runtime, "threads": threads, "batch": batch, "target": target,
        "table_seconds": round(time.perf_counter() - start, 1),
        "fit_error": round(max(abs(fitted / seen - 1) for seen, fitted in costs.fit), 4),
    }  # fmt: skip
    what, fraction = target.split("=")
    if what == "latency":
        goal = sc.Target(latency=float(fraction), batch=batch, runtime=runtime, threads=threads)
        try:
            timed = in_time(model, graph, inputs, goal, costs, lambda g: sc.plan(graph, scores, g, costs=costs))
        except sc.PlanError as error:
            return row | {"refused": str(error)}
        told, plan = timed.report, timed.plan
        row |= {k: round(told[k], 4) for k in ("asked", "predicted", "measured", "error")}
        row["corrected_from"] = None if told["corrected_from"] is None else round(told["corrected_from"], 4)
    else:
        plan = sc.plan(graph, scores, sc.Target(macs=float(fraction)), round_to="auto", costs=costs)
        before, after = whole([model, sc.apply(model, plan)], inputs, batch, runtime, threads)
        left = statistics.median(b / a for a, b in zip(before, after, strict=True))
        predicted = costs.seconds(graph, plan) / costs.seconds(graph)
        row |= {"predicted": round(predicted, 4), "measured": round(left, 4), "error": round(predicted / left - 1, 4)}
    macs = sc.macs(graph, plan) / sc.macs(graph)
    row |= {"macs_left": round(macs, 4), "of_theory": round(macs / row["measured"], 3)}
    found = environment()
    return row | {key: found[key] for key in ("processor", "cores", "torch")} | {"load": round(os.getloadavg()[0], 1)}


def section() -> str:
    """Tabulate the rows."""
    lines = [
        "## Targets of latency",
        "",
        MEANING,
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in STORE.read():
        head = f"| {row['network']} | {row['runtime']} | {row['threads']} | {row['batch']} | {row['target']} |"
        if "refused" in row:
            most = row["refused"].partition("; ")[2].partition(". ")[0]
            lines.append(f"{head} refused: {most} | | | | | |")
            continue
        asked = f"{row['asked']:.2f}" if "asked" in row else "–"
        lines.append(
            f"{head} {asked} | {row['predicted']:.3f} | {row['measured']:.3f} | {row['error']:+.1%} | "
            f"{row['macs_left']:.3f} | {row['of_theory']:.2f} |"
        )
    return "\n".join([*lines, "", "`python -m bench.latency` on a machine that other work shared."])


SECTION = Section("results.md", "latency", section)


def main() -> None:
    """Measure what is not measured yet, and print every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", choices=("eager", "onnxruntime"), default=["eager", "onnxruntime"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    known = set() if given.again else {STORE.name(row) for row in STORE.read()}
    for name in given.networks:
        for threads in given.threads:
            for runtime, batch, target in (*TARGETS, ROUNDED):
                key = {"network": name, "runtime": runtime, "threads": threads, "batch": batch, "target": target}
                if runtime not in given.runtimes or STORE.name(key) in known:
                    continue
                row = measure(name, runtime, threads, batch, target)
                STORE.keep(row)
                print(row, flush=True)
    SECTION.write()


if __name__ == "__main__":
    main()
