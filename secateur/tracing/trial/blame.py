"""What a failed trial is blamed on: groups that the failing line handles, or whose channels a layer reads wrongly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from secateur.tracing.findings import Site
from secateur.tracing.grouping import Grouping
from secateur.tracing.source_lines import shown


@dataclass(frozen=True)
class Failure:
    """A group that did not survive the trial, and what was seen."""

    group: int
    reason: str
    sources: tuple[str, ...] = ()
    """``file:line`` of the user's code that was running, innermost last."""


def frames_of(error: BaseException, model: nn.Module) -> list[tuple[str, str]]:
    """Return ``file:line`` and module path of every frame of an error, outermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    module = ""
    trace = error.__traceback__
    while trace is not None:
        module = names.get(id(trace.tb_frame.f_locals.get("self")), module)
        found.append((shown(trace.tb_frame.f_code.co_filename, trace.tb_lineno), module))
        trace = trace.tb_next
    return found


def blamed_for(grouping: Grouping, chosen: list[int], frames: list[tuple[str, str]], reason: str) -> list[Failure]:
    """Return the groups that an assumption about the failing line of the failing module concerns."""
    wanted = set(chosen)
    for source, module in reversed(frames):
        blamed: dict[int, None] = {}
        for site in grouping.sites:
            if site.cause.source == source and site.cause.module == module and site.options[site.choice] != "freeze":
                blamed |= dict.fromkeys(concerned(grouping, site))
        found = [i for i in blamed if i in wanted]
        if found:
            return [Failure(i, reason, (source,)) for i in found]
    return []


def handled_by(grouping: Grouping, chosen: list[int], frames: list[tuple[str, str]]) -> list[int]:
    """Return the groups that layers read or make inside the innermost failing module that has such layers."""
    wanted = set(chosen)
    for module in dict.fromkeys(module for _, module in reversed(frames)):
        found: set[int] = set()
        for port in grouping.graph.layers:
            if f"{port.module}.".startswith(f"{module}."):
                for places in (port.in_group, port.out_group):
                    found |= set(np.unique(places).tolist()) if places is not None else set()
        if found & wanted:
            return sorted(found & wanted)
    return []


def misread(grouping: Grouping, chosen: list[int], layers: dict[str, list[int]]) -> list[Failure]:
    """Return the groups whose channels a layer reads wrongly: those of the first such layer that concerns a group."""
    for port in grouping.graph.layers:
        if port.module not in layers or port.in_group is None:
            continue
        found = np.unique(port.in_group[layers[port.module]])
        blamed = [i for i in found.tolist() if i in chosen]
        if blamed:
            return [
                Failure(i, f"{port.module} would read other channels or values than in the original") for i in blamed
            ]
    return []


def concerned(grouping: Grouping, site: Site) -> list[int]:
    """Return the groups whose channels a site handles; -1 stands for channels of none."""
    found: list[int] = np.unique(grouping.group_of[grouping.classes[site.labels]]).tolist()
    return found
