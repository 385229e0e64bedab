"""Whether a plan is sound for a network: what it names exists and is of its kind, and no index is out of bounds.

A plan that was made here is so by construction. One that comes from elsewhere, in a file or as JSON, is held against
the network before anything is cut by it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateur.errors import PlanError
from secateur.graph.plan import PruningPlan
from secateur.network.custom_layers import layer_rule
from secateur.network.inputs import unwrapped
from secateur.network.named import BOOKS, modules_of, tensors_named
from secateur.pruning.surgery import is_depthwise, kind_of, require_shapes, sizes_of

_COUNTS = frozenset(
    {
        "num_features", "num_groups", "num_channels", "num_heads", "normalized_shape", "unflattened_size", "groups",
        "embed_dim", "head_dim", "kdim", "vdim",
    }
)  # fmt: skip
"""Attributes of PyTorch's own layers that count channels, beside those that follow the tensors of a layer."""
_ATTRIBUTE = re.compile(r"([A-Za-z_]\w*)(?:\[(\d{1,9})\])?")


def require_sound(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a plan that can't have been made of a network like this.

    - Layers and tensors that it keeps channels of exist, and layers are convolutions, linear or registered ones.
    - Kept indices lie within the dimension that they are indices of.
    - Blocks divide the rows of a weight; a magnitude holds one value for each slice of its direction.
    - An attribute is a number, or an element of a tuple or list of numbers, that the module itself holds, and becomes
      less; of PyTorch's own layers it is one that counts channels.

    Raises:
        PlanError: If any of it does not hold.
    """
    model = unwrapped(model)
    modules, tensors = modules_of(model), tensors_named(model)
    if isinstance(model, AveragedModel) and not plan.shapes.keys() <= tensors.keys():
        return require_sound(model.module, plan)
    require_shapes(tensors, plan)
    for side, kept_by in (("out", plan.kept_outputs), ("in", plan.kept_inputs)):
        for name, kept in kept_by.items():
            _require_layer(name, modules.get(name), side, kept)
    for name in plan.kept_outputs.keys() | plan.kept_inputs.keys():
        if layer_rule(modules[name]) is None and is_depthwise(modules[name]):
            _require_along(name, modules[name], plan.kept_inputs.get(name), plan.kept_outputs.get(name))
    for name, blocks in plan.blocks.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim < 2 or not 1 <= blocks <= tensor.shape[0] or tensor.shape[0] % blocks:
            raise _unsound(name, f"blocks: {blocks} do not divide the rows of such a weight")
    for kept_of in (plan.kept_tensors, plan.reads):
        for name, dims in kept_of.items():
            _require_tensor(name, tensors.get(name), dims, plan.blocks.get(name, 1))
    for name, (direction, dim) in plan.magnitudes.items():
        _require_magnitude(name, tensors.get(name), tensors.get(direction), dim, direction in plan.kept_tensors)
    for name, values in plan.attributes.items():
        for attribute, value in values.items():
            _require_count(name, modules.get(name), attribute, value)
    return None


def _unsound(name: str, what: str) -> PlanError:
    return PlanError(f"{name or 'the network'}: {what}; the plan is damaged, or another network's.")


def _require_layer(name: str, layer: nn.Module | None, side: str, kept: Sequence[int]) -> None:
    if layer_rule(layer) is not None:
        return
    if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        found = type(layer).__name__ if layer is not None else "nothing"
        raise PlanError(f"{name}: the plan expects a convolution or linear layer; the model has {found}.")
    tensor, counted = kind_of(layer)
    sizes = dict(
        zip((word.partition("_")[0] for word in counted), sizes_of(layer, getattr(layer, tensor)), strict=False)
    )
    _require_within(name, f"{side}put channels", kept, sizes[side])
    groups = getattr(layer, "groups", 1)
    if groups > 1 and groups != getattr(layer, "in_channels", 0) and len(kept) % groups:
        raise _unsound(name, f"it keeps {len(kept)} {side}put channels in {groups} groups")


def _require_along(name: str, layer: Any, read: Sequence[int] | None, made: Sequence[int] | None) -> None:
    """Refuse a depthwise convolution that keeps filters of other channels than it reads, or unequally many of each."""
    each = layer.out_channels // layer.in_channels
    channels = range(layer.in_channels) if read is None else read
    filters = Counter(i // each for i in (range(layer.out_channels) if made is None else made))
    if filters.keys() != set(channels) or len(set(filters.values())) != 1:
        raise _unsound(name, "it keeps filters of other channels than those that it reads")


def _require_tensor(name: str, tensor: Tensor | None, dims: dict[int, list[int]], blocks: int) -> None:
    if tensor is None:
        raise _unsound(name, "no such parameter or buffer")
    for dim, kept in dims.items():
        if dim >= tensor.ndim:
            raise _unsound(name, f"has no dimension {dim}")
        _require_within(name, f"indices of dimension {dim}", kept, tensor.shape[dim] * (blocks if dim == 1 else 1))


def _require_within(name: str, what: str, kept: Sequence[int], size: int) -> None:
    if not kept or max(kept) >= size:
        found = f"{max(kept)} among the {what}, of which there are {size}" if kept else f"none of its {size} {what}"
        raise _unsound(name, f"the plan keeps {found}")


def _require_magnitude(name: str, gain: Tensor | None, direction: Tensor | None, dim: int, is_cut: bool) -> None:
    if gain is None or direction is None or not is_cut or not dim < direction.ndim > 1:
        raise _unsound(name, "no magnitude of a direction that is cut")
    if list(gain.shape) != [size if d == dim else 1 for d, size in enumerate(direction.shape)]:
        raise _unsound(name, f"no magnitude along dimension {dim} of its direction")


def _require_count(name: str, module: Any, attribute: str, value: int) -> None:
    match = _ATTRIBUTE.fullmatch(attribute)
    own = {} if module is None else vars(module)
    if match is None or match[1] in BOOKS or match[1] not in own:
        raise _unsound(name, f"it has no attribute {attribute!r} that counts channels")
    torchs_own = type(module).__module__.startswith("torch.nn.")
    if torchs_own and match[1] not in {*_COUNTS, *kind_of(module)[1]}:
        raise _unsound(name, f"{attribute} of a {type(module).__name__} counts no channels")
    old = own[match[1]]
    if isinstance(old, (tuple, list)):
        place = int(match[2] or 0)
        old = old[place] if place < len(old) and (match[2] or len(old) == 1) else None
    elif match[2]:
        old = None
    least = 1 if torchs_own else 0  # Code may split channels into parts of which one is left empty.
    if isinstance(old, bool) or not isinstance(old, int) or not least <= value < old:
        raise _unsound(name, f"{attribute} can't be {value}: it is {old!r}, and counts less after a cut")
