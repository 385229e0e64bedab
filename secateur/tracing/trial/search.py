"""Trial prunings: is what was assumed of the user's own code true?

Every group loses about half of its channels, and where the code counts with their number, all but two. What fails is
traced back to the assumption behind it; the next one is tried, or the channels are kept and listed with the line that
failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from secateur.graph.channels import Role
from secateur.graph.steps import steps
from secateur.tracing.findings import Cause, Site
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Labels
from secateur.tracing.trial.attempt import Outcome, Picked, Trials, attempt, key_of, measured
from secateur.tracing.trial.blame import Failure, concerned

if TYPE_CHECKING:
    from secateur.graph.channels import ChannelGroup
    from secateur.tracing.grouping import Grouping

_OF_CUTS = ("widths", "whole", "equal", "share", "parts")
_FEW = 2
"""So many suspects are tried one by one."""


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
            outcome = attempt(trials, grouping, chosen, picked)
            if outcome is None:
                break
            found = outcome.failures or _isolate(trials, grouping, chosen, outcome, picked)
            found += _alike(trials, grouping, chosen, found)
            failures += found
            gone = {failure.group for failure in found}
            chosen = [i for i in chosen if i not in gone]
        if failures:
            break
    if measured(trials, grouping)[0] and not failures:
        _find_least(trials, grouping)
    return failures


def _find_least(trials: Trials, grouping: Grouping) -> None:
    """Find how many channels have to stay, where the code counts with their number: below some it may do otherwise.

    Two stay where two may: one has ways of its own, such as to be broadcast. A group that fails keeps as many as it had
    in the trial that it passed.
    """
    groups = grouping.graph.groups
    keys = [key_of(group) for group in groups]
    left = [group.size - len(trials.part(i, group)) for i, group in enumerate(groups)]
    low = [trials.least.get(key, min(2, n)) for key, n in zip(keys, left, strict=True)]
    picked = [_down_to(group, least) if group.exact else [] for group, least in zip(groups, low, strict=True)]
    while True:
        chosen = [i for i, channels in enumerate(picked) if channels]
        outcome = attempt(trials, grouping, chosen, picked) if chosen else None
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
                for i in concerned(grouping, site):
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


def _kinds(grouping: Grouping) -> dict[int, tuple[object, ...]]:
    """Tell groups apart by the lines that handle them and by their layers: names without numbers, and roles."""
    lines: dict[int, set[object]] = {}
    for site in grouping.sites:
        for i in concerned(grouping, site):
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


def _isolate(trials: Trials, grouping: Grouping, chosen: list[int], failed: Outcome, picked: Picked) -> list[Failure]:
    """Return failures of some of the groups, which together fail without telling where.

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
