"""The search for assumptions that hold: every group loses a part of its channels, and what fails is tried otherwise.

Every group loses about half of its channels; those whose number the code has been told lose, in a further trial, all
but two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from secateur.graph.channels import ChannelGroup, Role
from secateur.graph.steps import steps
from secateur.tracing.assumptions import CUTS, FREEZE, Assumption
from secateur.tracing.grouping import Grouping
from secateur.tracing.trial.attempt import Picked, Trials, attempt, key_of, told
from secateur.tracing.trial.blame import Failure, Outcome

_FEW = 2
"""So many suspects are tried one by one."""


def failing(trials: Trials, grouping: Grouping) -> list[Failure]:
    """Return the groups that the network can't be pruned in as assumed; empty when all is well."""
    failures: list[Failure] = []
    for picked in _selections(trials, grouping):
        chosen = [i for i, channels in enumerate(picked) if channels]
        while chosen:
            found = _failures(trials, grouping, chosen, picked)
            if not found:
                break
            failures += found
            gone = {failure.group for failure in found}
            chosen = [i for i in chosen if i not in gone]
        if failures:
            return failures
    _find_least(trials, grouping)
    return []


def _failures(trials: Trials, grouping: Grouping, chosen: list[int], picked: Picked) -> list[Failure]:
    """Try to prune these groups; return those that fail, with others that will fail for the same reason."""
    outcome = attempt(trials, grouping, chosen, picked) if chosen else None
    if outcome is None:
        return []
    found = outcome.failures or _isolate(trials, grouping, chosen, outcome, picked)
    return found + _alike(grouping, chosen, found)


def _selections(trials: Trials, grouping: Grouping) -> Iterator[Picked]:
    """Yield what to remove: of every group a part at random, then of every vector cut anywhere the first, the last end.

    Code that cuts in proportion to what is left computes the same as code that cuts at given widths, as long as all
    blocks lose the same; it is told apart where one block loses all that it can, and the others nothing.
    """
    yield [trials.part(index, group) for index, group in enumerate(grouping.graph.groups)]
    cuts = [a for a in grouping.assumptions if a.blocks and a.option in ("widths", "parts")]
    for end in (0, -1) if cuts else ():
        yield _of_one_end(grouping, cuts, end)


def _of_one_end(grouping: Grouping, cuts: list[Assumption], end: int) -> Picked:
    """Choose all that can go of one end of every cut vector, and so that what is left can't be cut in equal parts."""
    own, graph = grouping.partition, grouping.graph
    ends: dict[int, list[int]] = {}
    for cut in cuts:
        block = cut.blocks[end]
        for group, channel in zip(own.groups(block).tolist(), own.channels(block).tolist(), strict=True):
            if group >= 0:
                ends.setdefault(group, []).append(channel)
    taken: dict[int, list[list[int]]] = {}
    for index, inside in ends.items():
        group = graph.groups[index]
        mine = set(inside)
        found = steps(group, list(dict.fromkeys([*inside, *range(group.size)])))
        taken[index] = [step for step in found if mine.issuperset(step)] or found[:1]
    for cut in cuts:
        groups, channels = own.groups(cut.labels), own.channels(cut.labels)
        gone = sum(int(np.isin(channels[groups == i], list(chain(*taken[i]))).sum()) for i in taken)
        long = [i for i in own.among(cut.labels) if len(taken.get(i, ())) > 1]
        if (cut.labels.size - gone) % len(cut.blocks) == 0 and long:
            taken[long[0]].pop()
    return [sorted(chain(*taken.get(i, []))) for i in range(len(graph.groups))]


def _find_least(trials: Trials, grouping: Grouping) -> None:
    """Find how many channels have to stay, where the code has been told their number: below some it may do otherwise.

    Two stay where two may: one has ways of its own, such as to be broadcast. A group that fails keeps as many as it had
    in the trial that it passed.
    """
    groups = grouping.graph.groups
    picked: Picked = [[] for _ in groups]
    low: dict[int, int] = {}
    for i in told(trials, grouping):
        left = groups[i].size - len(trials.part(i, groups[i]))
        low[i] = trials.least.get(key_of(groups[i]), min(2, left))
        picked[i] = _down_to(groups[i], low[i]) if groups[i].exact else []
    while failures := _failures(trials, grouping, [i for i, channels in enumerate(picked) if channels], picked):
        for i in (failure.group for failure in failures):
            part = trials.part(i, groups[i])
            # A second time it is not its own number that matters: nothing goes of it.
            picked[i] = part if picked[i] != part else []
            low[i] = groups[i].size - len(picked[i])
    trials.least |= {key_of(groups[i]): least for i, least in low.items()}


def _down_to(group: ChannelGroup, least: int) -> list[int]:
    """Return all channels of a group that can go where so many stay."""
    return sorted(chain(*steps(replace(group, least=least), range(group.size))))


def _isolate(trials: Trials, grouping: Grouping, chosen: list[int], failed: Outcome, picked: Picked) -> list[Failure]:
    """Return failures of some of the groups, which together fail without telling where (delta debugging).

    Suspects are tried first, one by one and all together. Otherwise the shortest sequence that fails is looked for, by
    halving: its last group is to blame, and those before it can go.
    """
    if len(failed.suspects) < len(chosen):
        for part in [*([[i] for i in failed.suspects] if len(failed.suspects) <= _FEW else []), failed.suspects]:
            outcome = attempt(trials, grouping, part, picked) if part else None
            if outcome is not None:
                return outcome.failures or _isolate(trials, grouping, part, outcome, picked)
    order = [*(i for i in chosen if i not in failed.suspects), *failed.suspects]
    passing = 0
    while len(order) - passing > 1:
        middle = (passing + len(order)) // 2
        outcome = attempt(trials, grouping, order[:middle], picked)
        if outcome is None:
            passing = middle
        elif outcome.failures:
            return outcome.failures
        else:
            order, failed = order[:middle], outcome
    return [Failure(order[-1], failed.reason, failed.sources)]


def _alike(grouping: Grouping, chosen: list[int], failures: list[Failure]) -> list[Failure]:
    """Return failures of further groups: of the same assumption about the same line, or of a block's repetitions.

    A network repeats its blocks, and to find each one's failure by runs of its own would take as many times as long.
    """
    lines: dict[int, set[object]] = {i: set() for i in chosen}
    about = {}
    for assumption in grouping.assumptions:
        line = assumption.cause.source, assumption.options, assumption.choice
        for i in grouping.concerned(assumption):
            lines.setdefault(i, set()).add(line)
        about[id(assumption)] = line
    found: dict[int, Failure] = {}
    for failure in failures:
        blamed = {about[id(a)] for a in failure.assumptions(grouping)}
        kind = _kind(grouping.graph.groups[failure.group])
        for i in chosen:
            repeated = lines[failure.group] == lines[i] and lines[i] and kind == _kind(grouping.graph.groups[i])
            if not blamed.isdisjoint(lines[i]) or repeated:
                found.setdefault(i, replace(failure, group=i))
    return [failure for i, failure in found.items() if i not in {f.group for f in failures}]


def _kind(group: ChannelGroup) -> frozenset[object]:
    """Tell groups apart by their layers: names without numbers, and roles."""
    return frozenset((re.sub(r"\d+", "#", m.tensor), m.dim, m.role) for m in group.members)


def give_up(trials: Trials, grouping: Grouping, failures: list[Failure]) -> bool:
    """Take the next option of the assumptions behind the failures; without any left, keep the group's channels.

    Returns:
        Whether labels flow otherwise now: not where channels are just kept, as they went with these until now.
    """
    changed: dict[int, Assumption] = {}
    otherwise = False
    for failure in failures:
        blamed = failure.assumptions(grouping)
        for assumption in blamed:
            changed.setdefault(id(assumption), assumption)
        if not blamed:
            for member in grouping.graph.groups[failure.group].members:
                if member.role is Role.PRODUCER:
                    trials.assumptions.keep(member.tensor, member.dim, failure.cause(grouping))
    for assumption in changed.values():
        # A cut laid constraints on its parts, which only another run is without.
        otherwise |= assumption.following != FREEZE or assumption.option in CUTS
        trials.assumptions.take_next(assumption)
        if assumption.option == FREEZE:
            trials.recording.found.freeze(assumption.labels, assumption.cause)
    return otherwise
