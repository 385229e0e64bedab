"""Do outputs differ only because the original's own outputs jump: by a sort, a threshold, NMS of near-ties?"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.plan import PruningPlan
from secateur.network.inputs import mapped
from secateur.network.named import modules_of
from secateur.pruning.comparison import READERS, Difference, compare_outputs, outputs
from secateur.pruning.readings import Kept, Readings, held, made, masked

_NUDGES = 3
"""Number of times that the original is run with slight changes, at most."""
_ABOUT = 10
"""A jump explains a difference of up to so many times its size."""
_ROUNDING = {torch.float64: 1e-12}
"""By precision, the relative change that stands for rounding in sums of many terms; 1e-6 where not given."""


def jumps(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, found: Difference, tolerance: float
) -> bool:
    """Tell whether outputs differ only because the original's own outputs jump.

    Outputs jump where a change of the inputs, and of what layers make, by no more than rounding changes them beyond the
    tolerance, and about as much as they differ. To change the inputs alone is not enough: where scores tie, since a
    deep layer makes the same everywhere, the order in which layers sum decides which comes first. Such outputs tell
    nothing of a pruned network; what every layer of the plan makes is compared in their stead.

    Args:
        model: The original.
        small: The pruned network.
        plan: The plan applied.
        example_inputs: Example inputs, in the precision that the networks run in.
        found: How the networks differ on them: only in what they return.
        tolerance: Largest difference allowed, relative to the largest value.

    Returns:
        True where every output that differs jumps, and every layer of the plan makes what it makes in the original.
    """
    differing = {index: gap for index, gap in enumerate(found.gaps) if gap > tolerance}
    layers = dict.fromkeys(plan.kept_inputs | plan.kept_outputs)
    with masked(model, plan, defaultdict(list)):
        if differing and compare_outputs(found.wanted, outputs(model, example_inputs)).error > tolerance:
            return False  # outputs that differ from run to run do not jump
        for seed in range(_NUDGES if differing else 0):
            generator = torch.Generator().manual_seed(seed)
            with _rounding(model, generator):
                nudged = compare_outputs(found.wanted, outputs(model, _nudged(example_inputs, generator)))
            for index, gap in enumerate(nudged.gaps):
                other = differing.get(index, 0.0)
                if gap > tolerance and (gap > other / _ABOUT or math.isinf(other)):
                    differing.pop(index, None)
            if not differing:
                break
        if differing or not found.gaps:
            return False
        original = _made_by(model, example_inputs, layers | plan.kept_outputs)
    pruned = _made_by(small, example_inputs, layers)
    return all(compare_outputs(original[name], pruned[name]).error <= tolerance for name in layers)


def _nudged(values: Any, generator: torch.Generator) -> Any:
    """Change every floating-point number of some tensors as rounding might."""

    def nudge(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return tensor * (1 + _ROUNDING.get(tensor.dtype, 1e-6) * (2 * noise - 1))

    return mapped(values, nudge)


def _rounding(network: nn.Module, generator: torch.Generator) -> ExitStack:
    """Have every convolution and linear layer make what another order of its sums might, while the context lasts."""
    layers = [module for module in modules_of(network).values() if isinstance(module, READERS)]
    return held(layer.register_forward_hook(lambda _, args, out: _nudged(out, generator)) for layer in layers)


def _made_by(network: nn.Module, example_inputs: Any, layers: Kept) -> dict[str, list[Tensor]]:
    """Run a network, and return sums of what layers make of each channel, of those kept, for every call."""
    readings: Readings = defaultdict(list)
    with made(network, layers, readings):
        outputs(network, example_inputs)
    return {name: [sums for sums, _ in readings[name]] for name in layers}
