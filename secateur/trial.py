"""Trial prunings: is what was assumed of the user's own code true?

Every group loses about half of its channels in a copy of the network, which then has to run and to compute what the
masked original computes. What fails is traced back to the assumption behind it; the next one is tried, or the channels
are kept and listed with the line that failed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from secateur.cost import lost, macs, masks
from secateur.errors import SecateurError, TraceError
from secateur.graph import Role
from secateur.inputs import mapped
from secateur.labels import Labels
from secateur.planning import plan_removal, steps
from secateur.precision import in_double
from secateur.program import Program
from secateur.recording import Recording, record
from secateur.replay import can_tell, is_same
from secateur.rules.flow import Cause, Flow, Site, shown
from secateur.rules.reach import Reached
from secateur.surgery import cut
from secateur.verification import Difference, compare, doubled, jumps, outputs

if TYPE_CHECKING:
    from secateur.graph import ChannelGraph, ChannelGroup
    from secateur.grouping import Grouping
    from secateur.planning import PruningPlan

_TOLERANCE = 3e-6
_FINE = 1e-9
_OF_CUTS = ("widths", "whole", "equal", "share", "parts")
_FEW = 2
"""So many suspects are tried one by one."""


@dataclass(frozen=True)
class Failure:
    """A group that did not survive the trial, and what was seen."""

    group: int
    reason: str
    sources: tuple[str, ...] = ()
    """``file:line`` of the user's code that was running, innermost last."""


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
    functions: list[Reached]
    """What its forward may run."""
    recording: Recording
    """The run that the present grouping was made of."""
    removed: dict[tuple[object, ...], list[int]] = field(default_factory=dict)
    """What a group of this name and these constraints loses."""
    passed: list[tuple[PruningPlan, bool]] = field(default_factory=list)
    """Plans that passed, and whether values were compared."""
    least: dict[tuple[object, ...], int] = field(default_factory=dict)
    """Of a group of this name and these constraints, how many channels have to stay."""
    struck: dict[tuple[object, ...], int] = field(default_factory=lambda: defaultdict(int))
    """How many groups of a kind failed without a line that handles them to show for it."""

    def part(self, index: int, group: ChannelGroup) -> list[int]:
        """Return a part at random of a group's channels."""
        key = _key(group)
        if key not in self.removed:
            order = np.random.default_rng(index).permutation(group.size).tolist()
            found = steps(group, order)
            taken = found[: max(1, int(len(found) * _FRACTIONS[index % len(_FRACTIONS)]))]
            self.removed[key] = sorted(chain(*taken))
        return self.removed[key]

    def floored(self, graph: ChannelGraph) -> ChannelGraph:
        """Return a graph whose groups say how many of their channels have to stay."""
        return replace(graph, groups=tuple(replace(g, least=self.least.get(_key(g), 1)) for g in graph.groups))


def _key(group: ChannelGroup) -> tuple[object, ...]:
    schedule = group.schedule.tobytes() if group.schedule is not None else b""
    return group.name, group.blocks.tobytes(), group.removable.tobytes(), schedule


def _selections(trials: Trials, grouping: Grouping) -> Iterator[Picked]:
    """Yield what to remove: of every group a part at random, then of every vector cut anywhere the first, the last end.

    Code that cuts in proportion to what is left computes the same as code that cuts at given widths, as long as all
    blocks lose the same; it is told apart where one block loses all that it can, and the others nothing.
    """
    yield [trials.part(index, group) for index, group in enumerate(grouping.graph.groups)]
    free = [site for site in grouping.sites if site.blocks and site.options[site.choice] in ("widths", "parts")]
    for end in (0, -1) if free else ():
        yield _of_one_end(grouping, free, end)


def _of_one_end(grouping: Grouping, sites: list[Site], end: int) -> Picked:
    """Choose all that can go of one end of every cut vector, and so that what is left can't be cut in equal parts."""
    ends: dict[int, list[int]] = {}
    for site in sites:
        own = grouping.classes[site.blocks[end]]
        for group, channel in zip(grouping.group_of[own].tolist(), grouping.channel_of[own].tolist(), strict=True):
            if group >= 0:
                ends.setdefault(group, []).append(channel)
    taken: dict[int, list[list[int]]] = {}
    for index, inside in ends.items():
        group = grouping.graph.groups[index]
        mine = set(inside)
        found = steps(group, list(dict.fromkeys([*inside, *range(group.size)])))
        taken[index] = [step for step in found if mine.issuperset(step)] or found[:1]
    for site in sites:
        own = grouping.classes[site.labels]
        groups, channels = grouping.group_of[own], grouping.channel_of[own]
        gone = sum(int(np.isin(channels[groups == i], list(chain(*taken[i]))).sum()) for i in taken)
        long = [i for i in np.unique(groups).tolist() if len(taken.get(i, ())) > 1]
        if (own.size - gone) % len(site.blocks) == 0 and long:
            taken[long[0]].pop()
    return [sorted(chain(*taken.get(i, []))) for i in range(len(grouping.graph.groups))]


def contradicted(grouping: Grouping) -> list[tuple[Labels, Cause]]:
    """Return channels that can't be pruned, since code gives the number of some as the size of others, and why.

    Neither can: a group need not lose as many as another, or as what never goes.
    """
    found = []
    for site in grouping.sites:
        for own, asked in site.asked:
            mine, others = grouping.classes[own], grouping.classes[asked]
            groups, theirs = grouping.group_of[mine], grouping.group_of[others]
            if np.isin(groups[groups >= 0], theirs).any() or np.isin(mine, others).any():
                continue
            if _can_lose(grouping, mine):
                found.append((own, replace(site.cause, reason="is given the number of other channels as its size")))
            if _can_lose(grouping, others):
                found.append((asked, replace(site.cause, reason="gives the number of these channels as others' size")))
    return found


def _can_lose(grouping: Grouping, classes: Labels) -> bool:
    """Tell whether any of these channels can be removed."""
    groups, channels = grouping.group_of[classes], grouping.channel_of[classes]
    return any(grouping.graph.groups[g].removable[channels[groups == g]].any() for g in np.unique(groups[groups >= 0]))


def failing(trials: Trials, grouping: Grouping) -> list[Failure]:
    """Return the groups that the network can't be pruned in as assumed; empty when all is well."""
    failures: list[Failure] = []
    for picked in _selections(trials, grouping):
        chosen = [i for i, channels in enumerate(picked) if channels]
        while chosen:
            outcome = _attempt(trials, grouping, chosen, picked)
            if outcome is None:
                break
            found = outcome.failures or _isolate(trials, grouping, chosen, outcome, picked)
            found += _alike(trials, grouping, chosen, found)
            failures += found
            gone = {failure.group for failure in found}
            chosen = [i for i in chosen if i not in gone]
        if failures:
            break
    if trials.recording.flow.measure.taken and not failures:
        _find_least(trials, grouping)
    return failures


def _find_least(trials: Trials, grouping: Grouping) -> None:
    """Find how many channels have to stay, where the code counts with their number: below some it may do otherwise.

    Two stay where two may: one has ways of its own, such as to be broadcast. A group that fails keeps as many as it had
    in the trial that it passed.
    """
    groups = grouping.graph.groups
    keys = [_key(group) for group in groups]
    left = [group.size - len(trials.part(i, group)) for i, group in enumerate(groups)]
    low = [trials.least.get(key, min(2, n)) for key, n in zip(keys, left, strict=True)]
    picked = [_down_to(group, least) if group.exact else [] for group, least in zip(groups, low, strict=True)]
    while True:
        chosen = [i for i, channels in enumerate(picked) if channels]
        outcome = _attempt(trials, grouping, chosen, picked) if chosen else None
        if outcome is None:
            break
        found = outcome.failures or _isolate(trials, grouping, chosen, outcome, picked)
        for failure in found + _alike(trials, grouping, chosen, found):
            group, part = groups[failure.group], trials.part(failure.group, groups[failure.group])
            # A second time it is not its own number that matters: nothing goes of it.
            picked[failure.group] = part if picked[failure.group] != part else []
            low[failure.group] = group.size - len(picked[failure.group])
    trials.least |= dict(zip(keys, low, strict=True))


def _down_to(group: ChannelGroup, least: int) -> list[int]:
    """Return all channels of a group that can go where so many stay."""
    return sorted(chain(*steps(replace(group, least=least), range(group.size))))


def _alike(trials: Trials, grouping: Grouping, chosen: list[int], failures: list[Failure]) -> list[Failure]:
    """Return failures of further groups: of the same assumption about the same line, or of a block's repetitions.

    A network repeats its blocks, and finding each one's failure by a run of its own would take long. Where no line that
    handles a group shows its kind, the second failure is that of all.
    """
    found: dict[int, Failure] = {}
    gone = {failure.group for failure in failures}
    for failure in failures:
        blamed = _alternatives(grouping, failure)
        lines = {(s.cause.source, s.options, s.choice) for s in blamed}
        for site in grouping.sites:
            if (site.cause.source, site.options, site.choice) in lines:
                for i in _concerned(grouping, site):
                    if i in chosen and i not in gone:
                        found.setdefault(i, Failure(i, failure.reason, failure.sources))
    kinds = _kinds(grouping) if any(i not in gone and i not in found for i in chosen) else {}
    failed = {}
    for failure in failures if kinds else ():
        kind = kinds[failure.group]
        trials.struck[kind] += 1
        if kind[0] or trials.struck[kind] > 1:
            failed[kind] = failure
    for i in chosen:
        same = failed.get(kinds[i]) if kinds and i not in gone else None
        if same is not None:
            found.setdefault(i, Failure(i, same.reason, same.sources))
    return list(found.values())


def _concerned(grouping: Grouping, site: Site) -> list[int]:
    """Return the groups whose channels a site handles; -1 stands for channels of none."""
    found: list[int] = np.unique(grouping.group_of[grouping.classes[site.labels]]).tolist()
    return found


def _kinds(grouping: Grouping) -> dict[int, tuple[object, ...]]:
    """Tell groups apart by the lines that handle them and by their layers: names without numbers, and roles."""
    lines: dict[int, set[object]] = {}
    for site in grouping.sites:
        for i in _concerned(grouping, site):
            lines.setdefault(i, set()).add((site.cause.source, site.options, site.choice))
    return {
        i: (
            frozenset(lines.get(i, ())),
            frozenset((re.sub(r"\d+", "#", m.tensor), m.dim, m.role) for m in group.members),
        )
        for i, group in enumerate(grouping.graph.groups)
    }


def _alternatives(grouping: Grouping, failure: Failure) -> list[Site]:
    """Return the sites that concern a failed group and have a further option to try."""
    mine = [
        site
        for site in grouping.sites
        if "follow" not in site.options
        and site.options[site.choice] != "freeze"
        and (grouping.group_of[grouping.classes[site.labels]] == failure.group).any()
    ]
    return [s for s in mine if s.cause.source in failure.sources] or mine


@dataclass(frozen=True)
class _Outcome:
    """A trial that failed: the groups to blame, or, without any, those that the failing module handles."""

    failures: list[Failure]
    suspects: list[int] = field(default_factory=list)
    reason: str = "the pruned network computes something else"
    sources: tuple[str, ...] = ()


def _isolate(trials: Trials, grouping: Grouping, chosen: list[int], failed: _Outcome, picked: Picked) -> list[Failure]:
    """Return failures of some of the groups, which together fail without telling where.

    Suspects are tried first, one by one and all together. Otherwise the shortest sequence that fails is looked for, by
    halving: its last group is to blame, and those before it can go.
    """
    if len(failed.suspects) < len(chosen):
        for part in [*([[i] for i in failed.suspects] if len(failed.suspects) <= _FEW else []), failed.suspects]:
            outcome = _attempt(trials, grouping, part, picked) if part else None
            if outcome is not None:
                return outcome.failures or _isolate(trials, grouping, part, outcome, picked)
    order = [*(i for i in chosen if i not in failed.suspects), *failed.suspects]
    passing = 0
    while len(order) - passing > 1:
        middle = (passing + len(order)) // 2
        outcome = _attempt(trials, grouping, order[:middle], picked)
        if outcome is None:
            passing = middle
        elif outcome.failures:
            return outcome.failures
        else:
            order, failed = order[:middle], outcome
    return [Failure(order[-1], failed.reason, failed.sources)]


def _attempt(trials: Trials, grouping: Grouping, chosen: list[int], picked: Picked) -> _Outcome | None:
    """Prune some groups and compare; None: all is well."""
    graph = grouping.graph
    plan = plan_removal(graph, {graph.groups[i].name: picked[i] for i in chosen})
    exact = [i for i in chosen if graph.groups[i].exact]
    compared = len(exact) == len(chosen)  # inexact groups change values, so it has to run, and no more
    if (plan, compared) not in trials.passed:
        outcome = _run(trials, grouping, chosen, plan, compared)
        if outcome is not None:
            return outcome
        trials.passed.append((plan, compared))
    # Values are compared without the inexact groups.
    return _attempt(trials, grouping, exact, picked) if exact and not compared else None


def _run(trials: Trials, grouping: Grouping, chosen: list[int], plan: PruningPlan, compared: bool) -> _Outcome | None:
    """Cut the network and run it, and compare values where asked; None: all is well."""
    model, example_inputs = trials.model, trials.example_inputs
    small = cut(model, plan, share=True)
    program = Program()
    if _tells(trials, grouping, plan, small, program):
        return None
    try:
        if program.failed is not None:
            raise program.failed
        if not compared:
            outputs(small, example_inputs)
            return None
        # A number in a formula may matter less than rounding does.
        limit = (1e-6 if plan.magnitudes else _FINE) if trials.recording.flow.measure.taken else _TOLERANCE
        finely = _in_double(model, small, plan, example_inputs, limit) if limit < _TOLERANCE else None
        difference = finely or compare(model, small, plan, example_inputs, _TOLERANCE)
    except SecateurError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises; it is the finding
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"with fewer channels the model's own code fails: {text}"
        frames = _frames(error, small)
        sources = tuple(source for source, _ in frames)
        if len(chosen) == 1:
            return _Outcome([Failure(chosen[0], reason, sources)])
        return _Outcome(_blamed(grouping, chosen, frames, reason), _handled(grouping, chosen, frames), reason, sources)
    if finely is None and not _agrees(difference, _TOLERANCE):
        difference = _in_double(model, small, plan, example_inputs, 1e-6) or difference
    if _agrees(difference, limit if finely is not None else _TOLERANCE):
        return None
    blamed = _mismatched(grouping, chosen, difference.mismatched)
    if len(chosen) == 1:
        return _Outcome(blamed or [Failure(chosen[0], "the pruned network computes something else")])
    # What a layer reads wrongly may have been made wrong by what another group lost: they are tried alone.
    return _Outcome([], [failure.group for failure in blamed], blamed[0].reason if blamed else _Outcome.reason)


def _tells(trials: Trials, grouping: Grouping, plan: PruningPlan, small: nn.Module, program: Program) -> bool:
    """Tell whether a run without values shows that the cut network computes what the masked original computes.

    That run is noted in ``program``, and so is why it failed.
    """
    graph, whole = grouping.graph, trials.recording
    if not can_tell(whole, macs(graph) * graph.batch):
        return False
    flow = whole.flow
    try:
        found = record(small, trials.example_inputs, trials.functions, flow.decisions, flow.loose, light=program)
    except TraceError:
        return False
    return not program.kept() and is_same(
        whole, found, grouping.classes, lost(grouping.group_of, grouping.channel_of, masks(graph, plan.removed))
    )


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
    """Compare in fp64; outputs that jump tell nothing, and what layers make is compared in their stead."""
    found = compare(model, small, plan, inputs, limit)
    if not found.mismatched and found.error > limit and jumps(model, small, plan, inputs, limit):
        found.error = 0.0
    return found


def _frames(error: BaseException, model: nn.Module) -> list[tuple[str, str]]:
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


def _blamed(grouping: Grouping, chosen: list[int], frames: list[tuple[str, str]], reason: str) -> list[Failure]:
    """Return the groups that an assumption about the failing line of the failing module concerns."""
    wanted = set(chosen)
    for source, module in reversed(frames):
        blamed: dict[int, None] = {}
        for site in grouping.sites:
            if site.cause.source == source and site.cause.module == module and site.options[site.choice] != "freeze":
                blamed |= dict.fromkeys(_concerned(grouping, site))
        found = [i for i in blamed if i in wanted]
        if found:
            return [Failure(i, reason, (source,)) for i in found]
    return []


def _handled(grouping: Grouping, chosen: list[int], frames: list[tuple[str, str]]) -> list[int]:
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


def _mismatched(grouping: Grouping, chosen: list[int], layers: dict[str, list[int]]) -> list[Failure]:
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


def give_up(
    failures: list[Failure],
    grouping: Grouping,
    flow: Flow,
    decisions: dict[int, int],
    banned: dict[tuple[str, int], Cause],
) -> bool:
    """Take the next option of the assumptions behind the failures; without any left, keep the group's channels.

    Returns:
        Whether labels flow otherwise now: not where channels are just kept, as they went with these until now.
    """
    changed: list[Site] = []
    for failure in failures:
        blamed = _alternatives(grouping, failure)
        for site in blamed:
            changed.append(site)
            decisions[site.key] = site.choice + 1
        if not blamed:
            for member in grouping.graph.groups[failure.group].members:
                if member.role is Role.PRODUCER:
                    banned[member.tensor, member.dim] = _cause(grouping, failure)
    # A cut laid constraints on its parts, which only another run is without.
    kept = [s for s in changed if s.options[decisions[s.key] :] == ("freeze",) and s.options[s.choice] not in _OF_CUTS]
    for site in kept:
        flow.give_up(site)
    return len(kept) < len(changed)


def _cause(grouping: Grouping, failure: Failure) -> Cause:
    """Return what to show as the cause of a failure: the operator call on the failing line, where one is known."""
    concerned = [
        site for site in grouping.sites if (grouping.group_of[grouping.classes[site.labels]] == failure.group).any()
    ]
    for source in reversed(failure.sources):
        for site in concerned:
            if site.cause.source == source:
                return Cause(site.cause.operator, site.cause.module, source, failure.reason)
    source = failure.sources[-1] if failure.sources else ""
    return Cause("trial pruning", grouping.graph.groups[failure.group].name, source, failure.reason)
