"""The modules and tensors of a network by path, and the tensors among arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

BOOKS = frozenset(vars(nn.Module()))
"""Where a module keeps its parameters, modules, hooks and mode."""

PLANS = "_secateur_plans"
"""Attribute of a pruned network that holds the plans that made it, as plain data."""


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by its path, once; the model's own is empty.

    >>> list(modules_of(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))))
    ['', '0', '1', '1.0']
    """
    return dict(model.named_modules())


def tensors_named(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter, then every buffer, once by its name.

    >>> list(tensors_named(nn.BatchNorm2d(2)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    found: dict[str, Tensor] = {}
    modules = modules_of(model)
    seen: set[int] = set()
    for held in ("_parameters", "_buffers"):
        for path, module in modules.items():
            for name, tensor in getattr(module, held).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{name}" if path else name] = tensor
    return found


ATOMS = frozenset({int, float, bool, type(None), str})
"""What most arguments beside tensors are, seen at once."""


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
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
