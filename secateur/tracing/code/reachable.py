"""Which code a network's forward may run: found by name, without running it, and rather too much than too little.

A method runs where code that runs says its name, in whatever class of the network it is defined; a function, where it
says the function's. Code that looks attributes up by a computed name may run anything.
"""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.network.copies import is_set
from secateur.network.named import BOOKS, modules_of

_SILENT = frozenset(
    {
        "__init__", "__new__", "__init_subclass__", "__class_getitem__", "__post_init__", "__del__", "__dir__",
        "__repr__", "__str__", "extra_repr", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__",
        "__deepcopy__", "__eq__", "__hash__",
    }
)  # fmt: skip
"""Methods that no forward runs."""
_CALLED = frozenset({"forward", "_call_impl", "_wrapped_call_impl"})
"""Methods of every module that PyTorch calls in a forward; not ``train``, ``to`` or ``state_dict``."""
_ASIDE = frozenset({"reset_parameters", "_load_from_state_dict"})
"""Methods that PyTorch's layers call, but in no forward."""
_WRAPPERS = (types.MethodType, classmethod, staticmethod, functools.partial, functools.cached_property)
_LOOKUPS = frozenset({"getattr", "eval", "exec", "methodcaller", "attrgetter"})
_PLAIN = frozenset({bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device})
_STANDARD = sysconfig.get_path("stdlib")

Reached = tuple[types.FunctionType, type]
"""A function, and the class that it is a method of (``type(None)`` for a plain function)."""
Found = TypeVar("Found")
_MOST_KNOWN = 65536
"""So much code is remembered: what a program writes and runs itself, again and again, has no end."""


def remembered(look: Callable[[types.CodeType], Found]) -> Callable[[types.CodeType], Found]:
    """Remember what is found in code by its identity: a hash of code is one of all its instructions, every time."""
    known: dict[int, tuple[types.CodeType, Found]] = {}

    @functools.wraps(look)
    def found(code: types.CodeType) -> Found:
        entry = known.get(id(code))
        if entry is None:
            if len(known) >= _MOST_KNOWN:
                known.clear()
            entry = known[id(code)] = code, look(code)  # which has to live for its identity to be its own
        return entry[1]

    return found


def reachable(model: nn.Module) -> Iterator[Reached]:
    """Yield the functions of the user's code that the forward of a network may run."""
    methods = _methods(model)
    waiting = [m for name, found in methods.items() for m in found if _is_root(name, m[1])]
    seen: set[int] = set()
    said: set[str] = set()
    while waiting:
        function, kind = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if function.__code__.co_filename == "<string>":  # of a dataclass: it stores and compares
            continue
        yield function, kind
        names = names_in(function.__code__)
        new = methods.keys() if computes_names(function.__code__) else (names & methods.keys()) - said
        said |= names
        waiting += [m for name in new for m in methods[name]]
        waiting += [(f, type(None)) for f in _functions(function, names)]


def _is_root(name: str, kind: type) -> bool:
    """Tell whether Python or PyTorch calls a method, so that no code of the user's has to say its name."""
    if name in _CALLED or (name.startswith("__") and name.endswith("__")):
        return True
    layers = (base for base in kind.__mro__ if base is not nn.Module and base.__module__.startswith("torch."))
    return name not in _ASIDE and any(name in vars(base) for base in layers)


def _methods(model: nn.Module) -> dict[str, list[Reached]]:
    """Return all functions that the classes of a network, or its modules themselves, hold: by name."""
    found: dict[str, list[Reached]] = {}
    kinds: set[type] = set()
    for module in modules_of(model).values():
        kind = type(module)
        kinds.add(kind)
        for name, value in vars(module).items():
            if type(value) in _PLAIN or name in BOOKS or (type(value) is tuple and _PLAIN.issuperset(map(type, value))):
                continue
            for function in _held(value):
                found.setdefault(name, []).append((function, kind))
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            kinds |= {type(part) for part in (value, *inside) if not isinstance(part, (type, Tensor))}
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            for function in _held(hook):
                found.setdefault("forward", []).append((function, kind))
    of_base: dict[type, list[tuple[str, types.FunctionType]]] = {}
    for kind in kinds:
        for base in kind.__mro__:
            if base not in of_base:  # which many classes may have
                of_base[base] = list(_of_class(base))
            for name, function in of_base[base]:
                found.setdefault(name, []).append((function, kind))
    return found


def _of_class(base: type) -> Iterator[tuple[str, types.FunctionType]]:
    if _is_users(base):
        for name, value in vars(base).items():
            if name not in _SILENT and type(value) not in _PLAIN:
                for function in _held(value):
                    yield name, function


def _is_users(kind: type) -> bool:
    return kind is not object and is_users_module(kind.__module__)


@functools.lru_cache(maxsize=4096)
def is_users_module(name: str) -> bool:
    """Tell whether a Python module is neither PyTorch's nor NumPy's nor Python's own."""
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names:  # or the user's own file of the same name
        file = getattr(sys.modules.get(name), "__file__", None)
        return file is not None and (not file.startswith(_STANDARD) or "-packages" in file)
    return root not in ("torch", "numpy")


def _held(value: Any, depth: int = 3) -> Iterator[types.FunctionType]:
    """Yield the functions that a value is or holds: bound, wrapped, partial, of a property, in a list or dict."""
    while isinstance(value, _WRAPPERS):
        value = value.func if hasattr(value, "func") else value.__func__
    if isinstance(value, types.FunctionType):
        yield value
        inside: Iterable[Any] = (cell.cell_contents for cell in value.__closure__ or () if is_set(cell))
        inside = (held for held in inside if isinstance(held, types.FunctionType))  # what a decorator wrapped
    elif isinstance(value, property):
        inside = (part for part in (value.fget, value.fset) if part is not None)
    elif isinstance(value, (list, tuple)):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    else:
        return
    if depth:
        yield from (function for part in inside for function in _held(part, depth - 1))


def _functions(function: types.FunctionType, names: frozenset[str]) -> Iterator[types.FunctionType]:
    """Yield the functions of the user's code that a function names: in its module, or in a module that it names."""
    spaces = [function.__globals__]
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType) and is_users_module(value.__name__):
            spaces.append(vars(value))
    for space in spaces:
        for name in names & space.keys():
            value = space[name]
            if isinstance(value, type):
                if _is_users(value) and not issubclass(value, nn.Module):
                    yield from (f for _, f in _of_class(value))
            elif callable(value) and not isinstance(value, nn.Module):
                yield from (f for f in _held(value) if is_users_module(f.__module__ or ""))


@remembered
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return all names, and all strings that may be names, that code says."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


@remembered
def computes_names(code: types.CodeType) -> bool:
    """Tell whether code may look up an attribute by a name that it does not say."""
    if any(isinstance(constant, types.CodeType) and computes_names(constant) for constant in code.co_consts):
        return True
    if not _LOOKUPS.intersection(code.co_names):
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PRECALL", "PUSH_NULL", "CACHE")]
    for place, step in enumerate(steps):
        if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or step.argval not in _LOOKUPS:
            continue
        call = next((i for i in range(place, len(steps)) if steps[i].opname.startswith("CALL")), None)
        if step.argval != "getattr" or call is None or steps[call].argval not in (2, 3):
            return True
        # getattr(something, "name") or getattr(something, "name", simple)
        said, *default = steps[call + 1 - steps[call].argval : call]
        named = said.opname == "LOAD_CONST" and isinstance(said.argval, str)
        if not named or any(not simple.opname.startswith("LOAD_") for simple in default):
            return True
    return False
