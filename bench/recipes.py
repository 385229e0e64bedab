"""Run reduced recipes end to end through the command line; writes a section of docs/results.md.

    python -m bench.recipes --work runs/recipes

It shows that each recipe runs, what it removes and how long that takes; accuracies of the reduced forms stand for
nothing and are not shown. Finished recipes are kept in a JSON Lines file next to this script.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.sections import write_section

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SECATEUR_SHARED", ROOT.parent / "shared"))
STORE = ROOT / "bench" / "recipes.jsonl"
RECIPES = [
    *(f"vgg16_cifar10_{row}" for row in ("cfp_80", "cfp_82", "noopt_80", "noopt_82")),
    *(f"resnet56_cifar10_cfp{row}" for row in ("", "_10_20_38", "_9_18_36", "_8_16_27")),
    "resnet50_imagenet_cfp",
    *(
        f"{network}_{method}"
        for network in ("vgg16_cifar10", "resnet56_cifar10", "resnet50_imagenet")
        for method in ("corrnet", "cshe")
    ),
]


def run(recipe: str, work: Path) -> dict[str, Any]:
    """Run a recipe as a user does and return what came of it; a failure ends the bench with its own words."""
    words = ["compress", "--config", f"recipes/cpu/{recipe}.yaml", "--data", f"cifar10:{SHARED / 'data' / 'cifar10'}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "secateur", *words, "--run-dir", str(work / recipe), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = json.loads(ended.stdout)
    return {
        "recipe": recipe,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "macs_before": shown["baseline"]["macs"],
        "macs_after": shown["final"]["macs"],
        "parameters_before": shown["baseline"]["parameters"],
        "parameters_after": shown["final"]["parameters"],
        "rounds": shown["rounds"],
        "exact": shown["verification"]["exact"],
    }


def read() -> dict[str, dict[str, Any]]:
    """Return the recipes that have run."""
    lines = STORE.read_text().splitlines() if STORE.exists() else []
    return {line["recipe"]: line for line in map(json.loads, lines)}


def render(found: dict[str, dict[str, Any]]) -> str:
    """Return the section as Markdown."""
    lines = [
        "## Reduced recipes, end to end",
        "",
        (
            "Each by `secateur compress --config recipes/cpu/RECIPE.yaml`: a baseline of 2 epochs on 1,000 images of "
            "CIFAR-10, rounds of pruning and fine-tuning to the recipe's target (`resnet56_cifar10_cfp`: two rounds), "
            "last training, verification. Wall-clock time is beside other work on 2 cores; processor time tells more. "
            "Written by `python -m bench.recipes`."
        ),
        "",
        "| recipe | rounds | MACs | removed | parameters removed | exact | processor time | wall-clock time |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for recipe in RECIPES:
        if recipe not in found:
            lines.append(f"| `{recipe}` | not run | | | | | | |")
            continue
        line = found[recipe]
        macs = 1 - line["macs_after"] / line["macs_before"]
        parameters = 1 - line["parameters_after"] / line["parameters_before"]
        lines.append(
            f"| `{recipe}` | {line['rounds']} | {line['macs_before'] / 1e6:.1f} M → {line['macs_after'] / 1e6:.1f} M "
            f"| {macs:.1%} | {parameters:.1%} | {'yes' if line['exact'] else 'no'} | {line['cpu_seconds']:.0f} s "
            f"| {line['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "recipes", help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--only", nargs="+", default=RECIPES, choices=RECIPES, metavar="RECIPE", help="run these only")
    parser.add_argument("--render-only", action="store_true", help="write the section from the recipes run so far")
    arguments = parser.parse_args()
    for recipe in () if arguments.render_only else arguments.only:
        if recipe not in read():
            line = run(recipe, arguments.work)
            with STORE.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    write_section(arguments.results, "recipes", render(read()))


if __name__ == "__main__":
    main()
