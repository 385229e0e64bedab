"""How many channels each group loses, by a table of what that does to the network: a multiple-choice knapsack.

A plan costs a sum of products: a convolution's multiply-accumulate operations are its inputs times its outputs, and
both may shrink. The knapsack needs costs that add up, so what a group saves is counted with all others at half of what
they lose, which for products of two adds up to what all save together; it is solved, and counted anew, until it stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from secateur.errors import PlanError, UsageError
from secateur.graph.channels import ChannelGraph, LayerPort
from secateur.graph.plan import PruningPlan

CostOf = Callable[[np.ndarray], np.ndarray]
"""What a network costs where so many channels of each group go: shape ``(..., G)`` -> ``(...)``."""

_GRID = 8192
"""Cells that what is to be saved is divided into; a saving is rounded down to whole cells, so that no budget breaks."""
_ROUNDS = 24
"""How often costs are counted anew at most."""


class Table(Protocol):
    """What each group loses by losing channels, as :class:`secateur.Sensitivity` has measured it."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Group -> number of its channels."""

    @property
    def damage(self) -> Mapping[str, Mapping[int, float]]:
        """Group -> channels removed -> damage."""


@runtime_checkable
class Times(Protocol):
    """Times of a network's layers over their widths on one machine, as :func:`secateur.latency` has measured them."""

    @property
    def batch(self) -> int:
        """Examples in a forward pass."""

    @property
    def runtime(self) -> str:
        """What runs it."""

    @property
    def threads(self) -> int:
        """Threads of one operator."""

    def of(self, graph: ChannelGraph) -> CostOf:
        """Return the seconds of a forward pass by the channels that each group loses."""

    def seconds(self, graph: ChannelGraph, plan: PruningPlan | None = None) -> float:
        """Return the seconds of a forward pass of the network that a plan leaves."""


@dataclass(frozen=True)
class Choices:
    """What one group may lose."""

    group: str
    removed: np.ndarray
    """Numbers of channels that may go, ascending from 0."""
    damage: np.ndarray
    """What each does to the network."""


def choices(table: Table, group: str, size: int, removed: Sequence[int]) -> Choices:
    """Return what a group may lose, and the damage that the table tells of it.

    The table is measured at some widths. Between two of them the damage is taken as linear; and, since measurement has
    noise, as never smaller where more goes (monotone repair). Nothing is assumed beyond the smallest width measured.

    Raises:
        PlanError: If the table has no such group, or one of another size.
    """
    if table.sizes.get(group) != size:
        found = f"{table.sizes[group]} channels" if group in table.sizes else "nothing"
        raise PlanError(
            f"{group}: the allocation's table knows {found} of it, and it has {size} channels: measure the sensitivity "
            "of this very network."
        )
    at, repaired = curve(table.damage[group])
    own = np.array([0, *(n for n in removed if 0 < n <= at[-1])], dtype=np.int64)
    return Choices(group, own, np.interp(own, at, repaired))


def curve(damage: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many channels go, from 0 up, and the damage of each, never smaller where more go."""
    measured = {0: 0.0} | dict(damage)
    at = np.array(sorted(measured))
    return at, np.maximum.accumulate([measured[n] for n in at.tolist()])


@dataclass(frozen=True)
class Costs:
    r"""A cost as a sum of products: :math:`\sum_t a_t \prod_d (n_{td} - \sum_g s_{tdg} k_g)`, k channels removed."""

    coefficient: np.ndarray
    """a, shape ``(T,)``."""
    sizes: np.ndarray
    """n, shape ``(T, D)``."""
    shares: np.ndarray
    """s, shape ``(T, D, G)``: how many of each dimension go with one channel of a group, on average."""

    def __call__(self, removed: np.ndarray) -> np.ndarray:
        """Return the costs where so many channels go, shape ``(..., G)`` -> ``(...)``."""
        left = self.sizes - np.einsum("tdg,...g->...td", self.shares, removed)
        return np.array(left.prod(-1) @ self.coefficient)


def costs_of(graph: ChannelGraph, what: str, batch: int = 1) -> Costs:
    """Return a network's cost: ``macs``, ``params``, ``memory`` (TRM in bytes) or ``channels``.

    Where a layer reads only some of a group's channels, each counts as its share, whichever goes. What a plan costs in
    the end is counted by :mod:`secateur.graph.cost`.
    """
    places = {group.name: i for i, group in enumerate(graph.groups)}
    count = len(graph.groups)
    group_sizes = np.array([group.size for group in graph.groups], dtype=float)
    terms: list[tuple[float, list[tuple[float, np.ndarray]]]] = []

    def side(size: int, of_group: np.ndarray | None) -> tuple[float, np.ndarray]:
        found = of_group[of_group >= 0] if of_group is not None else np.zeros(0, dtype=int)
        return float(size), np.bincount(found, minlength=count) / group_sizes

    def layer(port: LayerPort) -> tuple[float, list[tuple[float, np.ndarray]]]:
        made = side(port.out_channels, port.out_group)
        if port.groups > 1 and port.groups == port.in_channels:
            return float(port.kernel), [made]
        return port.kernel / port.groups, [side(port.in_channels, port.in_group), made]

    if what == "channels":
        terms = [(1.0, [(float(g.size), np.eye(count)[i])]) for i, g in enumerate(graph.groups)]
    elif what == "params":
        dims = {name: [(float(n), np.zeros(count)) for n in graph.shapes[name]] for name in graph.parameters}
        for group in graph.groups:
            for member in group.members:
                if member.tensor in dims:
                    share = dims[member.tensor][member.dim][1]
                    share[places[group.name]] += len(member.channels) / member.blocks / group.size
        terms = [(1.0, sides or [(1.0, np.zeros(count))]) for sides in dims.values()]
    else:
        for port in graph.layers:
            if port.kind == "registered":
                continue
            coefficient, sides = layer(port)
            positions = port.positions // graph.batch
            if what == "macs":
                terms.append((coefficient * positions, sides))
            else:  # singh2020cfp, eqs. 4 and 5
                terms += [(4.0 * coefficient, sides), (4.0 * positions * batch, [sides[-1]])]
    deep = max((len(sides) for _, sides in terms), default=1)
    padded = [[*sides, *[(1.0, np.zeros(count))] * (deep - len(sides))] for _, sides in terms]
    return Costs(
        np.array([coefficient for coefficient, _ in terms]),
        np.array([[size for size, _ in sides] for sides in padded]).reshape(-1, deep),
        np.array([[share for _, share in sides] for sides in padded]).reshape(-1, deep, count),
    )


def paying(costs: CostOf, group: int, groups: int, ends: np.ndarray) -> np.ndarray:
    """Tell at which of the numbers of channels removed a group costs clearly less than where it loses fewer.

    Time falls in stairs: a vector unit takes as long for seven channels as for eight. A width pays that saves, since
    the one before it that does, at least half of what its channels save on the group's average.

    Args:
        costs: The network's cost; all other groups are whole.
        group: Index of the group.
        groups: How many there are.
        ends: Numbers of channels that may go, ascending.
    """
    removed = np.zeros((len(ends) + 1, groups))
    removed[1:, group] = ends
    found = costs(removed)
    pays = np.zeros(len(ends), dtype=bool)
    each = max((float(found[0]) - float(found.min())) / max(float(removed[found.argmin(), group]), 1.0), 0.0)
    last = 0
    for i, end in enumerate(ends.tolist(), start=1):
        saved = float(found[last] - found[i])
        if saved > 1e-9 * float(found[0]) and saved >= 0.5 * each * (end - float(removed[last, group])):
            pays[i - 1], last = True, i
    return pays


def allocate(
    graph: ChannelGraph, costs: CostOf, found: Sequence[Choices], start: np.ndarray, need: float
) -> np.ndarray:
    """Choose what every group loses, for the least damage in sum under a budget.

    Args:
        graph: The traced network.
        costs: What is saved.
        found: The choices of the groups that may lose any.
        start: What groups outside ``found`` lose, shape ``(G,)``.
        need: How much to save.

    Returns:
        Channels removed of every group of the graph, shape ``(G,)``; all that may go where that saves too little.
    """
    places = {group.name: i for i, group in enumerate(graph.groups)}
    index = np.array([places[one.group] for one in found], dtype=int)
    budget = float(costs(np.zeros(len(places)))) - need
    most = start.copy()
    most[index] = [one.removed[-1] for one in found]
    best, best_damage = most, np.inf
    for share in (0.5, 1.0):
        current, over = start if share < 1 else best, 0.0
        for _ in range(_ROUNDS):
            # A group's choices are counted with the others at a share of what they lose now: at half, what all save
            # adds up where costs are products of two; at all of it, where it changes little from round to round.
            savings = [_savings(costs, share * current, i, one.removed) for i, one in zip(index, found, strict=True)]
            picked = knapsack(
                savings, [one.damage for one in found], _asked(costs, current, start, index, share, budget) + over
            )
            following = start.copy()
            following[index] = [one.removed[p] for one, p in zip(found, picked, strict=True)]
            left = float(costs(following)) - budget
            damage = sum(float(one.damage[p]) for one, p in zip(found, picked, strict=True))
            if left <= 1e-9 * (budget + need) and damage < best_damage:
                best, best_damage = following, damage
            if (following == current).all():
                break
            over += 0.5 * max(left, 0.0)
            current = following
    return _with_slack_spent(costs, budget, best, index, found)


def _savings(costs: CostOf, others: np.ndarray, group: int, removed: np.ndarray) -> np.ndarray:
    """Return what a group saves by each choice, where the others lose so many."""
    at = np.repeat(others[None], len(removed) + 1, 0)
    at[:, group] = [0, *removed]
    values = costs(at)
    saved: np.ndarray = values[0] - values[1:]
    return saved


def _asked(
    costs: CostOf, current: np.ndarray, start: np.ndarray, index: np.ndarray, share: float, budget: float
) -> float:
    """Return how much the groups with a choice have to save in sum, by savings counted at a share of what is lost."""
    if share < 1:
        fixed = np.flatnonzero(start).tolist()
        saved = sum(float(_savings(costs, share * current, g, start[[g]])[0]) for g in fixed)
        return float(costs(np.zeros(len(start)))) - budget - saved
    now = sum(float(_savings(costs, current, g, current[[g]])[0]) for g in index.tolist())
    return now + float(costs(current)) - budget


def knapsack(savings: Sequence[np.ndarray], damage: Sequence[np.ndarray], need: float) -> list[int]:
    """Pick one choice of every group, so that all save enough and the damage is least (multiple-choice knapsack).

    Dynamic programming over what is saved so far, on a grid; exact for savings that are whole numbers of its cells.

    Args:
        savings: What each choice of each group saves.
        damage: What each does.
        need: How much to save in sum. Where that can't be, each group's largest saving is picked.

    Returns:
        The index of each group's choice.
    """
    cell = max(need, 0.0) / _GRID or np.inf
    whole = [np.minimum(np.floor(s / cell + 1e-9), _GRID).clip(0).astype(int).tolist() for s in savings]
    # The least damage by which so many cells are saved; the last stands for all that is needed, or more.
    least = np.full(_GRID + 1, np.inf)
    least[0 if need > 0 else -1] = 0.0
    before: list[np.ndarray] = []
    for steps, own in zip(whole, damage, strict=True):
        before.append(least)
        least = np.full(_GRID + 1, np.inf)
        for step, harm in zip(steps, own.tolist(), strict=True):
            least[step:] = np.minimum(least[step:], before[-1][: _GRID + 1 - step] + harm)
            least[-1] = min(least[-1], before[-1][_GRID - step :].min() + harm)
    if not np.isfinite(least[-1]):
        return [int(s.argmax()) for s in savings]
    picked: list[int] = []
    place = _GRID
    for states, steps, own in zip(before[::-1], whole[::-1], damage[::-1], strict=True):
        ways = []
        for p, (step, harm) in enumerate(zip(steps, own.tolist(), strict=True)):
            if place == _GRID:
                at = _GRID - step + int(states[_GRID - step :].argmin())
            elif step <= place:
                at = place - step
            else:
                continue
            ways.append((float(states[at]) + harm, p, at))
        _, p, place = min(ways)
        picked.append(p)
    return picked[::-1]


def _with_slack_spent(
    costs: CostOf, budget: float, removed: np.ndarray, index: np.ndarray, found: Sequence[Choices]
) -> np.ndarray:
    """Give channels back where the budget still allows it, those first whose loss does most damage."""
    removed = removed.copy()
    while True:
        options = []
        for i, one in zip(index.tolist(), found, strict=True):
            now = int(np.searchsorted(one.removed, removed[i]))
            for p in range(now - 1, -1, -1):
                less = removed.copy()
                less[i] = one.removed[p]
                if float(costs(less)) > budget * (1 + 1e-12):
                    break
                options.append((float(one.damage[now] - one.damage[p]), i, p, less))
        if not options:
            return removed
        removed = max(options, key=lambda option: (option[0], -option[1], option[2]))[3]


def require_known(what: object) -> None:
    """Refuse what is no allocation.

    Raises:
        UsageError: If it is none.
    """
    known = ("normalized", "global", "uniform")
    if not (what in known if isinstance(what, str) else hasattr(what, "damage") and hasattr(what, "sizes")):
        close = difflib.get_close_matches(what, known, n=1) if isinstance(what, str) else []
        hint = f"; did you mean {close[0]}?" if close else "."
        raise UsageError(f"allocation: expected {', '.join(known)} or a table of sensitivity; found {what!r}{hint}")
