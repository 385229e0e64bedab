"""Sections of docs/results.md about runs of recipes: the curve of one or more runs side by side, or a line a run.

    python -m bench.runs curve cfp-resnet20 --title "ResNet-20 ..." runs/cpu-resnet20_cifar10_cfp runs/cpu-...
    python -m bench.runs table cpu-recipes --title "..." runs/cpu-resnet56_* runs/cpu-vgg16_*

Every figure is read from the files of the run directories; text that ``--note`` names is put below them. A run's folder
is named as its recipe does, with options after ``--`` that differ: ``cpu-resnet20_cifar10_cfp--order=correlation``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.sections import write_section
from secateur.deploy.timing import environment

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results.md"


class Run:
    """A finished run, as its folder tells of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        self.history: list[dict[str, Any]] = [
            json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()
        ]

    @property
    def removed(self) -> float:
        """Fraction of the MACs removed."""
        return 1 - self.result["final"]["macs"] / self.result["baseline"]["macs"]

    @property
    def recipe(self) -> str:
        """The recipe's file."""
        name = self.name.partition("--")[0]
        return f"recipes/cpu/{name.removeprefix('cpu-')}.yaml" if name.startswith("cpu-") else f"recipes/{name}.yaml"

    @property
    def options(self) -> str:
        """What was typed beside the recipe, with a space before each option."""
        seed = f" --seed {self.config['seed']}" if self.config["seed"] else ""
        return seed + "".join(f" --set {option}" for option in self.name.split("--")[1:])

    @property
    def command(self) -> str:
        """What was typed."""
        return f"secateur compress --config {self.recipe}{self.options}"

    @property
    def label(self) -> str:
        """The recipe and what was typed beside it."""
        return f"`{Path(self.recipe).stem}{self.options}`"


def curve(runs: list[Run]) -> list[str]:
    """Return accuracy before and after, then each run's episodes."""
    lines = [
        (
            "| run | seed | MACs removed | parameters removed | test accuracy before | after | validation before "
            "| after | training images seen | seconds |"
        ),
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        before, after = run.result["baseline"], run.result["final"]
        gone = 1 - after["parameters"] / before["parameters"]
        lines.append(
            f"| {run.label} | {run.config['seed']} | {run.removed:.2%} | {gone:.2%} | {before['test']:.2%} "
            f"| **{after['test']:.2%}** | {before['validation']:.2%} | {after['validation']:.2%} "
            f"| {run.result['images']:,} | {run.result['seconds']:.0f} |"
        )
    for run in runs:
        total = run.result["baseline"]["macs"]
        lines += [
            "",
            f"{run.label}, episode by episode; accuracy on the validation images:",
            "",
            (
                "| episode | MACs removed | filters removed | before | after the drop | after fine-tuning "
                "| mean \\|ρ\\| of the pairs, before optimisation → after | largest |"
            ),
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for record in run.history:
            lines.append(
                f"| {record['round']} | {1 - record['macs'] / total:.2%} | {sum(map(len, record['removed'].values()))} "
                f"| {record['metric_before']:.2%} | {record['metric_dropped']:.2%} | {record['metric_tuned']:.2%} "
                f"| {_rho(record, mean=True)} | {_rho(record, mean=False)} |"
            )
        end = run.result["final"]
        lines.append(f"| end | {run.removed:.2%} | | | | {end['validation']:.2%} | | |")
    return lines


def _rho(record: dict[str, Any], *, mean: bool) -> str:
    pairs = record["pairs"]
    if not pairs:
        return "no pairs"
    cells = []
    for key in ("abs_rho_before", "abs_rho_after"):
        values = [pair[key] for pair in pairs if key in pair]
        cells.append(f"{sum(values) / len(values) if mean else max(values):.3f}" if values else "not optimised")
    return " → ".join(cells)


def table(runs: list[Run]) -> list[str]:
    """Return one line a run."""
    lines = [
        "| run | MACs removed | parameters removed | test accuracy before | after | episodes | exact | seconds |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for run in runs:
        before, after = run.result["baseline"], run.result["final"]
        lines.append(
            f"| {run.label} | {run.removed:.2%} | {1 - after['parameters'] / before['parameters']:.2%} "
            f"| {before['test']:.2%} | {after['test']:.2%} | {run.result['rounds']} "
            f"| {'yes' if run.result['verification']['exact'] else 'no'} | {run.result['seconds']:.0f} |"
        )
    return lines


def place(runs: list[Run]) -> str:
    """Return where the runs were made."""
    here = environment()
    threads = sorted({run.config["machine"]["threads"] for run in runs})
    versions = sorted({run.config["versions"].get("torch", torch.__version__) for run in runs})
    return (
        f"{here['processor']}, {here['cores']} cores, {', '.join(map(str, threads))} thread(s), "
        f"torch {', '.join(versions)}; other work ran beside it, which the seconds hold."
    )


def main() -> None:
    """Write one section."""
    parser = argparse.ArgumentParser(description="a section of docs/results.md about runs of recipes")
    parser.add_argument("kind", choices=("curve", "table"))
    parser.add_argument("section", help="name of the section")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", type=Path, help="file with text for the end of the section")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    runs = [Run(folder) for folder in chosen.runs]
    lines = curve(runs) if chosen.kind == "curve" else table(runs)
    commands = "".join(f"    {run.command}\n" for run in runs) if chosen.kind == "curve" else ""
    note = chosen.note.read_text().strip() if chosen.note else ""
    text = "\n".join([f"## {chosen.title}", "", *lines, "", commands, f"On {place(runs)}", "", note])
    write_section(chosen.out, chosen.section, text.replace("\n\n\n", "\n\n"))


if __name__ == "__main__":
    main()
