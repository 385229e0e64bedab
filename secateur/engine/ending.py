"""How a run ends other than by its own rule: a target out of reach, a loss that is not finite."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NoReturn

from secateur.engine.state import State
from secateur.engine.summary import summarise
from secateur.errors import CriterionError, DivergedError, PlanError, RunError, SecateurError
from secateur.graph import cost

if TYPE_CHECKING:
    from secateur.engine.loop import Engine
    from secateur.engine.rundir import RunDirectory

_LOG = logging.getLogger(__name__)


def ended(engine: Engine, state: State, directory: RunDirectory | None, error: SecateurError) -> NoReturn:
    """Leave the last accepted network and its result, as good as at the end of a run, and raise what happened.

    The state that is stored stands at the beginning of the round that failed, so that the run goes on from there.

    Raises:
        SecateurError: Always: of the error's own class, with what is left and how it goes on. A :class:`RunError` holds
            the result.
    """
    # Of other errors another process may have seen nothing, and what is measured here would wait for it.
    seen_by_all = engine.runtime.num_processes == 1 or isinstance(error, (DivergedError, PlanError, CriterionError))
    if not seen_by_all or not state.accepted_removed:
        raise error
    engine.begin_round(state)
    record = engine.milestone(state)
    result = summarise(engine, state, directory, record)
    result.report["ended"] = {"error": str(error), "round": state.round}
    result.report["notes"] = [*result.report["notes"], f"ended in round {state.round}: {error}"]
    share = record["macs"] / cost.macs(engine.graph)
    text = f"{error} The last accepted network is kept, with {share:.1%} of the MACs and {record['validation']:.2%}"
    if directory is not None:
        directory.store(state)
        directory.write_history(state)
        directory.finish(result)
        text += (
            f": {directory.path / 'model.safetensors'}; '{directory.resume_command}' goes on from it, with other "
            "settings where need be (--set, --macs, --tolerance)"
        )
    # Where one process fails, what started it ends the others: the main one writes first.
    engine.runtime.wait_for_everyone()
    told = type(error)(f"{text}.")
    if isinstance(told, RunError):
        told.result = result
    raise told from error


def out_of_reach(engine: Engine, state: State) -> None:
    """Say why there is nothing left to remove, where that is no end.

    Raises:
        RunError: If a target, ratios or widths were asked for, or the method can choose nothing at all.
    """
    left = engine.selection.left
    why = "".join(f" {name} is left alone: {reason}." for name, reason in left.items())
    if engine.target is not None:
        gone = ""
        if engine.target.what != "latency":  # which is measured, not counted
            gone = f": with nothing left to remove, {engine.selection.removed_share(state.removed):.3f} is gone"
        raise RunError(
            f"target: {engine.target.what} {engine.target.fraction:g} is out of reach{gone}. Ask for less, or "
            f"let more groups go (linear, skip, internal_only, max_ratio, min_channels, round_to).{why}"
        )
    if len(left) == len(engine.groups):
        raise RunError(f"compress: the method is defined on none of the groups:{why} Choose another, such as l1.")
    if engine.options.ratios:
        raise RunError(f"ratios: {dict(engine.options.ratios)} are out of reach with nothing left to remove.{why}")
    if engine.goals:
        raise RunError(f"widths: {engine.goals[state.goal]} can't be reached within the groups' constraints.{why}")


def diverged(engine: Engine, state: State, error: RunError) -> None:
    """Count a round whose training diverges as reverted, where a tolerance decides; training after the last, as none.

    Raises:
        RunError: The same, where every round is accepted: then nothing tells that less would have been enough.
    """
    engine.end_stage()
    if not engine.bounded:
        raise error
    _LOG.warning("compress: round %d, %s", state.round, error)
    state.training, state.epoch = None, 0
    if state.stage in ("final", "settle"):
        state.notes.append(f"the network is as it was before the final epochs: {error}")
        engine.begin_round(state)
        state.stage = "settle"
        return
    state.episode |= {"diverged": str(error), "metric_tuned": None}
    state.stage = "judge"
