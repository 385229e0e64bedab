"""A sweep: runs of one file with other values, drawn by Optuna, done by any number of workers."""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.deploy.failures import require
from secateur.deploy.timing.whole import whole
from secateur.engine.events import Event, Steps
from secateur.engine.rundir import HeldError
from secateur.errors import RunError, SecateurError, UsageError
from secateur.runfile import config, configured_run, space, trials
from secateur.runfile.config import RunConfig
from secateur.runfile.search import SearchConfig
from secateur.runfile.shared_tables import SharedTables
from secateur.runfile.storage import Storage
from secateur.runfile.trials import SWEEP_FILE, Trial, Trials

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as Attempt
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

Direction = Literal["minimize", "maximize"]
_LOG = logging.getLogger(__name__)

_BEGAN_WITH = "secateur"
"""Key under which a study holds the run's file that it began with."""
HOPELESS = 3
"""After so many failed trials in a row, none having been completed before, a worker gives up."""


class Sweep:
    """One worker's part of a sweep.

    What workers decide together (which trial is next, whose worker died) they decide one at a time, see
    :meth:`secateur.runfile.storage.Storage.alone`; everything else runs side by side. A trial is a run in
    ``runs/NUMBER`` of the sweep's folder, made as ``secateur compress`` makes one, so that a worker which takes up the
    trial of another goes on with its run where it sees the folder, and begins it again where it doesn't.

    Args:
        run: The run's file, with its ``search``.
        folder: Of the sweep.
        storage: URL of a database; a file in the folder when None.
        study: Name of the sweep in the database; the folder's name when None.
        total: Trials in all, over all workers; those of the file when None.
        heartbeat: Seconds between two signs of life.

    Raises:
        UsageError: If Optuna is not installed, the storage can't be used, or the folder or the study holds a sweep of
            another run, other spaces or objectives.
    """

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        *,
        storage: str | None = None,
        study: str | None = None,
        total: int | None = None,
        heartbeat: int = 30,
    ) -> None:
        self.run, self.search = run, space.section(run, folder / SWEEP_FILE)
        self.folder = folder.expanduser().absolute()
        self.grid = space.cells(self.search) if self.search.sampler == "grid" else []
        self.total = min(total or self.search.trials, len(self.grid) or 10**9)
        if "latency" in self.search.objectives and self.search.runtime == "onnxruntime":
            require("onnx", "onnxscript", "onnxruntime", instead=", or measure in PyTorch (search.runtime: eager)")
        if (self.folder / SWEEP_FILE).is_file():
            self._require_same(config.load(self.folder / SWEEP_FILE), f"{self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder}: can't be used as a sweep's folder: {error.strerror}.") from error
        self.name = study or self.folder.name
        with warnings.catch_warnings():
            _expect_warnings()
            self.storage = Storage(storage or f"sqlite:///{self.folder / 'sweep.db'}", heartbeat)
            try:
                with self.storage.lost(UsageError), self.storage.alone():
                    self.study = self._opened()
            except BaseException:
                self.storage.close()
                raise
        if not (self.folder / SWEEP_FILE).is_file():
            config.save(run, self.folder / SWEEP_FILE)
        self.distributions = space.distributions(self.search)
        self.worker = f"{socket.gethostname()}:{os.getpid()}"

    def work(self, steps: Steps, *, retry: bool = False, wait: bool = True) -> Trials:
        """Do trials until all are done, and return them.

        Args:
            steps: Where to show progress.
            retry: Whether trials that failed are tried again.
            wait: Whether to stay until the trials of other workers are done, to take up those whose worker dies.

        Raises:
            RunError: If the storage is lost.
            SecateurError: What failed :data:`HOPELESS` trials in a row, where none of the sweep was ever completed.
        """
        with warnings.catch_warnings():
            _expect_warnings()
            try:
                if retry:
                    self._retry_failed()
                return self._worked(steps, wait)
            finally:
                self.storage.close()

    def _worked(self, steps: Steps, wait: bool) -> Trials:
        failed = 0
        while True:
            attempt, found = self._next()
            open_ones = len(found.of("running") + found.of("waiting"))
            steps("sweeping", len(found.trials) - open_ones, found.total)
            if attempt is not None:
                error = self._do(attempt, steps)
                failed = 0 if error is None else failed + 1
                if error is not None and failed >= HOPELESS and not found.of("complete"):
                    raise type(error)(
                        f"sweep: {failed} trials failed in a row, and none was completed before; the last: {error} "
                        "Put the cause right, and try them again with --retry."
                    ) from error
            elif not wait or not found.of("running"):
                return found
            else:
                steps("waiting for other workers", 0, None, f"{len(found.of('running'))} trials are running")
                time.sleep(self.storage.heartbeat)

    # What workers do one at a time

    def _opened(self) -> Study:
        """Return the study, which is made where there is none of its name."""
        import optuna

        upwards = [name == "accuracy" for name in self.search.objectives]
        directions: list[Direction] = ["maximize" if up else "minimize" for up in upwards]
        study = optuna.create_study(
            study_name=self.name, storage=self.storage.optuna, directions=directions, load_if_exists=True,
            pruner=_pruner(self.search),
        )  # fmt: skip
        where = f"study {self.name} in {self.storage.name}"
        begun = study.user_attrs.get(_BEGAN_WITH)
        if begun is None:
            if study.get_trials(deepcopy=False) or [d.name.lower() for d in study.directions] != directions:
                raise UsageError(f"{where}: is no sweep of Secateur's; name another (--study).")
            study.set_user_attr(_BEGAN_WITH, self.run.model_dump(mode="json", exclude_none=True))
        else:
            self._require_same(config.build(begun), where)
        return study

    def _require_same(self, begun: RunConfig, where: str) -> None:
        """Refuse to go on with another sweep; how many trials are drawn, and how, may change under it."""
        if begun.search is None:
            raise UsageError(f"{where}: its file says nothing of a sweep; give another folder (--sweep-dir).")
        free = {name: getattr(begun.search, name) for name in ("trials", "sampler", "pruner", "seed")}
        now = self.run.model_copy(update={"search": self.search.model_copy(update=free)})
        remedy = "is asked for: ask for the same, or give another folder (--sweep-dir) and study (--study)"
        configured_run.require_alike(begun, now, f"{where}: the sweep there began", remedy)

    def _next(self) -> tuple[Attempt | None, Trials]:
        """Take the next trial, if there is one, and return it with all trials."""
        import optuna

        with self.storage.lost(RunError), self.storage.alone():
            optuna.storages.fail_stale_trials(self.study)
            known = self.study.get_trials(deepcopy=False)
            waiting = [trial for trial in known if trial.state.name == "WAITING"]
            begun = sum(_is_first(trial) for trial in known)
            if not waiting and begun < self.total:
                made = optuna.create_trial(state=optuna.trial.TrialState.WAITING)
                if self.grid:
                    made.params, made.distributions = self.grid[begun], self.distributions
                self.study.add_trial(made)
                waiting = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
            attempt = None
            if waiting:
                # A worker that dies right after it took the trial has given a sign of life, by which it is missed.
                for trial in waiting:
                    self.storage.optuna.record_heartbeat(self._id(trial.number))
                self.study.sampler = _sampler(self.search, waiting[0].number)
                attempt = self.study.ask(self.distributions)
                attempt.set_user_attr("worker", self.worker)
            return attempt, self._written()

    def _tell(self, attempt: Attempt, state: str, values: list[float] | None = None, error: str = "") -> None:
        """Store what came of a trial, unless another worker has taken it for dead and done it since."""
        import optuna

        with self.storage.lost(RunError), self.storage.alone():
            if not self.study.get_trials(deepcopy=False)[attempt.number].state.is_finished():
                if error:
                    attempt.set_user_attr("error", error)
                self.study.tell(attempt, values, state=optuna.trial.TrialState[state])
            self._written()

    def _give_back(self, attempt: Attempt) -> None:
        """Let the next worker go on with a trial that is interrupted."""
        import optuna

        with self.storage.lost(RunError), self.storage.alone():
            self.storage.optuna.set_trial_state_values(self._id(attempt.number), optuna.trial.TrialState.WAITING)
            self._written()

    def _retry_failed(self) -> None:
        import optuna

        again = optuna.storages.RetryHeartbeatStaleTrialCallback()
        with self.storage.lost(RunError), self.storage.alone():
            for attempts in self._attempts().values():
                if attempts[-1].state.name == "FAIL":
                    again(self.study, attempts[-1])

    def _written(self) -> Trials:
        """Write the trials into the folder, and return them."""
        found = [_trial(number, attempts) for number, attempts in sorted(self._attempts().items())]
        all_of_them = Trials(
            study=self.name, storage=self.storage.name, objectives=list(self.search.objectives), trials=found,
            total=max(self.total, len(found)),
        )  # fmt: skip
        trials.write(all_of_them, self.folder)
        return all_of_them

    def _attempts(self) -> dict[int, list[FrozenTrial]]:
        """Return all attempts at each trial, by the number of its first."""
        found: dict[int, list[FrozenTrial]] = {}
        for trial in self.study.get_trials():
            found.setdefault(_first_number(trial), []).append(trial)
        return found

    def _id(self, number: int) -> int:
        of = self.storage.optuna
        return of.get_trial_id_from_study_id_trial_number(of.get_study_id_from_name(self.name), number)

    # A trial

    def _do(self, attempt: Attempt, steps: Steps) -> SecateurError | None:
        """Run a trial and store what came of it; return the error by which it failed."""
        import optuna

        number = _first_number(self.study.get_trials(deepcopy=False)[attempt.number])
        shown = ", ".join(f"{key} {value}" for key, value in attempt.params.items())
        _LOG.info("trial %d: %s", number, shown)
        try:
            with self.storage.alive(self._id(attempt.number)):
                values = self._values(number, attempt, steps)
        except optuna.TrialPruned:
            self._tell(attempt, "PRUNED")
            _LOG.info("trial %d: pruned", number)
        except (SecateurError, RuntimeError, MemoryError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            self._tell(attempt, "FAIL", error=said)
            _LOG.warning("trial %d failed (%s): %s", number, shown, said)
            return error if isinstance(error, SecateurError) else RunError(said)
        except Exception as error:
            self._tell(attempt, "FAIL", error=f"{type(error).__name__}: {error}")
            raise
        except BaseException:  # an interrupt or a signal
            self._give_back(attempt)
            raise
        else:
            self._tell(attempt, "COMPLETE", values)
            named = zip(self.search.objectives, values, strict=True)
            _LOG.info("trial %d: %s", number, ", ".join(f"{name} {value:.6g}" for name, value in named))
        return None

    def _values(self, number: int, attempt: Attempt, steps: Steps) -> list[float]:
        """Run a trial, or go on with its run, and return its objectives."""
        folder = self.folder / trials.run_name(number)
        places = {"run_dir": str(folder), "baselines": self.run.baselines or str(self.folder / "baselines")}
        run = space.configured(self.run, space.drawn(self.search, attempt.params)).model_copy(update=places)
        judge = _Judge(attempt, self.search) if self.search.pruner != "none" else None
        while True:
            try:
                share = SharedTables(self.storage, self.study, steps)
                report = configured_run.start(run, steps, go_on_with=True, also=judge, share=share).report
                break
            except configured_run.FinishedRunError as finished:
                report = finished.report
                break
            except HeldError:  # by the worker that was taken for dead
                steps("waiting for the run's folder", 0, None, str(folder))
                time.sleep(self.storage.heartbeat)
        found = {"accuracy": report["final"]["validation"], **report["final"]}
        return [
            self._share_of_time(folder, steps) if name == "latency" else float(found[name])
            for name in self.search.objectives
        ]

    def _share_of_time(self, folder: Path, steps: Steps) -> float:
        """Return the time of a run's network as a share of the unpruned one's, measured in turns."""
        small, original = configured_run.networks(folder, steps)
        with steps.step("measuring latency"):
            after, before = whole(
                [small.model, original.model], small.inputs, self.search.batch, self.search.runtime, self.search.threads
            )
        return statistics.median(after) / statistics.median(before)


class _Judge:
    """Tells a pruner what is measured after each cut and each round, and ends the run where the pruner says so."""

    def __init__(self, attempt: Attempt, search: SearchConfig) -> None:
        self.attempt, (self.objective,) = attempt, search.objectives

    def __call__(self, event: Event) -> None:
        record = event.record or {}
        if self.objective == "accuracy":
            value = record.get({"cut": "metric", "episode": "metric_tuned"}.get(event.kind, ""))
        else:
            value = record[self.objective] if event.kind == "episode" and record["accepted"] else None
        if value is None:
            return
        import optuna

        self.attempt.report(float(value), 2 * event.round + (event.kind == "episode"))
        if self.attempt.should_prune():
            raise optuna.TrialPruned


def _sampler(search: SearchConfig, number: int) -> BaseSampler:
    """Return the sampler of one trial: what it draws at random hangs on the trial's number, and not on its worker."""
    from optuna import samplers

    seed = (search.seed * 1_000_003 + number) % 2**32
    if search.sampler == "tpe":
        return samplers.TPESampler(seed=seed, constant_liar=True)
    if search.sampler == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed)
    if search.sampler == "qmc":
        return samplers.QMCSampler(seed=search.seed, scramble=True)  # one sequence, whose place the study holds
    return samplers.RandomSampler(seed=seed)


def _pruner(search: SearchConfig) -> BasePruner:
    from optuna import pruners

    found: dict[str, type[BasePruner]] = {
        "none": pruners.NopPruner, "median": pruners.MedianPruner, "halving": pruners.SuccessiveHalvingPruner,
        "hyperband": pruners.HyperbandPruner,
    }  # fmt: skip
    return found[search.pruner]()


def _is_first(trial: FrozenTrial) -> bool:
    return _first_number(trial) == trial.number


def _first_number(trial: FrozenTrial) -> int:
    """Return the number of a trial, which is the same when it is retried."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    found = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if found is None else found


_STATES: dict[str, Any] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


def _trial(number: int, attempts: list[FrozenTrial]) -> Trial:
    last = attempts[-1]
    state = _STATES.get(last.state.name, "waiting")
    error = last.user_attrs.get("error", f"its worker died, {len(attempts)} times in all")
    return Trial(
        number=number, state=state, parameters=dict(last.params), attempts=len(attempts),
        values=last.values if state == "complete" else None, error=error if state == "failed" else None,
        seconds=last.duration.total_seconds() if last.duration is not None else None,
        worker=last.user_attrs.get("worker"),
    )  # fmt: skip


def _expect_warnings() -> None:
    """Leave out warnings of what is meant here: signs of life beside ``optimize``, a round that is told twice."""
    from optuna.exceptions import ExperimentalWarning

    warnings.simplefilter("ignore", ExperimentalWarning)
    for message in ("Heartbeat of storage", "The reported value is ignored"):
        warnings.filterwarnings("ignore", message)
