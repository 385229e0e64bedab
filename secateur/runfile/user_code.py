"""Import and call user code, named ``path/to/file.py:FUNCTION`` or ``package.module:FUNCTION``; say where it fails."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from secateur.criteria import Criterion
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
    return function


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
