"""A forward of a network whose weights have some of their columns zeroed, and stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from secateur.graph.plan import PruningPlan
from secateur.network.modes import OperatorMode
from secateur.network.named import tensors_named
from secateur.network.writes import address, read_as, targets


def zeroed(model: nn.Module, plan: PruningPlan) -> AbstractContextManager[Any]:
    """Have every operator read the weights that the plan says are read with their removed columns zeroed.

    A weight is copied for each operator that reads it, and the copy is freed after it: no second copy of the network is
    held. Views of a weight's memory are read in the same way. What an operator writes into is given as it is.

    >>> from secateur import PruningPlan
    >>> layer = torch.nn.Linear(3, 2, bias=False)
    >>> with torch.no_grad(), zeroed(layer, PruningPlan(reads={"weight": {1: [0]}})):
    ...     found = layer(torch.eye(3))
    >>> (found == 0).all(1).tolist(), bool((layer.weight == 0).any())
    ([False, True, True], False)
    """
    if not plan.reads:
        return nullcontext()
    tensors = tensors_named(model)
    return _Zeroing({name: tensors[name] for name in plan.reads}, plan)


class _Zeroing(OperatorMode):  # type: ignore[no-untyped-call]
    def __init__(self, weights: Mapping[str, Tensor], plan: PruningPlan) -> None:
        super().__init__()
        self.plan = plan
        self.held: dict[int, dict[str, Tensor]] = {}
        """By address of memory, the weights that lie there."""
        with torch._C.DisableTorchFunction():  # a mode that converts tensors would have the address of another one
            for name, weight in weights.items():
                self.held.setdefault(address(weight), {})[name] = weight

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, given = read_as(self._read, targets(func), args, kwargs)
        return func(*args, **given)

    def _read(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it would be with the weights in its memory zeroed."""
        with torch._C.DisableTorchFunction():
            weights = self.held.get(address(tensor))
            if weights is None:
                return tensor
            with _disable_current_modes(), torch.no_grad():
                return self._without(tensor, weights)

    def _without(self, tensor: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return what a view of some memory reads in a copy of it in which the weights that lie there are zeroed."""
        one = next(iter(weights.values()))
        memory = one.as_strided((one.untyped_storage().nbytes() // one.itemsize,), (1,), 0).clone()
        for name, weight in weights.items():
            value = memory.as_strided(*_geometry(weight))
            for dim, kept in self.plan.reads[name].items():
                _zero_others(value, dim, kept, self.plan.blocks.get(name, 1) if dim == 1 else 1)
        return memory.view(tensor.dtype).as_strided(*_geometry(tensor))


def _geometry(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _zero_others(value: Tensor, dim: int, kept: list[int], blocks: int) -> None:
    """Zero what is not kept along a dimension, on which each block of rows may hold its own block of the channels."""
    mask = torch.ones(value.shape[dim] * blocks, dtype=torch.bool, device=value.device)
    mask[torch.tensor(kept, device=value.device)] = False
    for rows, own in zip(value.chunk(blocks), mask.chunk(blocks), strict=True):
        rows.movedim(dim, -1).masked_fill_(own, 0)
