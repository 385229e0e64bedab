"""A run told in lines by the logger ``secateur.run``: one an epoch, one a decision, each with what comes next."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from secateur.engine.events import Event, Progress
from secateur.engine.pairing import CorrelationRegulariser
from secateur.engine.state import State
from secateur.graph import cost
from secateur.training.evaluation import metric_name
from secateur.training.stages import EpochRecord, Stage

if TYPE_CHECKING:
    from secateur.engine.loop import Engine

_LOG = logging.getLogger("secateur.run")

_NEXT = {
    "select": "round {round}", "measure": "measure what each group costs", "optimise": "train before the cut",
    "drop": "remove the channels", "finetune": "fine-tune", "judge": "accept the round",
    "final": "fine-tune at the end", "settle": "measure the result", "done": "write the result",
}  # fmt: skip
"""What a step of the run does, in words."""
_AFTER = {"optimise": "drop", "finetune": "judge", "final": "settle"}
"""The step behind a stage of training."""
_TRAINING = {"optimise": "training before the cut", "finetune": "fine-tuning", "final": "fine-tuning at the end"}
"""What a stage of training is, in words."""


class Log:
    """Hands events on, and writes a line for each that says something new.

    Args:
        progress: Gets every event.
        metric: The run's metric, for its name.
    """

    def __init__(self, progress: Progress | None, metric: Any) -> None:
        self.progress, self.metric = progress, metric_name(metric)

    def __call__(self, event: Event) -> None:
        """Write the event's line, if it has one."""
        if _LOG.isEnabledFor(logging.INFO) and event.record is not None:
            _LOG.info("%s", self.line(event, event.record))
        if self.progress is not None:
            self.progress(event)

    def line(self, event: Event, record: Mapping[str, Any]) -> str:
        """Return the line of an event."""
        where = f"round {event.round}"
        what, parts = "", [self._measured(record), _macs(record)]
        if event.kind == "begin":
            where, what = "unpruned network", ""
        elif event.kind == "epoch":
            where = f"{place(event)}, epoch {event.epoch}/{event.epochs}"
            parts = [*epoch_parts(record), f"last accepted {parts[0]}", parts[1]]
        elif event.kind == "cut":
            what = f"{record['channels']} channel{'s' if record['channels'] > 1 else ''} cut"
        elif event.kind == "episode":
            what = "accepted" if record["accepted"] else "reverted"
            what = "reverted, the training diverged" if "diverged" in record else what
        elif event.kind == "milestone":
            where, what = "result", ""
        said = ", ".join(part for part in (what, *parts) if part)
        return f"{where}: {said}" + (f"; next: {event.next}" if event.next else "")

    def _measured(self, record: Mapping[str, Any]) -> str:
        value = next((record[k] for k in ("metric", "metric_tuned", "validation") if record.get(k) is not None), None)
        if value is None:
            return ""
        top5 = (record.get("details") or {}).get("top-5")
        # Beside the validation metric of a whole run stand the details of its test set.
        of = "test " if record.get("test") is not None else ""
        return f"{self.metric} {value:.2%}" + ("" if top5 is None else f", {of}top-5 {top5:.2%}")


def place(event: Event) -> str:
    """Say in which round a run trains, and what for; what follows the last round is in none."""
    what = _TRAINING.get(event.stage, event.stage)
    return what if event.stage == "final" else f"round {event.round}, {what}"


def epoch_parts(record: Mapping[str, Any]) -> list[str]:
    """Return what an epoch's line says of its training."""
    speed = record["images"] / record["seconds"] if record["seconds"] else 0.0
    return [f"loss {record['loss']:.4g}", f"lr {record['learning_rate']:.3g}", f"{speed:.0f} images/s"]


def baseline_epoch(record: Mapping[str, Any], epochs: int) -> None:
    """Write the line of an epoch of a baseline's training."""
    done = record["epoch"]
    following = f"epoch {done + 1}" if done < epochs else "compress"
    parts = [f"loss {record['loss']:.4g}", f"{record['images'] / max(record['seconds'], 0.1):.0f} images/s"]
    _LOG.info("baseline, epoch %d/%d: %s; next: %s", done, epochs, ", ".join(parts), following)


def _macs(record: Mapping[str, Any]) -> str:
    return f"{record['macs']:,} MACs" if "macs" in record else ""


def epoch(
    engine: Engine,
    state: State,
    event: Event,
    done: EpochRecord,
    seconds: float,
    rate: float,
    over: bool,
    trained: Stage,
) -> Event:
    """Add an epoch to the run's records, and return it as an event.

    Args:
        engine: Of the run.
        state: After the epoch.
        event: With which the epoch began.
        done: What training says of it.
        seconds: How long it took.
        rate: Learning rate at its end.
        over: Whether it is the last of its stage.
        trained: The stage.
    """
    record = {
        "number": len(state.epochs) + 1, "round": event.round, "phase": event.phase, "stage": event.stage,
        "epoch": event.epoch, "epochs": event.epochs, "loss": done.loss, "learning_rate": rate, "images": done.images,
        "metric": state.metric, "macs": cost.macs(engine.graph, engine.plan(state.removed)),
        "seconds": round(seconds, 3),
    }  # fmt: skip
    if isinstance(trained.regulariser, CorrelationRegulariser):
        record["min_abs_rho"] = round(trained.regulariser.minimum, 6)
    state.epochs.append(record)
    coming = following(engine, state, _AFTER[event.stage]) if over else f"epoch {event.epoch + 1}"
    return replace(event, kind="epoch", record=record, next=coming)


def cut(engine: Engine, state: State) -> dict[str, Any]:
    """Return what is to be told of a cut."""
    return {
        "channels": sum(map(len, state.going.values())),
        "metric": state.episode["metric_dropped"],
        "macs": cost.macs(engine.graph, engine.plan(state.removed)),
    }


def begin(engine: Engine, state: State) -> Event:
    """Return the event with which a run begins, or goes on."""
    record = {**state.baseline, "macs": cost.macs(engine.graph), "number": len(state.epochs)}
    return Event("begin", state.stage, state.round, state.phase, record=record, next=following(engine, state))


def following(engine: Engine, state: State, stage: str | None = None) -> str:
    """Say what the run does next: what its state says, unless a stage is given."""
    stage = stage or state.stage
    if stage == "select" and engine.arrived(state):
        stage = "final"
    if stage == "final" and not engine.settings.final_epochs:
        stage = "settle"
    undecided = " or revert it" if stage == "judge" and engine.bounded else ""
    return _NEXT[stage].format(round=state.round) + undecided
