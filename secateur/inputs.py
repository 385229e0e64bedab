"""Example inputs: one tensor, positional arguments or keyword arguments, and the isolation of a run on them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from secateur.walk import BOOKS, modules_of


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network itself, out of data parallel and compiled wrappers, which put a prefix before every name."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments: a tuple is the former, a dict the latter."""
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


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


def tensors_of(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, data classes and plain objects, in a fixed order."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        for key in value:
            yield from tensors_of(value[key], seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_of(item, seen)
    elif is_dataclass(value) or hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from tensors_of(item, seen)


def batch_size(example_inputs: Any) -> int:
    """Return the number of examples in the first argument: leading size of a tensor, length of a list; else 1."""
    positional, keyword = arguments(example_inputs)
    first = next(iter((*positional, *keyword.values())), None)
    if are_images(first):
        return len(cast(list[Tensor], first))
    return int(first.shape[0]) if isinstance(first, Tensor) and first.ndim > 1 else 1


def _version(tensor: Tensor | None) -> int | None:
    """Return the count of writes into a tensor; None where none is kept."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def switches(module: nn.Module) -> bool:
    """Tell whether a module does something of its own where its mode is set, such as to merge or to swap weights."""
    return type(module).train is not nn.Module.train


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put modules into train mode or eval mode, each by itself; those that do something of their own then, do it."""
    modes = list(modes)
    for module, training in modes:
        if module.training != training and switches(module):
            module.train(training)
    for module, training in modes:  # which the above set for all modules inside
        if module.training != training:
            module.training = training


def _keeps(value: Any) -> bool:
    """Tell whether an attribute is a tensor, or a tuple or list with some: what code keeps from one run to the next."""
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_keeps, value)))


def _put_back(module: nn.Module, before: Mapping[str, Any]) -> None:
    """Give a module the attributes again in which a run left tensors: its state, which has the run's sizes."""
    own = vars(module)
    for name, value in list(own.items()):
        if value is before.get(name) or name in BOOKS or not _keeps(value):
            continue
        if name in before:
            own[name] = before[name]
        else:
            del own[name]


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """Run forwards inside, and leave no mark: modes, buffers, random states and backend flags are put back.

    So are attributes in which code keeps tensors from one run to the next.
    """
    modules = [m for model in models for m in modules_of(model).values()]
    modes = [(m, m.training) for m in modules]
    attributes = [(m, dict(vars(m))) for m in modules]
    buffers = [
        (m, key, tensor, tensor.clone() if tensor is not None else None, _version(tensor))
        for m in modules
        for key, tensor in m._buffers.items()
    ]
    # What is added to a weight and subtracted again is not what it was, to the last bit.
    switched = [
        (p, p.data, p.detach().clone())
        for module in modules
        if switches(module)
        for p in module.parameters(recurse=False)
        if not is_lazy(p)
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    cuda = sorted({t.device.index for model in models for t in model.parameters() if t.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the model's own code may draw from it
    try:
        # In inference mode operators reach the labels whole, and what is made there can never be trained.
        with torch.inference_mode(False), torch.random.fork_rng(devices=cuda), torch.no_grad():
            # The fused attention kernel is one opaque operator; the plain path is made of those that have rules.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        set_modes(modes)
        for module, before in attributes:
            _put_back(module, before)
        for parameter, place, was in switched:
            if parameter.data_ptr() != place.data_ptr():
                parameter.data = place
            if not (place.is_meta or torch.equal(place, was)):
                place.copy_(was)
        for module, key, tensor, value, version in buffers:
            module._buffers[key] = tensor
            if tensor is None or value is None:
                continue
            if tensor.shape != value.shape or tensor.dtype != value.dtype:  # resized, or given other memory
                tensor.data = value
            # Norms write without counting.
            elif version is None or tensor._version != version or not (tensor.is_meta or torch.equal(tensor, value)):
                with torch.no_grad():
                    tensor.copy_(value)
