"""The plans that made a network, kept on the network itself, so that whatever is copied or saved of it has them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from secateur.errors import PlanError
from secateur.graph.plan import PruningPlan
from secateur.network.inputs import unwrapped
from secateur.network.named import PLANS, modules_of, tensors_named

_COUNTS = {"kept_outputs": ("out_channels", "out_features"), "kept_inputs": ("in_channels", "in_features")}


def plans_of(model: nn.Module) -> tuple[PruningPlan, ...]:
    """Return the plans that made a network, in the order in which they were applied; none of an unpruned one."""
    return tuple(map(PruningPlan.from_dict, getattr(unwrapped(model), PLANS, ())))


def note(model: nn.Module, before: nn.Module | None, plan: PruningPlan) -> None:
    """Note on a network the plan that made it, after those of the network that it was made from."""
    # Plain data, so that a network that is pickled whole opens without this package.
    vars(model)[PLANS] = (*(getattr(before, PLANS, ()) if before is not None else ()), vars(plan))


def require_made_by(model: nn.Module, plans: Sequence[PruningPlan]) -> None:
    """Refuse plans that are not those that made a network.

    Raises:
        PlanError: If the network knows others, or has not the sizes that the last of the plans leaves.
    """
    known = plans_of(model)
    if known and list(plans) != list(known[len(known) - len(plans) :]):
        raise PlanError(
            "the plan given is not the one that made this network, which knows its own: leave the plan out."
        )
    if plans:
        _require_sizes(model, plans[-1])


def _require_sizes(model: nn.Module, plan: PruningPlan) -> None:
    modules, tensors = modules_of(model), tensors_named(model)
    for form, attributes in _COUNTS.items():
        for name, kept in getattr(plan, form).items():
            if name not in modules:
                raise PlanError(f"{name}: the plan keeps channels of it, and the network has no such layer.")
            found = next((n for a in attributes if isinstance(n := getattr(modules[name], a, None), int)), len(kept))
            _require_size(f"{name}: {form.removeprefix('kept_')}", found, len(kept))
    for name, dims in plan.kept_tensors.items():
        if name not in tensors:
            raise PlanError(f"{name}: the plan cuts it, and the network has no such tensor.")
        for dim, kept in dims.items():
            if not (dim == 1 and name in plan.blocks):  # which holds the channels of one block alone
                _require_size(f"{name}: dimension {dim}", tensors[name].shape[dim], len(kept))


def _require_size(where: str, found: int, expected: int) -> None:
    if found != expected:
        raise PlanError(
            f"{where}: the plan leaves {expected}, and the network has {found}. Save what the plan was applied to "
            "last, or pass the plans that made it."
        )
