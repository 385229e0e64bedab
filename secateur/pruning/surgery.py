"""A model and a plan become a smaller model: parameters, buffers and the attributes that count channels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.network.copies import replica
from secateur.network.custom_layers import layer_rule
from secateur.network.inputs import tensors_of, unwrapped
from secateur.network.isolation import set_modes, switches
from secateur.network.named import modules_of, tensors_named

if TYPE_CHECKING:
    from secateur.graph.plan import PruningPlan

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.inference_mode(False)  # what is made in inference mode can never be trained
def cut(model: nn.Module, plan: PruningPlan, *, share: bool = False) -> nn.Module:
    """Return a copy of the model without the channels that the plan removes; the model itself is untouched.

    The copy is of the model's own class. Its parameters hold exactly the kept elements; attributes that count channels
    (``in_channels``, ``groups``, ``num_features``, ``normalized_shape`` …) follow. Tied parameters stay tied, frozen
    ones frozen, hooks and modes are kept.

    Args:
        model: The model the plan was made for, or one of the same architecture. A data parallel or compiled wrapper is
            taken off.
        plan: What to keep.
        share: Let the copy hold the model's own tensors wherever nothing goes; for a copy that is only looked at.

    Raises:
        PlanError: If the plan names a module or tensor that the model lacks, or that has another shape.
    """
    model = unwrapped(model)
    modules = modules_of(model)
    tensors = tensors_named(model, modules)
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise PlanError(f"{name}: the plan prunes it, but the model has no such tensor. Is this the right model?")
        if tuple(tensors[name].shape) != tuple(shape):
            raise PlanError(
                f"{name}: the plan was made for shape {tuple(shape)}, the model has {tuple(tensors[name].shape)}. "
                "Apply it to the unpruned model."
            )
    memo = {id(t): t for t in tensors.values()} if share else {}
    memo |= _cut_tensors(modules, plan, tensors)
    small: nn.Module = replica(model, memo)
    _set_attributes(modules_of(small), plan)
    _forget(small, modules)
    return small


def _forget(copied: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Let modules drop what they computed from their weights and kept, as they do when their mode is set.

    The modes are the model's: a module that says itself how it is copied may leave its own behind.
    """
    whole = {name: module.training for name, module in modules.items()}
    modes = [(module, whole.get(name, module.training)) for name, module in modules_of(copied).items()]
    for module, training in modes:
        if switches(module):
            module.train(training)
    set_modes(modes)


def _cut_tensors(modules: Mapping[str, nn.Module], plan: PruningPlan, tensors: Mapping[str, Tensor]) -> dict[int, Any]:
    """Return what every tensor that the plan touches becomes, by the identity of the old one."""
    memo: dict[int, Any] = {}
    for name in plan.kept_outputs.keys() | plan.kept_inputs.keys():
        layer = modules.get(name)
        if layer_rule(layer) is not None:
            continue
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            found = type(layer).__name__ if layer is not None else "nothing"
            raise PlanError(f"{name}: the plan expects a convolution or linear layer; the model has {found}.")
        _cut_layer(name, layer, plan, tensors, memo)
    for name, dims in plan.kept_tensors.items():
        tensor = tensors[name]
        if name in plan.blocks and 1 in dims:
            value = _cut_blocks(tensor, dims.get(0), dims[1], plan.blocks[name])
        else:
            value = _select(tensor, dims)
        memo[id(tensor)] = _like(tensor, value)
    for name, (direction, dim) in plan.magnitudes.items():
        tensor, whole = tensors[name], tensors[direction]
        gain = memo.get(id(tensor), tensor).detach()
        left = _norms(memo[id(whole)].detach(), dim)
        before = _norms(_select(whole, {dim: plan.kept_tensors[direction].get(dim)}), dim)
        share = torch.where(before > 0, left / before, 1.0).to(gain.dtype)
        memo[id(tensor)] = _like(tensor, gain * share.view([-1 if d == dim else 1 for d in range(whole.ndim)]))
    return memo


def _norms(tensor: Tensor, dim: int) -> Tensor:
    """Return the norm of each slice along a dimension, in fp64."""
    norms: Tensor = torch.linalg.vector_norm(tensor.movedim(dim, 0).flatten(1), dim=1, dtype=torch.float64)
    return norms


def carry_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, plan: PruningPlan
) -> torch.optim.Optimizer:
    """Return an optimizer of the pruned model that goes on where the given one stands.

    State of a parameter's own shape (SGD momentum, Adam moments) loses the elements that the parameter loses; so does
    state that holds one value for a whole dimension of it (Adafactor's factors); counters are copied. Hyper-parameters
    and parameter groups stay.

    Args:
        optimizer: An optimizer of the unpruned model's parameters; it is left as it is.
        model: The unpruned model.
        small: What applying the plan made of it.
        plan: The plan applied.

    Raises:
        PlanError: If the optimizer holds a parameter that the model doesn't, or state that can't be cut.
    """
    model, small = unwrapped(model), unwrapped(small)
    old, new = dict(model.named_parameters()), dict(small.named_parameters())
    names = {id(parameter): name for name, parameter in old.items()}
    groups = []
    for group in optimizer.param_groups:
        unknown = [p for p in group["params"] if id(p) not in names]
        if unknown:
            shape = tuple(unknown[0].shape)
            raise PlanError(f"optimizer: it holds a parameter of shape {shape} that is none of the model's.")
        groups.append({**group, "params": [new[names[id(p)]] for p in group["params"]]})
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    carried = type(optimizer)(groups, **defaults)
    for key in {k for state in optimizer.state.values() for k in state}:
        # Whatever a parameter holds element by element is cut as the parameter itself is.
        found = {name: optimizer.state.get(p, {}).get(key) for name, p in old.items()}
        states = {name: value for name, value in found.items() if value is not None}
        held = {name: v.expand_as(old[name]) for name, v in states.items() if _is_laid_out(name, key, v, old[name])}
        stand_ins: dict[str, Tensor] = {name: held.get(name, p) for name, p in old.items()}
        # What an optimizer holds for a magnitude is no magnitude itself.
        sliced = replace(plan, magnitudes={})
        cut_state = _cut_tensors(modules_of(model), sliced, {**dict(model.named_buffers()), **stand_ins})
        for name, value in states.items():
            if name in held:
                whole = cut_state.get(id(held[name]), held[name]).detach()
                once = tuple(slice(1) if size == 1 else slice(None) for size in value.shape)
                carried.state[new[name]][key] = whole[once].clone()
            else:
                carried.state[new[name]][key] = value.clone() if isinstance(value, Tensor) else copy.copy(value)
    return carried


def _is_laid_out(name: str, key: str, value: Any, parameter: Tensor) -> bool:
    """Tell whether an optimizer's state holds a value for each element of a parameter, or for all along a dimension.

    Raises:
        PlanError: If it is of another shape, and no single value either.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else ()
    if len(shape) == parameter.ndim and all(n in (1, m) for n, m in zip(shape, parameter.shape, strict=True)):
        return isinstance(value, Tensor)
    if all(tensor.numel() <= 1 for tensor in tensors_of(value)):
        return False
    found = f"of shape {shape}" if shape else f"a {type(value).__name__} of tensors"
    raise PlanError(f"optimizer: its state {key} of {name} is {found}, and nothing tells how to cut it.")


def _cut_layer(
    name: str,
    layer: nn.Linear | nn.modules.conv._ConvNd,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    memo: dict[int, Any],
) -> None:
    prefix = f"{name}." if name else ""
    weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
    kept_in, kept_out = plan.kept_inputs.get(name), plan.kept_outputs.get(name)
    if weight is not None and id(weight) not in memo:
        transposed = isinstance(layer, _TRANSPOSED)
        full, half = (kept_in, kept_out) if transposed else (kept_out, kept_in)
        groups = getattr(layer, "groups", 1)
        if groups == 1:
            value = _select(weight, {0: full, 1: half})
        elif weight.shape[1] == 1:  # each block holds one channel of those that dimension 1 counts
            value = _select(weight, {0: full})
        else:
            value = _cut_blocks(weight, full, half, groups)
        memo[id(weight)] = _like(weight, value)
    if bias is not None and kept_out is not None:
        memo[id(bias)] = _like(bias, _select(bias, {0: kept_out}))


def is_depthwise(layer: nn.Module) -> bool:
    """Tell whether a convolution reads one input channel a group, so that a removed channel takes its group along."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", 0)


def _select(tensor: Tensor, kept: dict[int, list[int] | None] | dict[int, list[int]]) -> Tensor:
    value = tensor.detach()
    for dim, indices in kept.items():
        if indices is not None:
            index = torch.from_numpy(np.asarray(indices, dtype=np.int64))
            value = value.index_select(dim, index.to(tensor.device))
    return value.clone() if value.data_ptr() == tensor.data_ptr() else value


def _cut_blocks(tensor: Tensor, full: Sequence[int] | None, half: Sequence[int] | None, blocks: int) -> Tensor:
    """Cut a weight that holds, on dimension 1, one block of the channels that ``half`` counts: each block its own."""
    rows, columns = tensor.shape[0] // blocks, tensor.shape[1]
    kept_rows = np.arange(tensor.shape[0]) if full is None else np.asarray(full, dtype=np.int64)
    kept_columns = np.arange(columns * blocks) if half is None else np.asarray(half, dtype=np.int64)
    kept_rows = kept_rows[np.argsort(kept_rows // rows, kind="stable")]
    kept_columns = kept_columns[np.argsort(kept_columns // columns, kind="stable")]
    counts = np.bincount(kept_columns // columns, minlength=blocks)
    block_of = kept_rows // rows
    widths = np.unique(counts[block_of])
    if widths.size != 1:
        raise PlanError(
            f"plan: groups of a convolution keep {', '.join(map(str, widths))} input channels; keep as many of each."
        )
    # For every row that stays, the columns that its block keeps.
    taken = (np.cumsum(counts) - counts)[block_of][:, None] + np.arange(widths[0])
    index = torch.from_numpy(kept_columns[taken] % columns).to(tensor.device)
    value = tensor.detach().index_select(0, torch.from_numpy(kept_rows).to(tensor.device))
    return value.gather(1, index.view(*index.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:]))


def _like(old: Tensor, value: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    return value.contiguous()


def _count_weight(layer: nn.Linear | nn.modules.conv._ConvNd) -> None:
    """Let a layer's numbers of channels be those of its weight."""
    first, second = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = first, second
    else:
        if is_depthwise(layer):
            layer.groups = first * layer.in_channels // (layer.in_channels if layer.transposed else layer.out_channels)
        second *= layer.groups
        layer.in_channels, layer.out_channels = (first, second) if layer.transposed else (second, first)


def _set_attributes(modules: Mapping[str, Any], plan: PruningPlan) -> None:
    for name in plan.kept_outputs.keys() | plan.kept_inputs.keys():
        layer = modules[name]
        kept_in, kept_out = plan.kept_inputs.get(name), plan.kept_outputs.get(name)
        if (rule := layer_rule(layer)) is not None:
            rule.resize(layer, kept_in, kept_out)
            continue
        if isinstance(layer, nn.Linear):
            layer.in_features = len(kept_in) if kept_in is not None else layer.in_features
            layer.out_features = len(kept_out) if kept_out is not None else layer.out_features
            continue
        if is_depthwise(layer) and kept_in is not None:
            layer.groups = len(kept_in)
        layer.in_channels = len(kept_in) if kept_in is not None else layer.in_channels
        layer.out_channels = len(kept_out) if kept_out is not None else layer.out_channels
    for name in plan.kept_tensors:
        path, _, own = name.rpartition(".")
        owner = modules.get(path)
        if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) and own == "weight":
            _count_weight(owner)  # of a layer that runs in train mode alone, or whose weight the code uses elsewhere
        elif isinstance(owner, nn.PReLU):
            owner.num_parameters = owner.weight.numel()
        elif isinstance(owner, nn.Embedding):
            owner.num_embeddings, owner.embedding_dim = owner.weight.shape
        elif isinstance(owner, nn.RNNBase):
            owner.input_size = owner.get_parameter("weight_ih_l0").shape[1]
        elif isinstance(owner, nn.RNNCellBase):
            owner.input_size = owner.weight_ih.shape[1]
    for name, values in plan.attributes.items():
        for attribute, value in values.items():
            plain, _, index = attribute.removesuffix("]").partition("[")
            old = getattr(modules[name], plain)
            if index:
                new = type(old)(value if i == int(index) else v for i, v in enumerate(old))
            else:
                new = type(old)((value,)) if isinstance(old, tuple) else value
            setattr(modules[name], plain, new)
