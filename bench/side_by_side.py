"""Time of trace, score, plan and apply: this checkout beside Torch-Pruning, or beside another checkout of Secateur.

    python -m bench.side_by_side                                       # beside Torch-Pruning
    python -m bench.side_by_side --against PATH --only resnet50 efficientnet_b0

Each network is torchvision's, with random weights, and loses half of every group, lowest L1 norms first. The two take
turns for some rounds, each time in a fresh process on one thread: what the machine does meanwhile, it does to both.
Each process first prunes a tiny network, so that everything is imported and has run, and then the network once. Times
are of the processor; the figure is the median over rounds of the other's time over this checkout's, above 1 where this
one is faster. Torch-Pruning has one time, for copying the network, which Secateur leaves as it is, building its graph,
choosing by magnitude and cutting; it stands beside all that Secateur does, and beside all but the scores. Nothing is
written: the table is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# The other checkout runs this file, too: nothing of this one is imported but where Torch-Pruning is driven.
ROOT = Path(__file__).resolve().parent.parent
PARTS = ("trace", "score", "plan", "apply")
Times = dict[str, float]


def _secateur(model: Any, example: Any) -> tuple[Times, Any]:
    import secateur as sc

    clock = [time.process_time()]
    graph = sc.trace(model, example)
    clock.append(time.process_time())
    scores = sc.score(model, graph, "l1")
    clock.append(time.process_time())
    plan = sc.plan(graph, scores, ratios={"*": 0.5})
    clock.append(time.process_time())
    small = sc.apply(model, plan)
    clock.append(time.process_time())
    times = dict(zip(PARTS, (end - start for start, end in pairwise(clock)), strict=True))
    whole = clock[-1] - clock[0]
    return {**times, "all but score": whole - times["score"], "all": whole}, small


def _torch_pruning(model: Any, example: Any) -> tuple[Times, Any]:
    from bench import peer
    from bench.models import output_layers

    outputs = output_layers(model)
    start = time.process_time()
    small = peer.prune(copy.deepcopy(model), example, outputs, 0.5)
    whole = time.process_time() - start
    return {"all but score": whole, "all": whole}, small


def work(tool: str, network: str) -> dict[str, float]:
    """Prune one network in this process: seconds of each part, and the fraction of the parameters that went."""
    import torch
    from torch import nn
    from torchvision.models import get_model

    prune: Callable[[Any, Any], tuple[Times, Any]] = _torch_pruning if tool == "torch-pruning" else _secateur
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1000))
    prune(tiny.eval(), torch.randn(1, 3, 8, 8))
    slow = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}
    model = get_model(network, weights=None, **slow).eval()
    size = 299 if network == "inception_v3" else 256 if "swin_v2" in network else 224
    times, small = prune(model, torch.randn(1, 3, size, size))
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, small))
    return {**times, "removed": 1 - after / before}


def run(tool: str, checkout: Path, network: str, limit: float) -> dict[str, float] | str:
    """Prune a network in a fresh process, with the package of a checkout; a text says why there are no times."""
    variables = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--work", tool, str(checkout), network]
    try:
        ended = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no end after {limit:g} s"
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        return " ".join(lines[-1].split())[:120] if lines else f"exit code {ended.returncode}"
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def compare(network: str, other: str, checkout: Path, rounds: int, limit: float) -> tuple[list[str], Times]:
    """Let both prune a network in turns: the lines of the table, and the ratio of each part."""
    pairs = []
    for turn in range(rounds):
        sides = [("this", "secateur", ROOT), ("other", other, checkout)]
        found = {name: run(tool, path, network, limit) for name, tool, path in sides[:: 1 - 2 * (turn % 2)]}
        for name, result in found.items():
            if isinstance(result, str):
                return [f"| {network} | {name}: {result.replace('|', '/')} | | | | |"], {}
        pairs.append((found["this"], found["other"]))
    lines, ratios = [], {}
    for part in (*PARTS, "all but score", "all"):
        if part in pairs[0][1]:
            ratios[part] = statistics.median(theirs[part] / max(ours[part], 1e-3) for ours, theirs in pairs)
            ours, theirs = (statistics.median(pair[side][part] for pair in pairs) for side in (0, 1))
            gone = " | ".join(f"{100 * pairs[0][side]['removed']:.1f}" if part == "all" else "" for side in (0, 1))
            lines.append(f"| {network} | {part} | {ours:.3f} | {theirs:.3f} | {ratios[part]:.2f} | {gone} |")
    return lines, ratios


def main() -> None:
    """Print the table and the median ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of Secateur; default: Torch-Pruning")
    parser.add_argument("--only", nargs="+", metavar="NETWORK", help="default: all of torchvision's for classification")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds for a process")
    parser.add_argument("--work", nargs=3, metavar=("TOOL", "CHECKOUT", "NETWORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        import secateur

        tool, checkout, network = options.work
        if not Path(secateur.__file__ or "").is_relative_to(checkout):
            sys.exit(f"{secateur.__file__}: was imported, which is not the package of {checkout}.")
        print(json.dumps(work(tool, network)))
        return
    networks = options.only
    if networks is None:
        from torchvision import models

        networks = models.list_models(module=models)
    other, checkout = ("secateur", options.against.resolve()) if options.against else ("torch-pruning", ROOT)
    if not (checkout / "secateur" / "__init__.py").is_file():
        parser.error(f"--against {options.against}: there is no folder secateur in it.")
    print("| network | part | this, s | other, s | other / this | removed %, this | other |", flush=True)
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    every: dict[str, list[float]] = {}
    for network in networks:
        lines, ratios = compare(network, other, checkout, options.rounds, options.limit)
        print(*lines, sep="\n", flush=True)
        for part, ratio in ratios.items():
            every.setdefault(part, []).append(ratio)
    told = ", ".join(f"{part} {statistics.median(ratios):.2f}" for part, ratios in every.items())
    print(f"\nMedian of other / this over {len(every.get('all', []))} of {len(networks)} networks: {told or 'none'}.")


if __name__ == "__main__":
    main()
