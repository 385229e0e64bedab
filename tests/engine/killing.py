"""Runs killed again and again, in one process: ``python -m tests.engine.killing CASE FOLDER SEED KILLS TOTAL``.

The first run, in ``FOLDER/whole``, is not killed. Then, from SEED on, each seed's run is killed up to KILLS times,
until there were TOTAL kills. Each attempt is a forked child that gets SIGKILL at a place drawn at random: at a batch of
optimisation or fine-tuning, at the n-th writing of a file (before or after the file takes its name), or after a time.
The next goes on from what is left. Prints how many children died.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from secateur.engine import Event, RunDirectory, compress, resume
from secateur.pruning.planning import Target
from tests.conftest import collect_no_garbage
from tests.engine.nets import Small, digits, trained

PAIRS: dict[str, Any] = {
    "method": "cfp", "pairs": 3, "optimise_epochs": 2, "correlation_target": None, "finetune_epochs": 2,
    "final_epochs": 1,
}  # fmt: skip


def _classifier() -> tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any], dict[str, Any]]:
    train, validation, test = digits(200)
    return (
        trained,
        Small,
        {"train": train, "validation": validation, "test": test},
        {"tolerance": 6.0, "lr": 0.02, **PAIRS},
    )


def _auto() -> tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any], dict[str, Any]]:
    # A large step, so that the table is measured anew in between, and some rounds are reverted.
    more = {"tolerance": 6.0, "lr": 0.02, "fraction": 0.25, "finetune_epochs": 2, "final_epochs": 1}
    return *_classifier()[:3], more


def _detector() -> tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, Any], dict[str, Any]]:
    from secateur.training.detection import DetectionLoss, MeanAveragePrecision
    from tests import detectors

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return detectors.faster_rcnn()

    # Faster R-CNN draws which of its proposals it is trained on.
    data = {**detectors.batches(), "loss": DetectionLoss(), "metric": MeanAveragePrecision()}
    return seeded, detectors.faster_rcnn, data, {"target": Target(macs=0.4), "lr": 1e-3, **PAIRS}


CASES = {"classifier": _classifier, "auto": _auto, "detector": _detector}


def attempt(case: str, folder: Path, progress: Any = None) -> None:
    """Start the run, or go on with it."""
    first, fresh, data, more = CASES[case]()
    if RunDirectory(folder).started:
        resume(folder, fresh(), progress=progress, **data)
    else:
        compress(first(), run_dir=folder, seed=7, progress=progress, **data, **more)


def die() -> NoReturn:
    """Leave at once, with nothing put in order."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def doomed(case: str, folder: Path, draw: random.Random) -> None:
    """Run until a place drawn at random, and die there."""
    kind = draw.choice(["batch", "batch", "write", "written", "time"])
    number = draw.randrange(1, 30) if kind == "batch" else draw.randrange(1, 8)
    stage = draw.choice(["optimise" if case != "auto" else "sensitivity", "finetune"])
    count = [0]

    def on_event(event: Event) -> None:
        if event.kind == "batch" and event.stage == stage:
            count[0] += 1
            if count[0] == number:
                die()

    replace = os.replace

    def dying_replace(*names: Any, **options: Any) -> None:
        count[0] += 1
        if count[0] == number and kind == "write":
            die()
        replace(*names, **options)
        if count[0] == number:
            die()

    if kind in ("write", "written"):
        os.replace = dying_replace
    elif kind == "time":
        threading.Timer(draw.uniform(0.0, 0.6), die).start()
    attempt(case, folder, on_event if kind == "batch" else None)


def killed(case: str, folder: Path, seed: int, kills: int) -> int:
    """Kill up to ``kills`` attempts, then let the run finish; return how many died."""
    draw, died, attempts = random.Random(seed), 0, 0
    while died < kills and not (folder / "result.json").exists():
        attempts += 1
        child = os.fork()
        if child == 0:
            try:
                doomed(case, folder, random.Random(draw.randrange(2**31) if attempts == 1 else seed * 1000 + attempts))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        died += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    attempt(case, folder)
    return died


def main(case: str, folder: Path, seed: int, kills: int, total: int) -> None:
    """Let a run finish, and kill others until there were enough kills."""
    torch.set_num_threads(1)
    collect_no_garbage()
    attempt(case, folder / "whole")
    died = 0
    for each in range(seed, seed + 28):
        if died < total:
            died += killed(case, folder / str(each), each, kills)
    sys.stdout.write(f"{died}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
