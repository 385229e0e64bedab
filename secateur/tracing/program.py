"""What a run did, operator by operator: names, operands, other arguments, shapes and labels of what was made."""

from __future__ import annotations

import functools
import gc
import math
import mmap
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from secateur.network.named import ATOMS, tensors_in
from secateur.tracing.labels import Axes

if TYPE_CHECKING:
    from secateur.tracing.flow import Flow

BY_VALUE = frozenset({
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::bincount", "aten::_unique", "aten::_unique2", "aten::unique_dim", "torchvision::nms",
})  # fmt: skip
"""Operators that hand out values, or of whose result values decide the shape."""
WORTH = 2_000_000
"""From so many multiply-accumulate operations a call, running them takes longer than looking at labels."""
_ORIGIN = "_secateur_origin"
_SIZES = {
    "aten::view": 1, "aten::_unsafe_view": 1, "aten::reshape": 1, "aten::expand": 1, "aten::repeat": 1,
    "aten::new_zeros": 1, "aten::new_ones": 1, "aten::new_empty": 1, "aten::new_full": 1,
    "aten::zeros": 0, "aten::ones": 0, "aten::empty": 0, "aten::full": 0,
    "aten::split": 1, "aten::split_with_sizes": 1, "aten::unsafe_split": 1, "aten::unsafe_split_with_sizes": 1,
    "aten::native_layer_norm": 1, "aten::native_group_norm": 4, "aten::convolution": 8,
}  # fmt: skip
"""Operators -> the argument that follows what is left of the channels: the shapes of what they make tell if rightly."""
_PRODUCTS = frozenset({
    "aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::linear",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
})  # fmt: skip
"""Operators of layers, which take long; of what they make no value is needed."""
_RANDOM = frozenset({
    "aten::rand_like", "aten::randn_like", "aten::randint_like", "aten::bernoulli", "aten::bernoulli_", "aten::normal",
    "aten::normal_", "aten::uniform_", "aten::random_", "aten::exponential_", "aten::geometric_", "aten::cauchy_",
    "aten::log_normal_", "aten::multinomial", "aten::poisson", "aten::native_dropout", "aten::rrelu_with_noise",
})  # fmt: skip
_FAKE = "_secateur_without_values"
_OF_NUMBERS = "aten.lift_fresh.default"
"""Operator that is given what the code made of its own numbers."""
_LARGE = 1 << 16
"""From so many elements read, running an operator takes longer than asking for the shapes of what it makes."""
_AS_IT_IS = ("aten::_unsafe_view", "aten::native_batch_norm")
"""Operators that are run whatever they read: one is a view; the other, asked for shapes, tells those of training."""


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

    def note(self, flow: Flow, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Note a call after it."""
        free = _SIZES.get(name)
        bounds: tuple[Any, ...] = ()
        along = False
        if name == "aten::slice" and len(args) > 2:
            along = args[1] % args[0].ndim in flow.axes(args[0])
            args, bounds = args[:2], tuple(args[2:])
        arguments = [a if type(a) in ATOMS else self._plain(flow, a) for i, a in enumerate(args) if i != free]
        for key, value in kwargs.items():
            arguments.append((key, self._plain(flow, value)))
        made = []
        for index, tensor in enumerate(tensors_in((out,))):
            made.append((tensor.shape, dict(flow.axes(tensor))))
            if not flow.name(tensor):
                self._mark(tensor, (len(self.steps), index))
        self.steps.append(Step(name, tuple(arguments), tuple(made), bounds, along))
        self.random = self.random or (name in _RANDOM and any(axes for _, axes in made))

    def end(self, flow: Flow, outputs: Iterable[Tensor]) -> None:
        """Note what a forward returns."""
        self.note(flow, "output", list(outputs), {}, ())

    def shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator; where it takes long, what it makes has the right shapes, and all values are zero.

        What was made of neither layers' outputs nor random numbers has its values: the code may keep it for good.
        """
        try:
            made, faked = _shaped(func, args, kwargs)
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

    def _plain(self, flow: Flow, value: Any) -> Any:
        """Return an argument in a form that can be compared with another run's."""
        if isinstance(value, Tensor):
            token, origin = getattr(value, _ORIGIN, (None, None))
            if token is self._token or (origin := flow.name(value)):
                return origin
            if value.ndim and flow.doubt is None and flow.operator != _OF_NUMBERS:
                # A constant, or what was made of channels where nothing sees it.
                flow.doubt = flow.cause("is given a tensor that no operator made")
            return _content(value)
        if isinstance(value, (list, tuple)):
            return tuple([v if type(v) in ATOMS else self._plain(flow, v) for v in value])
        return value


def _content(tensor: Tensor) -> Any:
    """Return what a tensor holds that no operator made: a constant of the code."""
    try:
        return tuple(tensor.shape), hash(tensor.detach().cpu().contiguous().numpy().tobytes())
    except (TypeError, RuntimeError):  # of a kind that NumPy has not: it is the same as no other
        return object()


def _shaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Call an operator, or make zeros of the shapes of what it would make; tell which."""
    operands = tensors_in((*args, *kwargs.values()))
    name, kind = func._schema.name, func._schema.name.rpartition("::")[2]
    without_values = any(getattr(t, _FAKE, False) for t in operands)
    if kind.endswith("_like") or kind.startswith("new_") or not (without_values or name in _PRODUCTS):
        return func(*args, **kwargs), False
    writes = _writes(func) if sum(t.numel() for t in operands) >= _LARGE else None
    made, faked = _made(func, args, kwargs, writes) if writes is not None else (func(*args, **kwargs), False)
    if faked or without_values:
        for tensor in tensors_in((made,)):
            setattr(tensor, _FAKE, True)
    return made, faked


def _made(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> tuple[Any, bool]:
    device = tensors_in(args)[0].device

    def filled(value: Any) -> Any:
        if isinstance(value, _Like):
            return _zeros(value).to(device)
        return type(value)(map(filled, value)) if isinstance(value, (list, tuple)) else value

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
