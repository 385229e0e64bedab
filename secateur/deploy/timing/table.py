"""A table of the times of a network's layers over their widths: what it costs, where time is what counts."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from secateur.checkpoint.tables import read_table, write_table
from secateur.errors import PlanError
from secateur.graph.channels import ChannelGraph, LayerPort
from secateur.graph.cost import layer_costs
from secateur.graph.plan import PruningPlan
from secateur.graph.structure import checked
from secateur.pruning.allocation import CostOf

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Grid:
    """Seconds of a layer over channels in and out; a depthwise layer's over channels alone, with one row."""

    wide: list[int]
    made: list[int]
    seconds: list[list[float]]
    steps: tuple[int, int] = (1, 1)
    """Between two multiples of a step, of channels in and out, a layer takes as long as at the upper one."""


@dataclass(frozen=True, repr=False)
class Latency:
    r"""Times of a network's layers on one machine; ``costs=`` of :func:`secateur.plan` takes it.

    A forward pass takes :math:`a + s \sum_l t_l(in_l, out_l) + m \sum_l v_l(out_l)` seconds: t is measured for each
    layer by itself, v counts the values that it makes, which norms, activations and sums go over, and a, s and m are
    fitted to the whole network at a few widths.
    """

    batch: int
    runtime: str
    threads: int
    machine: dict[str, Any]
    """What the times depend on: processor, cores, versions."""
    network: int
    """Checksum of the layers that it is of."""
    layers: list[int]
    """Of each call of a layer the index of its grid; -1 where it has none, as a layer class of the user's own."""
    grids: list[Grid]
    odd: list[Grid | None]
    """The same where the channels in are no multiple of the step, which takes a slower way; None where none does."""
    overhead: float
    """a, seconds that do not depend on widths."""
    scale: float
    """s, how much longer layers take in the network than by themselves."""
    file: ClassVar[str] = ""
    """Where the times were read from, which messages name."""
    per_value: float
    """m, seconds for each value that a layer makes."""
    fit: list[tuple[float, float]]
    """Seconds of the whole network as measured and as fitted: unpruned first, then at falling widths."""

    def require_of(self, graph: ChannelGraph) -> None:
        """Refuse a network that this was not measured on.

        Raises:
            PlanError: If layers differ.
        """
        if checksum(graph) != self.network:
            raise PlanError(
                f"{self.file or 'costs'}: these times are of another network: measure them of this one "
                "(secateur.latency)."
            )

    def of(self, graph: ChannelGraph) -> CostOf:
        """Return the seconds of a forward pass by the channels that each group loses, shape ``(..., G)`` -> ``(...)``.

        Where a layer reads only some of a group's channels, each counts as its share.

        Raises:
            PlanError: If the times are of another network.
        """
        self.require_of(graph)
        ports = ports_of(graph)
        sizes = np.array([group.size for group in graph.groups], dtype=float)

        def shares(of_group: np.ndarray | None) -> np.ndarray:
            found = of_group[of_group >= 0] if of_group is not None else np.zeros(0, dtype=int)
            return np.asarray(np.bincount(found, minlength=len(sizes)) / sizes)

        read = np.array([shares(p.in_group) for p in ports]).reshape(len(ports), len(sizes)).T
        made = np.array([shares(p.out_group) for p in ports]).reshape(len(ports), len(sizes)).T
        whole = np.array([(p.in_channels, p.out_channels) for p in ports], dtype=float).reshape(-1, 2).T
        total = self._total(graph, ports)
        return lambda removed: total(whole[0] - removed @ read, whole[1] - removed @ made)

    def seconds(self, graph: ChannelGraph, plan: PruningPlan | None = None) -> float:
        """Return the seconds of a forward pass of the network that a plan leaves.

        Raises:
            PlanError: If the times are of another network.
        """
        self.require_of(graph)
        left = layer_costs(graph, plan)
        widths = np.array([(layer.in_channels, layer.out_channels) for layer in left], dtype=float).reshape(-1, 2).T
        return float(self._total(graph, ports_of(graph))(widths[0], widths[1]))

    def _total(self, graph: ChannelGraph, ports: Sequence[LayerPort]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        timed = [i for i, place in enumerate(self.layers) if place >= 0]
        even = Lookup([self.grids[self.layers[i]] for i in timed])
        slower = [self.odd[self.layers[i]] for i in timed]
        odd = Lookup([other or self.grids[self.layers[i]] for i, other in zip(timed, slower, strict=True)])
        differs = np.array([other is not None for other in slower], dtype=bool)
        values = np.array([p.positions * self.batch / graph.batch for p in ports])

        def total(wide: np.ndarray, made: np.ndarray) -> np.ndarray:
            read, out = wide[..., timed].round(6), made[..., timed].round(6)
            first = np.where(even.alone, out, read)
            off = differs & (first % even.steps[0] > 0)
            seconds = even(read, out)
            if off.any():  # what takes the slower way is never faster than at the step above
                seconds = np.where(off, np.maximum(odd(read, out), seconds), seconds)
            return np.asarray(self.overhead + self.scale * seconds.sum(-1) + self.per_value * (made @ values))

        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        write_table(path, FORMAT_VERSION, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Latency:
        """Read what :meth:`save` has written.

        Raises:
            UsageError: If the file is not there or not of this form.
        """
        return read_table(path, FORMAT_VERSION, "table of times", "secateur.latency measures one.", cls)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Latency:
        """Make it of plain data, as ``dataclasses.asdict`` gives them and JSON keeps them.

        Raises:
            ValueError: If they are of another form.
        """
        return checked(cls, dict(given))

    def __repr__(self) -> str:
        return f"Latency({len(self.grids)} layers, batch {self.batch}, {self.runtime}, {self.threads} threads)"

    def __str__(self) -> str:
        lines = [f"batch {self.batch}, {self.runtime}, {self.threads} threads, {self.machine.get('processor', '')}"]
        lines += [
            f"whole network: {1000 * seen:.3g} ms, by layers {1000 * fitted:.3g} ms ({fitted / seen - 1:+.1%})"
            for seen, fitted in self.fit
        ]
        return "\n".join(lines)


class Lookup:
    """Times of several layers at once, bilinear between the widths that were measured."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        rows = max((len(g.wide) for g in grids), default=1) + 1
        columns = max((len(g.made) for g in grids), default=1) + 1
        self._wide, self._made = np.full((len(grids), rows), np.inf), np.full((len(grids), columns), np.inf)
        self._seconds = np.zeros((len(grids), rows, columns))
        for i, grid in enumerate(grids):
            self._wide[i, : len(grid.wide)], self._made[i, : len(grid.made)] = grid.wide, grid.made
            own = np.array(grid.seconds)
            self._seconds[i] = np.pad(own, [(0, rows - own.shape[0]), (0, columns - own.shape[1])], mode="edge")
        self.alone = np.array([g.wide == [0] for g in grids], dtype=bool)
        """Which layers have channels of one kind, those that they make."""
        self.steps = np.array([g.steps for g in grids], dtype=float).reshape(-1, 2).T

    def __call__(self, wide: np.ndarray, made: np.ndarray) -> np.ndarray:
        """Return seconds for widths of shape ``(..., L)``, of the same shape."""
        wide, made = (np.ceil(w / s) * s for w, s in zip((wide, made), self.steps, strict=True))
        place = np.arange(len(self._wide))
        i, right = self._between(self._wide, wide)
        j, below = self._between(self._made, made)
        near = self._seconds[place, i, j] * (1 - below) + self._seconds[place, i, j + 1] * below
        far = self._seconds[place, i + 1, j] * (1 - below) + self._seconds[place, i + 1, j + 1] * below
        return np.asarray(near * (1 - right) + far * right)

    @staticmethod
    def _between(nodes: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the node below and how far it is to the next; outside, the nearest node stands for all."""
        last = np.isfinite(nodes).sum(1) - 1
        place = np.arange(len(nodes))
        at = np.clip(at, nodes[:, 0], nodes[place, last])
        low = np.clip((at[..., None] >= nodes).sum(-1) - 1, 0, last)
        return low, (at - nodes[place, low]) / (nodes[place, low + 1] - nodes[place, low])


def ports_of(graph: ChannelGraph) -> list[LayerPort]:
    """Return every call of a convolution or linear layer, as costs count them."""
    return [port for port in graph.layers if port.kind != "registered"]


def checksum(graph: ChannelGraph) -> int:
    """Return a number that tells networks of other layers apart."""
    parts = [
        (p.name, p.kind, p.in_channels, p.out_channels, p.groups, p.window, p.positions / graph.batch)
        for p in ports_of(graph)
    ]
    return zlib.crc32(repr(parts).encode())
