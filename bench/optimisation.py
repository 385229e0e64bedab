"""What CFP's optimisation is worth on ResNet-20, against other uses of the same number of training images.

    python -m bench.optimisation

Each arm is one run of ``cfp`` that removes 40% of the MACs of a trained ResNet-20 in two episodes, inner filters alone,
pairs by the least residual. An episode sees 15,000 training images: an epoch of 5,000 before its filters go and two
epochs behind that, or, where they go at once, three epochs behind that. Arms differ in what is done in the first epoch,
and in what the kept filters take over from the dropped ones. Accuracy is that of the last epoch on all 10,000 test
images. The sweep of λ trains the pairs of one episode until min |ρ| reaches 0.99, and counts the epochs. Finished runs
are kept in ``bench/results/optimisation.jsonl``, an interrupted run goes on where it was; from there they get into
``docs/results.md``, as ``python -m bench.pages`` writes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from bench import criteria
from bench.rows import Row, Store
from bench.sections import Section
from secateur.data import Batches, load
from secateur.engine import compress, resume
from secateur.pruning.target import Target

SEEDS = (0, 1, 2)
TRAIN, MOST = 5_000, 20
"""Images of an epoch; most epochs of the sweep."""
EVERYWHERE: dict[str, Any] = {"compensate": ("least_squares",), "compensate_options": {"everywhere": True}}
AT_ONCE: dict[str, Any] = {"optimise_epochs": 0, "finetune_epochs": 3}
ARMS: dict[str, dict[str, Any]] = {
    "plain training, then merged": {"optimise": "none", "merge": True},
    "the paper's, λ = 1, then merged": {"merge": True},
    "the same, a tenth of the learning rate": {"merge": True, "optimise_lr": 0.001},
    "merged at once": {"optimise": "none", "merge": True, **AT_ONCE},
    "least squares at once": {"optimise": "none", **EVERYWHERE, **AT_ONCE},
}
PLAIN = "plain training, then merged"
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
STORE = Store("optimisation.jsonl", ("arm", "strength", "seed"))


def settings(**own: Any) -> dict[str, Any]:
    """Return the settings of a run; arms differ in ``own`` alone."""
    return {
        "internal_only": True, "order": "residual", "signed": True, "fraction": 0.25, "max_rounds": 2,
        "optimise_epochs": 1, "correlation_target": None, "finetune_epochs": 2, "final_epochs": 0, "lr": 0.01,
        "schedule": "cosine", "weight_decay": 1e-4, "device": "cpu", "precision": "fp32", "channels_last": True, **own,
    }  # fmt: skip


def run(folder: Path, seed: int, own: dict[str, Any]) -> dict[str, Any]:
    """Run one arm with one seed, or read or finish an earlier run."""
    if not (folder / "result.json").is_file():
        data = load(f"cifar10:{criteria.SHARED / 'data' / 'cifar10'}", train_size=TRAIN, validation=0.02)
        given: dict[str, Any] = {
            "train": Batches(data.train, 128, shuffle=True, augment=True, drop_last=True),
            "validation": Batches(data.validation, 500),
            "test": Batches(data.test, 500),
        }
        if (folder / "checkpoint" / "state.safetensors").is_file():
            resume(folder, criteria.trained("resnet20"), **given)
        else:
            compress(
                criteria.trained("resnet20"), "cfp", target=Target(macs=0.4), run_dir=folder, seed=seed,
                describe={"model": "resnet20", "data": "cifar10"}, **given, **settings(**own),
            )  # fmt: skip
    report: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return report


def measured(folder: Path, seed: int, own: dict[str, Any]) -> Row:
    """Return what a run came to: points of accuracy, the least |ρ| of a pair, and the epochs of optimisation."""
    report = run(folder, seed, own)
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    epochs = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "accuracy": round(100 * report["final"]["test"], 2),
        "dropped": round(100 * history[-1]["metric_dropped"], 2),
        "removed": round(1 - report["final"]["macs"] / report["baseline"]["macs"], 4),
        "images": sum(line["images"] for line in epochs),
        "optimised": sum(line["stage"] == "optimise" for line in epochs),
        "rho": [round(min(episode["abs_rho_after"].values(), default=0.0), 4) for episode in history],
    }


def of(rows: list[Row], arm: str) -> dict[int, float]:
    """Return seed -> accuracy of an arm."""
    return {row["seed"]: row["accuracy"] for row in rows if row.get("arm") == arm}


def spread(values: list[float], signed: bool = False) -> str:
    """Write mean ± standard deviation, or a single value."""
    text = f"{statistics.mean(values):{'+' if signed else ''}.2f}"
    return text + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def render() -> str:
    """Return the tables as Markdown."""
    rows = STORE.read()
    plain = of(rows, PLAIN)
    text = [
        "## CFP's optimisation against other uses of its images: resnet20, CIFAR-10",
        "",
        (
            "40% of the MACs removed in two episodes, inner filters, pairs by the least residual (signed); "
            f"{3 * TRAIN:,} training images an episode in every arm, {TRAIN:,} an epoch: one before the filters go and "
            "two behind that, or all three behind it where they go at once. SGD, momentum 0.9, weight decay 1e-4, "
            "batches of 128, a cosine from 0.01 to 0 over each stage. Test accuracy of the last epoch in per cent "
            "(unpruned 91.73), 10,000 images, mean ± standard deviation over the seeds, of the seeds' differences "
            "beside it. *Behind the drop* is validation accuracy (1,000 images that the weights were trained on). "
            "Written by `python -m bench.optimisation`."
        ),
        "",
        "| the first epoch, and what takes over | seeds | behind the drop | accuracy | against plain training |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        found = of(rows, arm)
        if not found:
            continue
        both = [found[seed] - plain[seed] for seed in found if seed in plain]
        dropped = [row["dropped"] for row in rows if row.get("arm") == arm]
        against = spread(both, signed=True) if both and arm != PLAIN else ""
        text.append(f"| {arm} | {len(found)} | {spread(dropped)} | {spread(list(found.values()))} | {against} |")
    sweep = [row for row in rows if "strength" in row]
    if sweep:
        text += [
            "",
            (
                f"λ, one episode of a quarter of the inner filters, at most {MOST} epochs of {TRAIN:,} images until "
                "the least |ρ| of a pair is 0.99; then merged, and two epochs:"
            ),
            "",
            "| λ | epochs of optimisation | least \\|ρ\\| then | behind the drop | accuracy |",
            "|---|---|---|---|---|",
        ]
        for row in sweep:
            cells = (
                row["strength"],
                row["optimised"],
                row["rho"][-1],
                f"{row['dropped']:.2f}",
                f"{row['accuracy']:.2f}",
            )
            text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text)


SECTION = Section("results.md", "optimisation", render)


def main() -> None:
    """Measure what is missing, seed by seed, then the sweep, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=criteria.ROOT / "runs" / "optimisation", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = {STORE.name(row) for row in STORE.read()}
    sweep: dict[str, Any] = {"merge": True, "max_rounds": 1, "correlation_target": 0.99, "optimise_epochs": MOST}
    wanted: list[tuple[Row, dict[str, Any]]] = [
        ({"arm": arm, "seed": seed}, own) for seed in given.seeds for arm, own in ARMS.items()
    ] + [({"strength": strength, "seed": 0}, {**sweep, "strength": strength}) for strength in STRENGTHS]
    for named, own in wanted:
        if STORE.name(named) not in known:
            folder = given.work / "-".join(STORE.name(named)).strip("-").replace(" ", "_").replace(",", "")
            row = {**named, **measured(folder, named["seed"], own)}
            STORE.keep(row)
            print(row, flush=True)
    SECTION.write()


if __name__ == "__main__":
    main()
