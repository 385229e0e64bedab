"""The independent oracle: a pruned network equals the original with the removed channels zeroed where they are read.

Nothing here looks into the engine. It takes a plan's names and integers, zeroes what they remove on a copy of the
*original* network, and compares the outputs of the two networks on fresh inputs in fp64.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

TOLERANCE = 1e-9
"""Largest error of an exact plan, in units of the output's largest magnitude."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Plan(Protocol):
    """What the oracle reads of a plan."""

    @property
    def kept_outputs(self) -> Mapping[str, Sequence[int]]:
        """Module name to kept output channels."""

    @property
    def kept_inputs(self) -> Mapping[str, Sequence[int]]:
        """Module name to kept input channels."""

    @property
    def kept_tensors(self) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Tensor name to dimension to kept indices."""


class Group(Protocol):
    """What a random selection reads of a group."""

    @property
    def blocks(self) -> Any:
        """Block of every channel."""

    @property
    def members(self) -> Sequence[Any]:
        """The tensors' dimensions that the channels lie on."""

    @property
    def removable(self) -> Any:
        """Whether a channel may go."""


@dataclass(frozen=True)
class Verdict:
    """How a pruned network compares with the masked original."""

    kind: str
    """``exact``, ``wrong-channel`` (right shape, wrong values), ``wrong-shape``, ``crash`` or ``refused``."""
    detail: str = ""
    error: float = 0.0
    """Largest difference over the largest magnitude of the original's output, dimensionless."""

    @property
    def exact(self) -> bool:
        """Whether the two networks compute the same."""
        return self.kind == "exact"


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every channel its own values, in fp64: norms start at one and zero, where mistakes don't show."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() < 2:
                parameter.copy_(1 + 0.4 * noise if name.endswith("weight") else 0.5 * noise)
            else:
                scale = parameter.detach().std().clamp(min=0.05) if parameter.numel() > 1 else torch.tensor(0.5)
                parameter.copy_(noise * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model


def doubled(inputs: Any) -> Any:
    """Turn every floating-point tensor of the inputs to fp64."""
    return pytree.tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)


def fresh(inputs: Any, seed: int) -> Any:
    """Draw new values for every floating-point tensor of the inputs; integers, which may be indices, stay."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return value

    return pytree.tree_map(draw, inputs)


def run(model: nn.Module, inputs: Any) -> list[Any]:
    """Call the model on example inputs in any of their forms, and list the leaves of what it returns."""
    inputs = copy.deepcopy(inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(inputs, dict):
            output = model(**inputs)
        elif isinstance(inputs, tuple):
            output = model(*inputs)
        else:
            output = model(inputs)
    return list(pytree.tree_leaves(output))


def _channel_dim(module: nn.Module, x: Tensor) -> int:
    if isinstance(module, CONVOLUTIONS):
        return x.dim() - 1 - len(module.kernel_size)
    if isinstance(module, nn.Linear):
        return x.dim() - 1
    raise TypeError(f"the oracle does not know which dimension {type(module).__name__} reads")


def _zeroed(x: Tensor, dim: int, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(x.shape[dim], dtype=x.dtype)
    mask[list(kept)] = 1
    shape = [1] * x.dim()
    shape[dim] = -1
    return x * mask.view(shape)


def _zero_slices(tensor: Tensor, dim: int, kept: Sequence[int]) -> None:
    removed = sorted(set(range(tensor.shape[dim])) - set(kept))
    with torch.no_grad():
        tensor.index_fill_(dim, torch.tensor(removed, dtype=torch.long), 0)


def _zero_block_slices(weight: Tensor, kept: Sequence[int], blocks: int) -> None:
    """Zero what the filters of each block of a grouped convolution's weight read of the removed input channels."""
    filters, width = weight.shape[0] // blocks, weight.shape[1]
    for block in range(blocks):
        here = [i - block * width for i in kept if block * width <= i < (block + 1) * width]
        _zero_slices(weight[block * filters : (block + 1) * filters], 1, here)


def _raw_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _norm_over_kept(module: nn.Module, small: nn.Module, kept: Sequence[int], x: Tensor) -> Tensor:
    """Normalise over the kept channels alone; the others are zero."""
    index = torch.tensor(list(kept))
    weight = None if module.weight is None else module.weight[index]
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias[index]
    if isinstance(module, nn.GroupNorm):
        out = torch.zeros_like(x)
        out[:, index] = F.group_norm(x[:, index], int(small.num_groups), weight, bias, module.eps)
        return out
    dim = -1 if x.shape[-1] == module.weight.numel() else 1  # layer norms of maps (N, C, H, W) permute inside
    x = x.movedim(dim, -1)
    out = torch.zeros_like(x)
    if isinstance(module, nn.LayerNorm):
        out[..., index] = F.layer_norm(x[..., index], (len(index),), weight, bias, module.eps)
    else:
        out[..., index] = F.rms_norm(x[..., index], (len(index),), weight, module.eps)
    return out.movedim(-1, dim)


def masked(
    model: nn.Module,
    plan: Plan,
    *,
    zero_tensors: bool = False,
    zero_filters: bool = False,
    norms_of: nn.Module | None = None,
) -> tuple[nn.Module, set[str]]:
    """Copy the original and zero the removed input channels of every layer named in ``plan.kept_inputs``.

    Layers are masked by forward pre-hooks. A layer that never runs and only lends its weight to a functional call has
    the weight's slices zeroed instead, which is the same.

    Args:
        model: The original network.
        plan: Names and kept indices.
        zero_tensors: Zero the removed slices of raw parameters as well: what reads channels linearly without being a
            layer reads zeros then.
        zero_filters: Zero the removed filters at their producers as well: the other, equally valid, reading of
            "removed", needed where channels are contracted with one another and not by a layer.
        norms_of: The pruned network, to replace norms over channels by the same norm over the kept channels.

    Returns:
        The masked copy, and the set that its hooks fill with the names of the layers that ran.
    """
    copied = copy.deepcopy(model)
    ran: set[str] = set()
    tensors = _raw_tensors(copied)
    for name, dims in plan.kept_tensors.items():
        if zero_tensors and name in tensors and tensors[name].is_floating_point():
            blocks = int(getattr(plan, "blocks", {}).get(name, 1))
            for dim, kept in dims.items():
                if int(dim) == 1 and blocks > 1:
                    _zero_block_slices(tensors[name].data, kept, blocks)
                else:
                    _zero_slices(tensors[name].data, int(dim), kept)
    for name, kept in plan.kept_inputs.items():

        def mask_input(module: nn.Module, arguments: Any, *, name: str = name, kept: Sequence[int] = kept) -> Any:
            ran.add(name)
            return (_zeroed(arguments[0], _channel_dim(module, arguments[0]), kept), *arguments[1:])

        copied.get_submodule(name).register_forward_pre_hook(mask_input)
    if zero_filters:
        for name, kept in plan.kept_outputs.items():

            def mask_output(
                module: nn.Module, arguments: Any, output: Tensor, *, name: str = name, kept: Sequence[int] = kept
            ) -> Tensor:
                ran.add(name)
                return _zeroed(output, _channel_dim(module, output), kept)

            copied.get_submodule(name).register_forward_hook(mask_output)
    if norms_of is not None:
        for name, module in copied.named_modules():
            kept_here = plan.kept_tensors.get(f"{name}.weight", {}).get(0)
            if kept_here is not None and isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):

                def renorm(
                    module: nn.Module, arguments: Any, output: Tensor, *, name: str = name, kept: Any = kept_here
                ) -> Tensor:
                    return _norm_over_kept(module, norms_of.get_submodule(name), kept, arguments[0])

                module.register_forward_hook(renorm)
    return copied, ran


def _lend_masked_weights(copied: nn.Module, plan: Plan, ran: set[str], zero_filters: bool) -> bool:
    """Zero weight slices of planned layers that were never called, and say whether there were any."""
    silent = (set(plan.kept_inputs) | (set(plan.kept_outputs) if zero_filters else set())) - ran
    for name in silent:
        layer = copied.get_submodule(name)
        transposed = bool(getattr(layer, "transposed", False))
        weight = layer.weight.data
        if name in plan.kept_inputs and getattr(layer, "groups", 1) == 1:
            _zero_slices(weight, 0 if transposed else 1, plan.kept_inputs[name])
        if zero_filters and name in plan.kept_outputs and getattr(layer, "groups", 1) == 1:
            _zero_slices(weight, 1 if transposed else 0, plan.kept_outputs[name])
            if layer.bias is not None:
                _zero_slices(layer.bias.data, 0, plan.kept_outputs[name])
    return bool(silent)


def reference(model: nn.Module, plan: Plan, inputs: Any, **options: Any) -> list[Any]:
    """Return the outputs of the masked original."""
    copied, ran = masked(model, plan, **options)
    outputs = run(copied, inputs)
    if _lend_masked_weights(copied, plan, ran, bool(options.get("zero_filters"))):
        outputs = run(copied, inputs)
    return outputs


def difference(expected: Sequence[Any], found: Sequence[Any]) -> Verdict:
    """Compare two lists of output leaves."""
    if len(expected) != len(found):
        return Verdict("wrong-shape", f"{len(found)} outputs instead of {len(expected)}")
    worst = 0.0
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a != b:
                return Verdict("wrong-channel", f"output {i} is {b!r} instead of {a!r}", float("inf"))
            continue
        if a.shape != b.shape:
            return Verdict("wrong-shape", f"output {i} has shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        if a.numel() == 0:
            continue
        if not a.is_floating_point() and not a.is_complex():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        error = float((a - b).detach().abs().max())
        scale = max(float(a.detach().abs().max()), 1e-12)
        worst = max(worst, float("inf") if not np.isfinite(error) else error / scale)
    if worst > TOLERANCE:
        return Verdict("wrong-channel", f"outputs differ by {worst:.1e} of their scale", worst)
    return Verdict("exact", error=worst)


def judge(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    inputs: Any,
    *,
    modes: Iterable[str] = ("eval",),
    norms: bool = False,
) -> Verdict:
    """Compare the pruned network with the masked original.

    Args:
        model: The original network, in fp64.
        small: The pruned network.
        plan: What was removed.
        inputs: Inputs in fp64, other than the example inputs.
        modes: ``eval``, ``train`` or both.
        norms: Whether norms over the pruned channels are replaced by norms over the kept ones (inexact groups).

    Returns:
        The worst verdict over the modes. Never raises: what either network raises is the verdict ``crash``.
    """
    worst = Verdict("exact")
    modes = tuple(modes)
    if modes != ("eval",):  # a forward in training mode changes batch-norm statistics
        model, small = copy.deepcopy(model), copy.deepcopy(small)
    for mode in modes:
        model.train(mode == "train")
        small.train(mode == "train")
        try:
            found = run(small, inputs)
        except Exception as error:  # noqa: BLE001 - whatever the pruned forward raises is the verdict
            return Verdict("crash", f"{mode}: {type(error).__name__}: {error}")
        verdicts = []
        for tensors, filters in ((False, False), (True, False), (True, True)):
            expected = reference(
                model, plan, inputs, zero_tensors=tensors, zero_filters=filters, norms_of=small if norms else None
            )
            verdicts.append(difference(expected, found))
            if verdicts[-1].exact:
                break
        best = min(verdicts, key=lambda v: (not v.exact, v.error))
        if not best.exact:
            return Verdict(best.kind, f"{mode}: {best.detail}", best.error)
        worst = max(worst, best, key=lambda v: v.error)
    return worst


def ties(model: nn.Module, small: nn.Module, plan: Plan, inputs: Any) -> bool:
    """Tell whether two networks' outputs differ only because rounding decides what comes first.

    A detector sorts boxes by scores; where scores tie, sums in another order choose other boxes. Then the original's
    own outputs change about as much where its weights change by a part in 10^14, and outputs tell nothing. What every
    layer makes has to agree in their stead, value by value.
    """
    shaken = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shaken.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + 1e-14 * noise.to(parameter.dtype))
    whole, ran = masked(model, plan)
    expected, wanted = _made(whole, inputs, plan.kept_outputs)
    returned, found = _made(small, inputs, {})
    if set(plan.kept_inputs) - ran or wanted.keys() != found.keys():
        return False
    gap, jump = difference(expected, returned).error, difference(expected, reference(shaken, plan, inputs)).error
    return jump >= gap / 10 and all(difference(wanted[name], found[name]).exact for name in wanted)


def _made(network: nn.Module, inputs: Any, kept: Mapping[str, Sequence[int]]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Run a network; return its outputs, and what every convolution and linear layer made of the channels kept."""
    made: dict[str, list[Any]] = {}
    hooks = []
    for name, layer in network.named_modules():
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):

            def note(layer: nn.Module, arguments: Any, output: Tensor, *, name: str = name) -> None:
                dim = _channel_dim(layer, output)
                index = torch.tensor(kept.get(name, range(output.shape[dim])))
                made.setdefault(name, []).append(output.index_select(dim, index))

            hooks.append(layer.register_forward_hook(note))
    outputs = run(network, inputs)
    for hook in hooks:
        hook.remove()
    return outputs, made


def select(group: Group, ratio: float, rng: np.random.Generator) -> list[int]:
    """Choose random channels of a group that its blocks and fixed channels allow.

    Args:
        group: Blocks and removable channels.
        ratio: Fraction of the channels to remove, at most.
        rng: Source of randomness.

    Returns:
        Ascending channels; empty where the rules leave no choice at this ratio. Every block loses the same fraction,
        and at least one channel of each block, and of each tensor that makes or reads some of the channels, stays;
        of the group as many as it says.
    """
    blocks, removable = np.asarray(group.blocks), np.asarray(group.removable)
    least, staying = getattr(group, "least", 1), getattr(group, "staying", ())
    sizes = np.bincount(blocks)
    if getattr(group, "schedule", None) is not None:
        most = min(ratio * len(blocks) + 0.5, len(blocks) - least)
        rows = [row for row in np.asarray(group.schedule) if row.sum() <= most]
        own = [rng.permutation(np.flatnonzero((blocks == b) & removable)) for b in range(len(sizes))]
        return sorted(int(c) for o, k in zip(own, rows[-1], strict=True) for c in o[:k]) if rows else []
    quota = sizes // np.gcd.reduce(sizes)
    quota *= math.lcm(int(quota.sum()), getattr(group, "multiple", 1)) // int(quota.sum())
    free = [np.flatnonzero((blocks == b) & removable) for b in range(len(sizes))]
    rounds = min(int(min(len(f), n - 1) // q) for f, n, q in zip(free, sizes, quota, strict=True))
    rounds = min(rounds, round(ratio * len(blocks) / int(quota.sum())), (len(blocks) - least) // int(quota.sum()))
    free = [rng.permutation(f) for f in free]
    for count in range(rounds, 0, -1):
        chosen = np.concatenate([f[: count * q] for f, q in zip(free, quota, strict=True)])
        layers = all(np.setdiff1d(m.channels, chosen).size for m in group.members if len(m.channels))
        if layers and all(np.setdiff1d(s.channels, chosen).size >= s.least for s in staying):
            return sorted(int(c) for c in chosen)
    return []


def recover(original: nn.Module, pruned: nn.Module) -> RecoveredPlan:
    """Find which slices of the original a pruned network kept, by its values alone.

    Every parameter of the original has to hold distinct values, as :func:`randomise` gives it. This is how a pruner
    that hands out no plan is put before the same oracle.

    Raises:
        ValueError: If a tensor of the pruned network is not a selection of slices of the original's.
    """
    plan = RecoveredPlan({}, {}, {})
    layers = {name: m for name, m in original.named_modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))}
    before = dict(original.named_parameters(remove_duplicate=False))
    after = dict(pruned.named_parameters(remove_duplicate=False))
    for name, tensor in after.items():
        if name not in before:
            raise ValueError(f"{name} is not a parameter of the original")
        whole = before[name].detach()
        if whole.shape == tensor.shape and torch.equal(whole, tensor):
            continue
        grid = _source(name, whole, tensor.detach())
        kept = [_lines(grid[dim], dim) for dim in range(whole.dim())]
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf == "weight":
            _enter_layer(plan, owner, layers[owner], grid, tuple(whole.shape))
        elif owner in layers and leaf == "bias":
            plan.kept_outputs.setdefault(owner, kept[0])
        else:
            plan.kept_tensors[name] = {d: k for d, k in enumerate(kept) if len(k) < whole.shape[d]}
    return plan


@dataclass(frozen=True)
class RecoveredPlan:
    """A plan read off a pruned network's values."""

    kept_outputs: dict[str, list[int]]
    kept_inputs: dict[str, list[int]]
    kept_tensors: dict[str, dict[int, list[int]]]


def _source(name: str, whole: Tensor, part: Tensor) -> np.ndarray:
    """Find the original's coordinates of every value of a pruned tensor."""
    values, wanted = whole.numpy(), part.numpy()
    if whole.dim() == part.dim() and part.numel():
        # Whole slices, as a rule: the first line along each dimension tells which.
        origin = np.zeros(part.dim(), dtype=int)
        lines = [tuple(slice(None) if d == dim else origin[d] for d in range(part.dim())) for dim in range(part.dim())]
        kept = [_coordinates(values, wanted[line])[dim] for dim, line in enumerate(lines)]
        if [len(k) for k in kept] == list(part.shape) and np.array_equal(values[np.ix_(*kept)], wanted):
            return np.stack(np.meshgrid(*kept, indexing="ij"))
    source = _coordinates(values, wanted.reshape(-1))
    if whole.dim() != part.dim() or not np.array_equal(values[tuple(source)], wanted.reshape(-1)):
        raise ValueError(f"{name} holds values that the original has not")
    return source.reshape(whole.dim(), *part.shape)


def _coordinates(values: np.ndarray, sought: np.ndarray) -> np.ndarray:
    """Return where in an array each of some values stands; anywhere for a value that does not."""
    if not len(sought):
        return np.zeros((values.ndim, 0), dtype=np.int64)
    flat = values.reshape(-1)
    order = np.argsort(sought)
    ranks = np.searchsorted(sought[order], flat).clip(max=len(sought) - 1)
    found = np.flatnonzero(sought[order][ranks] == flat)
    source = np.zeros(len(sought), dtype=np.int64)
    source[order[ranks[found]]] = found
    return np.stack(np.unravel_index(source, values.shape))


def _lines(coordinates: np.ndarray, dim: int) -> list[int]:
    """Read the kept indices of one dimension off the coordinates along it."""
    lines = np.moveaxis(coordinates, dim, 0).reshape(coordinates.shape[dim], -1)
    return [int(i) for i in lines[:, 0]] if lines.size else []


def _enter_layer(plan: RecoveredPlan, name: str, layer: nn.Module, grid: np.ndarray, shape: tuple[int, ...]) -> None:
    """Turn the kept slices of a layer's weight into channels; a grouped layer counts one dimension by blocks."""
    groups = int(getattr(layer, "groups", 1))
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    whole = _lines(grid[0], 0)  # this dimension counts all channels
    block = grid[0] // (shape[0] // groups)
    partial = np.flatnonzero(np.bincount((block * shape[1] + grid[1]).reshape(-1))).tolist()
    outputs, inputs = (partial, whole) if transposed else (whole, partial)
    n_out, n_in = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    if len(outputs) < n_out:
        plan.kept_outputs[name] = outputs
    if len(inputs) < n_in:
        plan.kept_inputs[name] = inputs
