"""A model and a plan become a smaller model: parameters, buffers and the attributes that count channels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateur.errors import PlanError
from secateur.graph.plan import PruningPlan
from secateur.network.copies import replica
from secateur.network.custom_layers import layer_rule
from secateur.network.inputs import tensors_of, unwrapped
from secateur.network.isolation import set_modes, switches
from secateur.network.named import modules_of, tensors_named
from secateur.pruning.applied import note

_KINDS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.modules.conv._ConvTransposeNd: ("weight", ("in_channels", "out_channels")),
    nn.modules.conv._ConvNd: ("weight", ("out_channels", "in_channels")),
    nn.Linear: ("weight", ("out_features", "in_features")),
    nn.Embedding: ("weight", ("num_embeddings", "embedding_dim")),
    nn.PReLU: ("weight", ("num_parameters",)),
    nn.RNNBase: ("weight_ih_l0", ("", "input_size")),
    nn.RNNCellBase: ("weight_ih", ("", "input_size")),
}
"""Kind of layer -> the tensor that holds its channels, and for each dimension of it the attribute that counts them.

Along dimension 1, the weight of a grouped convolution holds the channels of one group only.
"""


_AT_ONCE = 1 << 18
"""So many elements of a tensor are cut at once along several dimensions."""
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16}
"""What NumPy allocates as zeros without touching the memory, which PyTorch would."""


@torch.inference_mode(False)  # what is made in inference mode can never be trained
def cut(model: nn.Module, plan: PruningPlan, *, share: bool = False, hollow: bool = False) -> nn.Module:
    """Return a copy of the model without the channels that the plan removes; the model itself is untouched.

    The copy is of the model's own class. Its parameters hold exactly the kept elements; attributes that count channels
    (``in_channels``, ``groups``, ``num_features``, ``normalized_shape`` …) follow. Tied parameters stay tied, frozen
    ones frozen, hooks and modes are kept.

    Args:
        model: The model the plan was made for, or one of the same architecture. A data parallel or compiled wrapper is
            taken off; an ``AveragedModel`` stays one, with as many averages behind it.
        plan: What to keep.
        share: Let the copy hold the model's own tensors, but for those that are cut; for a copy that is only looked at.
        hollow: Let weights that are cut be zeros, for a copy that is run without values.

    Raises:
        PlanError: If the plan names a module or tensor that the model lacks, or that has another shape.
    """
    model = unwrapped(model)
    modules = modules_of(model)
    tensors = tensors_named(model)
    if isinstance(model, AveragedModel) and not plan.shapes.keys() <= tensors.keys():
        averaged: nn.Module = replica(model, {id(model.module): cut(model.module, plan, share=share, hollow=hollow)})
        return averaged
    require_shapes(tensors, plan)
    memo = {id(t): t for t in tensors.values()} if share else {}
    memo |= _cut_tensors(modules, plan, tensors, hollow=hollow)
    small: nn.Module = replica(model, memo)
    _set_attributes(modules_of(small), plan)
    _forget(small, modules)
    note(small, model, plan)
    return small


def require_shapes(tensors: Mapping[str, Tensor], plan: PruningPlan) -> None:
    """Refuse a plan that was made for tensors of other names or shapes.

    Raises:
        PlanError: If it was.
    """
    for name, shape in plan.shapes.items():
        if name not in tensors:
            raise PlanError(f"{name}: the plan prunes it, but the model has no such tensor. Is this the right model?")
        if tuple(tensors[name].shape) != tuple(shape):
            raise PlanError(
                f"{name}: the plan was made for shape {tuple(shape)}, the model has {tuple(tensors[name].shape)}. "
                "Apply it to the unpruned model."
            )


def _forget(copied: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Let modules drop what they computed from their whole weights and keep, as they do when their mode is set.

    Args:
        copied: The cut copy.
        modules: The model's, whose modes the copy gets: code of a module's own may have copied it, and not its mode.
    """
    original = {name: module.training for name, module in modules.items()}
    modes = [(module, original.get(name, module.training)) for name, module in modules_of(copied).items()]
    for module, training in modes:
        if switches(module):
            module.train(training)
    set_modes(modes)


def _cut_tensors(
    modules: Mapping[str, nn.Module], plan: PruningPlan, tensors: Mapping[str, Tensor], *, hollow: bool = False
) -> dict[int, Any]:
    """Return what every tensor that the plan touches becomes, by the identity of the old one."""
    memo: dict[int, Any] = {}
    for name in plan.kept_outputs.keys() | plan.kept_inputs.keys():
        layer = modules.get(name)
        if layer_rule(layer) is not None:
            continue
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            found = type(layer).__name__ if layer is not None else "nothing"
            raise PlanError(f"{name}: the plan expects a convolution or linear layer; the model has {found}.")
        _cut_layer(name, layer, plan, tensors, memo, hollow)
    for name, dims in plan.kept_tensors.items():
        tensor = tensors[name]
        if name in plan.blocks and 1 in dims:
            value = _cut_blocks(tensor, dims.get(0), dims[1], plan.blocks[name])
        else:
            value = _select(tensor, dims, hollow=hollow)
        memo[id(tensor)] = _like(tensor, value)
    for name, (direction, dim) in plan.magnitudes.items():
        tensor, whole = tensors[name], tensors[direction]
        gain = memo.get(id(tensor), tensor).detach()
        after = _norms(memo[id(whole)].detach(), dim)
        before = _norms(_select(whole, {dim: plan.kept_tensors[direction].get(dim)}), dim)
        share = torch.where(before > 0, after / before, 1.0).to(gain.dtype)
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
        # State that holds a value for each element of a parameter is cut as the parameter itself is.
        found = {name: optimizer.state.get(p, {}).get(key) for name, p in old.items()}
        states = {name: value for name, value in found.items() if value is not None}
        held = {name: v.expand_as(old[name]) for name, v in states.items() if _is_laid_out(name, key, v, old[name])}
        stand_ins: dict[str, Tensor] = {name: held.get(name, p) for name, p in old.items()}
        # State of a magnitude of weight norm is sliced; only the magnitude itself is computed anew.
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
    hollow: bool,
) -> None:
    """Cut the weight and the bias of a layer, where the memo does not hold what they become yet."""
    prefix = f"{name}." if name else ""
    weight, bias = tensors.get(f"{prefix}weight"), tensors.get(f"{prefix}bias")
    if weight is not None and id(weight) not in memo:
        rows, columns = _kept_by_dim(name, layer, plan)
        groups = getattr(layer, "groups", 1)
        if groups == 1:
            value = _select(weight, {0: rows, 1: columns}, hollow=hollow)
        elif weight.shape[1] == 1:  # each block holds one channel of those that dimension 1 counts
            value = _select(weight, {0: rows})
        else:
            value = _cut_blocks(weight, rows, columns, groups)
        memo[id(weight)] = _like(weight, value)
    if bias is not None and (kept := plan.kept_outputs.get(name)) is not None:
        memo[id(bias)] = _like(bias, _select(bias, {0: kept}))


def kind_of(layer: nn.Module | None) -> tuple[str, tuple[str, ...]]:
    """Return the entry of a layer in the table of kinds; an empty one for a layer without channels of its own."""
    return next((entry for kind, entry in _KINDS.items() if isinstance(layer, kind)), ("", ()))


def _kept_by_dim(name: str, layer: nn.Module, plan: PruningPlan) -> list[list[int] | None]:
    """Return the channels that a layer keeps along each dimension of its weight that counts channels; None: all."""
    kept = {"in": plan.kept_inputs.get(name), "out": plan.kept_outputs.get(name)}
    return [kept[attribute.partition("_")[0]] for attribute in kind_of(layer)[1]]


def is_depthwise(layer: nn.Module) -> bool:
    """Tell whether a convolution reads one input channel a group, so that a removed channel takes its group along."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", 0)


def _select(tensor: Tensor, kept: Mapping[int, list[int] | None], *, hollow: bool = False) -> Tensor:
    """Return a copy of a tensor with the kept indices of some dimensions; None: all. A hollow one may be zeros."""
    whole = tensor.detach()
    lengths = {dim: len(own) for dim, own in kept.items() if own is not None}
    sizes = [lengths.get(dim, size) for dim, size in enumerate(whole.shape)]
    if hollow and whole.device.type == "cpu" and whole.dtype in _NUMPY:
        return torch.from_numpy(np.zeros(sizes, _NUMPY[whole.dtype]))
    indices = {
        dim: torch.from_numpy(np.asarray(own, dtype=np.int64)).to(tensor.device)
        for dim, own in kept.items()
        if own is not None
    }
    rows = indices.pop(0, None)
    if rows is None or not indices:
        value = whole if rows is None else whole.index_select(0, rows)
        for dim, index in indices.items():
            value = value.index_select(dim, index)
        return value.clone() if value.data_ptr() == tensor.data_ptr() else value
    # Some rows at a time: what is cut along one dimension alone then needs no memory of its own.
    value = whole.new_empty(sizes)
    at_once = max(1, _AT_ONCE // max(1, whole[:1].numel()))
    for some, place in zip(torch.split(rows, at_once), torch.split(value, at_once), strict=True):
        part = whole.index_select(0, some)
        for dim, index in indices.items():
            part = part.index_select(dim, index)
        place.copy_(part)
    return value


def _cut_blocks(tensor: Tensor, rows: Sequence[int] | None, channels: Sequence[int] | None, blocks: int) -> Tensor:
    """Cut a grouped convolution's weight: each block of rows holds, on dimension 1, its own block of the channels.

    Args:
        tensor: The weight.
        rows: Kept indices of dimension 0; None: all.
        channels: Kept channels of all blocks together; None: all.
        blocks: Number of blocks.

    Raises:
        PlanError: If blocks keep different numbers of channels.
    """
    height, width = tensor.shape[0] // blocks, tensor.shape[1]
    kept_rows = np.arange(tensor.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
    kept_columns = np.arange(width * blocks) if channels is None else np.asarray(channels, dtype=np.int64)
    kept_rows = kept_rows[np.argsort(kept_rows // height, kind="stable")]
    kept_columns = kept_columns[np.argsort(kept_columns // width, kind="stable")]
    counts = np.bincount(kept_columns // width, minlength=blocks)
    block_of = kept_rows // height
    widths = np.unique(counts[block_of])
    if widths.size != 1:
        raise PlanError(
            f"plan: groups of a convolution keep {', '.join(map(str, widths))} input channels; keep as many of each."
        )
    # For every kept row, the places in ``kept_columns`` of the columns that its block keeps.
    places = (np.cumsum(counts) - counts)[block_of][:, None] + np.arange(widths[0])
    index = torch.from_numpy(kept_columns[places] % width).to(tensor.device)
    value = tensor.detach().index_select(0, torch.from_numpy(kept_rows).to(tensor.device))
    return value.gather(1, index.view(*index.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:]))


def _like(old: Tensor, value: Tensor) -> Tensor:
    """Return a value as a parameter, frozen or not, where the tensor that it replaces is one."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)
    return value.contiguous()


def _set_attributes(modules: Mapping[str, Any], plan: PruningPlan) -> None:
    """Let the attributes that count channels follow: of layers by what they keep, of others by their cut tensors."""
    for name in plan.kept_outputs.keys() | plan.kept_inputs.keys():
        layer = modules[name]
        if (rule := layer_rule(layer)) is not None:
            rule.resize(layer, plan.kept_inputs.get(name), plan.kept_outputs.get(name))
        else:
            _set_counts(layer, [None if kept is None else len(kept) for kept in _kept_by_dim(name, layer, plan)])
    for name in plan.kept_tensors:
        path, _, own = name.rpartition(".")
        layer = modules[path]
        if own == kind_of(layer)[0]:  # a convolution or linear layer may run in train mode alone, or lend its weight
            _set_counts(layer, sizes_of(layer, getattr(layer, own)))
    for name, values in plan.attributes.items():
        for attribute, value in values.items():
            _set_listed(modules[name], attribute, value)


def sizes_of(layer: Any, tensor: Tensor) -> list[int]:
    """Return how many channels lie along each dimension of a layer's cut tensor, those of all groups together."""
    sizes = list(tensor.shape)
    if isinstance(layer, nn.modules.conv._ConvNd):
        groups, rows = layer.groups, getattr(layer, kind_of(layer)[1][0])
        sizes[1] *= groups * sizes[0] // rows if is_depthwise(layer) else groups
    return sizes


def _set_counts(layer: Any, sizes: Sequence[int | None]) -> None:
    """Let a layer's attributes count so many channels along each dimension of its tensor; None: as many as before."""
    depthwise = is_depthwise(layer)
    for attribute, size in zip(kind_of(layer)[1], sizes, strict=False):
        if attribute and size is not None:
            setattr(layer, attribute, size)
    if depthwise:
        layer.groups = layer.in_channels


def _set_listed(module: nn.Module, attribute: str, value: int) -> None:
    """Set an attribute to a number, or with ``name[i]`` element i of it; a tuple that counts channels holds one."""
    plain, _, index = attribute.removesuffix("]").partition("[")
    old = getattr(module, plain)
    if index:
        setattr(module, plain, type(old)(value if i == int(index) else v for i, v in enumerate(old)))
    else:
        setattr(module, plain, type(old)((value,)) if isinstance(old, tuple) else value)
