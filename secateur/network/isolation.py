"""Runs that leave a network as they found it, and what libraries keep beside it."""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from secateur.network.named import BOOKS, modules_of
from secateur.network.writes import restore

_FIXED = frozenset({bool, int, float, str, tuple, type(None)})
"""Types of most attributes of modules, into which nothing can be put."""
_HOOKS = [name for name, value in vars(nn.Module()).items() if name.endswith("_hooks") and isinstance(value, dict)]
"""Where a module keeps its hooks."""
ONE_AT_A_TIME = threading.RLock()
"""Held while a network runs that is to be left as found: random states and switches of torch are every thread's."""
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


def switches(module: nn.Module) -> bool:
    """Tell whether a module does something of its own when its mode is set, such as to merge or to swap weights."""
    return type(module).train is not nn.Module.train


def set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put each module into train or eval mode by itself; ``train`` is called of those alone that have their own."""
    modes = list(modes)
    for module, training in modes:
        if module.training != training and switches(module):
            module.train(training)
    for module, training in modes:  # a module's own ``train`` set the mode of all modules inside it
        if module.training != training:
            module.training = training


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """Run forwards inside, and leave no mark: what they change of the networks and of torch's state is put back.

    That is: modes; attributes of modules, and what the dicts, lists, sets and plain objects among them hold; hooks;
    buffers; parameters that a module changes when its mode is set; random states; torch's switches. Another thread
    that runs networks so waits.
    """
    modules = [m for model in models for m in modules_of(model).values()]
    cuda = sorted({p.device.index for m in modules for p in m._parameters.values() if p is not None and p.is_cuda})
    with ONE_AT_A_TIME, ExitStack() as stack:  # what is entered last is put back first
        stack.callback(_tensors(modules))
        stack.callback(_attributes(modules))
        stack.callback(set_modes, [(m, m.training) for m in modules])
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - the model's own code may draw from it
        stack.callback(random.setstate, random.getstate())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        # In inference mode operators reach the labels whole, and what is made there can never be trained.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.no_grad())
        # Compiled parts run as they are written, for no kernel to stand for several operators. Where nothing has
        # imported the compiler, which takes seconds, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # The fused attention kernel is one opaque operator; the plain path is made of those that have rules.
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@contextmanager
def _without_modes() -> Iterator[None]:
    """Read and write tensors as they are, where modes around the run have operators read others in their place."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@_without_modes()
def _tensors(modules: list[nn.Module]) -> Callable[[], None]:
    """Look at tensors that a run in eval mode writes; return what puts them back.

    These are buffers, and parameters of modules that do something of their own where their mode is set: what is added
    to a weight and subtracted again is not what it was, to the last bit.
    """
    buffers = [(m._buffers, name, tensor) for m in modules for name, tensor in m._buffers.items()]
    tensors = [*(t for *_, t in buffers), *(p for m in modules if switches(m) for p in m._parameters.values())]
    known = [(t, t.data, t.detach().clone()) for t in tensors if t is not None and not is_lazy(t)]

    @_without_modes()
    def put_back() -> None:
        for table, name, buffer in buffers:
            table[name] = buffer
        for tensor, memory, value in known:
            restore(tensor, memory, value)

    return put_back


def _attributes(modules: list[nn.Module]) -> Callable[[], None]:
    """Look at the attributes of modules, at what containers among them hold, and at hooks; return what puts them back.

    What a run leaves in attributes may have the run's sizes, or count runs. A library may install hooks when a model
    first runs, and note this on a module: note and hooks are put back together, or the next run would install them
    once more. Where a run changed hooks and nothing else, the note is kept elsewhere, and the hooks are left with it.
    """
    # A lazy layer counts its channels when it first sees them, and keeps that.
    known = [(m, dict(vars(m))) for m in modules if not any(map(is_lazy, m._parameters.values()))]  # type: ignore[arg-type]
    held_by = (v for _, own in known for name, v in own.items() if type(v) not in _FIXED and name not in BOOKS)
    # A configuration that all modules share is looked at once.
    held_once = {id(value): value for value in held_by}.values()
    containers = [found for value in held_once for found in _containers(value)]
    tables = [own[name] for _, own in known for name in _HOOKS if name in own]
    hooks = [(table, _held(table) if table else []) for table in tables]

    def put_back() -> None:
        changed = [_set_back(module, before) for module, before in known]
        changed += [_refill(container, held) for container, held in containers]
        if any(changed):
            for table, held in hooks:
                _refill(table, held)

    return put_back


def _set_back(module: nn.Module, before: Mapping[str, Any]) -> bool:
    """Give a module the attributes that it had, and no others; tell whether it had lost or got any."""
    own = vars(module)
    if len(own) == len(before) and all(map(operator.is_, own.values(), before.values())):
        return False
    changed = [n for n, value in own.items() if n not in BOOKS and (n not in before or value is not before[n])]
    changed += before.keys() - own.keys()
    for name in changed:
        if name in before:
            own[name] = before[name]
        else:
            del own[name]
    return bool(changed)


def _containers(value: Any, depth: int = 3) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the dicts, lists and sets that an attribute of a module is or holds, with what they hold now.

    The attributes of a plain object, such as one that holds a state, are a dict like any other.
    """
    if not (isinstance(value, _CONTAINERS) or callable(value) or isinstance(value, (torch.Tensor, ModuleType))):
        value = getattr(value, "__dict__", None)
    if isinstance(value, _CONTAINERS):
        held = _held(value)
        yield value, held
        for item in held if depth > 1 else ():
            if type(item) not in _FIXED:
                yield from _containers(item, depth - 1)


def _held(container: Any) -> list[Any]:
    """Return what a container holds: of a dict its keys, then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _refill(container: Any, held: list[Any]) -> bool:
    """Give a container what it held again, the same objects in the same order; tell whether it held something else."""
    now = _held(container)
    if len(now) == len(held) and all(map(operator.is_, now, held)):
        return False
    # The plain container's own ways: a class of its own may allow them to nobody.
    kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
    kind.clear(container)
    if isinstance(container, dict):
        for key, value in zip(held[: len(held) // 2], held[len(held) // 2 :], strict=True):
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, held)
    return True
