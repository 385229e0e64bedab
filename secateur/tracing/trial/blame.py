"""What a failed trial is blamed on: groups that the failing line handles, or whose channels a layer reads wrongly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from secateur.tracing.assumptions import FREEZE, Assumption, Cause
from secateur.tracing.grouping import Grouping
from secateur.tracing.source_lines import shown


@dataclass(frozen=True)
class Failure:
    """A group that did not survive a trial, and what was seen."""

    group: int
    reason: str
    sources: tuple[str, ...] = ()
    """``file:line`` of the user's code that was running, innermost last."""

    def assumptions(self, grouping: Grouping) -> list[Assumption]:
        """Return the assumptions about the group that have a further option: those on the failing lines, or all."""
        mine = [a for a in grouping.assumptions if _can_be_wrong(a) and self.group in grouping.concerned(a)]
        return [a for a in mine if a.cause.source in self.sources] or mine

    def cause(self, grouping: Grouping) -> Cause:
        """Return what to show as the cause: the operator call on the failing line, where one is known."""
        concerned = [a for a in grouping.assumptions if self.group in grouping.concerned(a)]
        for source in reversed(self.sources):
            for assumption in concerned:
                if assumption.cause.source == source:
                    return Cause(assumption.cause.operator, assumption.cause.module, source, self.reason)
        source = self.sources[-1] if self.sources else ""
        return Cause("trial pruning", grouping.graph.groups[self.group].name, source, self.reason)


def _can_be_wrong(assumption: Assumption) -> bool:
    return "follow" not in assumption.options and assumption.option != FREEZE and FREEZE in assumption.options


@dataclass(frozen=True)
class Outcome:
    """A trial that failed: the groups to blame, or, without any, those that may be."""

    failures: list[Failure]
    suspects: list[int] = field(default_factory=list)
    reason: str = "the pruned network computes something else"
    sources: tuple[str, ...] = ()


def blame_error(grouping: Grouping, chosen: list[int], error: Exception, network: nn.Module) -> Outcome:
    """Blame what the pruned network's own code has raised on groups that an assumption about the failing line concerns.

    Without such an assumption, the groups are suspects that layers read or make inside the innermost failing module.
    """
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason = f"with fewer channels the model's own code fails: {text}"
    frames = _frames(error, network)
    # What was looked at in its frames holds it, and it holds them, with all that the network had made.
    error.__traceback__ = None
    sources = tuple(source for source, _ in frames)
    if len(chosen) == 1:
        return Outcome([Failure(chosen[0], reason, sources)])
    for source, module in reversed(frames):
        about = [a for a in grouping.assumptions if (a.cause.source, a.cause.module) == (source, module)]
        groups = dict.fromkeys(g for a in about if a.option != FREEZE for g in grouping.concerned(a))
        blamed = [Failure(g, reason, (source,)) for g in groups if g in chosen]
        if blamed:
            return Outcome(blamed, [], reason, sources)
    return Outcome([], _handled(grouping, chosen, frames), reason, sources)


def _frames(error: BaseException, network: nn.Module) -> list[tuple[str, str]]:
    """Return ``file:line`` and module path of every frame of an error, outermost first."""
    names = {id(module): name for name, module in network.named_modules()}
    found = []
    module = ""
    trace = error.__traceback__
    while trace is not None:
        module = names.get(id(trace.tb_frame.f_locals.get("self")), module)
        found.append((shown(trace.tb_frame.f_code.co_filename, trace.tb_lineno), module))
        trace = trace.tb_next
    return found


def _handled(grouping: Grouping, chosen: list[int], frames: list[tuple[str, str]]) -> list[int]:
    """Return the groups that layers read or make inside the innermost failing module that has such layers."""
    for module in dict.fromkeys(module for _, module in reversed(frames)):
        found: set[int] = set()
        for port in grouping.graph.layers:
            if f"{port.module}.".startswith(f"{module}."):
                for groups in (port.in_group, port.out_group):
                    found |= set(np.unique(groups).tolist()) if groups is not None else set()
        if found & set(chosen):
            return sorted(found & set(chosen))
    return []


def blame_readings(grouping: Grouping, chosen: list[int], misread: dict[str, list[int]]) -> Outcome:
    """Blame what layers read wrongly on the groups of those channels: of the first such layer that concerns any.

    What a layer reads wrongly may have been made wrong by what another group lost, so the groups are suspects only.
    """
    for port in grouping.graph.layers:
        if port.module not in misread or port.in_group is None:
            continue
        found = [g for g in np.unique(port.in_group[misread[port.module]]).tolist() if g in chosen]
        if found:
            reason = f"{port.module} would read other channels or values than in the original"
            return Outcome([Failure(found[0], reason)] if len(chosen) == 1 else [], found, reason)
    return Outcome([Failure(chosen[0], Outcome.reason)] if len(chosen) == 1 else [])
