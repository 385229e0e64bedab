"""What the layers of a network read and make while it runs, as two sums of every channel.

Two sums are enough to tell a wrong channel from a right one, and the maps themselves would take much memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.graph.plan import PruningPlan
from secateur.network.named import modules_of
from secateur.pruning.masking import zeroed

Readings = dict[str, list[tuple[Tensor, int]]]
"""Layer -> for every call, sums of what it reads (or makes) of each channel, and over how many values."""
Kept = Mapping[str, list[int] | None]
"""Layer -> the channels of the original that the pruned network keeps of what it reads (or makes); None: all."""


def channel_dim(layer: nn.Module, x: Tensor) -> int:
    """Return the dimension of a layer's input that counts its channels."""
    if isinstance(layer, nn.Linear):
        return x.ndim - 1
    weight = getattr(layer, "weight", None)
    return 1 if not isinstance(weight, Tensor) or x.ndim == weight.ndim else 0


def sums(x: Tensor, dim: int, kept: list[int] | None = None) -> tuple[Tensor, int]:
    """Sum every channel twice: its values, and its values times weights drawn at random; all over their number.

    Args:
        x: What a layer reads or makes.
        dim: The dimension that counts its channels.
        kept: Those of its channels to return; None: all.

    Returns:
        The sums, shape ``(C, 2)``, and the number of values of a channel.
    """
    x, dim = _unwrapped(x.detach(), dim)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    before, size, after = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
    weights = _weights(before * after, x.dtype, x.device)
    if after == 1:
        found = weights @ x.reshape(before, size)
    else:  # one product for each index of the dimensions before the channels': so the tensor need not be laid out anew
        rows = weights.view(2, before, after).transpose(0, 1)
        found = (rows @ x.reshape(before, size, after).transpose(1, 2)).sum(0)
    return (found if kept is None else found[:, kept]).t(), before * after


def _unwrapped(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """Return a tensor as it is outside torch's maps (``vmap``) and gradients: none of these may be kept after them."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        mapped_over = torch._C._functorch.maybe_get_bdim(x) if torch._C._functorch.is_batchedtensor(x) else -1
        x = torch._C._functorch.get_unwrapped(x)
        if mapped_over >= 0:
            x, dim = x.movedim(mapped_over, 0), dim + 1
    return x, dim


@functools.lru_cache(maxsize=8)
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one row of equal weights and one of random weights in [-1.5, 1.5], the same in every run.

    NumPy draws them: inside a map of torch's, torch draws none.
    """
    drawn = np.random.default_rng(count).random(count)
    weights = torch.from_numpy(np.stack([np.ones(count), 3 * drawn - 1.5]) / max(count, 1))
    return weights.to(device, dtype)


def held(hooks: Iterable[RemovableHandle]) -> ExitStack:
    """Return a context that takes hooks away at its end."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        return stack.pop_all()


def watched(network: nn.Module, kept: Kept, readings: Readings) -> ExitStack:
    """Note what layers read, for as long as the context lasts.

    A layer with a list of kept channels has these alone noted, and reads all others as zeros.
    """

    def hook_of(name: str, channels: list[int] | None) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["input"]
            dim = channel_dim(layer, x)
            found, values = sums(x, dim)
            readings[name].append((found if channels is None else found[channels], values))
            if channels is None:
                return None
            keep = torch.zeros(x.shape[dim], dtype=x.dtype, device=x.device)
            keep[channels] = 1
            if found.isfinite().all():  # a product takes a fraction of the time that filling takes
                x = x * keep.view(-1, *[1] * (x.ndim - dim - 1))
            else:
                x = x.index_fill(dim, (keep == 0).nonzero().flatten(), 0)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

        return hook

    modules = modules_of(network)
    return held(modules[n].register_forward_pre_hook(hook_of(n, c), with_kwargs=True) for n, c in kept.items())


def made(network: nn.Module, kept: Kept, readings: Readings) -> ExitStack:
    """Note what layers make, of the channels kept, for as long as the context lasts."""

    def hook_of(name: str, channels: list[int] | None) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):  # a layer of the user's own may return more than it makes
                readings[name].append(sums(out, channel_dim(layer, out), channels))

        return hook

    modules = modules_of(network)
    return held(modules[name].register_forward_hook(hook_of(name, channels)) for name, channels in kept.items())


@contextmanager
def masked(model: nn.Module, plan: PruningPlan, readings: Readings) -> Iterator[None]:
    """Have removed channels zeroed where the original reads them, for as long as the context lasts.

    Layers read through a hook, which is taken away again. Where code uses a weight without a layer of its own, that
    weight, or what it is computed from, is read with its removed columns zeroed.
    """
    with watched(model, plan.kept_inputs, readings), zeroed(model, plan):
        yield
