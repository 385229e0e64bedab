"""What operators write into: values that a forward writes are put back, and arguments that are read are exchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from secateur.network.named import ATOMS, tensors_in

_STATISTICS = ("running_mean", "running_var")
"""Arguments that norms write into in training, though their schema does not say so."""


class Written:
    """The values that the tensors of a network had before a run wrote into them.

    Code may write into parameters, as a momentum encoder does, and through ``tensor.data``, as observers do, which a
    tensor's version does not show. So the values are remembered before each operator that writes into them.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = named
        self.values: dict[str, Tensor] = {}
        self.memory = {name: tensor.data for name, tensor in named.items()}
        """The tensors' memory, which ``tensor.data = …`` and ``tensor.resize_`` replace by another."""

    @functools.cached_property
    def _owners(self) -> dict[int, list[str]]:
        """The names of the tensors whose values lie at an address."""
        found: dict[int, list[str]] = {}
        for name, tensor in self.named.items():
            found.setdefault(address(tensor), []).append(name)
        return found

    def before(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the values of what an operator is about to write into."""
        given = [args[i] if i < len(args) else kwargs.get(name) for i, name in targets(func)]
        for tensor in tensors_in(given):
            for name in self._owners.get(address(tensor), ()):
                if name not in self.values:
                    self.values[name] = self.named[name].detach().clone()

    def put_back(self) -> None:
        """Give all tensors their values again."""
        for name, memory in self.memory.items():
            restore(self.named[name], memory, self.values.get(name))


def restore(tensor: Tensor, memory: Tensor, value: Tensor | None) -> None:
    """Give a tensor the memory that it had, and this memory the value that it held, if one is known."""
    if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape or tensor.dtype != memory.dtype:
        tensor.data = memory
    if value is not None and not (memory.is_meta or torch.equal(memory, value)):
        memory.copy_(value)


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; for a tensor that has none, such as a sparse one, its identity."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


@functools.lru_cache(maxsize=4096)
def targets(func: Any, *, statistics: bool = True) -> tuple[tuple[int, str], ...]:
    """Return place and name of every argument that an operator writes into.

    Args:
        func: The operator.
        statistics: Whether running statistics of norms count, though in eval mode they are only read.
    """
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (statistics and argument.name in _STATISTICS)
    )


def exchanged(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return an argument with every tensor changed, in lists too.

    Most arguments are tensors or numbers, which PyTorch's own way through containers takes longer for than an operator.
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(exchanged(change, v) for v in value)
    return value if type(value) in ATOMS else tree_map_only(Tensor, change, value)


def read_as(
    change: Callable[[Tensor], Tensor], written: Iterable[tuple[int, str]], args: Any, kwargs: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Return an operator's arguments with every tensor changed, but for those that it writes into."""
    spared = set(chain(*written))
    given = {k: v if k in spared else exchanged(change, v) for k, v in (kwargs or {}).items()}
    return [a if i in spared else exchanged(change, a) for i, a in enumerate(args)], given
