"""A configured run from start to end: find data and model, train a baseline if need be, compress, save the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur import checkpoint
from secateur.data import DATASETS
from secateur.engine import CompressResult, Engine, Event, RunDirectory, compress, resume
from secateur.engine.events import Steps
from secateur.engine.request import require_method
from secateur.errors import UsageError
from secateur.models import MODELS
from secateur.models.detectors import DETECTORS
from secateur.pruning.options import AUTO
from secateur.pruning.planning import Target
from secateur.runfile import config, sources
from secateur.runfile.config import RunConfig
from secateur.training import baseline, stages, tasks
from secateur.training.stages import TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from secateur.data import DataBundle
    from secateur.training.arithmetic import Arithmetic


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
    target = None if run.target is None else Target(**run.target.model_dump())
    require_method(method, run.options, run.settings, target)
    bundle, found = _found(run, steps)
    run = run.model_copy(update={"batch_size": run.batch_size or tasks.TRAINING_BATCH[bundle.task]})
    request: dict[str, Any] = {
        **_data(run, bundle),
        "example_inputs": found.inputs if run.input else None,
        "tolerance": run.tolerance,
        "target": target,
        "seed": run.seed,
    }
    model = found.model
    described: dict[str, Any] = {"model": run.model, "data": run.data, "weights": run.weights}
    if run.weights is None:
        # Settings that this network can't meet are refused before its baseline is trained.
        engine = Engine(model, method, options=run.options, settings=run.settings, **request)
        # What was decided for this machine is written down first: the baseline, too, goes on as it began.
        run = run.model_copy(update={"settings": engine.settings})
        training = _BaselineTraining(run, folder, model, engine.arithmetic)
        config.save(run, folder / config.FILE)
        model = training.trained(model, request, steps)
        described |= {"baseline": training.record}
        if engine.arithmetic.reason:
            described["arithmetic"] = engine.arithmetic.reason
    else:
        config.save(run, folder / config.FILE)
    result = compress(
        model,
        method,
        run_dir=folder,
        progress=Show(steps),
        describe=described,
        **request,
        **run.settings.plain(),
        **run.options.plain(),
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
        # The run was interrupted while its baseline was trained; that training goes on from its last whole epoch.
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
            "baselines": run.baselines and str(Path(run.baselines).expanduser().absolute()),
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
        method = "l2" if run.method == AUTO else sources.method(run.method)
        tasks.require_classes(bundle, method, distillation=chosen.distillation or 0.0, label_smoothing=smoothing)
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


class _BaselineTraining:
    """The training of the network that a run begins with, in the run's folder, or what another run made of the same.

    Shared are networks and data that are known by name. What the user's own code does can't be told from its name, so
    such a baseline stays in the run's folder.

    Raises:
        UsageError: If another training is under way in the folder.
        CheckpointError: If its file is damaged.
    """

    def __init__(self, run: RunConfig, folder: Path, model: nn.Module, arithmetic: Arithmetic) -> None:
        self.run, self.folder, self.arithmetic = run, folder, arithmetic
        self.request = {
            **run.model_dump(
                mode="json",
                include={"model", "model_options", "data", "data_options", "baseline", "batch_size", "seed"},
            ),
            "precision": arithmetic.precision,
            "channels_last": arithmetic.channels_last,
            "begins": baseline.fingerprint(model),
        }
        self.under_way = folder / "checkpoint" / "baseline.safetensors"
        by_name = (*MODELS, *DETECTORS, "torchvision", "timm")
        known = run.model.partition(":")[0] in by_name and run.data.partition(":")[0] in DATASETS
        shared = Path(run.baselines or folder.parent / "baselines") if known else folder / "checkpoint"
        self.file = shared / baseline.file_name(self.request)
        self.record: dict[str, Any] = {"file": str(self.file), "trained_here": not self.file.is_file()}
        baseline.read(self.under_way, self.request)

    def trained(self, model: nn.Module, data: Mapping[str, Any], steps: Steps) -> nn.Module:
        """Return the trained network."""
        runtime = stages.accelerator(self.run.settings.device)
        # Every process looks before one of them writes.
        found = baseline.kept(model, self.file, self.request)
        runtime.wait_for_everyone()
        write = runtime.is_main_process
        if found is not None:
            if write:  # this run may have been killed right after it kept the network
                self.under_way.unlink(missing_ok=True)
            return found.eval()
        plan, epoch = self.run.baseline, 0

        def on_batch(done: int, total: int | None, loss: float) -> None:
            each = total or done
            steps("training the baseline", epoch * each + done, plan.epochs * each, f"loss {loss:.3f}")

        def on_epoch(done: int) -> None:
            nonlocal epoch
            epoch = done

        with RunDirectory(self.folder, write=write):
            records = baseline.train(
                model, data["train"], self.under_way, self.request,
                epochs=plan.epochs, seed=self.run.seed, write=write, on_epoch=on_epoch, on_batch=on_batch,
                settings=TrainingSettings(**{f.name: getattr(plan, f.name) for f in fields(TrainingSettings)}),
                loss=data["loss"], runtime=runtime, arithmetic=self.arithmetic,
            )  # fmt: skip
            if write:
                baseline.keep(model, self.file, self.request, records)
                self.under_way.unlink(missing_ok=True)
        return model.eval()
