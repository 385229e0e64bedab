"""A configured run from start to end: find data and model, train a baseline if need be, compress, save the files."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint.locks import PAUSE, lock
from secateur.compensation.sensitivity import Share
from secateur.data import DATASETS
from secateur.engine import CompressResult, Engine, Event, RunDirectory, compress, log, resume
from secateur.engine.events import Progress, Steps
from secateur.engine.request import require_method
from secateur.engine.rundir import resume_call
from secateur.engine.tracking import Trackers, require
from secateur.errors import UsageError
from secateur.models import MODELS
from secateur.models.detectors import DETECTORS
from secateur.pruning.options import AUTO
from secateur.pruning.planning import Target
from secateur.runfile import config, sources, suspicions, trust
from secateur.runfile.config import RunConfig
from secateur.training import baseline, processes, stages, tasks
from secateur.training.fingerprint import fingerprint
from secateur.training.launched import process
from secateur.training.stages import TrainingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from secateur.data import DataBundle
    from secateur.training.arithmetic import Arithmetic


_LOG = logging.getLogger(__name__)


def start(
    run: RunConfig,
    steps: Steps,
    *,
    go_on_with: bool = False,
    also: Progress | None = None,
    share: Share | None = None,
) -> CompressResult:
    """Begin a run in a folder of its own.

    Args:
        run: What to do; its paths are made absolute before they are written down.
        steps: Where to show progress.
        go_on_with: Whether a run that began in the folder by the same request is gone on with.
        also: Gets every event, too.
        share: Where tables of sensitivity are found that other runs have measured.

    Raises:
        UsageError: If the folder holds a run already, or the request can't be met.
        DataError: If the data is missing or does not fit.
        RunError: If training diverges or a target is out of reach, or another process is running in the folder.
    """
    run = grounded(run)
    assert run.run_dir is not None
    folder = RunDirectory(run.run_dir, write=process() == 0)
    folder.resume_command = trust.resume_command(folder.path, run)
    if go_on_with and (folder.path / config.FILE).is_file():
        begun = config.load(folder.path / config.FILE, {"run_dir": run.run_dir})
        require_alike(
            begun,
            run,
            f"{folder.path}: the run there began",
            "is asked for: ask for the same, or resume it",
            loose=True,
        )
        return go_on(folder.path, steps, also=also, share=share)
    folder.require_free()
    require(run.track)
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
    model, training = found.model, None
    described: dict[str, Any] = {"model": run.model, "data": run.data, "weights": run.weights}
    if run.weights is None:
        # Settings that this network can't meet are refused before its baseline is trained.
        engine = Engine(model, method, options=run.options, settings=run.settings, **request)
        # What was decided for this machine is written down first: the baseline, too, goes on as it began.
        decided = {name: getattr(engine.settings, name) for name in ("precision", "channels_last")}
        run = run.model_copy(update={"settings": replace(run.settings, **decided)})
        training = _BaselineTraining(run, folder.path, model, fingerprint(request["train"]), engine.arithmetic)
        if engine.arithmetic.reason:
            described["arithmetic"] = engine.arithmetic.reason
    folder.earlier, folder.share = found.plans, share
    with folder, _tracked(run, folder, steps, also) as told:
        folder.require_free()
        # The main process must not write before every other one has seen that no run is here.
        stages.accelerator(run.settings.device).wait_for_everyone()
        if folder.write:
            config.save(run, folder.path / config.FILE)
        if training is not None:
            model = training.trained(model, request, steps, told)
            described |= {"baseline": training.record}
        return compress(
            model,
            method,
            run_dir=folder,
            progress=told,
            describe={**described, "run": config.plain(run)},
            **request,
            **run.settings.plain(),
            **run.options.plain(),
        )


def go_on(
    path: Path,
    steps: Steps,
    changes: Mapping[str, Any] | None = None,
    *,
    also: Progress | None = None,
    share: Share | None = None,
) -> CompressResult:
    """Take up a run where it was interrupted.

    Args:
        path: The run's folder.
        steps: Where to show progress.
        changes: Keys of the configuration with other values, which are written down.
        also: Gets every event, too.
        share: As in :func:`start`.

    Raises:
        UsageError: If the folder holds no run, or its configuration or data are not those that the run began with.
        RunError: If another process is running it.
        CheckpointError: If one of its files is damaged.
    """
    file = path / config.FILE
    if not file.is_file():
        if (path / "config.json").is_file():
            raise UsageError(
                f"{path}: holds a run begun from Python, of which no file says model and data; go on with it there: "
                f"{resume_call(path)}."
            )
        raise UsageError(f"{path}: holds no run to resume: there is no {config.FILE}; 'secateur compress' begins one.")
    folder = RunDirectory(path, write=process() == 0)
    if folder.finished:
        raise FinishedRunError(
            f"{path}: the run has finished, and is left as it is.", *folder.written(), list(changes or {})
        )
    run = config.changed(config.load(file, {"run_dir": str(path.absolute())}), changes or {})
    if not folder.started:
        # The run was interrupted while its baseline was trained; that training goes on from its last whole epoch.
        return start(run, steps, also=also, share=share)
    if (begun := folder.configuration().get("run")) is not None:
        require_alike(
            config.changed(config.build(begun), changes or {}), run, f"{file}: the run began", "stands here now: put "
            "it back, or give it to 'secateur resume' (--set), which records it"
        )  # fmt: skip
    bundle, found = _found(run, steps, fresh=sources.version(run.weights) is not None)
    folder.earlier, folder.share = found.plans, share
    folder.resume_command = trust.resume_command(path, run)
    given = changes or {}
    own = {k: v for k, v in run.options.plain().items() if k in given}
    own |= {k: v for k, v in run.settings.plain().items() if k in given.get("settings", {})}
    with folder, _tracked(run, folder, steps, also) as told:
        if changes and folder.write:
            config.save(run, file)
        return resume(
            folder,
            found.model,
            **_data(run, bundle),
            example_inputs=found.inputs if run.input else None,
            method=sources.method(run.method),
            progress=told,
            describe={"run": config.plain(run)},
            tolerance=given.get("tolerance"),
            target=Target(**given["target"]) if "target" in given else None,
            **own,
        )


class FinishedRunError(UsageError):
    """There is nothing to go on with; the report and the history of the run that is there are at hand."""

    def __init__(self, text: str, report: dict[str, Any], history: list[dict[str, Any]], changes: list[str]) -> None:
        super().__init__(text)
        self.report, self.history, self.changes = report, history, changes


_PLACES = ("run_dir", "baselines", "weights", "data", "workers", "track")
"""Keys whose values may change under a run: what is found there is compared, or doesn't decide the result."""


def require_alike(begun: RunConfig, now: RunConfig, where: str, remedy: str, *, loose: bool = False) -> None:
    """Refuse a configuration that is not the one a run began with.

    Args:
        begun: The one it began with.
        now: The other.
        where: Begins the message.
        remedy: Ends it.
        loose: Whether what one of both leaves open is no difference, but for a target.

    Raises:
        UsageError: If there is a difference; the first are named, with both values.
    """
    before, after = (_flat(each.model_dump(mode="json")) for each in (begun, now))
    differing = []
    for key in {**before, **after}:
        section, old, new = key.partition(".")[0], before.get(key), after.get(key)
        left_open = loose and section != "target" and bool({None, "auto"} & {old, new})
        if section not in _PLACES and old != new and not left_open:
            differing.append(f"{key} {old!r}, and {new!r}")
    if differing:
        more = f" ({len(differing) - 3} more like this.)" if len(differing) > 3 else ""
        raise UsageError(f"{where} with {'; '.join(differing[:3])} {remedy}.{more}")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots, and lists as text; of a path in a file's name, the name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": found for inner, found in _flat(value).items()}
        elif isinstance(value, list):
            flat[key] = str(value)
        elif key in ("model", "method") and ".py:" in str(value):
            flat[key] = Path(value).name
        else:
            flat[key] = value
    return flat


class Show:
    """Shows the engine's events as two lines: the run, and the epoch under way."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.rounds = 0
        self.standing = ""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.stage == "baseline":
            return  # the step of its training shows it
        if event.kind == "episode" and event.record is not None:
            self.rounds += 1
            kept = "accepted" if event.record["accepted"] else "reverted"
            tuned = event.record["metric_tuned"]
            shown = "diverged" if tuned is None else f"{tuned:.2%}"
            self.standing = f"{shown} at {event.record['macs']:,} MACs, {kept}"
        where = "after the last round" if event.stage == "final" else f"round {event.round}, phase {event.phase}"
        if event.kind == "batch":
            if event.stage == "measure":
                self.steps("  measuring", event.batch, event.batches, "times of layers, or sensitivity")
            else:
                note = f"{log.place(event)}, epoch {event.epoch} of {event.epochs}"
                self.steps("  batches", event.batch, event.batches, note)
        self.steps("compressing", self.rounds, None, f"{where}; {self.standing}" if self.standing else where)


def grounded(run: RunConfig) -> RunConfig:
    """Make every path absolute and name the folder, so that the run can be resumed from anywhere."""
    name = "".join(c if c.isalnum() else "-" for c in Path(run.model.rpartition(":")[2] or run.model).stem)
    by = run.method.rpartition(":")[2]
    weights, options = sources.pinned(run.model, run.weights), dict(run.model_options)
    if weights is not None and sources.version(weights) is None:
        weights = str(Path(weights).expanduser().absolute())
    base = options.get("base_weights")  # of a detector, built on a classifier whose weights they are
    if isinstance(base, str) and sources.version(base) is None:
        options["base_weights"] = str(Path(base).expanduser().absolute())
    return run.model_copy(
        update={
            "model": sources.absolute(run.model),
            "model_options": options,
            "data": sources.absolute(run.data),
            "method": sources.absolute(run.method),
            "weights": weights,
            "baselines": run.baselines and str(Path(run.baselines).expanduser().absolute()),
            "run_dir": str(Path(run.run_dir or f"runs/{name}-{by}").expanduser().absolute()),
        }
    )


def _tracked(run: RunConfig, folder: RunDirectory, steps: Steps, also: Progress | None) -> Trackers:
    """Return what shows a run's events, hands them on, and sends them to the trackers that it names."""
    trained, show = run.baseline.epochs if run.weights is None else 0, Show(steps)

    def told(event: Event) -> None:
        show(event)
        if also is not None:
            also(event)

    return Trackers(
        run.track,
        folder.path,
        run.model_dump(mode="json", exclude={"track", "run_dir", "baselines"}),
        told,
        device=run.settings.device,
        baseline=trained,
    )


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
        if weights is not None and sources.version(weights) is None and not Path(weights).is_file():
            raise UsageError(f"{weights}: no such file of weights; name one by --weights FILE, or train the network "
                             "first: --weights none, as long as the file's baseline says.")  # fmt: skip
        found = sources.open_model(run.model, run.model_options, weights, run.input, bundle)
    suspicions.of_classes(found, bundle)
    return found.data or bundle, found


def networks(folder: Path, steps: Steps) -> tuple[sources.SourceModel, sources.SourceModel]:
    """Rebuild a run's pruned network and its original from the files in its folder.

    Raises:
        UsageError: If it holds no run's file.
    """
    if not (folder / config.FILE).is_file():
        raise UsageError(
            f"{folder}: no {config.FILE}, so the model can't be built from it; name MODEL, --weights and --against."
        )
    run = config.load(folder / config.FILE, {"run_dir": str(folder.absolute())})
    with steps.step("building the model"):
        bundle = sources.data(run.data, run.data_options)
        small, original = (
            sources.open_model(run.model, run.model_options, str(folder / name), run.input, bundle)
            for name in ("model.safetensors", "baseline.safetensors")
        )
    return small, original


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

    def __init__(
        self, run: RunConfig, folder: Path, model: nn.Module, images: dict[str, Any], arithmetic: Arithmetic
    ) -> None:
        self.run, self.folder, self.arithmetic = run, folder, arithmetic
        self.request = {
            **run.model_dump(
                mode="json",
                include={"model", "model_options", "data", "data_options", "baseline", "batch_size", "seed"},
            ),
            "precision": arithmetic.precision,
            "channels_last": arithmetic.channels_last,
            "begins": baseline.fingerprint(model),
            "images": images,
        }
        self.under_way = folder / "checkpoint" / "baseline.safetensors"
        by_name = (*MODELS, *DETECTORS, "torchvision", "timm")
        known = run.model.partition(":")[0] in by_name and run.data.partition(":")[0] in DATASETS
        shared = Path(run.baselines or folder.parent / "baselines") if known else folder / "checkpoint"
        self.file = shared / baseline.file_name(self.request)
        self.record: dict[str, Any] = {"file": str(self.file), "trained_here": not self.file.is_file()}
        baseline.read(self.under_way, self.request)

    def trained(self, model: nn.Module, data: Mapping[str, Any], steps: Steps, told: Progress) -> nn.Module:
        """Return the trained network; each of its epochs is told."""
        runtime = stages.accelerator(self.run.settings.device)
        with ExitStack() as held:
            # Of runs that begin at once, one trains and the others wait for it.
            waits = False
            while not processes.told(runtime, lambda: lock(self.file.with_suffix(".lock"), held)):
                held.pop_all().close()
                if not waits:
                    waits = True
                    _LOG.info("baseline: another run trains the same; waiting for %s", self.file)
                steps("waiting for the baseline", 0, None, "another run trains the same")
                time.sleep(PAUSE)
            # Every process looks before one of them writes.
            found = baseline.kept(model, self.file, self.request)
            runtime.wait_for_everyone()
            if found is None:
                return self._trained(model, data, steps, told, runtime)
            self.record["trained_here"] = False
            if runtime.is_main_process:  # this run may have been killed right after it kept the network
                baseline.clear(self.under_way)
            return found.eval()

    def _trained(
        self, model: nn.Module, data: Mapping[str, Any], steps: Steps, told: Progress, runtime: Accelerator
    ) -> nn.Module:
        write = runtime.is_main_process
        plan, epoch = self.run.baseline, 0

        def on_batch(done: int, total: int | None, loss: float) -> None:
            each = total or done
            steps("training the baseline", epoch * each + done, plan.epochs * each, f"loss {loss:.3f}")

        def on_epoch(done: int, record: Mapping[str, Any] | None) -> None:
            nonlocal epoch
            epoch = done
            if record is not None:
                log.baseline_epoch(record, plan.epochs)
                told(Event("epoch", "baseline", 0, 0, done, plan.epochs, record=record))

        records = baseline.train(
            model, data["train"], self.under_way, self.request,
            epochs=plan.epochs, seed=self.run.seed, write=write, on_epoch=on_epoch, on_batch=on_batch,
            settings=TrainingSettings(**{f.name: getattr(plan, f.name) for f in fields(TrainingSettings)}),
            loss=data["loss"], runtime=runtime, arithmetic=self.arithmetic,
        )  # fmt: skip
        if write:
            baseline.keep(model, self.file, self.request, records)
            baseline.clear(self.under_way)
        return model.eval()
