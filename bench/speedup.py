"""Theoretical against measured speed-up at half the MACs, and what exporting the pruned networks comes to.

    python -m bench.speedup                  # writes its two sections of docs/results.md
    python -m bench.speedup --networks resnet56 --dry-run

Weights are freshly drawn: neither time nor parity depends on them. Original and pruned network are timed in turns, on
one batch, each speed-up the median over rounds with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import nn

import secateur as sc
from bench.sections import write_section
from secateur.deploy.export import ParityReport, export
from secateur.deploy.timing import BenchmarkResult, benchmark, choose_round_to, environment
from secateur.models import lenet5, resnet20, resnet56, vgg16

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results.md"

NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet5": ("LeNet-5", lenet5, (1, 28, 28)),
    "resnet20": ("ResNet-20", resnet20, (3, 32, 32)),
    "resnet56": ("ResNet-56", resnet56, (3, 32, 32)),
    "vgg16": ("VGG-16 (CIFAR)", vgg16, (3, 32, 32)),
    "resnet50": ("ResNet-50", torchvision.models.resnet50, (3, 224, 224)),
    "mobilenet_v3_large": ("MobileNetV3 large", torchvision.models.mobilenet_v3_large, (3, 224, 224)),
}
TIMED = ("resnet56", "vgg16", "resnet50")


@dataclass
class Outcome:
    """What was measured of one network."""

    title: str
    round_to: int
    memory_format: str
    macs: tuple[int, int]
    parameters: tuple[int, int]
    exact: bool
    timed: BenchmarkResult | None = None
    plain: BenchmarkResult | None = None
    exported: dict[str, tuple[ParityReport, ParityReport]] = field(default_factory=dict)


def measure(name: str, batch: int, threads: int, rounds: int, clock: str, with_export: bool) -> Outcome:
    """Prune a network to half its MACs, time it against the original, and export both."""
    title, build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = build().eval(), torch.randn(batch, *shape)
    graph = sc.trace(model, inputs[:1])
    scores = sc.score(model, graph, "l1")

    def plan(round_to: int) -> sc.PruningPlan:
        return sc.plan(graph, scores, sc.Target(macs=0.5), round_to=round_to, allocation="uniform")

    def prune(round_to: int) -> nn.Module:
        return sc.apply(model, plan(round_to))

    round_to, layout = 1, "contiguous"
    if name in TIMED:
        choice = choose_round_to(prune, inputs, threads=threads, rounds=5, clock=clock)
        round_to, layout = choice.round_to, choice.memory_format
    chosen = plan(round_to)
    small = sc.apply(model, chosen)
    outcome = Outcome(
        title,
        round_to,
        layout,
        (sc.macs(graph), sc.macs(graph, chosen)),
        (sc.parameters(graph), sc.parameters(graph, chosen)),
        sc.verify(model, small, chosen, inputs[:1]).exact,
    )
    if name in TIMED:
        options = {
            "example_inputs": inputs,
            "batch_sizes": (batch,),
            "threads": (threads,),
            "rounds": rounds,
            "clock": clock,
        }
        costs = (outcome.macs[1], outcome.macs[0])
        outcome.timed = benchmark(
            small,
            model,
            backends=("eager", "onnxruntime"),
            memory_formats=tuple(dict.fromkeys(("contiguous", layout))),
            macs=costs,
            **options,
        )
        plain = prune(1)
        outcome.plain = benchmark(plain, model, macs=costs, memory=False, **options)
    if with_export:
        with tempfile.TemporaryDirectory() as folder:
            for suffix in (".pt2", ".onnx"):
                files = [export(net, Path(folder) / f"net{suffix}", inputs[:2]) for net in (model, small)]
                outcome.exported[suffix] = (files[0], files[1])
    return outcome


def speed_section(outcomes: list[Outcome], batch: int, threads: int, rounds: int, clock: str, command: str) -> str:
    """Write the table of theoretical against measured speed-up."""
    how_measured = (
        f"Batch {batch}, fp32, {threads} CPU thread{'s' if threads > 1 else ''}, original and pruned timed in turns"
        f"{' by processor time, as other work ran beside it' if clock == 'cpu' else ''}. "
        f"Measured: median over {rounds} rounds of the ratio, quartiles in brackets. `round_to` and memory format are "
        "what `--round-to auto` chose by measuring. Removed are the channels smallest by L1 norm, the same fraction of "
        "each group."
    )
    lines = [
        "## Speed-up at half the MACs",
        "",
        how_measured,
        "",
        "| network | MACs | round_to | runs in | before, ms | after, ms | theoretical | measured | with round_to 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for o in (o for o in outcomes if o.timed is not None and o.plain is not None):
        plain = o.plain.speed_ups[0]
        for s in o.timed.speed_ups:
            times = {
                row.variant: 1000 * row.seconds
                for row in o.timed.rows
                if (row.backend, row.memory_format) == (s.backend, s.memory_format)
            }
            how = s.backend.replace("onnxruntime", "ONNX Runtime")
            if s.memory_format == "channels_last":
                how += ", channels-last"
            same = s.backend == "eager" and s.memory_format == "contiguous"
            lines.append(
                f"| {o.title} | {o.macs[0] / 1e6:.4g} M → {o.macs[1] / 1e6:.4g} M | {o.round_to} | {how} | "
                f"{times['against']:.4g} | {times['model']:.4g} | {s.theoretical:.2f}× | **{s.measured:.2f}×** "
                f"({s.low:.2f}–{s.high:.2f}) | {f'{plain.measured:.2f}×' if same else ''} |"
            )
    lines += ["", *_peaks(outcomes), _ground(command)]
    return "\n".join(lines)


def _peaks(outcomes: list[Outcome]) -> list[str]:
    lines = ["| network | peak memory of a pass, original | pruned |", "|---|---|---|"]
    for o in outcomes:
        peaks = {row.variant: row.peak_bytes for row in (o.timed.rows if o.timed else []) if row.peak_bytes}
        if len(peaks) == 2:
            lines.append(f"| {o.title} | {peaks['against'] / 1e6:.1f} MB | {peaks['model'] / 1e6:.1f} MB |")
    return [*lines, ""] if len(lines) > 2 else []


def export_section(outcomes: list[Outcome], command: str) -> str:
    """Write the table of exported files."""
    how_compared = (
        "Each file was loaded again and compared with the PyTorch network at batch sizes 1, 2 and 3; the difference is "
        "relative to the largest output. Sizes are of the original's and the pruned network's file."
    )
    lines = [
        "## Export at half the MACs",
        "",
        how_compared,
        "",
        "| network | exact | parameters left | .pt2 left | .onnx left | .pt2 difference | .onnx difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in (o for o in outcomes if o.exported):
        left = {s: small.file_bytes / full.file_bytes for s, (full, small) in o.exported.items()}
        lines.append(
            f"| {o.title} | {'yes' if o.exact else 'NO'} | {o.parameters[1] / o.parameters[0]:.1%} | "
            f"{left['.pt2']:.1%} | "
            f"{left['.onnx']:.1%} | {o.exported['.pt2'][1].relative_error:.1e} | "
            f"{o.exported['.onnx'][1].relative_error:.1e} |"
        )
    return "\n".join([*lines, "", _ground(command)])


def _ground(command: str) -> str:
    ground = environment()
    return (
        f"`{command}` on {ground['processor']}, {ground['cores']} cores ({ground['cpu_capability']}), torch "
        f"{ground['torch']}; load average at the end {ground.get('load', 'unknown')}."
    )


def main() -> None:
    """Measure, print, and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that others use")
    parser.add_argument("--no-export", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print the sections, write nothing")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    outcomes: list[Outcome] = []
    command = " ".join(["python -m bench.speedup", *sys.argv[1:]])
    for name in given.networks:
        outcomes.append(measure(name, given.batch, given.threads, given.rounds, given.clock, not given.no_export))
        timed = outcomes[-1].timed
        ratios = [[s.backend, s.memory_format, round(s.measured, 3)] for s in timed.speed_ups] if timed else []
        print(name, json.dumps(ratios), flush=True)
        # After every network, so that what took minutes is not lost to the next one.
        sections = {"export": export_section(outcomes, command)} if not given.no_export else {}
        if any(o.timed for o in outcomes):
            sections["speed-up"] = speed_section(
                outcomes, given.batch, given.threads, given.rounds, given.clock, command
            )
        for section, text in sections.items():
            if not given.dry_run:
                write_section(RESULTS, section, text)
    print("\n\n".join(sections.values()))


if __name__ == "__main__":
    main()
