"""A configured run from start to end: find data and model, train a baseline if need be, compress, save the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur import checkpoint
from secateur.engine import CompressResult, Engine, Event, RunDirectory, compress, resume
from secateur.engine.events import Steps
from secateur.engine.selection import selective
from secateur.errors import UsageError
from secateur.pruning.planning import Target
from secateur.runfile import config, sources
from secateur.runfile.config import RunConfig
from secateur.training import stages, tasks
from secateur.training.stages import TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from secateur.data import DataBundle


def start(run: RunConfig, steps: Steps) -> CompressResult:
    """Begin a run in a folder of its own.

    Args:
        run: What to do; its paths are made absolute before they are written down.
        steps: Where to show progress.

    Raises:
        UsageError: If the folder holds a run already, or the request can't be met.
        DataError: If the data is missing or does not fit.
        RunError: If training diverges or a target is out of reach.
    """
    run = grounded(run)
    assert run.run_dir is not None
    folder = Path(run.run_dir)
    if RunDirectory(folder).started:
        raise UsageError(f"{folder}: holds a run already; go on with 'secateur resume {folder}', or give --run-dir.")
    method = sources.method(run.method)
    selective(method, run.settings.criterion)  # refuses an unknown option before the data are loaded
    bundle, found = _found(run, steps)
    run = run.model_copy(update={"batch_size": run.batch_size or tasks.TRAINING_BATCH[bundle.task]})
    request: dict[str, Any] = {
        **_data(run, bundle),
        "example_inputs": found.inputs if run.input else None,
        "tolerance": run.tolerance,
        "target": None if run.target is None else Target(**run.target.model_dump()),
        "seed": run.seed,
    }
    config.save(run, folder / config.FILE)
    if run.weights is None:
        # Settings that this network can't meet are refused before its baseline is trained.
        Engine(found.model, method, settings=run.settings, **request)
        _train_baseline(found.model, run, request, steps)
    result = compress(
        found.model,
        method,
        run_dir=folder,
        progress=Show(steps),
        describe={"model": run.model, "data": run.data, "weights": run.weights},
        **request,
        **run.settings.plain(),
    )
    return _with_earlier_plans(result, found, folder)


def go_on(folder: Path, steps: Steps) -> CompressResult:
    """Take up a run where it was interrupted.

    Raises:
        UsageError: If the folder holds no run.
        RunError: If another process is running it.
        CheckpointError: If one of its files is damaged.
    """
    if not (folder / config.FILE).is_file():
        raise UsageError(
            f"{folder}: holds no run to resume: there is no {config.FILE}; 'secateur compress' begins one."
        )
    run = config.load(folder / config.FILE, {"run_dir": str(folder.absolute())})
    if not RunDirectory(folder).started:
        # The run was interrupted while its baseline was trained; that training begins anew from the same seed.
        return start(run, steps)
    bundle, found = _found(run, steps, fresh=run.weights == sources.PRETRAINED)
    result = resume(
        folder,
        found.model,
        **_data(run, bundle),
        example_inputs=found.inputs if run.input else None,
        method=sources.method(run.method),
        progress=Show(steps),
    )
    return _with_earlier_plans(result, found, folder)


class Show:
    """Shows the engine's events as two lines: the run, and the epoch under way."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.rounds = 0
        self.standing = ""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "episode" and event.record is not None:
            self.rounds += 1
            kept = "accepted" if event.record["accepted"] else "reverted"
            self.standing = f"{event.record['metric_tuned']:.2%} at {event.record['macs']:,} MACs, {kept}"
        where = f"round {event.round}, phase {event.phase}"
        if event.kind == "batch":
            self.steps("  epoch", event.batch, event.batches, f"{event.stage} {event.epoch}/{event.epochs}")
        self.steps("compressing", self.rounds, None, f"{where}; {self.standing}" if self.standing else where)


def grounded(run: RunConfig) -> RunConfig:
    """Make every path absolute and name the folder, so that the run can be resumed from anywhere."""
    name = "".join(c if c.isalnum() else "-" for c in Path(run.model.rpartition(":")[2] or run.model).stem)
    by = run.method.rpartition(":")[2]
    weights = run.weights
    if weights is not None and weights != sources.PRETRAINED:
        weights = str(Path(weights).expanduser().absolute())
    return run.model_copy(
        update={
            "model": sources.absolute(run.model),
            "data": sources.absolute(run.data),
            "method": sources.absolute(run.method),
            "weights": weights,
            "run_dir": str(Path(run.run_dir or f"runs/{name}-{by}").expanduser().absolute()),
        }
    )


def _with_earlier_plans(result: CompressResult, found: sources.SourceModel, folder: Path) -> CompressResult:
    """Where the run began with a pruned network, save all plans, so that the file loads into the unpruned network."""
    if found.plans:
        plans = (*found.plans, result.plan)
        checkpoint.save(result.model, plans, folder / "model.safetensors", extra=result.report["final"])
    return result


def _found(run: RunConfig, steps: Steps, *, fresh: bool = False) -> tuple[DataBundle, sources.SourceModel]:
    with steps.step("loading the data"):
        bundle = sources.data(run.data, run.data_options)
        chosen = run.settings
        smoothing = chosen.label_smoothing or run.baseline.label_smoothing
        method = sources.method(run.method)
        tasks.require_classes(bundle, method, distillation=chosen.distillation, label_smoothing=smoothing)
    with steps.step("building the model"):
        sources.seed(run.seed)
        weights = None if fresh else run.weights
        return bundle, sources.open_model(run.model, run.model_options, weights, run.input, bundle)


def _data(run: RunConfig, bundle: DataBundle) -> dict[str, Any]:
    """Return the engine's batches, loss and metric."""
    return {
        "train": tasks.training_batches(bundle, run.batch_size, run.seed, run.workers),
        "validation": tasks.evaluation_batches(bundle, "validation", run.workers),
        "test": tasks.evaluation_batches(bundle, "test", run.workers),
        "loss": tasks.loss(bundle),
        "metric": tasks.metric(bundle),
    }


def _train_baseline(model: nn.Module, run: RunConfig, data: Mapping[str, Any], steps: Steps) -> None:
    plan = run.baseline
    given: dict[str, Any] = {f.name: getattr(plan, f.name) for f in fields(TrainingSettings)}
    epoch = 0

    def on_batch(done: int, total: int | None, loss: float) -> None:
        each = total or done
        steps("training the baseline", epoch * each + done, plan.epochs * each, f"loss {loss:.3f}")

    def on_epoch(number: int, _: stages.EpochRecord) -> None:
        nonlocal epoch
        epoch = number + 1

    stages.fit(
        model,
        data["train"],
        epochs=plan.epochs,
        loss=data["loss"],
        settings=TrainingSettings(**given),
        seed=run.seed,
        on_epoch=on_epoch,
        on_batch=on_batch,
        runtime=stages.accelerator(run.settings.device, run.settings.precision),
    )
    model.eval()
