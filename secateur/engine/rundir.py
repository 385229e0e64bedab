"""A run's folder: configuration, history, models, result, and the state from which a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secateur import checkpoint
from secateur.engine.state import State
from secateur.engine.stored import require_configuration
from secateur.errors import CheckpointError, RunError, UsageError
from secateur.graph.plan import PruningPlan
from secateur.structure import parsed

if TYPE_CHECKING:
    from types import TracebackType

    from secateur.engine.result import CompressResult

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]


class RunDirectory:
    """The folder of one run, held by one process at a time.

    Every file in it is whole at every moment. All but ``checkpoint/state.safetensors`` can be written again from that
    one, or were written before it (the networks of goals). A process that doesn't write (not the main one of several)
    only reads.

    Raises:
        RunError: If another process holds the folder.
        UsageError: If it can't be made.
    """

    def __init__(self, path: str | Path, *, write: bool = True) -> None:
        self.path, self.write = Path(path), write
        self._lock: int | None = None

    def __enter__(self) -> RunDirectory:
        if not self.write:
            return self
        try:
            (self.path / "checkpoint").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "checkpoint" / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UsageError(f"{self.path}: can't be used as a run directory: {error.strerror}.") from error
        if fcntl is not None:
            try:
                # The kernel releases the lock when the process ends, however it ends.
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock)
                raise RunError(
                    f"{self.path}: another process is running here; wait for it or choose another folder."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def started(self) -> bool:
        """Whether a run has begun here."""
        return self._state.is_file()

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
        try:
            config = parsed(path.read_bytes())
            require_configuration(config)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: missing or damaged: {error}.") from error
        return dict(config)

    def baseline(self, model: nn.Module) -> nn.Module:
        """Fill a freshly built model with the weights that the run began with."""
        return checkpoint.load(model, self.path / "baseline.safetensors")

    def store(self, state: State) -> None:
        """Write the state."""
        if self.write:
            state.save(self._state)

    def restore(self) -> tuple[State, dict[str, Tensor]]:
        """Read the state; see :meth:`State.load`."""
        return State.load(self._state)

    def write_history(self, state: State) -> None:
        """Write the records of all rounds, one line each."""
        if self.write:
            text = "".join(json.dumps(record) + "\n" for record in state.history)
            checkpoint.write_atomic(self.path / "history.jsonl", text.encode())

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
            checkpoint.save(result.model, result.plan, self.path / "model.safetensors", extra=result.milestones[-1])
            checkpoint.write_atomic(self.path / "plan.json", (result.plan.to_json() + "\n").encode())
            result.report["final"]["file_bytes"] = (self.path / "model.safetensors").stat().st_size
            result.report["baseline"]["file_bytes"] = (self.path / "baseline.safetensors").stat().st_size
            checkpoint.write_json(self.path / "result.json", result.report)
