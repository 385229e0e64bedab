"""Runs that leave a network as they found it, and what libraries keep beside it."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.network.named import BOOKS, modules_of


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


def _put_back(module: nn.Module, before: Mapping[str, Any]) -> None:
    """Give a module the attributes again that it had: what a run left there may have the run's sizes, or count runs."""
    own = vars(module)
    for name in [name for name, value in own.items() if value is not before.get(name) and name not in BOOKS]:
        if name in before:
            own[name] = before[name]
        else:
            del own[name]
    for name in before.keys() - own.keys():
        own[name] = before[name]


def _as_written() -> AbstractContextManager[Any]:
    """Have compiled parts of a network run as they are written: no kernel stands for several operators."""
    # Its own import takes seconds, and where nothing has imported it, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


_FIXED = frozenset({bool, int, float, str, tuple, type(None)})
"""What most attributes of modules are: nothing can be put into it."""


_State = tuple[Any, list[Any]]
"""A container in which code may keep something from one run to the next, and what it holds."""


def _contents(value: Any, depth: int = 3) -> Iterator[_State]:
    """Yield the dicts, lists and sets that an attribute of a module is or holds, with what they hold now."""
    if isinstance(value, dict):
        held: list[Any] = list(value.items())
        inside: Iterable[Any] = value.values()
    elif isinstance(value, (list, set, deque)):
        held = inside = list(value)
    else:
        return
    yield value, held
    if depth > 1:
        for item in inside:
            if type(item) not in _FIXED:
                yield from _contents(item, depth - 1)


def _refill(value: Any, held: list[Any]) -> None:
    """Give a container what it held again, the same objects in the same order, where it holds something else."""
    now = list(value.items()) if isinstance(value, dict) else list(value)
    if len(now) == len(held) and all(map(_is_same, now, held)):
        return
    # The plain container's own ways: a class of its own may allow them to nobody.
    kind: Any = next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(value, kind))
    kind.clear(value)
    for item in held:
        if isinstance(value, dict):
            kind.__setitem__(value, *item)
        elif isinstance(value, set):
            kind.add(value, item)
        else:
            kind.append(value, item)


def _is_same(now: Any, before: Any) -> bool:
    """Tell whether a container holds the same object, or under the same key the same one."""
    pairs = isinstance(now, tuple) and isinstance(before, tuple) and len(now) == len(before) == 2
    return now is before or (pairs and now[0] is before[0] and now[1] is before[1])


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """Run forwards inside, and leave no mark: modes, buffers, random states and backend flags are put back.

    So are the attributes of modules, and what the dicts, lists and sets among them hold.
    """
    modules = [m for model in models for m in modules_of(model).values()]
    modes = [(m, m.training) for m in modules]
    # A lazy layer counts its channels when it first sees them, and keeps that.
    attributes = [(m, dict(vars(m))) for m in modules if not any(map(is_lazy, m._parameters.values()))]  # type: ignore[arg-type]
    held_by = (v for _, own in attributes for n, v in own.items() if type(v) not in _FIXED and n not in BOOKS)
    kept = [state for value in held_by for state in _contents(value)]
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
        for p in module._parameters.values()
        if p is not None and not is_lazy(p)
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device for m in modules for p in m._parameters.values() if p is not None}
    cuda = sorted(device.index for device in devices if device.type == "cuda")
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the model's own code may draw from it
    try:
        # In inference mode operators reach the labels whole, and what is made there can never be trained.
        with torch.inference_mode(False), torch.random.fork_rng(devices=cuda), torch.no_grad(), _as_written():
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
        for container, held in kept:
            _refill(container, held)
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
