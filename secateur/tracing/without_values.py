"""Operators that take long are not run: what they would make has the right shapes, and all values are zero."""

from __future__ import annotations

import functools
import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.network.named import tensors_in

_ATTRIBUTE = "_secateur_without_values"


_LARGE = 1 << 16
"""From so many elements read, running an operator takes longer than asking for the shapes of what it makes."""


_AS_IT_IS = ("aten::_unsafe_view",)
"""Operators that are run whatever they read: views, whose schemas do not say so."""


_PRODUCTS = frozenset({
    "aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::linear",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
})  # fmt: skip
"""Operators of layers, which take long; of what they make no value is needed."""


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Call an operator, or make zeros of the shapes of what it would make; tell which."""
    operands = tensors_in((*args, *kwargs.values()))
    name, kind = func._schema.name, func._schema.name.rpartition("::")[2]
    without_values = any(getattr(t, _ATTRIBUTE, False) for t in operands)
    if kind.endswith("_like") or kind.startswith("new_") or not (without_values or name in _PRODUCTS):
        return func(*args, **kwargs), False
    writes = _writes(func) if sum(t.numel() for t in operands) >= _LARGE else None
    made, faked = _made(func, args, kwargs, writes) if writes is not None else (func(*args, **kwargs), False)
    if faked or without_values:
        for tensor in tensors_in((made,)):
            setattr(tensor, _ATTRIBUTE, True)
    return made, faked


def _made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> tuple[Any, bool]:
    device = tensors_in(args)[0].device

    def filled(value: Any) -> Any:
        if isinstance(value, _Like):
            return _zeros(value).to(device)
        return type(value)(map(filled, value)) if isinstance(value, (list, tuple)) else value

    if writes and len(tensors_in((*args, *kwargs.values()))) == 1:
        return args[0], False  # it has the shape that it had
    try:
        made = _shapes(func, _likes(args), tuple((key, _likes(value)) for key, value in kwargs.items()))
    except NotImplementedError:
        return func(*args, **kwargs), False
    return (args[0], False) if writes else (filled(made), True)


class _Like(NamedTuple):
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Number(NamedTuple):
    """A number and its type: 1, 1.0 and True are equal, but operators make different things with them."""

    kind: type
    value: Any


def _likes(value: Any) -> Any:
    """Replace tensors by what they are like, and lists by tuples, so that calls can be told apart."""
    if isinstance(value, Tensor):
        return _Like(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_likes, value))
    return _Number(type(value), value) if isinstance(value, (int, float)) else value


@functools.lru_cache(maxsize=4096)
def _shapes(func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Any:
    """Ask for the shapes of what an operator makes: a network repeats its blocks, and asking takes long."""

    def twin(value: Any) -> Any:
        if isinstance(value, _Like):
            return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
        if isinstance(value, _Number):
            return value.value
        return tuple(map(twin, value)) if isinstance(value, tuple) else value

    if func._schema.name == "aten::native_batch_norm" and not twin(args[5]):
        # Meta tensors tell the shapes of training, and take long for it.
        normed, empty = twin(args[0]).contiguous(), torch.empty(0, device="meta")
        for moment in filter(None, args[1:5]):
            if moment.shape != normed.shape[1:2]:
                raise RuntimeError(f"batch norm: {moment.shape[0]} numbers for {normed.shape[1]} channels")
        return _likes((normed, empty, empty))
    return _likes(func(*twin(args), **{key: twin(value) for key, value in kwargs}))


def _zeros(like: _Like) -> Tensor:
    """Return zeros of a tensor's shape and strides, in memory that is not touched until it is written to."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride, strict=True))
    if 0 in like.shape:
        return torch.empty(like.shape, dtype=like.dtype)
    pages = mmap.mmap(-1, extent * like.dtype.itemsize)
    return torch.frombuffer(pages, dtype=like.dtype).as_strided(like.shape, like.stride)


@functools.lru_cache(maxsize=1024)
def _writes(func: Any) -> bool | None:
    """Tell whether an operator writes into its first operand and returns it, or makes new tensors; None: neither."""
    schema = func._schema
    aliases = [a.alias_info for a in (*schema.arguments, *schema.returns) if a.alias_info is not None]
    if schema.name in _AS_IT_IS or any(a.name == "device" for a in schema.arguments):
        return None
    if not aliases:
        return False
    first = schema.arguments[0].alias_info
    whole = len(aliases) == 2 and first is not None and first.is_write and len(schema.returns) == 1
    return True if whole and torch.Tag.inplace_view not in func.tags else None
