"""The embedded example: a LeNet-5 on real handwritten digits, compressed, verified, saved and loaded again."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur import checkpoint
from secateur.engine import RunDirectory
from secateur.errors import VerificationError
from secateur.runfile import config, configured_run, sources
from secateur.training import evaluation, tasks

if TYPE_CHECKING:
    from secateur.cli.console import Steps

SETTINGS = {
    "model": "lenet5",
    "data": "digits",
    "target": {"macs": 0.9},
    "batch_size": 64,
    # Twice the epochs reach no higher accuracy.
    "baseline": {"epochs": 20, "lr": 0.01, "nesterov": True},
    "settings": {"finetune_epochs": 1, "device": "cpu"},
}
"""The run, as a configuration file would say it: three rounds, as so much goes, and 8 epochs after the last."""


def demonstrate(run_dir: Path | None, seed: int, steps: Steps) -> dict[str, Any]:
    """Train LeNet-5 on scikit-learn's 1,797 digits, remove at least 90% of its MACs, and check the result.

    Args:
        run_dir: Folder of the run; the first free of ``runs/demo``, ``runs/demo-2`` … when None.
        seed: Seed of everything that is drawn.
        steps: Where to show progress.

    Returns:
        The run's report, with ``run_dir`` and, under ``reloaded``, the accuracy of the saved network on the test set.

    Raises:
        VerificationError: If the pruned network is not exact, or the saved one differs from the one in memory.
        UsageError: If the folder holds a run already, or can't be written to.
    """
    started, threads = time.perf_counter(), torch.get_num_threads()
    # So small a network runs no faster on several threads, and on one it ends in the same bits everywhere.
    torch.set_num_threads(1)
    try:
        values = _run(run_dir, seed, steps)
    finally:
        torch.set_num_threads(threads)
    return {**values, "seconds": time.perf_counter() - started}


def _run(run_dir: Path | None, seed: int, steps: Steps) -> dict[str, Any]:
    folder = run_dir if run_dir is not None else _free(Path("runs"))
    configured = config.build({**SETTINGS, "seed": seed, "run_dir": str(folder)})
    result = configured_run.start(configured, steps)
    if not result.report["verification"]["exact"]:
        raise VerificationError(
            f"demo: the pruned network is not exact: {result.report['verification']}. Please report it."
        )
    with steps.step("loading the saved network"):
        bundle = sources.data(configured.data, configured.data_options)
        fresh = sources.open_model(configured.model, bundle=bundle).model
        small = checkpoint.load(fresh, folder / "model.safetensors")
        reloaded = evaluation.evaluate(small, tasks.evaluation_batches(bundle, "test"))
    if reloaded != result.report["final"]["test"]:
        raise VerificationError(
            f"demo: the saved network's accuracy is {reloaded}, not {result.report['final']['test']}. Please report it."
        )
    return {
        **result.report,
        "history": result.history,
        "run_dir": str(folder),
        "reloaded": reloaded,
        "examples": {part: len(getattr(bundle, part)) for part in ("train", "validation", "test")},
    }


def _free(parent: Path) -> Path:
    names = (parent / ("demo" if number == 1 else f"demo-{number}") for number in count(1))
    return next(path for path in names if not RunDirectory(path).started)
