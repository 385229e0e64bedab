"""Example inputs: one tensor, positional arguments or keyword arguments; and the tensors among what a model takes."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, MappingView
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from secateur.errors import UsageError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside data parallel and compiled wrappers, which put a prefix before every name.

    Raises:
        UsageError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the network: expected a torch.nn.Module, found {type(model).__name__}. Call a function in the forward of "
            "a module that owns its layers."
        )
    parallel = isinstance(model, DataParallel | DistributedDataParallel)
    inner = model.module if parallel else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments: a tuple is the former, a dict the latter."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


_TYPES = {torch.float32: "", torch.int64: ":long", torch.int32: ":int", torch.bool: ":bool", torch.uint8: ":uint8"}


def shapes_of(example_inputs: Any) -> list[str]:
    """Write the shapes of example inputs as ``--input`` takes them; none where one is no tensor of a common type.

    Example:
        >>> shapes_of(torch.zeros(1, 3, 8, 8)), shapes_of({"ids": torch.zeros(1, 16, dtype=torch.int64)})
        (['1x3x8x8'], ['ids=1x16:long'])
    """
    positional, keyword = arguments(example_inputs)
    values = [*positional, *keyword.values()]
    if (positional and keyword) or not all(
        isinstance(value, Tensor) and value.numel() and value.dim() and value.dtype in _TYPES for value in values
    ):
        return []
    names = ["" for _ in positional] + [f"{name}=" for name in keyword]
    return [f"{n}{'x'.join(map(str, v.shape))}{_TYPES[v.dtype]}" for n, v in zip(names, values, strict=True)]


def call(network: nn.Module, example_inputs: Any) -> Any:
    """Call a network on copies of the tensors in example inputs, since its code may write into them."""
    positional, keyword = arguments(mapped(example_inputs, torch.clone))
    return network(*positional, **keyword)


def are_images(value: Any) -> bool:
    """Tell whether an argument is a list of images ``(C, H, W)``, as detectors take them in place of a batch."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, Tensor) and one.dim() == 3 for one in value)


def mapped(value: Any, change: Any) -> Any:
    """Return nested lists, tuples and dicts with ``change`` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(v, change) for v in value)
    return copy.copy(value)


def varied(example_inputs: Any) -> Any:
    """Replace inputs that hold one value throughout by random ones: of zeros, many networks compute the same."""
    generator = torch.Generator().manual_seed(0)

    def vary(tensor: Tensor) -> Tensor:
        dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
        if not (dense and tensor.is_floating_point() and tensor.numel() > 1):
            return tensor
        if bool((tensor != tensor.flatten()[0]).any()):
            return tensor
        return tensor + torch.rand(tensor.shape, generator=generator).to(tensor)

    return mapped(example_inputs, vary)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, data classes and plain objects, in a fixed order."""
    return (leaf for leaf in leaves_of(value, {}, taking=False) if isinstance(leaf, Tensor))


_HOLDING = (list, tuple, set, frozenset, deque, MappingView)
"""Containers other than mappings. Iterables of other types may be endless, or hold themselves, as text does."""


def leaves_of(value: Any, seen: dict[int, Any], *, taking: bool = True) -> Iterator[Any]:
    """Yield everything in nested containers that is no container itself, such as tensors, numbers and arrays.

    Args:
        value: What to search.
        seen: By identity, the containers searched already, which are not searched again.
        taking: Whether iterators are used up; those within an object never are: it may need them, as a file it reads.
    """
    if isinstance(value, (Tensor, str, bytes, bool, int, float, type(None), type, ModuleType)):
        yield value
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept, since another object may get the identity of one that is freed
    inside: Any
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (nn.ParameterList, nn.ParameterDict)):
        inside = value.parameters()
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        inside = value.flat
    elif isinstance(value, _HOLDING) or (isinstance(value, Iterator) and taking):
        inside = value
    elif isinstance(value, nn.Module) or not (hasattr(value, "__dict__") or hasattr(value, "__slots__")):
        yield value
        return
    else:
        slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
        inside = (*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots))
        taking = False
    for item in inside:
        yield from leaves_of(item, seen, taking=taking)


def batch_size(example_inputs: Any) -> int:
    """Return the number of examples in the first argument: leading size of a tensor, length of a list; else 1."""
    positional, keyword = arguments(example_inputs)
    first = next(iter((*positional, *keyword.values())), None)
    if are_images(first):
        return len(cast(list[Tensor], first))
    return int(first.shape[0]) if isinstance(first, Tensor) and first.ndim > 1 else 1
