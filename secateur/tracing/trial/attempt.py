"""One trial pruning: a copy of the network is cut, run, and compared with the masked original.

A large network's program is compared, operator by operator; otherwise values are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from torch import nn

from secateur.errors import SecateurError, TraceError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.cost import macs
from secateur.graph.places import mask_at
from secateur.graph.plan import PruningPlan, masks
from secateur.graph.steps import steps
from secateur.network.inputs import mapped
from secateur.network.precision import in_double
from secateur.pruning.comparison import Difference, compare, doubled, outputs
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.pruning.ties import jumps
from secateur.tracing.assumptions import Assumptions
from secateur.tracing.grouping import Grouping
from secateur.tracing.program import WORTH, Program
from secateur.tracing.recording import Recording, record
from secateur.tracing.trial.blame import Outcome, blame_error, blame_readings
from secateur.tracing.trial.programs import can_tell, is_same

_COARSE = 1e-3
"""For what layers read, where sums of many terms cancel."""
_TOLERANCE = 3e-5
"""For what the network returns."""
_FINE = 1e-9
"""Where the code has been told numbers of channels: one of them may matter less than rounding does."""
_FRACTIONS = (1 / 2, 1 / 3, 2 / 3)
"""Fractions that groups lose in turn: what holds only where all lose the same has to fail."""

Picked = list[list[int]]
"""For every group, the channels that it loses in a trial."""


@dataclass(eq=False)
class Trials:
    """The trial prunings of one network: what was removed and what passed is remembered from one grouping to the next.

    Groups that outlive a failure lose the same channels again, and a plan that passed needs no second run.
    """

    model: nn.Module
    example_inputs: Any
    assumptions: Assumptions
    recording: Recording
    """The run that the present grouping was made of."""
    removed: dict[tuple[object, ...], list[int]] = field(default_factory=dict)
    """What a group of this name and these constraints loses."""
    passed: list[tuple[PruningPlan, bool]] = field(default_factory=list)
    """Plans that passed, and whether it was compared what they compute, or only seen that they run."""
    least: dict[tuple[object, ...], int] = field(default_factory=dict)
    """Of a group of this name and these constraints, how many channels have to stay."""

    def part(self, index: int, group: ChannelGroup) -> list[int]:
        """Return a part at random of a group's channels."""
        key = key_of(group)
        if key not in self.removed:
            order = np.random.default_rng(index).permutation(group.size)
            # Channels that may go come first: one of them, last in the order, would stay as the last of its layer.
            order = order[np.argsort(~group.removable[order], kind="stable")]
            found = steps(group, order.tolist())
            self.removed[key] = sorted(chain(*found[: _odd(group, found, _FRACTIONS[index % len(_FRACTIONS)])]))
        return self.removed[key]

    def passed_as(self, plan: PruningPlan, compared: bool) -> bool:
        """Tell whether a plan passed; with ``compared``, by what it computes."""
        return any(other == plan and (how or not compared) for other, how in self.passed)

    def floored(self, graph: ChannelGraph) -> ChannelGraph:
        """Return a graph whose groups say how many of their channels have to stay."""
        return replace(graph, groups=tuple(replace(g, least=self.least.get(key_of(g), 1)) for g in graph.groups))


def _odd(group: ChannelGroup, found: list[list[int]], fraction: float) -> int:
    """Return how many steps to take, near a fraction of them, for what is left to be a multiple of nothing.

    Code may ask in many ways whether a number can be divided by another. A prime number can't, nor has it a root.
    """
    left = group.size - np.cumsum([0, *map(len, found)])
    unit = math.gcd(group.size, *map(len, found))
    wanted = max(1, int(len(found) * fraction))
    near = (taken for d in range(len(left)) for taken in (wanted + d, wanted - d) if 0 < taken < len(left))
    return next((taken for taken in near if _is_prime(int(left[taken]) // unit)), wanted)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def key_of(group: ChannelGroup) -> tuple[object, ...]:
    """Return what tells a group apart from one grouping to the next: its name and its constraints."""
    schedule = group.schedule.tobytes() if group.schedule is not None else b""
    return group.name, group.blocks.tobytes(), group.removable.tobytes(), schedule, group.multiple


def told(trials: Trials, grouping: Grouping) -> set[int]:
    """Return the groups of whose channels the code has been told the number, so that it may count with it."""
    found = trials.recording.found
    counted = [labels for labels, _ in found.counted]
    counted += [a.labels for a in found.attributes if a.guessed]
    groups = {g for labels in counted for g in grouping.partition.among(labels)}
    taken = {module for (module, _), measure in found.widths.items() if measure.taken}
    for port in grouping.graph.layers if taken else ():
        for places in (port.in_group, port.out_group):
            if port.module in taken and places is not None:
                groups |= set(np.unique(places[places >= 0]).tolist())
    return groups


def attempt(trials: Trials, grouping: Grouping, chosen: list[int], picked: Picked) -> Outcome | None:
    """Prune some groups and compare; None: all is well."""
    graph = grouping.graph
    plan = plan_removal(graph, {graph.groups[i].name: picked[i] for i in chosen})
    exact = [i for i in chosen if graph.groups[i].exact]
    compared = len(exact) == len(chosen)  # inexact groups change values, so it has to run, and no more
    if not trials.passed_as(plan, compared):
        outcome = _run(trials, grouping, chosen, plan, compared)
        if outcome is not None:
            return outcome
        trials.passed.append((plan, compared))
    # Values are compared without the inexact groups; a program tells of these, too.
    return attempt(trials, grouping, exact, picked) if exact and not trials.passed_as(plan, True) else None


def _run(trials: Trials, grouping: Grouping, chosen: list[int], plan: PruningPlan, compared: bool) -> Outcome | None:
    """Cut the network and run it, and compare values where asked; None: all is well."""
    small, program = trials.model, Program()
    try:
        if _pays(trials, grouping.graph):
            small = cut(trials.model, plan, share=True, hollow=True)
            if _is_told_by_program(trials, grouping, plan, small, program):
                trials.passed.append((plan, True))
                return None
            if program.failed is not None:
                raise program.failed
        small = cut(trials.model, plan, share=True)
        if not compared:
            outputs(small, trials.example_inputs)
            return None
        misread = _differing(trials, plan, small, fine=bool(told(trials, grouping).intersection(chosen)))
        # Values of a network that keeps state differ from run to run; its program tells all the same.
        if misread is not None and can_tell(trials.recording) and not program.steps:
            fresh = cut(trials.model, plan, share=True, hollow=True)
            misread = None if _is_told_by_program(trials, grouping, plan, fresh, program) else misread
    except SecateurError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises; it is the finding
        return blame_error(grouping, chosen, error, small)
    finally:
        program.failed = None  # by its traceback it holds this very call, and the network that was cut
    return None if misread is None else blame_readings(grouping, chosen, misread)


def _pays(trials: Trials, graph: ChannelGraph) -> bool:
    """Tell whether comparing programs takes less time than running the network's products, or is all there is."""
    whole = trials.recording
    meta = any(tensor.is_meta for tensor in whole.labels.named.values())
    return can_tell(whole) and (meta or macs(graph) * graph.batch > WORTH * len(whole.program.steps))


def _is_told_by_program(
    trials: Trials, grouping: Grouping, plan: PruningPlan, small: nn.Module, program: Program
) -> bool:
    """Tell whether a run without values shows that the cut network computes what the masked original computes.

    That run is noted in ``program``, and so is why it failed.
    """
    try:
        left = record(small, trials.example_inputs, trials.assumptions, light=program)
    except TraceError:
        return False
    own = grouping.partition
    gone = mask_at(own.group_of, own.channel_of, masks(grouping.graph, plan.removed))
    return not program.kept() and is_same(trials.recording, left, own.classes, gone)


def _differing(trials: Trials, plan: PruningPlan, small: nn.Module, *, fine: bool) -> dict[str, list[int]] | None:
    """Compare values; return the layers that read something else, with their channels, or None where all agrees."""
    model, inputs = trials.model, trials.example_inputs
    limit = (1e-6 if plan.magnitudes else _FINE) if fine else _TOLERANCE
    finely = _in_double(model, small, plan, inputs, limit) if fine else None
    difference = finely or _settled(model, small, plan, inputs, _COARSE)
    if finely is None:
        limit = _TOLERANCE
        if not _agrees(difference, limit):
            difference = _in_double(model, small, plan, inputs, 1e-6) or difference
    return None if _agrees(difference, limit) else difference.mismatched


def _agrees(difference: Difference, limit: float) -> bool:
    return not difference.mismatched and difference.error <= limit


def _in_double(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, limit: float
) -> Difference | None:
    """Compare once more in fp64, where rounding can't tip a data-dependent choice; None where it does not run."""
    inputs = mapped(example_inputs, lambda t: t.double() if t.is_floating_point() else t)
    try:
        with in_double():
            return _settled(model, small, plan, inputs, limit)
    except (RuntimeError, TypeError, ValueError):
        pass
    try:  # with copies of the networks, which take more memory
        model = doubled(model)
        return _settled(model, cut(model, plan, share=True), plan, inputs, limit)
    except (RuntimeError, TypeError, ValueError):
        return None


def _settled(model: nn.Module, small: nn.Module, plan: PruningPlan, inputs: Any, limit: float) -> Difference:
    """Compare; outputs that jump tell nothing, and what layers make is compared in their stead."""
    found = compare(model, small, plan, inputs, limit)
    if not found.mismatched and found.error > limit and jumps(model, small, plan, inputs, found, limit):
        found.error = 0.0
    return found
