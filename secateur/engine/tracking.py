"""A run's figures sent to trackers by name, through Accelerate: TensorBoard, Weights & Biases, MLflow and others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from secateur import checkpoint
from secateur.engine.events import Event, Progress
from secateur.errors import UsageError, install

IDS = "trackers.json"
"""File in a run's ``checkpoint/`` with the trackers' own names of the run, so that a resumed run goes on in them."""


class Trackers:
    """Hands events on, and sends what epochs, cuts, rounds and results say to trackers.

    A step of a tracker is an epoch of training, those of the baseline among them. Sent are ``train/loss``,
    ``train/learning_rate``, ``train/images_per_second``, ``train/min_abs_rho`` (of CFP's pairs under training),
    ``baseline/loss``, ``validation/metric`` (after a cut, a round, and at the end), ``test/metric``, ``macs``,
    ``parameters``, ``max_abs_rho/before`` and ``/after`` of a round, and ``round``, with ``accepted`` as 0 or 1.

    Args:
        names: Names that Accelerate knows.
        folder: The run's.
        hyperparameters: Of the run: JSON values, nested or not.
        progress: Gets every event.
        device: As in :func:`secateur.training.stages.accelerator`.
        baseline: Epochs of training before the first of the run.

    Raises:
        UsageError: If a tracker is unknown or not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        hyperparameters: Mapping[str, Any],
        progress: Progress,
        *,
        device: str = "auto",
        baseline: int = 0,
    ) -> None:
        self.names, self.folder, self.progress = list(names), folder, progress
        self.hyperparameters = _flat(hyperparameters)
        self.device, self.baseline, self.step = device, baseline, 0
        self._accelerator: Any = None
        require(names)

    def __enter__(self) -> Trackers:
        if not self.names:
            return self
        from accelerate import Accelerator

        accelerator = Accelerator(
            cpu=self.device == "cpu",
            mixed_precision="no",
            log_with=self.names,
            project_dir=str(self.folder / "trackers"),
        )
        file = self.folder / "checkpoint" / IDS
        ids = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        options: dict[str, dict[str, Any]] = {
            "mlflow": {"run_name": self.folder.name}, "wandb": {"name": self.folder.name},
        }  # fmt: skip
        if "mlflow" in ids:
            options["mlflow"] = {"run_id": ids["mlflow"]}
        if "wandb" in ids:
            options["wandb"] |= {"id": ids["wandb"], "resume": "allow"}
        if "wandb" in self.names and "WANDB_DIR" not in os.environ:
            options["wandb"]["dir"] = str(self.folder / "trackers")
            (self.folder / "trackers").mkdir(exist_ok=True)
        accelerator.init_trackers(
            "secateur" if set(self.names) - {"tensorboard"} else self.folder.name,
            # What a tracker holds of a run's beginning can't be written again.
            None if ids else self.hyperparameters,
            {name: own for name, own in options.items() if name in self.names},
        )
        self._accelerator = accelerator
        if accelerator.is_main_process and not ids:
            found = {"started": "yes"}
            for tracker in accelerator.trackers:
                if tracker.name == "mlflow":
                    found["mlflow"] = tracker.tracker.info.run_id
                elif tracker.name == "wandb":
                    found["wandb"] = tracker.tracker.id
            checkpoint.write_json(file, found)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None

    def __call__(self, event: Event) -> None:
        """Send what an event says."""
        if self._accelerator is not None and event.record is not None:
            if "number" in event.record:
                self.step = self.baseline + event.record["number"]
            elif event.stage == "baseline":
                self.step = event.epoch
            if values := figures(event, event.record):
                self._accelerator.log(values, step=self.step)
        self.progress(event)


def require(names: Sequence[str]) -> None:
    """Refuse trackers that can't be had, before anything is done.

    Raises:
        UsageError: If a tracker is unknown or not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UsageError(f"track: {name}: no such tracker; known are {', '.join(known)}.")
        if name not in available:
            more = f", or {install('trackers')}" if name in ("tensorboard", "mlflow") else ""
            raise UsageError(f"track: {name}: is not installed; pip install {name}{more}.")


def figures(event: Event, record: Mapping[str, Any]) -> dict[str, float]:
    """Return what an event says in numbers."""
    values: dict[str, Any] = {name: record.get(name) for name in ("macs", "parameters")}
    if event.kind == "epoch":
        prefix = "baseline" if event.stage == "baseline" else "train"
        values |= {f"{prefix}/{name}": record.get(name) for name in ("loss", "learning_rate", "min_abs_rho")}
        values[f"{prefix}/images_per_second"] = record["images"] / max(record["seconds"], 1e-3)
    elif event.kind == "cut":
        values["validation/metric"] = record["metric"]
    elif event.kind == "episode":
        values |= {
            "validation/metric": record["metric_tuned"],
            "round": event.round,
            "accepted": int(record["accepted"]),
            "max_abs_rho/before": max(record.get("abs_rho_before", {}).values(), default=None),
            "max_abs_rho/after": max(record.get("abs_rho_after", {}).values(), default=None),
        }
    elif event.kind in ("begin", "milestone"):
        values |= {"validation/metric": record["validation"], "test/metric": record["test"]}
    else:
        return {}
    return {name: float(value) for name, value in values.items() if value is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values as trackers take them: one mapping of names to numbers, flags and text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            flat[f"{prefix}{key}"] = value
        elif value is not None:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat
