"""Run reduced recipes end to end through the command line.

    python -m bench.recipes --work runs/recipes

It shows that each recipe runs, what it removes and how long that takes; accuracies of the reduced forms stand for
nothing and are not shown. Finished recipes are kept in ``bench/results/recipes.jsonl``; from there they get into
``docs/results.md``, as ``python -m bench.pages`` writes it.
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

from bench.rows import Row, Store
from bench.sections import Section

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SECATEUR_SHARED", ROOT.parent / "shared"))
STORE = Store("recipes.jsonl", ("recipe",))
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


def run(recipe: str, work: Path) -> Row:
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
        "seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "macs_before": shown["baseline"]["macs"],
        "macs_after": shown["final"]["macs"],
        "parameters_before": shown["baseline"]["parameters"],
        "parameters_after": shown["final"]["parameters"],
        "rounds": shown["rounds"],
        "exact": shown["verification"]["exact"],
    }


def render() -> str:
    """Return the section as Markdown."""
    found = {row["recipe"]: row for row in STORE.read()}
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
            f"| {macs:.1%} | {parameters:.1%} | {'yes' if line['exact'] else 'no'} | {line['cpu_seconds']} s "
            f"| {line['seconds']} s |"
        )
    return "\n".join(lines)


SECTION = Section("results.md", "recipes", render)


def main() -> None:
    """Run what is missing and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "recipes", help="folder of the runs")
    parser.add_argument("--only", nargs="+", default=RECIPES, choices=RECIPES, metavar="RECIPE", help="run these only")
    arguments = parser.parse_args()
    done = {row["recipe"] for row in STORE.read()}
    for recipe in (recipe for recipe in arguments.only if recipe not in done):
        row = run(recipe, arguments.work)
        STORE.keep(row)
        print(row, flush=True)
    SECTION.write()


if __name__ == "__main__":
    main()
