"""The torch functions that the network's own code calls: with which sizes, and what they tell the code."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.tracing.call import Call
from secateur.tracing.labels import Labels
from secateur.tracing.numbers import VIEWS, Counted, counted, plain, sizes_given

_SHAPES = {torch.Tensor.size, torch.Tensor.shape.__get__}  # type: ignore[attr-defined]
_NUMBERS = {
    torch.numel, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.stride, torch.Tensor.__len__,
    torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
}  # fmt: skip
"""Functions that tell a number in which that of the channels is hidden."""
_READS = {
    getattr(torch.Tensor, name)
    for name in [
        "numpy",
        "tolist",
        "item",
        "__array__",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
    ]
}
"""Functions that hand values out of tensors."""
_LEAVING = {getattr(torch.Tensor, name) for name in ("numpy", "tolist", "__array__", "__dlpack__")}
"""Functions that hand whole tensors out of PyTorch, where nothing sees what is done with their channels."""
_INDEXING = torch.Tensor.__getitem__
_BATCH_NORMS = {
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
}
"""Functions that normalise by the batch -> names of their first arguments."""
_NONE: dict[int, Labels] = {}
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


class FunctionMode(TorchFunctionMode):
    """Tells the call at work which torch function the network's code has called, and the code whose sizes it reads."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.paused = False
        """Whether a layer is at work whose operators are not looked at, because a rule of its own speaks for it."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self.call
        if func in _READS:
            call.found.by_value = True
        outer = call.function, call.given, call.asked
        call.function, call.given, call.asked = func, (args, *kwargs.values()), _NONE
        if func in VIEWS:
            call.asked = {dim: size.labels for dim, size in enumerate(sizes_given(args)) if isinstance(size, Counted)}
        elif func is _INDEXING:
            call.asked = _bounding(args[1], args[0].ndim)
        try:
            out = self._normed(func, args, kwargs) if func in _BATCH_NORMS else func(*args, **kwargs)
        finally:
            call.function, call.given, call.asked = outer
        if self.paused:
            return out
        if func in _NUMBERS:
            for labels in call.axes(args[0]).values():
                call.found.measure(labels)
        elif func in _LEAVING:
            call.operator = func.__name__
            call.freeze_tensor(args[0], "is handed out of PyTorch")
        elif func in _SHAPES and not sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            return self._told(args, kwargs, out)
        return out

    def _told(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: Any) -> Any:
        """Return the sizes that the code reads of a shape, so that they know of which channels they are the numbers."""
        axes = self.call.axes(args[0])
        if not axes:
            return sizes

        def told(size: int, dim: int) -> int:
            return counted(size, axes[dim], self.call.found.measure(axes[dim])) if dim in axes else size

        if isinstance(sizes, int):
            return told(sizes, plain(args[1] if len(args) > 1 else kwargs["dim"]) % args[0].ndim)
        return torch.Size([told(size, dim) for dim, size in enumerate(sizes)])

    def _normed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Normalise by the batch: without elements PyTorch multiplies all channels by the first one's scale alone."""
        names = _BATCH_NORMS[func]
        given: dict[str, Any] = dict.fromkeys(names) | kwargs | dict(zip(names, args, strict=False))
        if self.paused or given["input"].numel() or given["running_mean"] is None:
            return func(*args, **kwargs)
        normed: Any = torch.native_batch_norm
        return normed(*(given[name] for name in _BATCH_NORMS[torch.batch_norm]), False, 0.0, 1e-5)[0]


def _bounding(index: Any, ndim: int) -> dict[int, Labels]:
    """Return for an index the dimensions, of those that are left, whose bounds are numbers of channels, and these."""
    parts: Sequence[Any] = list(index) if isinstance(index, tuple) else [index]
    if not any(isinstance(b, Counted) for part in parts if isinstance(part, slice) for b in (part.start, part.stop)):
        return _NONE
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        parts = [*parts[:place], *[slice(None)] * (ndim - taken), *parts[place + 1 :]]
    found: dict[int, Labels] = {}
    dim = 0
    for part in parts:
        for bound in (part.start, part.stop) if isinstance(part, slice) else ():
            if isinstance(bound, Counted):
                found[dim] = bound.labels
        dim += not isinstance(part, int)
    return found
