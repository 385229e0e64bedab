"""The modules and tensors of a network by path, as PyTorch lists them, but in one pass without nested generators.

A trial asks for them a dozen times, and of a network of a thousand modules that takes longer than its forward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

BOOKS = frozenset(vars(nn.Module()))
"""Where a module keeps its parameters, modules, hooks and mode."""


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return ``dict(model.named_modules())``.

    >>> list(modules_of(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))))
    ['', '0', '1', '1.0']
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        if module._modules:  # most have none
            start = f"{path}." if path else ""
            waiting += [(start + name, child) for name, child in reversed(module._modules.items()) if child is not None]
    return found


def tensors_named(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> dict[str, Tensor]:
    """Return ``dict(model.named_parameters()) | dict(model.named_buffers())``; of modules listed before, if given.

    >>> list(tensors_named(nn.BatchNorm2d(2)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    modules = modules_of(model) if modules is None else modules
    parameters = ((path, module._parameters) for path, module in modules.items())
    buffers = ((path, module._buffers) for path, module in modules.items())
    found: dict[str, Tensor] = {}
    for tables in (parameters, buffers):
        seen: set[int] = set()
        for path, table in tables:
            for name, tensor in table.items() if table else ():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{name}" if path else name] = tensor
    return found


ATOMS = frozenset({int, float, bool, type(None), str})
"""What most arguments beside tensors are, seen at once."""


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments, in lists too."""
    found: list[Tensor] = []
    for value in values:
        if type(value) in ATOMS:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_in(value))
    return found
