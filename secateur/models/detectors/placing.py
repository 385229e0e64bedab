"""The plans of a network hold for its layers inside of another one, under other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from secateur.graph.plan import PruningPlan
from secateur.network.named import tensors_named
from secateur.pruning.applied import note, plans_of, require_made_by


def note_plans(
    classifier: nn.Module, detector: nn.Module, names: Mapping[str, str], readers: Mapping[str, str]
) -> None:
    """Note on a detector the plans that made its base, so that one file holds it and loads into the unpruned one.

    Args:
        classifier: The network that the base was taken from; it knows its plans.
        detector: The detector, built on the base as it is.
        names: Module of the classifier -> what it is called in the detector; others are not part of it.
        readers: What reads the base in the detector: a layer, or a parameter with one value a channel -> the
            classifier's layer that makes the channels.

    Raises:
        PlanError: If the plans don't leave the sizes that the detector has.
    """
    plans = [placed(plan, detector, names, readers) for plan in plans_of(classifier)]
    plans = [plan for plan in plans if plan.shapes]
    require_made_by(detector, plans)
    for plan in plans:
        note(detector, detector, plan)


def placed(plan: PruningPlan, whole: nn.Module, names: Mapping[str, str], readers: Mapping[str, str]) -> PruningPlan:
    """Return what a plan of one network means for a network that holds some of its layers; see :func:`note_plans`."""

    def tensor(name: str) -> str | None:
        module, _, own = name.rpartition(".")
        return f"{names[module]}.{own}" if module in names else None

    def renamed(table: Mapping[str, Any], by: Callable[[str], str | None]) -> dict[str, Any]:
        return {new: value for name, value in table.items() if (new := by(name)) is not None}

    modules, tensors = dict(whole.named_modules()), tensors_named(whole)
    inputs, kept, shapes = renamed(plan.kept_inputs, names.get), renamed(plan.kept_tensors, tensor), {}
    for reader, source in readers.items():
        if source not in plan.kept_outputs:
            continue
        stays, before = plan.kept_outputs[source], plan.shapes[f"{source}.weight"][0]
        if reader in modules:
            name, dim, inputs[reader] = f"{reader}.weight", 1, stays
        else:
            name, dim, kept[reader] = reader, 0, {0: stays}
        shapes[name] = tuple(before if d == dim else size for d, size in enumerate(tensors[name].shape))
    counts = renamed(plan.attributes, names.get)
    return PruningPlan(
        kept_outputs=renamed(plan.kept_outputs, names.get),
        kept_inputs=inputs,
        kept_tensors=kept,
        blocks=renamed(plan.blocks, tensor),
        # A frozen batch norm counts no features.
        attributes={
            name: found
            for name, own in counts.items()
            if (found := {key: n for key, n in own.items() if hasattr(modules[name], key.partition("[")[0])})
        },
        magnitudes={new: (v, dim) for name, (old, dim) in plan.magnitudes.items()
                    if (new := tensor(name)) and (v := tensor(old))},
        reads=renamed(plan.reads, tensor),
        removed=renamed(plan.removed, names.get),
        shapes=renamed(plan.shapes, tensor) | shapes,
    )  # fmt: skip
