"""What a run did, operator by operator: names, operands, other arguments, shapes and labels of what was made."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.network.named import ATOMS, tensors_in
from secateur.tracing import without_values
from secateur.tracing.labels import Axes
from secateur.tracing.tensor_labels import TensorLabels

BY_VALUE = frozenset({
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::bincount", "aten::_unique", "aten::_unique2", "aten::unique_dim", "torchvision::nms",
})  # fmt: skip
"""Operators that hand out values, or of whose result values decide the shape."""
WORTH = 1_000_000
"""From so many multiply-accumulate operations a call, running them takes longer than looking at labels."""
_ORIGIN = "_secateur_origin"
_SIZES = {
    "aten::view": (1,), "aten::_unsafe_view": (1,), "aten::reshape": (1,), "aten::expand": (1,), "aten::repeat": (1,),
    "aten::new_zeros": (1,), "aten::new_ones": (1,), "aten::new_empty": (1,), "aten::new_full": (1,),
    "aten::zeros": (0,), "aten::ones": (0,), "aten::empty": (0,), "aten::full": (0,),
    "aten::split": (1,), "aten::split_with_sizes": (1,), "aten::unsafe_split": (1,),
    "aten::unsafe_split_with_sizes": (1,), "aten::native_layer_norm": (1,), "aten::native_group_norm": (4,),
    "aten::convolution": (8,), "aten::as_strided_": (1, 2),
}  # fmt: skip
"""Operators -> the arguments that follow what is left of the channels: the shapes of what they make tell if rightly."""
_RANDOM = frozenset({
    "aten::rand_like", "aten::randn_like", "aten::randint_like", "aten::bernoulli", "aten::bernoulli_", "aten::normal",
    "aten::normal_", "aten::uniform_", "aten::random_", "aten::exponential_", "aten::geometric_", "aten::cauchy_",
    "aten::log_normal_", "aten::multinomial", "aten::poisson", "aten::native_dropout", "aten::rrelu_with_noise",
})  # fmt: skip

Made = tuple[torch.Size, Axes]
"""Shape and labels of a tensor that an operator made."""


class Step(NamedTuple):
    """One operator call."""

    name: str
    arguments: tuple[Any, ...]
    """Everything that has to be the same: operands by origin, numbers and flags by value."""
    made: tuple[Made, ...]
    bounds: tuple[Any, ...] = ()
    """Where a slice begins and ends."""
    along: bool = False
    """Whether it cuts along channels: only there its bounds may differ."""


class Program:
    """The operator calls of a run, in order."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.failed: RuntimeError | None = None
        """Why an operator could not make what the code asked for, by sizes that it gave."""
        self.random = False
        """Whether random numbers with channels were drawn, of which a pruned network draws others."""
        self._faked: list[weakref.ref[Tensor]] = []
        self._token = object()

    def begin(self, inputs: Iterable[Tensor]) -> None:
        """Note where a forward's inputs are from."""
        for index, tensor in enumerate(inputs):
            self._mark(tensor, ("input", index))

    def note(self, labels: TensorLabels, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Note a call after it."""
        free = _SIZES.get(name, ())
        bounds: tuple[Any, ...] = ()
        along = False
        if name == "aten::slice" and len(args) > 2:
            along = args[1] % args[0].ndim in labels.axes(args[0])
            args, bounds = args[:2], tuple(args[2:])
        arguments = [a if type(a) in ATOMS else self._plain(labels, a) for i, a in enumerate(args) if i not in free]
        for key, value in kwargs.items():
            arguments.append((key, self._plain(labels, value)))
        made = []
        for index, tensor in enumerate(tensors_in((out,))):
            made.append((tensor.shape, dict(labels.axes(tensor))))
            if not labels.name(tensor):
                self._mark(tensor, (len(self.steps), index))
        self.steps.append(Step(name, tuple(arguments), tuple(made), bounds, along))
        self.random = self.random or (name in _RANDOM and any(axes for _, axes in made))

    def end(self, labels: TensorLabels, outputs: Iterable[Tensor]) -> None:
        """Note what a forward returns."""
        self.note(labels, "output", list(outputs), {}, ())

    def shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator; where it takes long, what it makes has the right shapes, and all values are zero.

        What was made of neither layers' outputs nor random numbers has its values: the code may keep it for good.
        """
        try:
            made, faked = without_values.run(func, args, kwargs)
            if faked:
                self._faked += map(weakref.ref, tensors_in((made,)))
            return made
        except RuntimeError as error:
            if func._schema.name in _SIZES:
                self.failed = error
            raise

    def kept(self) -> bool:
        """Tell whether the code keeps something without values; it is spoilt, so that nobody takes it for real."""
        if any(made() is not None for made in self._faked):
            gc.collect()
        left = [tensor for made in self._faked if (tensor := made()) is not None]
        for tensor in left:
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)
        return bool(left)

    def _mark(self, tensor: Tensor, origin: tuple[Any, ...]) -> None:
        setattr(tensor, _ORIGIN, (self._token, origin))

    def _plain(self, labels: TensorLabels, value: Any) -> Any:
        """Return an argument in a form that can be compared with another run's."""
        if isinstance(value, Tensor):
            token, origin = getattr(value, _ORIGIN, (None, None))
            if token is self._token or (origin := labels.name(value)):
                return origin
            return _content(value)
        if isinstance(value, (list, tuple)):
            return tuple([v if type(v) in ATOMS else self._plain(labels, v) for v in value])
        return value


def _content(tensor: Tensor) -> Any:
    """Return what a tensor holds that no operator made: a constant of the code."""
    try:
        return tuple(tensor.shape), hash(tensor.detach().cpu().contiguous().numpy().tobytes())
    except (TypeError, RuntimeError):  # NumPy has no such type: no other tensor is taken for the same
        return object()
