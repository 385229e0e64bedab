"""The state of a run: everything that a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.checkpoint.records import flatten, newest, read_record, restore, write_record
from secateur.compensation.sensitivity import Sensitivity
from secateur.engine.stored import plain_state
from secateur.errors import CheckpointError

FORMAT_VERSION = 2
"""Version of the file's layout; raised when an older reader could misread a newer file."""

_KEY = "secateur-run"

Removed = dict[str, list[int]]
"""Group name -> removed channels, numbered as in the unpruned network."""


@dataclass
class State:
    """State of the loop between two steps.

    Channels are numbered as in the unpruned network throughout, so that records of different rounds compare.
    """

    stage: str = "select"
    """The next step: ``select``, ``measure``, ``optimise``, ``drop``, ``finetune``, ``judge``, ``final``, ``settle`` or
    ``done``."""
    phase: int = 1
    """1: all groups at once; 2: group after group."""
    position: int = 0
    """Phase 2: index of the group, in execution order."""
    round: int = 1
    epoch: int = 0
    """Epochs done in the present stage of training."""
    stages: int = 0
    """Stages of training begun; the order of the examples follows from it."""
    goal: int = 0
    """Index into the chain of widths."""
    goal_round: int = 0
    """Episodes made towards the present goal."""
    rounds: int = 0
    """Rounds in which a criterion goes to its target; 0 before the first choice."""
    step: float = 0.0
    """Share of the MACs that ``auto`` removes in a round under a tolerance; 0 for the usual."""
    round_to: int = 0
    """Multiple of channels that runs fastest, where it was measured."""
    table: dict[str, Any] | None = None
    """Sensitivity as last measured, and the MACs that the network had then."""
    times: dict[str, Any] | None = None
    """Times of the unpruned network's layers, where latency is to be reached."""
    latency: dict[str, Any] | None = None
    """What a target of latency predicted and measured, see :class:`secateur.engine.speed.Timed`."""
    images: int = 0
    """Training images seen in all."""
    metric: float = 0.0
    """Metric of the last accepted network on the validation data."""
    seconds: float = 0.0
    """Working time, over all processes that took part in the run."""
    removed: Removed = field(default_factory=dict)
    accepted_removed: Removed = field(default_factory=dict)
    pairs: dict[str, list[list[int]]] = field(default_factory=dict)
    """The present episode's pairs, group name -> [dropped, kept]."""
    going: Removed = field(default_factory=dict)
    """The channels that are removed at the end of the present optimisation."""
    episode: dict[str, Any] = field(default_factory=dict)
    changes: int = 0
    """How many of the changes that ``config.json`` records are in force."""
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """A record of every epoch of training."""
    history: list[dict[str, Any]] = field(default_factory=list)
    milestones: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Parts of the method that could not be had."""

    # Not plain data
    model: nn.Module | None = field(default=None, repr=False)
    accepted: dict[str, Tensor] | None = field(default=None, repr=False)
    """State dict of the last accepted network, to go back to."""
    training: dict[str, Any] | None = field(default=None, repr=False)
    """Optimizer state of a stage under way, between two epochs."""

    @property
    def network(self) -> nn.Module:
        """The network as it is now."""
        assert self.model is not None
        return self.model

    @property
    def sensitivity(self) -> Sensitivity | None:
        """The table, where it was measured."""
        if self.table is None or "measure" not in self.table:
            return None
        damage = {name: {int(n): d for n, d in own.items()} for name, own in self.table["damage"].items()}
        return Sensitivity(**{k: v for k, v in self.table.items() if k != "macs"} | {"damage": damage})

    def plain(self) -> dict[str, Any]:
        """Return the fields that are plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "accepted", "training")}

    def save(self, path: Path) -> None:
        """Write the state into one file, atomically; the one before is kept."""
        tensors: dict[str, Tensor] = {
            f"model/{k}": v for k, v in self.network.state_dict().items() if isinstance(v, Tensor)
        }
        if self.accepted is not None:
            tensors |= {f"accepted/{k}": v for k, v in self.accepted.items()}
        training = flatten(self.training, "training", tensors)
        record = {"state": self.plain(), "training": training, "accepted": self.accepted is not None}
        write_record(path, _KEY, FORMAT_VERSION, record, tensors)

    @classmethod
    def load(cls, path: Path) -> tuple[State, dict[str, Tensor]]:
        """Read a state, and the state dict of its network, which the caller puts into a network of the right shape.

        Where the file is damaged, that is said, and the state before it is read.

        Raises:
            CheckpointError: If no file can be read: missing, damaged or something else.
        """
        return newest(path, cls._read)

    @classmethod
    def _read(cls, path: Path) -> tuple[State, dict[str, Tensor]]:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file, so there is no run to resume; the run directory or its name is another."
            )
        record, tensors = read_record(path, _KEY, FORMAT_VERSION, "the state of a run")
        try:
            state = cls(**plain_state(cls, record["state"]))
            _ = state.sensitivity  # its table is of the form of one
            if record["accepted"]:
                state.accepted = {
                    k.removeprefix("accepted/"): v for k, v in tensors.items() if k.startswith("accepted/")
                }
            state.training = restore(record["training"], tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged, or written by another release: {error}.") from error
        return state, {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
