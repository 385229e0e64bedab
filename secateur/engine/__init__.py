"""Compress a network and keep a record of it: the loop in a run directory, from which a killed run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur.criteria import Criterion
from secateur.engine import ending, log, record
from secateur.engine.events import Event, Progress
from secateur.engine.loop import Engine
from secateur.engine.pairing import CorrelationRegulariser, largest_correlations
from secateur.engine.result import CompressResult
from secateur.engine.rundir import RunDirectory
from secateur.engine.settings import Settings, parted
from secateur.engine.state import State
from secateur.engine.summary import summarise
from secateur.errors import CriterionError, PlanError, RunError, UsageError
from secateur.pruning.options import Options
from secateur.pruning.planning import Target
from secateur.training.evaluation import Metric
from secateur.training.launched import process
from secateur.training.passes import Batches
from secateur.training.stages import Loss

_LOG = logging.getLogger(__name__)

__all__ = [
    "CompressResult",
    "CorrelationRegulariser",
    "Engine",
    "Event",
    "RunDirectory",
    "Settings",
    "State",
    "compress",
    "largest_correlations",
    "resume",
]


def compress(
    model: nn.Module,
    method: str | Criterion | Callable[..., Any] = "auto",
    *,
    train: Batches,
    validation: Batches,
    test: Batches | None = None,
    example_inputs: Any = None,
    tolerance: float = 0.5,
    target: Target | None = None,
    run_dir: str | Path | RunDirectory | None = None,
    seed: int = 0,
    loss: Loss | None = None,
    metric: Metric | Any = None,
    progress: Progress | None = None,
    describe: Mapping[str, Any] | None = None,
    **settings: Any,
) -> CompressResult:
    """Prune and fine-tune a trained network round by round, as long as its accuracy allows or to a target.

    ``auto`` measures what each group's loss costs on the first 512 training images, lets each lose what costs least,
    channels of the lowest ``l2`` first, refits all layers behind by least squares, and fine-tunes with the unpruned
    network as teacher. With a target it does so once, or in two or three rounds where much goes; without, round by
    round as long as the metric on the validation data stays within ``tolerance`` of the unpruned network's; otherwise
    it goes back. ``cfp`` is Singh et al. 2020: each round is an episode, which selects the most correlated filter pairs
    of every layer, trains them towards |ρ| = 1, drops one filter of each and fine-tunes. Phase 1 prunes all layers at
    once; phase 2 layer after layer. Any other method is a criterion, planned as :func:`secateur.plan` does.

    Args:
        model: The trained network; it is copied, never changed.
        method: ``auto``, ``cfp``, the name of a criterion, or a criterion.
        train: Training batches ``(inputs, target)``, walked through once an epoch.
        validation: Held-out batches of the training data; every decision is taken on them.
        test: Test batches. Only ever reported, of the last epoch.
        example_inputs: A tensor, a tuple or a dict to trace the network on; when None, ``validation.example_inputs``
            where there is such a thing, else the first validation example.
        tolerance: Points (hundredths) of the metric that may be lost on the validation data. Unused with a target.
        target: Stop when this fraction is removed, whatever the metric; ``widths`` among the settings does the same
            for given widths.
        run_dir: Folder for the run's files: its configuration, history, result, models, and the state from which
            :func:`resume` goes on; or one that is held already. Nothing is written when None.
        seed: Seed of everything that is drawn.
        loss: ``loss(output, target)``; cross entropy when None. :mod:`secateur.training.detection` has a detector's.
        metric: None for accuracy; a ``torchmetrics.Metric``; or ``metric(model, batches) -> float``, higher is better.
            Reports call it by its ``name``, else by that of its function or class.
        progress: Called with an :class:`Event` at each stage, batch and episode.
        describe: JSON values that go into ``config.json``, e.g. names of the model and the data.
        **settings: Fields of :class:`Settings`, and of :class:`secateur.Options`, which mean what they do in
            :func:`secateur.prune`.

    Returns:
        The pruned network with its plan (for the unpruned one), the history and the report.

    Raises:
        UsageError: If a setting is unknown or out of range, or ``run_dir`` holds another run.
        PlanError: If the target is out of reach.
        RunError: If the loss is not finite, ``cfp`` can't reach its target, or ``run_dir`` is in use. Where a round was
            accepted before, its network and result are written as at a run's end; ``error.result`` has them, too. Under
            a tolerance, a round that diverges is reverted.
        DataError: If data are empty or no pairs of inputs and targets.
        TraceError: If the network can't be run on the example inputs.
    """
    options, chosen = parted(settings)
    engine = Engine(
        model, method, train=train, validation=validation, test=test, example_inputs=example_inputs,
        tolerance=tolerance, target=target, seed=seed, options=options, settings=chosen, loss=loss, metric=metric,
        progress=progress,
    )  # fmt: skip
    if run_dir is None:
        return _run(engine, engine.init(), None)
    with _directory(run_dir, engine.runtime.is_main_process) as directory:
        directory.require_free()
        # The main process must not write before every other one has seen that no run is here.
        engine.runtime.wait_for_everyone()
        state = engine.init()
        directory.begin(engine.original, _configuration(engine, chosen, describe))
        directory.store(state)
        return _run(engine, state, directory)


def resume(
    run_dir: str | Path | RunDirectory,
    model: nn.Module,
    *,
    train: Batches,
    validation: Batches,
    test: Batches | None = None,
    example_inputs: Any = None,
    method: str | Criterion | Callable[..., Any] | None = None,
    loss: Loss | None = None,
    metric: Metric | Any = None,
    progress: Progress | None = None,
    tolerance: float | None = None,
    target: Target | None = None,
    describe: Mapping[str, Any] | None = None,
    **settings: Any,
) -> CompressResult:
    """Go on with a run that was killed, from its last whole step; the data must be those it began with.

    A run that has finished is left as it is, and its result returned. What is given of ``tolerance``, ``target`` and
    settings takes the place of what the run began with, from the beginning of the round that is under way; it is
    recorded in ``config.json`` under ``changes``.

    Args:
        run_dir: The folder given to :func:`compress`.
        model: The unpruned model, freshly built; its weights are read from the folder.
        train: As in :func:`compress`.
        validation: As in :func:`compress`.
        test: As in :func:`compress`.
        example_inputs: As in :func:`compress`.
        method: The criterion, where it is no name; read from the folder when None.
        loss: As in :func:`compress`.
        metric: As in :func:`compress`.
        progress: As in :func:`compress`.
        tolerance: Another one.
        target: Another one.
        describe: JSON values that take the place of those in ``config.json``.
        **settings: Other settings and options; as in :func:`compress`.

    Returns:
        What the uninterrupted run returns; on a CPU, with the same seed and threads, in the same bits.

    Raises:
        UsageError: If there is no run in the folder, or the data are not those that the run began with.
        RunError: If another process is running it.
        CheckpointError: If a file is damaged, or the model is another.
    """
    with _directory(run_dir, process() == 0) as directory:
        if directory.finished:
            _LOG.warning("resume: %s: the run has finished; its result is returned as it is.", directory.path)
            return directory.result(model)
        if not directory.started:
            raise UsageError(f"{directory.path}: holds no run to resume; compress writes one.")
        config = directory.configuration()
        record.compare(directory.path, config, train=train, validation=validation, test=test)
        config, changed = record.changed(config, tolerance, target, settings, dict(describe or {}))
        goal = config["target"]
        engine = Engine(
            directory.baseline(model), method or config["method"], train=train, validation=validation, test=test,
            example_inputs=example_inputs, tolerance=config["tolerance"],
            target=None if goal is None else Target(**goal), seed=config["seed"],
            options=Options.of(config["options"]), settings=Settings.of(config["settings"]),
            loss=loss, metric=metric, progress=progress,
        )  # fmt: skip
        record.compare_machine(directory.path, config, engine)
        state = engine.resume(*directory.restore())
        # The main process must not write before every other one has read.
        engine.runtime.wait_for_everyone()
        if changed:
            directory.reconfigure({**config, "settings": engine.settings.plain()})
        if state.changes < len(config["changes"]):
            engine.begin_round(state)
            state.changes = len(config["changes"])
            directory.store(state)
        return _run(engine, state, directory)


def _directory(given: str | Path | RunDirectory, write: bool) -> RunDirectory:
    return given if isinstance(given, RunDirectory) else RunDirectory(given, write=write)


def _run(engine: Engine, state: State, directory: RunDirectory | None) -> CompressResult:
    if directory is not None:
        engine.share = directory.share
        directory.write_history(state)
        directory.write_epochs(state)
        directory.write_table(state)
    engine.progress(log.begin(engine, state))
    while not engine.finished(state):
        rounds, goals, table, epochs = len(state.history), len(state.milestones), state.table, len(state.epochs)
        try:
            state = engine.step(state)
        except (RunError, PlanError, CriterionError) as error:
            ending.ended(engine, state, directory, error)
        if directory is not None:
            if len(state.milestones) > goals:
                # The milestone is written before the state: a run killed between the two repeats the step and the file.
                directory.write_milestone(state, engine.plan(state.removed))
            directory.store(state)
            if len(state.history) > rounds:
                directory.write_history(state)
            if len(state.epochs) > epochs:
                directory.write_epochs(state)
            if state.table is not table:
                directory.write_table(state)
    result = summarise(engine, state, directory)
    if directory is not None:
        directory.finish(result)
    return result


def _configuration(engine: Engine, asked: Settings, describe: Mapping[str, Any] | None) -> dict[str, Any]:
    target = engine.target
    if not isinstance(engine.method, str) and not hasattr(engine.method, "name") and not callable(engine.method):
        raise UsageError(f"method: is a name or a criterion, found {type(engine.method).__name__}.")
    method = (
        engine.method
        if isinstance(engine.method, str)
        else getattr(engine.method, "name", None) or engine.method.__name__
    )
    return {
        "method": method,
        "model": f"{type(engine.original).__module__}.{type(engine.original).__qualname__}",
        "tolerance": engine.tolerance,
        "target": None if target is None else target.to_dict(),
        "seed": engine.seed,
        "options": engine.options.plain(),
        "asked": asked.plain(),
        "settings": engine.settings.plain(),
        "changes": [],
        "arithmetic": engine.arithmetic.reason,
        "data_fingerprints": record.fingerprints(train=engine.train, validation=engine.validation, test=engine.test),
        **record.surroundings(engine),
        **dict(describe or {}),
    }
