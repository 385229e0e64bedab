"""Copies of networks: as ``copy.deepcopy`` makes them, but faster, and with functions that call the copy.

``copy.deepcopy`` shares functions. In a copy, a hook that holds the network in its closure, or a forward put on an
instance, would still call the network that it was made for, and write into it.
"""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from secateur.errors import PlanError, SecateurError
from secateur.network.named import PLANS, modules_of, tensors_named

_ATOMS = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, types.ModuleType}
)
"""Types of values that a network and its copy share."""
_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
"""Every module's own tables of parameters, submodules and hooks: nobody shares them."""
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
"""Types of views of a dict: the only way to the dict is through Python's garbage collector."""
_DEPTH = 6
"""How many containers deep a function's variables are searched for the model."""
_MOST = 20_000
"""How many objects are searched for the model in what a copy holds, at most."""


def replica(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Return ``copy.deepcopy(model, memo)``, with a short way for what modules are mostly made of.

    A network has thousands of empty hook tables and plain numbers, over which the general copy takes longer than one
    forward. A module of a class that defines how it is copied is left to the general copy.

    Functions that reach the model through their closure or defaults are made anew; they hold the copies of what the
    model's functions hold. Python modules that a network holds, as its backend, are shared with it.

    Args:
        model: The network to copy.
        memo: By identity of a value, what takes its place in the copy.

    Raises:
        PlanError: If the copy would go on to call the model all the same, or a value that a module holds can't be
            copied.
    """
    memo = {} if memo is None else memo
    modules = modules_of(model)
    for module in modules.values():
        for value in vars(module).values():
            # A tensor computed from parameters can't be deep-copied; it is computed anew at the next forward.
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    copied = _Copier(modules, memo).copy(model)
    own = {id(module) for module in modules.values()}
    for path, module in modules_of(copied).items():
        for held, value in vars(module).items():
            if held not in _TABLES and held != PLANS and not _is_atomic(value) and _holds(value, own):
                raise PlanError(
                    f"{f'{path}.{held}'.lstrip('.')}: this {type(value).__name__} holds a function that goes on to "
                    "call the unpruned network, also in a copy. Make it a method, or keep it in a list or dict."
                )
    return copied


def _holds(value: Any, own: set[int]) -> bool:
    """Tell whether a value that a copy holds, and that is neither module nor tensor, leads to one of these modules.

    Args:
        value: An attribute of a module of the copy.
        own: The identities of the modules that were copied.
    """
    if isinstance(value, (torch.Tensor, nn.Module)) or not gc.is_tracked(value):
        return False
    waiting, seen = [value], {id(value)}
    while waiting and len(seen) < _MOST:
        holder = waiting.pop()
        for found in [holder()] if isinstance(holder, weakref.ref) else gc.get_referents(holder):
            if id(found) in own:
                return True
            plain = isinstance(found, (torch.Tensor, nn.Module, type, types.ModuleType, types.CodeType))
            if id(found) not in seen and not plain and gc.is_tracked(found) and not _is_namespace(found):
                seen.add(id(found))
                waiting.append(found)
    return False


def _is_namespace(value: Any) -> bool:
    """Tell whether a dict holds the global variables of a Python module."""
    return type(value) is dict and "__builtins__" in value


def _is_atomic(value: Any) -> bool:
    """Tell whether copies share a value: a number or the like, or a tuple of such."""
    return type(value) in _ATOMS or (type(value) is tuple and _ATOMS.issuperset(map(type, value)))


class _Copier:
    def __init__(self, modules: dict[str, nn.Module], memo: dict[int, Any]) -> None:
        self.modules, self.memo = modules, memo

    @functools.cached_property
    def owned(self) -> set[int]:
        """The identities of what is the model's own: modules, tensors, and the containers that modules hold."""
        found = {id(own) for own in (*self.modules.values(), *tensors_named(self.modules[""]).values())}
        for module in self.modules.values():
            held = (v for name, v in vars(module).items() if name not in _TABLES)
            found |= {id(v) for v in held if isinstance(v, (list, dict, set))}
        return found

    def copy(self, value: Any) -> Any:
        kind: Any = type(value)
        if kind in _ATOMS:
            return value
        known = self.memo.get(id(value))
        if known is not None:
            return known
        if kind is dict or (kind is OrderedDict and not vars(value)):
            table = self.memo[id(value)] = kind()
            for key, item in value.items():
                table[self.copy(key)] = self.copy(item)
            return table
        if kind is list:
            items = self.memo[id(value)] = []
            items.extend(map(self.copy, value))
            return items
        if kind is tuple:
            return value if _is_atomic(value) else tuple(map(self.copy, value))
        if kind is types.FunctionType:
            return self._function(value) if self._reaches(value) else value
        if kind is types.MethodType:
            return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))
        if kind is functools.partial:
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **self.copy(value.keywords))
        if kind in _VIEWS:  # such as the keys of a ModuleDict
            (table,) = gc.get_referents(value)
            return getattr(self.copy(table), kind.__name__.removeprefix("dict_"))()
        if not isinstance(value, nn.Module) or not _is_plain(kind):
            return copy.deepcopy(value, self.memo)
        return self._module(value, kind)

    def _module(self, module: nn.Module, kind: Any) -> Any:
        small: Any = kind.__new__(kind)
        self.memo[id(module)] = small
        state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
        # The memo knows values by their identity, which another value may get once a state made for copying is freed.
        self.memo.setdefault(id(self.memo), []).append(state)
        copied = {}
        for name, item in state.items():
            if name in _TABLES and not item and type(item) in (dict, set, OrderedDict):
                # A module may hold the handle of a hook, which refers to the table of hooks.
                copied[name] = self.memo.setdefault(id(item), type(item)())
            elif _is_atomic(item) or name == PLANS:
                copied[name] = item
            else:
                copied[name] = self._attribute(module, name, item)
        small.__setstate__(copied)
        return small

    def _attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        try:
            return self.copy(value)
        except SecateurError:
            raise
        except Exception as error:  # whatever the value's own code raises
            path = next((path for path, own in self.modules.items() if own is module), type(module).__name__)
            text = f"{type(error).__name__}: {error}".rstrip(".")
            raise PlanError(
                f"{f'{path}.{name}'.lstrip('.')}: this {type(value).__name__} can't be copied ({text}), so neither can "
                "the network. Take it off the module, and put it back on the pruned one."
            ) from error

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self.memo[id(function)] = made  # before its cells, which may hold the function itself
        made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
        made.__annotations__ = function.__annotations__
        made.__dict__.update({name: self._held(value) for name, value in vars(function).items()})
        made.__defaults__ = self._held(function.__defaults__)
        made.__kwdefaults__ = self._held(function.__kwdefaults__)
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            if is_set(old):
                cell.cell_contents = self._held(old.cell_contents)
        return made

    def _held(self, value: Any) -> Any:
        """Return what a function of the copy holds for a value: a copy if it reaches the model, otherwise the value."""
        return self.copy(value) if self._reaches(value) else value

    def _reaches(self, value: Any, depth: int = _DEPTH) -> bool:
        """Tell whether a value is one of ``owned``, or holds one."""
        kind = type(value)
        inside: Iterable[Any] = ()
        if kind in _ATOMS or not depth:
            return False
        if kind is types.FunctionType:
            held = [cell.cell_contents for cell in value.__closure__ or () if is_set(cell)]
            inside = (*held, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values())
        elif id(value) in self.owned:
            return True
        elif kind is types.MethodType:
            inside = (value.__func__, value.__self__)
        elif kind is functools.partial:
            inside = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            inside = value
        elif isinstance(value, dict):
            inside = value.values()
        elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, torch.Tensor)):
            inside = vars(value).values()
        return any(self._reaches(item, depth - 1) for item in inside)


@functools.lru_cache(maxsize=256)
def _is_plain(kind: Any) -> bool:
    """Tell whether copying a module means copying the dict that its ``__getstate__`` gives, and nothing else."""
    ways = ("__reduce_ex__", "__reduce__")
    others = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
    slots = any(getattr(base, "__slots__", ()) for base in kind.__mro__)
    own = any(hasattr(kind, way) for way in others) or any(getattr(kind, w) is not getattr(object, w) for w in ways)
    return not slots and not own


def is_set(cell: types.CellType) -> bool:
    """Tell whether a variable of a closure has a value yet: a cell without one equals an empty cell, and no other."""
    return cell != types.CellType()
