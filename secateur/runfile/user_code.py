"""Import and call user code, named ``path/to/file.py:FUNCTION`` or ``package.module:FUNCTION``; say where it fails.

A name is called only if it can be meant. A model's is a class derived from ``torch.nn.Module``, or a function written
in Python; a data set's a :class:`secateur.data.DataBundle` or such a function; a method's a criterion or such a
function. No builtin is, and nothing of the standard library, which isn't imported either.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from secateur.criteria import Criterion
from secateur.data import DataBundle
from secateur.errors import SecateurError, UsageError


def call(spec: str, options: dict[str, Any], what: str) -> Any:
    """Import the function that ``path/to/file.py:FUNCTION`` or ``package.module:FUNCTION`` names, and call it."""
    return guard(spec, imported(spec, what), options, what)


def imported(spec: str, what: str) -> Any:
    """Import the function, class or criterion that ``path/to/file.py:NAME`` or ``package.module:NAME`` names."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise UsageError(f"{spec}: no such file: {path}")
        # A criterion registers its name once, so a file that the model's file has imported isn't run again.
        there = _module_of(path) if what == "method" else None
        module = there or guard(spec, lambda: _import_file(path), {}, what)
    else:
        if _is_standard(place):
            raise UsageError(f"{spec}: {place} is of Python's standard library, which has no {_MEANT[what]}.")
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise UsageError(f"{spec}: no module {place!r} to import; name it by its path, path/to/file.py:{name}.")
        module = guard(spec, importlib.import_module, {"name": place}, what)
    function = getattr(module, name, None)
    if not callable(function) and not isinstance(function, Criterion):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UsageError(f"{spec}: {place} has no function {name!r}{suggest(name, known)}")
    if not _can_be_meant(function, what):
        kind = "a class" if inspect.isclass(function) else f"a {type(function).__name__}"
        raise UsageError(f"{spec}: is {kind} of {_module_name(function) or place}, and no {_MEANT[what]}.")
    return function


_MEANT = {
    "model": "class derived from torch.nn.Module, nor a function of yours that returns one",
    "data": "function of yours that returns a secateur.data.DataBundle",
    "method": "criterion, nor a function of yours that computes one",
}
"""What a name stands for, as messages say it."""


def _can_be_meant(named: Any, what: str) -> bool:
    """Tell whether an object may be called for what its name is given for."""
    if inspect.isclass(named):
        return issubclass(named, {"model": nn.Module, "data": DataBundle, "method": Criterion}[what])
    if what == "method" and isinstance(named, Criterion):
        return True
    while isinstance(named, functools.partial | types.MethodType):
        named = named.func if isinstance(named, functools.partial) else named.__func__
    named = inspect.unwrap(named)
    return isinstance(named, types.FunctionType) and not _is_standard(_module_name(named))


def _module_name(named: Any) -> str:
    """Return the name of the module that a function was written in; empty where it has none."""
    return str(getattr(named, "__module__", None) or "")


def _is_standard(module: str) -> bool:
    """Tell whether a module is of Python's standard library, and no other one of the same name."""
    top = module.partition(".")[0]
    if top not in sys.stdlib_module_names:
        return False
    try:
        found = importlib.util.find_spec(top)
    except ValueError:
        return True
    if found is None or found.origin is None or not found.has_location:
        return True
    file = Path(found.origin).resolve()
    own = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib")]
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")]
    return any(map(file.is_relative_to, own)) and not any(map(file.is_relative_to, installed))


def _module_of(path: Path) -> Any:
    """Return the module that was imported from a file; None if the file wasn't imported."""
    files = {getattr(module, "__file__", None): module for module in list(sys.modules.values())}
    return files.get(str(path.absolute()))


def _import_file(path: Path) -> Any:
    """Import a Python file under its own name; files beside it can be imported from it, as if it were run."""
    folder = str(path.parent.absolute())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"secateur_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses and pickling look the module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def guard(spec: str, function: Callable[..., Any], options: dict[str, Any], what: str) -> Any:
    """Call user code, and turn whatever it raises into a UsageError that names the line."""
    try:
        return function(**options)
    except SecateurError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{spec}: {type(error).__name__} at {last.filename}:{last.lineno}: {one_line(error)}"
        if isinstance(error, TypeError) and "argument" in str(error):
            text = f"{text.removesuffix('.')}. Arguments are given as --{what}-option NAME=VALUE."
        raise UsageError(text) from error


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the known names like it, if any."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "."


def one_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split())
