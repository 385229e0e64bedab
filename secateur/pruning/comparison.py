"""A pruned network and its masked original, run on the same inputs: do they return, and read, the same?"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.plan import PruningPlan
from secateur.network.copies import replica
from secateur.network.inputs import call, leaves_of
from secateur.network.isolation import left_as_found
from secateur.network.named import modules_of
from secateur.pruning.readings import Readings, masked, watched

READERS = (nn.modules.conv._ConvNd, nn.Linear)
"""Kinds of layers; what a layer of these reads is compared, whether the plan names it or not."""
_PART = 1 << 18
"""So many values are compared at once."""


@dataclass(eq=False)
class Difference:
    """How a pruned network differs from its masked original on one input."""

    error: float = 0.0
    """The largest of ``gaps``; infinite where the two return different numbers of tensors."""
    wanted: list[Tensor] = field(default_factory=list)
    """What the original returns."""
    gaps: list[float] = field(default_factory=list)
    """For each output, the difference over its largest value; infinite where shapes differ."""
    compared: int = 0
    """Number of outputs of the same shape."""
    mismatched: dict[str, list[int]] = field(default_factory=dict)
    """Layer -> input channels of the original that it reads differently."""
    notes: list[str] = field(default_factory=list)


def doubled(network: nn.Module) -> nn.Module:
    """Return a copy in fp64."""
    copied: nn.Module = replica(network)
    return copied.double()


def outputs(network: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Run a network in eval mode, with the same random numbers every time, and return its output tensors."""
    with left_as_found(network):
        torch.manual_seed(0)
        if any(module.training for module in modules_of(network).values()):  # to set modes takes long
            network.eval()
        returned = leaves_of(call(network, example_inputs), {})
        return [leaf.detach() for leaf in returned if isinstance(leaf, Tensor)]


def compare(model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, tolerance: float) -> Difference:
    """Run the pruned network and the masked original on the same inputs, in eval mode, and compare.

    Raises:
        Exception: Whatever the pruned network's own forward raises.
    """
    original: Readings = defaultdict(list)
    pruned: Readings = defaultdict(list)
    readers = [name for name, module in modules_of(small).items() if isinstance(module, READERS)]
    others = dict.fromkeys(name for name in readers if name not in plan.kept_inputs)
    with watched(small, dict.fromkeys(plan.kept_inputs) | others, pruned):
        found = outputs(small, example_inputs)
    with masked(model, plan, original), watched(model, others, original):
        difference = compare_outputs(outputs(model, example_inputs), found)
    for name, kept in (plan.kept_inputs | others).items():
        calls = original[name]
        if len(calls) != len(pruned[name]):
            difference.mismatched[name] = list(kept or ())
            continue
        if not calls and kept is not None:
            difference.notes.append(f"{name}: never runs in eval mode")
        elif calls and not any(count for _, count in calls):
            difference.notes.append(f"{name}: reads tensors without elements on these inputs, so nothing was compared")
        for of_original, of_pruned in zip(calls, pruned[name], strict=True):
            if wrong := _misread(of_original, of_pruned, kept, tolerance):
                difference.mismatched.setdefault(name, []).extend(wrong)
    return difference


def _misread(
    original: tuple[Tensor, int], pruned: tuple[Tensor, int], kept: list[int] | None, tolerance: float
) -> list[int]:
    """Return the channels of the original that one call of a layer reads differently in the pruned network.

    Where it reads as many channels but other numbers of values, channels of another group lie along the other
    dimensions, and some of those are removed: nothing can be told. Nor can it of a layer outside the plan that reads
    another number of channels: it may read those of a group that no layer of the plan reads.
    """
    (want, values), (found, other_values) = original, pruned
    if want.shape != found.shape:
        return list(kept or ())
    if values != other_values:
        return []
    scale = max(float(want.abs().max()), 1e-12) if want.numel() else 1.0
    wrong: list[int] = ((want - found).abs() > tolerance * scale).any(1).nonzero().flatten().tolist()
    return wrong if kept is None else [kept[i] for i in wrong]


def compare_outputs(want: list[Tensor], found: list[Tensor]) -> Difference:
    """Compare what the original returns with what the pruned network returns, one by one."""
    result = Difference(wanted=want)
    if len(want) != len(found):
        result.error = math.inf
        result.notes.append(f"outputs: the original returns {len(want)} tensors, the pruned network {len(found)}")
        return result
    for index, (a, b) in enumerate(zip(want, found, strict=True)):
        result.gaps.append(_gap(a, b))
        if a.shape != b.shape:
            result.notes.append(f"output {index}: shape {tuple(b.shape)} instead of {tuple(a.shape)}")
    result.compared = sum(a.shape == b.shape for a, b in zip(want, found, strict=True))
    result.error = max(result.gaps, default=0.0)
    return result


def _gap(want: Tensor, found: Tensor) -> float:
    """Return the largest absolute difference over the largest finite value; infinite where shapes differ, or for NaN.

    Equal infinities do not differ. Part by part: in fp64, a whole output would take many times its own memory.
    """
    if want.shape != found.shape or not want.numel():
        return 0.0 if want.shape == found.shape else math.inf
    kind = torch.complex128 if want.is_complex() else torch.float64
    gaps, sizes = [], []
    parts = (torch.split(tensor.flatten(), _PART) for tensor in (want, found))
    for a, b in zip(*parts, strict=True):
        left, right = a.to(kind), b.to(kind)
        size = left.abs()
        gaps.append(torch.where(left == right, 0.0, (left - right).abs()).max())
        sizes.append(torch.where(torch.isfinite(size), size, 0.0).max())
    gap = float(torch.stack(gaps).max()) / max(float(torch.stack(sizes).max()), 1e-30)
    return math.inf if math.isnan(gap) else gap
