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

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.checkpoint.atomic import write_atomic
from secateur.compensation import replay
from secateur.compensation.damage import Loss, Reference, floats
from secateur.compensation.following import observing
from secateur.compensation.least_squares import RIDGE, NormalEquations, by_weight, refusal, shrunk
from secateur.compensation.sharing import require_possible, shared
from secateur.compensation.unfolding import draw_positions, unfold
from secateur.criteria import feature_maps
from secateur.criteria.feature_maps import Batch
from secateur.criteria.scoring import score
from secateur.errors import DataError, PlanError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan
from secateur.graph.steps import steps
from secateur.network.inputs import tensors_of, unwrapped
from secateur.network.isolation import left_as_found
from secateur.network.named import tensors_named
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut

FORMAT_VERSION = 1
LEVELS = 8
ROWS = 1 << 16
"""So many unfolded inputs of a layer are enough: more tell hardly anything, and products of them take the time."""


@dataclass(frozen=True)
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
    made_with: str = ""
    """Checksum of data and options, by which an interrupted measurement is told from another."""

    def require_of(self, model: nn.Module) -> None:
        """Refuse a network that this was not measured on.

        Raises:
            PlanError: If weights differ.
        """
        if _checksum(tensors_named(unwrapped(model)).values()) != self.network:
            raise PlanError("the table of sensitivity was measured with other weights: measure it of this network.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomic(path, json.dumps(self.to_dict(), indent=1).encode())

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON data."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Read what :meth:`save` has written.

        Raises:
            UsageError: If the file is not there or not of this form.
        """
        try:
            given = json.loads(Path(path).read_bytes())
            if given.pop("format_version") != FORMAT_VERSION:
                raise ValueError("its version is unknown")
            damage = {g: {int(n): float(d) for n, d in own.items()} for g, own in given.pop("damage").items()}
            return cls(damage=damage, **given)
        except OSError as error:
            raise UsageError(f"{path}: can't be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}: no table of sensitivity ({error}). secateur.sensitivity measures one."
            ) from error

    def figure(self, plan: PruningPlan | None = None) -> Any:
        """Return a Plotly figure, a curve a group, the most harmful first; with a plan, its widths are marked."""
        from secateur.report.sensitivity import plotly_figure

        return plotly_figure(self, plan)

    def __str__(self) -> str:
        width = max((len(name) for name in self.damage), default=5)
        lines = [f"{'group':<{width}}  channels  removed: damage ({self.measure})"]
        for name, own in sorted(self.damage.items(), key=lambda item: -max(item[1].values(), default=0.0)):
            cells = "  ".join(f"{n}: {d:.2g}" for n, d in own.items())
            lines.append(f"{name:<{width}}  {self.sizes[name]:>8}  {cells}")
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

    Raises:
        UsageError: If ``levels`` or ``workers`` is out of range, or labels are missing for ``loss``.
        DataError: If the data are empty or don't fit the network.
        RunError: If one of several processes was killed.
    """
    if levels < 1:
        raise UsageError(f"sensitivity: levels is {levels}. Use 1 or more.")
    model = unwrapped(model)
    device = feature_maps.device_of(model)
    require_possible(workers, device)
    held = list(feature_maps.batches(data, device))
    feature_maps.require_samples(sum(batch.size for batch in held), device)
    chosen = [g for g in feature_maps.chosen_groups(graph, groups) if g.exact or inexact]
    if scores is None:
        scores = score(model, graph, "l2", groups=[g.name for g in chosen], inexact=inexact)
    orders = {g.name: np.argsort(scores[g.name].cpu().double().numpy(), kind="stable").tolist() for g in chosen}
    with left_as_found(model):
        model.eval()
        measuring = _Measuring(model, graph, Reference(model, held, loss), orders, levels)
        options = f"{levels} {sorted(orders.items())}".encode()
        seen = _checksum(t for batch in held for t in tensors_of((batch.args, batch.kwargs)))
        made_with = f"{zlib.crc32(options, seen):08x}"
        network = _checksum(tensors_named(model).values())
        sizes = {g.name: g.size for g in chosen}
        reference = measuring.reference
        table = Sensitivity(sizes, {}, reference.measure, reference.images, network, made_with)
        table = _resumed(table, path)
        waiting = [g for g in chosen if g.name not in table.damage]
        tell = progress or (lambda done, of: None)
        tell(len(table.damage), len(chosen))
        for some in _passes(model, graph, waiting, memory):
            measuring.moments = _input_moments(model, [name for _, names in some for name in names], held)
            for group, damage in shared(measuring.measured, [group for group, _ in some], workers):
                table.damage[group.name] = damage
                if path is not None:
                    table.save(path)
                tell(len(table.damage), len(chosen))
    return replace(table, damage={g.name: table.damage[g.name] for g in chosen})


def _resumed(table: Sensitivity, path: str | os.PathLike[str] | None) -> Sensitivity:
    """Return the part of a table that a file holds already; the table itself where there is no file."""
    if path is None or not Path(path).exists():
        return table
    found = Sensitivity.load(path)
    if (found.network, found.made_with, found.measure) != (table.network, table.made_with, table.measure):
        raise UsageError(f"{path}: a table of another network, other data or options; name another file.")
    return found


class _Measuring:
    """What it takes to measure one group after the other."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        reference: Reference,
        orders: Mapping[str, Sequence[int]],
        levels: int,
    ) -> None:
        self.model, self.graph, self.reference, self.orders, self.levels = model, graph, reference, orders, levels
        self.moments: Mapping[str, Tensor] = {}
        """Of the inputs of the layers that read the groups to be measured."""
        self.calls = replay.observe(model, reference.held[0])
        with observing(model) as following:
            feature_maps.forward(model, reference.held[0], 1)
        self.norms = {name: own.norm for name, own in following.items()}
        """Layer -> the batch norm that takes up a shift of its outputs, if there is one."""

    def measured(self, group: ChannelGroup) -> dict[int, float]:
        """Return what removing so many channels of a group does."""
        ends = steps(group, self.orders[group.name])
        counts = sorted({round(len(ends) * level / self.levels) for level in range(1, self.levels + 1)} - {0})
        smalls: dict[int, nn.Module] = {}
        changed: set[str] = set()
        for count in counts:
            removed = sorted(channel for step in ends[:count] for channel in step)
            plan = plan_removal(self.graph, {group.name: removed})
            smalls[len(removed)] = self._small(plan)
            changed |= plan.kept_outputs.keys() | plan.kept_inputs.keys() | plan.attributes.keys()
            changed |= {name.rpartition(".")[0] for name in (*plan.kept_tensors, *plan.magnitudes)}
        skip = self.calls.before(changed)
        return (skip and self._by_parts(smalls, skip)) or self._by_whole_runs(smalls)

    def _small(self, plan: PruningPlan) -> nn.Module:
        """Cut the network, and refit what reads the group."""
        small = cut(self.model, plan, share=True)
        for name in shrunk(self.model, small, plan):
            if name in self.moments:
                norm = small.get_submodule(self.norms[name]) if self.norms.get(name) else None
                layers = self.model.get_submodule(name), small.get_submodule(name)
                _refit(*layers, norm, self.moments[name], plan, name)
        return small

    def _by_parts(self, smalls: Mapping[int, nn.Module], skip: replay.Skip) -> dict[int, float] | None:
        """Measure without running what lies before the group; None where a whole run would give something else."""
        sums = dict.fromkeys(smalls, 0.0)
        for i, batch in enumerate(self.reference.held):
            kept = replay.record(self.model, batch, i + 1, skip)
            for count, small in smalls.items():
                try:
                    with replay.skipping(small, kept):
                        output = feature_maps.forward(small, batch, i + 1)
                except DataError:  # the whole run will tell whether the skipping was to blame
                    return None
                if i == 0 and count == max(smalls):
                    found = floats(output)
                    whole = floats(feature_maps.forward(small, batch, 1))
                    if len(found) != len(whole) or not all(map(torch.equal, found, whole)):
                        return None
                sums[count] += self.reference.damage(i, output)
        return {count: total / self.reference.images for count, total in sums.items()}

    def _by_whole_runs(self, smalls: Mapping[int, nn.Module]) -> dict[int, float]:
        sums = dict.fromkeys(smalls, 0.0)
        for count, small in smalls.items():
            for i, batch in enumerate(self.reference.held):
                sums[count] += self.reference.damage(i, feature_maps.forward(small, batch, i + 1))
        return {count: total / self.reference.images for count, total in sums.items()}


def _passes(
    model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], memory: int
) -> list[list[tuple[ChannelGroup, list[str]]]]:
    """Divide groups, with the layers that read each, so that the moments of those layers fit into memory."""
    tied = by_weight(model)
    found: dict[str, list[str]] = {}
    for group in groups:
        readers = dict.fromkeys(member.module for member in group.members if member.read)
        own = [name for name in readers if not refusal(name, model.get_submodule(name), tied, memory)]
        found[group.name] = own

    def need(group: ChannelGroup) -> int:
        return sum(_bytes(model.get_submodule(name)) for name in found[group.name])

    return [[(g, found[g.name]) for g in some] for some in feature_maps.passes(groups, need, memory)]


def _bytes(layer: nn.Module) -> int:
    blocks, width = _form(layer)
    return 8 * blocks * width * width


def _form(layer: Any) -> tuple[int, int]:
    """Return how many blocks a layer has, and how many unfolded inputs each, a constant 1 for the bias among them."""
    return getattr(layer, "groups", 1), layer.weight[0].numel() + 1


def _input_moments(model: nn.Module, names: Iterable[str], held: Sequence[Batch]) -> dict[str, Tensor]:
    r"""Run the network once; return :math:`\sum z z^T` of layers' unfolded inputs, ``(blocks, D, D)``.

    Batches are multiplied in the network's own precision, which takes a fraction of the time, and summed in fp64.
    """
    names = list(dict.fromkeys(names))
    images = sum(batch.size for batch in held)
    positions = max(1, -(-ROWS // images))
    moments: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            layer = model.get_submodule(name)
            blocks, width = _form(layer)
            device = feature_maps.device_of(layer)
            moments[name] = torch.zeros(blocks, width, width, dtype=torch.float64, device=device)
            generator = torch.Generator().manual_seed(0)

            def see(
                layer: Any, args: Any, kwargs: Any, made: Tensor, name: str = name, generator: Any = generator
            ) -> None:
                rows = unfold(
                    layer, args[0] if args else kwargs["input"], draw_positions(layer, made, positions, generator)
                )
                rows = torch.cat((rows, rows.new_ones(*rows.shape[:2], 1)), 2)
                moments[name] += rows.mT @ rows

            stack.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
        for number, batch in enumerate(held, start=1):
            feature_maps.forward(model, batch, number)
    return moments


def _refit(layer: Any, small: Any, norm: Any, moments: Tensor, plan: PruningPlan, name: str) -> None:
    """Fit a cut layer, and the norm that takes up its shift, to what the whole one makes, by moments of its inputs."""
    blocks, width = _form(layer)
    bias = layer.bias is not None or norm is not None
    inputs = layer.weight.shape[1]
    taps = (width - 1) // inputs
    kept = torch.zeros(blocks * inputs, dtype=torch.bool)
    kept[plan.kept_inputs[name]] = True
    kept = kept.reshape(blocks, inputs).repeat_interleave(taps, 1)
    weight = layer.weight.detach().double().reshape(blocks, -1, inputs * taps)
    rows = torch.zeros(len(layer.weight), dtype=torch.bool)
    rows[plan.kept_outputs.get(name, list(range(len(rows))))] = True
    changes = []
    for block in range(blocks):
        own = moments[block]
        stays = torch.cat((kept[block], kept.new_full((1,), bias)))
        gone = torch.cat((~kept[block], kept.new_zeros(1)))
        outputs = weight[block][rows.reshape(blocks, -1)[block]][:, gone[:-1]]
        errors = own[stays][:, gone] @ outputs.mT
        error = (outputs @ own[gone][:, gone] * outputs).sum()
        equations = NormalEquations(own[stays][:, stays][None], errors[None], error, error, error, error)
        changes.append(equations.solve(RIDGE, bias)[0][0])
    change = torch.stack(changes)
    if bias:
        shift, change = change[:, -1].flatten(), change[:, :-1]
        if layer.bias is not None:
            small.bias = nn.Parameter(small.bias + shift.to(small.bias))
        else:
            norm.running_mean = norm.running_mean - shift.to(norm.running_mean)
    small.weight = nn.Parameter(small.weight + change.mT.reshape(small.weight.shape).to(small.weight))


def _checksum(tensors: Iterable[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found = zlib.crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b"", found)
    return found
