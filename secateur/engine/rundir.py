"""A run's folder: configuration, history, models, result, and the state from which a killed run goes on."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secateur import checkpoint
from secateur.checkpoint import records
from secateur.compensation.sensitivity import Share
from secateur.engine.state import State
from secateur.engine.stored import require_configuration
from secateur.errors import CheckpointError, RunError, UsageError
from secateur.graph.plan import PruningPlan
from secateur.graph.structure import parsed

if TYPE_CHECKING:
    from types import TracebackType

    from secateur.engine.result import CompressResult

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]


NO_LOCKS = "SECATEUR_NO_LOCK"
"""Environment variable that, set to 1, lets a run go on in a folder whose file system has no locks."""

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _let_go() -> None:
    """Close them in a process that is forked to read images, which would hold the locks after this one's end."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

PLACE = "choose another folder (--run-dir)"


class HeldError(RunError):
    """Another process is running in the folder."""


def resume_call(path: Path) -> str:
    """Return the call that goes on with a run begun from Python, of which no file says model and data."""
    return f"secateur.resume({str(path)!r}, model, train=..., validation=...)"


class RunDirectory:
    """The folder of one run, held by one process at a time.

    Every file in it is whole at every moment. All but ``checkpoint/state.safetensors`` and the one before it can be
    written again from these, or were written before them (the networks of goals). A process that doesn't write (not the
    main one of several) only reads. What is held already can be entered again, and is let go when it is left as often.

    Raises:
        RunError: If another process holds the folder, or its file system can't tell.
        UsageError: If it can't be made.
    """

    def __init__(self, path: str | Path, *, write: bool = True) -> None:
        self.path, self.write = Path(path), write
        self._lock: int | None = None
        self._entered = 0
        self.earlier: tuple[PruningPlan, ...] = ()
        """Plans that made the network with which the run begins."""
        self.share: Share | None = None
        """Where the run finds tables of sensitivity that others have measured; see :data:`Share`."""
        self.resume_command = (
            f"secateur resume {shlex.quote(str(self.path))}" if self.of_a_file else resume_call(self.path)
        )
        """What goes on with the run."""

    def __enter__(self) -> RunDirectory:
        if self.write and not self._entered:
            self._hold()
        self._entered += 1
        return self

    def _hold(self) -> None:
        try:
            (self.path / "checkpoint").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "checkpoint" / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UsageError(f"{self.path}: can't be used as a run directory: {error.strerror}.") from error
        if fcntl is not None:
            self._flock(self._lock)
        _held.add(self._lock)

    def _flock(self, lock: int) -> None:
        try:
            # The kernel releases the lock when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and os.environ.get(NO_LOCKS) == "1":
                return
            os.close(lock)
            self._lock = None
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise HeldError(
                    f"{self.path}: another process is running here; wait for it or choose another folder."
                ) from error
            raise RunError(
                f"{self.path}: this file system has no locks ({error.strerror}), so that two processes could run here "
                f"unnoticed; {PLACE} on another, or set {NO_LOCKS}=1 where no other process will use this one."
            ) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._lock is not None and not self._entered:
            _held.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    @property
    def started(self) -> bool:
        """Whether a run has begun here that can be gone on with, or has been."""
        return self._state.is_file() or records.before(self._state).is_file()

    @property
    def finished(self) -> bool:
        """Whether a run has come to its end here; one that was ended by an error can be gone on with.

        Raises:
            CheckpointError: If the result can't be read.
        """
        file = self.path / "result.json"
        return file.is_file() and "ended" not in _read_json(file, set())

    @property
    def of_a_file(self) -> bool:
        """Whether the command line can go on with the run: it keeps the run's file there, and Python does not."""
        return (self.path / "run.yaml").is_file()

    def require_free(self) -> None:
        """Refuse a folder in which a run has begun.

        Raises:
            UsageError: If there is one, finished or not, with what it was last stored at or without.
        """
        if self.finished:
            raise UsageError(f"{self.path}: holds a finished run, which is left as it is; {PLACE}.")
        if self.started:
            raise UsageError(
                f"{self.path}: holds a run already; go on with '{self.resume_command}' (or the same command "
                f"and --resume), or {PLACE}."
                if self.of_a_file
                else f"{self.path}: holds a run begun from Python; go on with '{resume_call(self.path)}', or {PLACE}."
            )
        if (self.path / "history.jsonl").is_file():
            raise UsageError(f"{self.path}: holds a run whose checkpoint/ is gone, so that it can't go on; {PLACE}.")

    @property
    def _state(self) -> Path:
        return self.path / "checkpoint" / "state.safetensors"

    def begin(self, original: nn.Module, configuration: Mapping[str, Any]) -> None:
        """Write the configuration and the unpruned network, which don't change during the run."""
        if self.write:
            checkpoint.write_json(self.path / "config.json", dict(configuration))
            checkpoint.save(original, (), self.path / "baseline.safetensors")

    def configuration(self) -> dict[str, Any]:
        """Read the configuration.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        path = self.path / "config.json"
        config = _read_json(path, set())
        try:
            require_configuration(config)
        except ValueError as error:
            raise CheckpointError(f"{path}: missing or damaged: {error}.") from error
        return config

    def reconfigure(self, configuration: Mapping[str, Any]) -> None:
        """Write the configuration anew, with what has changed recorded in it."""
        if self.write:
            checkpoint.write_json(self.path / "config.json", dict(configuration))

    def baseline(self, model: nn.Module) -> nn.Module:
        """Fill a freshly built model with the weights that the run began with."""
        return checkpoint.load(model, self.path / "baseline.safetensors")

    def store(self, state: State) -> None:
        """Write the state.

        Raises:
            RunError: If the folder is gone, or the disk fails.
        """
        if self.write:
            if self._entered and not self._state.parent.is_dir():
                raise RunError(f"{self.path}: the run's folder is gone; put it back and resume, or begin the run anew.")
            state.save(self._state)

    def restore(self) -> tuple[State, dict[str, Tensor]]:
        """Read the state; see :meth:`State.load`."""
        return State.load(self._state)

    def write_history(self, state: State) -> None:
        """Write the records of all rounds, one line each."""
        if self.write:
            text = "".join(json.dumps(record) + "\n" for record in state.history)
            checkpoint.write_atomic(self.path / "history.jsonl", text.encode())

    def write_epochs(self, state: State) -> None:
        """Write the records of all epochs of training, one line each."""
        if self.write:
            text = "".join(json.dumps(record) + "\n" for record in state.epochs)
            checkpoint.write_atomic(self.path / "epochs.jsonl", text.encode())

    def write_table(self, state: State) -> None:
        """Write the sensitivity that was measured last."""
        if self.write and (table := state.sensitivity) is not None:
            table.save(self.path / "sensitivity.json")

    def write_milestone(self, state: State, plan: PruningPlan) -> None:
        """Save the network of a goal that was reached."""
        if self.write:
            record = state.milestones[-1]
            checkpoint.save(
                state.network, plan, self.path / f"milestone-{len(state.milestones)}.safetensors", extra=record
            )

    def finish(self, result: CompressResult) -> None:
        """Write the network, its plan and the result."""
        if self.write:
            # Where the run began with a pruned network, all plans, so that the file loads into the unpruned one.
            plans = (*self.earlier, result.plan)
            extra = {**result.milestones[-1], "input": result.report["input"]}
            checkpoint.save(result.model, plans, self.path / "model.safetensors", extra=extra)
            checkpoint.write_atomic(self.path / "plan.json", (result.plan.to_json() + "\n").encode())
            result.report["final"]["file_bytes"] = (self.path / "model.safetensors").stat().st_size
            result.report["baseline"]["file_bytes"] = (self.path / "baseline.safetensors").stat().st_size
            checkpoint.write_json(self.path / "result.json", result.report)

    def result(self, model: nn.Module) -> CompressResult:
        """Read what a finished run has written.

        Args:
            model: The unpruned network, freshly built.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        from secateur.engine.result import CompressResult

        report, history = self.written()
        plan = PruningPlan.from_json((self.path / "plan.json").read_text(encoding="utf-8"))
        small = checkpoint.load(model, self.path / "model.safetensors")
        return CompressResult(small, plan, history, report["milestones"], report, self.path)

    def written(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Read a finished run's report and history.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        report = _read_json(self.path / "result.json", {"final", "milestones"})
        lines = self.path / "history.jsonl"
        try:
            return report, [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{lines}: missing or damaged: {error}.") from error


def _read_json(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        found = parsed(path.read_bytes())
        if missing := keys - set(found):
            raise ValueError(f"the key {min(missing)} is missing")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: missing or damaged: {error}.") from error
    return dict(found)
