"""How much to remove, and of what: MACs, parameters, channels, run-time memory or time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.errors import UsageError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.network.kinds import checked_class
from secateur.pruning.allocation import Times

QUANTITIES = ("macs", "params", "channels", "memory", "latency")
"""What a target may count."""
RUNTIMES = ("onnxruntime", "eager")
_SETTING: dict[str, Any] = {"batch": 8, "runtime": RUNTIMES[0], "threads": 1}
"""What latency is counted at, where the target does not say."""


@checked_class
@dataclass(frozen=True)
class Target:
    """How much to remove: each a fraction of the unpruned network's, in (0, 1); exactly one is given."""

    macs: float | None = None
    params: float | None = None
    channels: float | None = None
    memory: float | None = None
    """Run-time memory TRM, see :func:`secateur.graph.cost.run_time_memory`."""
    latency: float | None = None
    """Time of a forward pass on this machine, see :func:`secateur.latency`."""
    batch: int | None = None
    """Examples that memory and latency are counted with; 8 unless given."""
    runtime: str | None = None
    """Of latency: ``onnxruntime``, as unless given, or ``eager``."""
    threads: int | None = None
    """Of latency: threads of one operator; 1 unless given."""

    def __post_init__(self) -> None:
        """Check the fractions, and what they are counted with.

        Raises:
            UsageError: If not exactly one fraction is given, it is outside (0, 1), or a setting does not belong to it.
        """
        given = {name: getattr(self, name) for name in QUANTITIES if getattr(self, name) is not None}
        if len(given) != 1:
            raise UsageError(
                f"target: give exactly one of {', '.join(QUANTITIES[:-1])} and {QUANTITIES[-1]}; "
                f"found {', '.join(given) or 'none'}."
            )
        for name, value in given.items():
            if not 0 < value < 1:
                raise UsageError(f"target: {name} is the fraction to remove, between 0 and 1; found {value}.")
        for name, of in (("batch", ("memory", "latency")), ("runtime", ("latency",)), ("threads", ("latency",))):
            value = getattr(self, name)
            if value is not None and self.what not in of:
                raise UsageError(f"target: {name} says nothing of {self.what}; leave it out, or ask for {of[-1]}.")
            if value is not None and name != "runtime" and (not isinstance(value, int) or value < 1):
                raise UsageError(f"target: {name} is a whole number from 1 up; found {value!r}.")
        if self.runtime is not None and self.runtime not in RUNTIMES:
            raise UsageError(f"target: runtime is {' or '.join(RUNTIMES)}; found {self.runtime!r}.")

    @property
    def what(self) -> str:
        """The quantity that the target counts."""
        return next(name for name in QUANTITIES if getattr(self, name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction of it to remove."""
        return float(getattr(self, self.what))

    @property
    def setting(self) -> dict[str, Any]:
        """What the quantity is counted at: ``batch`` of memory; ``batch``, ``runtime`` and ``threads`` of latency."""
        names = {"memory": ("batch",), "latency": tuple(_SETTING)}.get(self.what, ())
        return {name: _SETTING[name] if getattr(self, name) is None else getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return what was given, by which the target can be made again."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def removed(self, graph: ChannelGraph, plan: PruningPlan, costs: Times | None = None) -> float:
        """Return the fraction of the quantity that a plan removes.

        Args:
            graph: The traced network.
            plan: A plan made for it.
            costs: Times of the network's layers, for latency.

        Raises:
            UsageError: If latency is counted, and ``costs`` are missing or of another setting.
        """
        if self.what == "channels":
            total = sum(g.size for g in graph.groups)
            return sum(len(v) for v in plan.removed.values()) / total if total else 0.0
        before, after = self._count(graph, None, costs), self._count(graph, plan, costs)
        return 1 - after / before if before else 0.0

    def _count(self, graph: ChannelGraph, plan: PruningPlan | None, costs: Times | None) -> float:
        if self.what == "latency":
            return self.require_times(costs).seconds(graph, plan)
        if self.what == "memory":
            return cost.run_time_memory(graph, plan, self.setting["batch"])
        return (cost.macs if self.what == "macs" else cost.parameters)(graph, plan)

    def require_times(self, costs: Times | None) -> Times:
        """Return the times that latency is counted by.

        Raises:
            UsageError: If there are none, or they were measured at another setting than the target asks for.
        """
        if costs is None:
            raise UsageError(
                "target: latency is counted by times of layers: pass costs=secateur.latency(model, graph), or use "
                "secateur.prune, which measures them."
            )
        for name in _SETTING:
            asked, found = getattr(self, name), getattr(costs, name)
            if asked is not None and asked != found:
                raise UsageError(f"target: {name} is {asked}, and costs were measured with {found}; make them agree.")
        return costs
