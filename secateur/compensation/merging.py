r"""Merging: a dropped filter's weights are folded into the layers that read its partner. No data are needed.

With the batch norm behind a producer folded into it, filter p gives :math:`\tilde w_p * x + b_p`,
:math:`\tilde w = (\gamma/\sigma)\,w`, :math:`\sigma = \sqrt{\mathrm{var} + \epsilon}`,
:math:`b = \beta + (\gamma/\sigma)(\mathrm{bias} - \mu)`. Where :math:`\tilde w_p \approx s\,\tilde w_k`,

.. math::
    s = \alpha \frac{\gamma_p/\sigma_p}{\gamma_k/\sigma_k}, \qquad
    t = b_p - s\,b_k = \beta_p - s\,\beta_k + \frac{\gamma_p}{\sigma_p}(\alpha\,\mu_k - \mu_p)

and the layers that read both get :math:`W'_k = W_k + s\,W_p`. What remains is a shift, which a bias takes up where
there is one and the layer pads nothing: t where no activation lies between; where a ReLU does, what t amounts to on
average behind it if the batch norm's output k is normal, :math:`E[(s\,k + t)_+] - s\,E[(k)_+]`.

Whether scaling commutes with what lies between producers and readers is not guessed but tried: their outputs are
doubled in one run of the model, and what the readers see must double exactly; negated, for a negative s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.compensation.report import LayerCompensation
from secateur.criteria import feature_maps, weights
from secateur.criteria.readings import Reading
from secateur.criteria.weights import Slices
from secateur.errors import PlanError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan
from secateur.network.copies import replica


class _NotDefinedError(Exception):
    """Merging is not defined for a group; the text is the reason."""


@dataclass
class _Path:
    """What lies between the producers of a group and the layers that read it."""

    made: list[Slices]
    """The layers that make the channels."""
    read: list[Slices]
    """The layers that read them."""
    norms: dict[str, str]
    """Producer module -> the batch norm right behind it."""
    negatable: bool
    """Whether negated channels are read negated: there is no activation."""
    rectified: bool
    """Whether negative channels are read as zero: there is a ReLU."""


def merge(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    example: feature_maps.Batch,
    pairs: Mapping[str, Mapping[int, int]] | None = None,
) -> tuple[nn.Module, list[LayerCompensation]]:
    """Fold every filter that the plan removes into the kept filter most like it.

    A filter's partner is the kept one with the largest cosine to it, both with their batch norms folded in; among
    coupled channels, over all producers at once, and where a grouped convolution reads them, in the same block. A
    filter whose best cosine is not positive is dropped plainly, unless no activation lies between.

    Departures: α is the least-squares factor between p and k. The shift behind a ReLU (see above).

    Args:
        model: The unpruned network; it is left as found.
        graph: Its channel graph.
        plan: What is going to be removed.
        example: One batch to run the model on, to see which layers follow each other; its values do not matter.
        pairs: Group name -> removed channel -> kept channel, in place of the most similar ones.

    Returns:
        A copy of the network that reads nothing from the removed channels any more, so that applying the plan to it
        gives the compensated network; and one entry a group.

    Raises:
        PlanError: If the plan doesn't fit the graph.
        UsageError: If ``pairs`` names a kept channel as removed, or the reverse.
    """
    merged = replica(model)
    report = []
    for group in graph.groups:
        removed = removed_channels(group, plan)
        if not removed:
            continue
        lost = _passed_on(graph, group, removed)
        try:
            path = _examine(model, graph, group, example)
            done, note = _merge_group(merged, group, removed, path, (pairs or {}).get(group.name))
            report.append(LayerCompensation("merge", group.name, done > 0, "; ".join([note, *lost][not note :])))
        except _NotDefinedError as reason:
            report.append(LayerCompensation("merge", group.name, False, str(reason)))
    return merged, report


def removed_channels(group: ChannelGroup, plan: PruningPlan) -> list[int]:
    """Return the channels of a group that a plan removes."""
    removed = sorted(int(c) for c in plan.removed.get(group.name, ()))
    if removed and (removed[0] < 0 or removed[-1] >= group.size):
        raise PlanError(
            f"{group.name}: the plan removes channel {removed[-1]}; the group has {group.size}. Trace this model."
        )
    return removed


def _passed_on(graph: ChannelGraph, group: ChannelGroup, removed: list[int]) -> list[str]:
    """Name the layers that hand removed channels to other groups, such as a shortcut that pads: they hand on zeros."""
    index = graph.groups.index(group)
    found = [
        port.module
        for port in graph.layers
        if port.kind == "registered" and port.in_group is not None and port.in_channel is not None
        if np.isin(port.in_channel[port.in_group == index], removed).any()
    ]
    return [f"{module} hands them on to other channels, which is lost" for module in dict.fromkeys(found)]


def _examine(model: nn.Module, graph: ChannelGraph, group: ChannelGroup, example: feature_maps.Batch) -> _Path:
    """Find the batch norm behind each producer, and try what lies between them and the readers."""
    made, read = weights.making(model, graph, group), weights.reading(model, graph, group)
    makers, readers = [one.module for one in made], [one.module for one in read]
    for slices, members, does in ((read, group.consumers, "reads"), (made, group.producers, "makes")):
        called = {one.module for one in slices if one.called}
        for member in members:
            if weights.owner(model, member.tensor)[0] not in called:
                raise _NotDefinedError(f"{member.tensor} {does} the channels and is of no convolution or linear layer")
    for one in read:
        if weights.is_computed(model.get_submodule(one.module)):
            raise _NotDefinedError(f"the weight of {one.module}, which reads the channels, is computed at each forward")
    if not read:
        raise _NotDefinedError("no layer reads the channels")
    followers = {weights.owner(model, m.tensor)[0] for m in group.members} - {*makers, *readers}
    for name in sorted(followers):
        layer = model.get_submodule(name)
        if isinstance(layer, weights.CONVOLUTIONS):
            raise _NotDefinedError(f"{name} is depthwise: two filters in a row can't be merged as one")
        if not isinstance(layer, _BatchNorm) or layer.running_mean is None:
            raise _NotDefinedError(f"{name} ({type(layer).__name__}) treats every channel in its own way")
    norms = _norms(model, makers, followers, example)
    ends = [norms.get(name, name) for name in makers]
    record: dict[str, Tensor] = {}
    plain = _run(model, read, example, ends, lambda name, y: record.setdefault(name, y.clone()))
    doubled = _run(model, read, example, ends, lambda name, _: 2 * record[name])
    if not _equal(doubled, [2 * x for x in plain]):
        raise _NotDefinedError(
            "what lies between its filters and the layers that read them does not commute with scaling"
        )
    negated = _run(model, read, example, ends, lambda name, _: -record[name])
    below = _run(model, read, example, ends, lambda name, _: -record[name].abs())
    return _Path(made, read, norms, _equal(negated, [-x for x in plain]), all(not bool(x.any()) for x in below))


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _norms(model: nn.Module, makers: list[str], followers: set[str], example: feature_maps.Batch) -> dict[str, str]:
    outputs: dict[str, list[Tensor]] = {name: [] for name in makers}
    inputs: dict[str, list[Tensor]] = {name: [] for name in followers}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: outputs[name].append(y))
        for name in makers
    ]
    for name in followers:

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            inputs[name].append(args[0] if args else kwargs["input"])

        handles.append(model.get_submodule(name).register_forward_pre_hook(read, with_kwargs=True))
    try:
        with feature_maps.evaluating(model), torch.no_grad():
            feature_maps.forward(model, example, 1)
    finally:
        for handle in handles:
            handle.remove()
    norms: dict[str, str] = {}
    for norm, seen in inputs.items():
        behind = [name for name, made in outputs.items() if len(made) == len(seen) == 1 and made[0] is seen[0]]
        if len(behind) != 1:
            raise _NotDefinedError(f"{norm} does not follow one of its filters directly")
        norms[behind[0]] = norm
    for name, made in outputs.items():
        if len(made) != 1:
            raise _NotDefinedError(f"{name} is called {len(made)} times")
        if not isinstance(made[0], Tensor):
            raise _NotDefinedError(f"{name} returns more than the channels")
    return norms


def _run(
    model: nn.Module, read: list[Slices], example: feature_maps.Batch, ends: list[str], change: Any
) -> list[Tensor]:
    """Run the model with the outputs of some layers changed; return what the readers see of the group."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: change(name, y).clone())
        for name in dict.fromkeys(ends)
    ]
    for one in read:
        flat = one.table[one.table >= 0]
        reading = Reading(one.module, flat, flat[:, None])

        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reading: Reading = reading) -> None:
            seen.append(reading.maps(args[0] if args else kwargs["input"], layer).clone())

        handles.append(model.get_submodule(one.module).register_forward_pre_hook(see, with_kwargs=True))
    try:
        with feature_maps.evaluating(model), torch.no_grad():
            feature_maps.forward(model, example, 1)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _folded(model: nn.Module, made: Slices, norm: str | None, size: int) -> tuple[Tensor, Tensor]:
    """A producer's filters and offsets with its batch norm folded in: ``(C, F)`` and ``(C, q)``, in fp64."""
    rows = weights.rows_of(made.weight(model).detach().double(), made.dim, made.blocks)
    bias = getattr(model.get_submodule(made.module), "bias", None)
    offset = rows.new_zeros(len(rows)) if bias is None else bias.detach().double()
    if norm is not None:
        scale, shift = _affine(model.get_submodule(norm))
        rows, offset = rows * scale[:, None], offset * scale + shift
    return made.spread(rows, size), made.spread(offset[:, None], size)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    scale = 1 / sigma if norm.weight is None else norm.weight.detach().double() / sigma
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _merge_group(
    model: nn.Module, group: ChannelGroup, removed: list[int], path: _Path, given: Mapping[int, int] | None
) -> tuple[int, str]:
    parts = [_folded(model, one, path.norms.get(one.module), group.size) for one in path.made]
    rows = torch.cat([filters for filters, _ in parts], 1)
    single = all(offset.shape[1] == 1 for _, offset in parts)
    offset = torch.stack([o.flatten() for _, o in parts]).sum(0) if single else None
    normal = _normal(model, group, path) if path.rectified and single else None
    partners = _partners(model, group, rows, removed, path, given)
    shifts: dict[int, float] = {}
    scales: dict[int, tuple[int, float]] = {}
    for p, k in partners.items():
        s = float(rows[p] @ rows[k] / (rows[k] @ rows[k]))
        scales[p] = (k, s)
        t = float(offset[p] - s * offset[k]) if offset is not None else 0.0
        if path.negatable:
            shifts[p] = t
        elif normal is not None:
            centre, deviation = float(normal[0][k]), float(normal[1][k])
            shifts[p] = rectified_mean(s * centre + t, s * deviation) - s * rectified_mean(centre, deviation)
    plainly = len(removed) - len(scales)
    notes = [f"{plainly} of {len(removed)} filters have no partner and are dropped plainly"] if plainly else []
    for one in path.read:
        left = _fold_into(model, one, removed, scales, shifts)
        if left:
            notes.append(left)
    return len(scales), "; ".join(notes)


def _partners(
    model: nn.Module,
    group: ChannelGroup,
    rows: Tensor,
    removed: list[int],
    path: _Path,
    given: Mapping[int, int] | None,
) -> dict[int, int]:
    gone = set(removed)
    if given is not None:
        for p, k in given.items():
            if p not in gone or k in gone or not 0 <= k < group.size:
                raise UsageError(f"{group.name}: pair {p} -> {k} does not lead from a removed to a kept channel.")
    norms = torch.linalg.vector_norm(rows, dim=1)
    cosine = rows @ rows.mT / torch.outer(norms, norms).clamp(min=1e-300)
    alike = cosine.abs() if path.negatable else cosine
    alike_in = _signatures(model, path, group.size)
    partners: dict[int, int] = {}
    for p in removed:
        allowed = [k for k in range(group.size) if k not in gone and alike_in[k] == alike_in[p] and norms[k] > 0]
        if given is not None:
            allowed = [k for k in allowed if given.get(p) == k]
        best = max(allowed, key=lambda k: float(alike[p, k]), default=None)
        if best is not None and float(alike[p, best]) > 0:
            partners[p] = best
    return partners


def _signatures(model: nn.Module, path: _Path, size: int) -> list[tuple[Any, ...]]:
    """For each channel, which layers make and read it and in which block: where channels differ, they can't be merged.

    Filters of two blocks of a grouped convolution look at different channels, however alike they are.
    """
    signature: list[list[Any]] = [[] for _ in range(size)]
    for slices, side in ((path.made, "out_channels"), (path.read, "in_channels")):
        for one in slices:
            layer = model.get_submodule(one.module)
            for channel, places in zip(one.channels.tolist(), one.table.tolist(), strict=True):
                blocks = [_block(layer, place, side) for place in places if place >= 0]
                signature[channel].append((side, one.module, blocks))
    return [tuple(s) for s in signature]


def _block(layer: Any, place: int, side: str = "in_channels") -> int:
    """Return the block of a grouped convolution, transposed or not, that a channel of it is in; 0 of other layers."""
    groups = getattr(layer, "groups", 1)
    return place // (int(getattr(layer, side)) // groups) if groups > 1 else 0


def _fold_into(
    model: nn.Module, read: Slices, removed: list[int], scales: dict[int, tuple[int, float]], shifts: dict[int, float]
) -> str:
    """Add each removed channel's weights to its partner's, and clear them; return what was left out."""
    layer: Any = model.get_submodule(read.module)
    places = {c: [q for q in row if q >= 0] for c, row in zip(read.channels.tolist(), read.table.tolist(), strict=True)}
    transposed = isinstance(layer, weights.TRANSPOSED)
    padded = any(getattr(layer, "_reversed_padding_repeated_twice", ())) or transposed
    takes_shift = layer.bias is not None and not padded
    left_out = False
    with torch.no_grad():
        for p in removed:
            for index, source in enumerate(places.get(p, ())):
                column = _column(layer, read.dim, source)
                if p in scales:
                    k, s = scales[p]
                    _column(layer, read.dim, places[k][index]).add_(column, alpha=s)
                    if p in shifts and takes_shift:
                        _bias(layer, source).add_((column.double().flatten(1).sum(1) * shifts[p]).to(layer.bias))
                    left_out |= abs(shifts.get(p, 0.0)) > 1e-9 and not takes_shift
                column.zero_()
    why = "pads its input" if padded else "has no bias"
    return f"{read.module} {why}: the shift is left out" if left_out else ""


def _column(layer: Any, dim: int, place: int) -> Tensor:
    """View the weights that read one input position, outputs first."""
    weight: Tensor = layer.weight
    groups = getattr(layer, "groups", 1)
    if groups > 1 and dim == 1:
        rows, width = weight.shape[0] // groups, weight.shape[1]
        block = place // width
        return weight[block * rows : (block + 1) * rows, place % width].reshape(rows, -1)
    column = weight.select(dim, place)
    return column if column.dim() > 1 else column[:, None]


def _bias(layer: Any, place: int) -> Tensor:
    """View the biases of the outputs that read one input position."""
    bias: Tensor = layer.bias
    rows = len(bias) // getattr(layer, "groups", 1)
    block = _block(layer, place)
    return bias[block * rows : (block + 1) * rows]


def _normal(model: nn.Module, group: ChannelGroup, path: _Path) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of each channel in front of its ReLU, if its batch norm says; None where it doesn't."""
    if len(path.made) != 1 or path.made[0].module not in path.norms:
        return None
    made = path.made[0]
    norm: Any = model.get_submodule(path.norms[made.module])
    if norm.weight is None or norm.bias is None:
        return None
    centre, deviation = norm.bias.detach().double(), norm.weight.detach().double().abs()
    return made.spread(centre[:, None], group.size).flatten(), made.spread(deviation[:, None], group.size).flatten()


def rectified_mean(centre: float, deviation: float) -> float:
    r""":math:`E[(x)_+]` of a normal x: :math:`\mu\,\Phi(\mu/\sigma) + \sigma\,\varphi(\mu/\sigma)`."""
    if deviation < 1e-12 * abs(centre) or deviation == 0.0:
        return max(centre, 0.0)
    z = centre / deviation
    density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return centre * 0.5 * (1 + math.erf(z / math.sqrt(2))) + deviation * density
