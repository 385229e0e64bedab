r"""Sensitivity: what a network loses when one group keeps fewer channels, measured at several widths of each.

Each cell of the table is one experiment: the group alone is cut to a width, the layers that read it are refitted by
least squares, and the network's outputs are compared with the unpruned network's on a few hundred unlabelled images.
For outputs that are logits the damage is

.. math:: D = \frac{1}{N} \sum_n \mathrm{KL}(p_T(x_n) \,\Vert\, q_T(x_n)), \qquad T = 4,

p of the unpruned network, q of the cut one; for other outputs their squared error, as a fraction of their power; with
``loss`` and labels, by how much the mean loss rises. The refit takes its second moments from the unpruned network, so
that one run of it serves every width.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.checkpoint.tables import read_table, write_table
from secateur.compensation.cells import Cells, input_moments, passes
from secateur.compensation.damage import Loss, Reference
from secateur.compensation.sharing import require_possible, shared
from secateur.criteria import feature_maps
from secateur.criteria.scoring import score
from secateur.errors import PlanError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan
from secateur.graph.steps import steps
from secateur.graph.structure import checked
from secateur.network.inputs import tensors_of, unwrapped
from secateur.network.isolation import left_as_found
from secateur.network.named import tensors_named

FORMAT_VERSION = 1
LEVELS = 8
_MOST_GROUPS = 20

Share = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
"""``share(name, measure)`` -> the table, as JSON data, that is kept under the name; what ``measure()`` returns if none.

The name tells networks, images and widths, and what decides a number's last bits, so that what another has measured is
what one would have measured oneself, bit for bit.
"""


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """What each group's loss does to one network; ``allocation=`` of :func:`secateur.plan` takes it."""

    sizes: dict[str, int]
    """Group -> number of its channels."""
    damage: dict[str, dict[int, float]]
    """Group -> channels removed -> damage."""
    measure: str
    """``kl``, ``squared error`` or ``loss``."""
    images: int
    """How many it was measured on."""
    network: int
    """Checksum of the network's weights."""
    file: ClassVar[str] = ""
    """Where the table was read from, which messages name."""
    made_with: str = ""
    """Checksum of data and options, by which an interrupted measurement is told from another."""

    def __post_init__(self) -> None:
        """Refuse what no measurement makes.

        Raises:
            ValueError: If a group has no size.
        """
        if lost := sorted(self.damage.keys() - self.sizes.keys()):
            raise ValueError(f"damage.{lost[0]}: the group has no number of channels")

    def require_of(self, model: nn.Module) -> None:
        """Refuse a network that this was not measured on.

        Raises:
            PlanError: If weights differ.
        """
        if _checksum(tensors_named(unwrapped(model)).values()) != self.network:
            raise PlanError(
                f"{self.file or 'allocation'}: the table of sensitivity was measured with other weights: measure it of "
                "this network."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        write_table(path, FORMAT_VERSION, asdict(self), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON data."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what :meth:`save` has written.

        Raises:
            UsageError: If the file is not there or not of this form.
        """
        remedy = "secateur.sensitivity (secateur sensitivity) measures one."
        return read_table(path, FORMAT_VERSION, "table of sensitivity", remedy, cls)

    def figure(self, plan: PruningPlan | None = None) -> Any:
        """Return a Plotly figure, a curve a group, the most harmful first; with a plan, its widths are marked.

        Raises:
            UsageError: If what is given is no plan.
        """
        if plan is not None and not isinstance(plan, PruningPlan):
            raise UsageError(
                f"figure: takes a plan, whose widths are marked, found {plan!r}; what it returns writes a file by "
                ".write_html(path)."
            )
        from secateur.report.sensitivity import plotly_figure

        return plotly_figure(self, plan)

    def __repr__(self) -> str:
        return f"Sensitivity({len(self.damage)} groups, {self.measure} on {self.images} images)"

    def __str__(self) -> str:
        """Return the table, of many groups the most harmful ones."""
        return self.table(_MOST_GROUPS)

    def table(self, groups: int | None = None) -> str:
        """Return what each group loses at each width, the most harmful first.

        Args:
            groups: How many to show; all when None.
        """
        harm = sorted(self.damage.items(), key=lambda item: -max(item[1].values(), default=0.0))
        width = max((len(name) for name, _ in harm[:groups]), default=5)
        lines = [f"{'group':<{width}}  channels  removed: damage ({self.measure})"]
        for name, own in harm[:groups]:
            cells = "  ".join(f"{n}: {d:.2g}" for n, d in own.items())
            lines.append(f"{name:<{width}}  {self.sizes[name]:>8}  {cells}")
        if groups is not None and len(harm) > groups:
            lines.append(f"... and {len(harm) - groups} groups with less harm; print(table.table()) shows all")
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    graph: ChannelGraph,
    data: Iterable[Any],
    *,
    scores: Mapping[str, Tensor] | None = None,
    levels: int = LEVELS,
    loss: Loss | None = None,
    inexact: bool = False,
    groups: Iterable[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    memory: int = feature_maps.MEMORY,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    share: Share | None = None,
) -> Sensitivity:
    """Measure what each group loses at several widths.

    Args:
        model: The network; left as it is.
        graph: Its channel graph.
        data: Batches, see :func:`secateur.criteria.feature_maps.batches`; a few hundred images, which are held in
            memory. Labels are read for ``loss`` alone.
        scores: Which channels of a group go first; ``l2`` by default. After the refit it matters little.
        levels: Widths of each group, equally far apart, down to the smallest that there is.
        loss: ``loss(output, target)``; damage is then by how much its mean rises.
        inexact: Whether groups whose removal can't equal zeroing are measured, too.
        groups: Names of the groups to measure; all by default.
        path: A file that is written as measurement goes on, and read where it was interrupted.
        memory: Bytes of moments that are gathered at once.
        workers: Processes that share the groups; more than one need a network on the CPU, and a system that can fork.
            Each computes on one thread: the table is that of one process which does so, bit for bit.
        progress: Called with how many groups are measured, and how many there are.
        share: Where tables are kept for others, and found; see :data:`Share`. A table of anything else is not taken.

    Raises:
        UsageError: If ``levels`` or ``workers`` is out of range, or labels are missing for ``loss``.
        DataError: If the data are empty or don't fit the network.
        RunError: If one of several processes was killed.
    """
    if levels < 1:
        raise UsageError(f"sensitivity: levels is {levels}. Use 1 or more.")
    chosen = [g for g in feature_maps.chosen_groups(graph, groups) if g.exact or inexact]

    def evenly(_: str, totals: Sequence[int]) -> list[int]:
        places = {round(len(totals) * level / levels) for level in range(1, levels + 1)} - {0}
        return [totals[place - 1] for place in sorted(places)]

    return _measured(model, graph, data, chosen, evenly, scores, loss, path, memory, workers, progress, share)


def refined(
    model: nn.Module,
    graph: ChannelGraph,
    data: Iterable[Any],
    table: Sensitivity,
    plan: PruningPlan,
    *,
    scores: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    memory: int = feature_maps.MEMORY,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    share: Share | None = None,
) -> Sensitivity:
    """Measure around a plan's widths: halfway from what each group loses to the neighbours that the table knows.

    Two rounds of planning and refining find what a table of twice the levels does, for a quarter of its further cells.

    Args:
        model: The network; left as it is.
        graph: Its channel graph.
        data: What the table was measured on.
        table: The table.
        plan: A plan by it.
        scores: As for the table.
        loss: As for the table.
        memory: See :func:`sensitivity`.
        workers: See :func:`sensitivity`.
        progress: See :func:`sensitivity`.
        share: See :func:`sensitivity`.

    Returns:
        The table with the new cells among its own.

    Raises:
        PlanError: If the table is another network's.
        UsageError: If the table is of another measure than asked for.
        DataError: As :func:`sensitivity`.
        RunError: As :func:`sensitivity`.
    """
    table.require_of(model)
    chosen = feature_maps.chosen_groups(graph, table.damage)

    def between(name: str, totals: Sequence[int]) -> list[int]:
        known, own = {0, *table.damage[name]}, len(plan.removed.get(name, ()))
        below, above = max((n for n in known if n < own), default=own), min((n for n in known if n > own), default=own)
        wanted = ((own + below) / 2, own, (own + above) / 2)
        nearest = {min(totals, key=lambda n, at=at: abs(n - at)) for at in wanted if at} if totals else set()  # type: ignore[misc]
        return sorted(nearest - known)

    found = _measured(model, graph, data, chosen, between, scores, loss, None, memory, workers, progress, share)
    if (found.measure, found.images) != (table.measure, table.images):
        raise UsageError(
            "sensitivity: the table was measured on other data, or by another measure: refine it as it was."
        )
    damage = {name: dict(sorted((own | found.damage[name]).items())) for name, own in table.damage.items()}
    return replace(table, damage=damage, made_with=found.made_with)


def _measured(
    model: nn.Module,
    graph: ChannelGraph,
    data: Iterable[Any],
    chosen: Sequence[ChannelGroup],
    cells: Callable[[str, Sequence[int]], list[int]],
    scores: Mapping[str, Tensor] | None,
    loss: Loss | None,
    path: str | os.PathLike[str] | None,
    memory: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
    share: Share | None,
) -> Sensitivity:
    """Measure cells of a table.

    ``cells`` says which: of a group's name and all numbers of its channels that may go, those to measure.
    """
    model = unwrapped(model)
    device = feature_maps.device_of(model)
    require_possible(workers, device)
    held = list(feature_maps.batches(data, device))
    feature_maps.require_samples(sum(batch.size for batch in held), device)
    if scores is None:
        scores = score(model, graph, "l2", groups=[g.name for g in chosen], inexact=True)
    wanted: dict[str, list[list[int]]] = {}
    for group in chosen:
        found = steps(group, np.argsort(scores[group.name].cpu().double().numpy(), kind="stable").tolist())
        order = [channel for step in found for channel in step]
        totals = np.cumsum([len(step) for step in found], dtype=np.int64).tolist()
        wanted[group.name] = [sorted(order[:count]) for count in cells(group.name, totals)]
    with left_as_found(model):
        model.eval()
        measuring = Cells(model, graph, Reference(model, held, loss), wanted)
        seen = _checksum(t for batch in held for t in tensors_of((batch.args, batch.kwargs)))
        made_with = f"{zlib.crc32(repr(sorted(wanted.items())).encode(), seen):08x}"
        network = _checksum(tensors_named(model).values())
        sizes = {g.name: g.size for g in chosen}
        reference = measuring.reference
        table = Sensitivity(sizes, {}, reference.measure, reference.images, network, made_with)
        table = _resumed(table, path)
        tell = progress or (lambda done, of: None)

        def whole() -> Sensitivity:
            waiting = [g for g in chosen if g.name not in table.damage]
            tell(len(table.damage), len(chosen))
            for some in passes(model, graph, waiting, memory):
                needed = [name for group, names in some if wanted[group.name] for name in names]
                measuring.moments = input_moments(model, needed, held)
                for group, damage in shared(measuring.measured, [group for group, _ in some], workers):
                    table.damage[group.name] = damage
                    if path is not None:
                        table.save(path)
                    tell(len(table.damage), len(chosen))
            return replace(table, damage={g.name: table.damage[g.name] for g in chosen})

        if share is None or loss is not None:  # a loss of one's own has no name
            return whole()
        name = f"{FORMAT_VERSION}-{network:08x}-{made_with}-{_arithmetic(model, device, workers)}"
        known = _shared_table(share(name, lambda: asdict(whole())), table)
        return known if known is not None and list(known.damage) == [g.name for g in chosen] else whole()


def _arithmetic(model: nn.Module, device: torch.device, workers: int) -> str:
    """Return what a number's last bits hang on beside what is computed."""
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads() if workers == 1 else 1
    strides = [tensor.stride() for tensor in tensors_named(model).values()]
    return f"{zlib.crc32(repr((torch.__version__, device.type, on, threads, strides)).encode()):08x}"


def _shared_table(given: dict[str, Any], table: Sensitivity) -> Sensitivity | None:
    """Read a table that others have kept; None where it is damaged, or of anything else than ``table``."""
    try:
        found = checked(Sensitivity, given)
    except ValueError:
        return None
    return found if _alike(found, table) else None


def _alike(one: Sensitivity, other: Sensitivity) -> bool:
    return (one.network, one.made_with, one.measure) == (other.network, other.made_with, other.measure)


def _resumed(table: Sensitivity, path: str | os.PathLike[str] | None) -> Sensitivity:
    """Return the part of a table that a file holds already; the table itself where there is no file."""
    if path is None or not Path(path).exists():
        return table
    found = Sensitivity.load(path)
    if not _alike(found, table):
        raise UsageError(f"{path}: a table of another network, other data or options; name another file.")
    return found


def _checksum(tensors: Iterable[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found = zlib.crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b"", found)
    return found
