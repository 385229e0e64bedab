"""A forward in fp64 of a network that stays in its own precision."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.network.modes import OperatorMode
from secateur.network.writes import exchanged, read_as, targets

_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_SETTERS = ("__get__", "__set__", "__setitem__")


@contextmanager
def in_double() -> Iterator[None]:
    """Have every operator read and make fp64 in place of fp32, also where the code asks for fp32.

    A weight is converted for each operator that reads it, and the converted one is freed after it: no second copy of
    the network is held, as there would be of a converted network. What an operator writes into keeps its precision.

    >>> layer = torch.nn.Conv1d(3, 2, 1)
    >>> with torch.no_grad(), in_double():
    ...     found = layer(torch.ones(1, 3, 4)).float()
    >>> found.dtype, layer.weight.dtype
    (torch.float64, torch.float32)
    """
    with _Functions(), _Operators():
        yield


class _Functions(TorchFunctionMode):
    """Converts the arguments of functions, some of which compare precisions before they call an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DTYPE:
            return torch.float64 if (found := func(*args)) is torch.float32 else found
        if _reads_alone(func) and "out" not in kwargs:
            args = exchanged(_doubled, args)
            kwargs = {key: exchanged(_doubled, value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


class _Operators(OperatorMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = targets(func, statistics=False)
        args, given = read_as(_doubled, written, args, kwargs)
        if given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        out = func(*args, **given)
        return out if written else exchanged(_doubled, out)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype is torch.float32 else tensor


@functools.lru_cache(maxsize=1024)
def _reads_alone(func: Any) -> bool:
    """Tell by its name whether a function only reads its arguments: it is no setter, and writes into none."""
    name = getattr(func, "__name__", "_")
    return not (name in _SETTERS or name.startswith("__i") or (name.endswith("_") and not name.endswith("__")))
