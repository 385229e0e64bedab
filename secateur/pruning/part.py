"""The plan of a network, for another network that holds the layers of the first as a part."""

from __future__ import annotations

from secateur.errors import PlanError
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.building import build, checked


def for_whole(plan: PruningPlan, graph: ChannelGraph, prefix: str) -> PruningPlan:
    """Return the plan that removes from a part of a network what another plan removes from that part alone.

    Layers of the whole that read the part, as a detector's pyramid reads a classifier's stages, lose the inputs that
    go. Layers of the plan that the part lacks, such as a classifier's last, are passed over.

    Args:
        plan: Made for a network that the part was taken from; its names, behind ``prefix``, are those of the whole.
        graph: The traced whole.
        prefix: Name of the part, such as ``backbone.body``.

    Raises:
        PlanError: If the part has no layer of the plan, or one of another shape; if the whole needs a channel that the
            plan removes; or if more of the part would have to go.
    """
    removed: dict[str, set[int]] = {}
    met = {}
    for port in graph.layers:
        own = port.module.removeprefix(f"{prefix}.")
        if own == port.module or own not in plan.kept_outputs.keys() | plan.kept_inputs.keys():
            continue
        met[own] = port.module
        before = plan.shapes.get(f"{own}.weight")
        if before is not None and tuple(before) != tuple(graph.shapes.get(port.weight, before)):
            raise PlanError(
                f"{port.module}: the plan was made for a weight of shape {tuple(before)}, and this network's is "
                f"{tuple(graph.shapes[port.weight])}. Build the part as it was before it was pruned."
            )
        for channel in sorted(
            set(range(port.out_channels)) - set(plan.kept_outputs.get(own, range(port.out_channels)))
        ):
            group = -1 if port.out_group is None or port.out_channel is None else int(port.out_group[channel])
            if group < 0 or port.out_channel is None:
                raise PlanError(
                    f"{port.module}: the plan removes channel {channel}, which has to stay in the whole network; "
                    "`secateur trace` says why."
                )
            removed.setdefault(graph.groups[group].name, set()).add(int(port.out_channel[channel]))
    if not met:
        raise PlanError(f"{prefix}: holds no layer that the plan prunes, the first of which is "
                        f"{next(iter(plan.kept_outputs | plan.kept_inputs), 'none')}.")  # fmt: skip
    groups = {group.name: group for group in graph.groups}
    whole = build(graph, {name: checked(groups[name], sorted(channels)) for name, channels in removed.items()})
    for form in ("kept_outputs", "kept_inputs"):
        wanted, found = getattr(plan, form), getattr(whole, form)
        for own, name in met.items():
            if wanted.get(own) != found.get(name):
                raise PlanError(
                    f"{name}: its {form.removeprefix('kept_')} can't go as the plan has it: in the whole network they "
                    "are coupled to others."
                )
    return whole
