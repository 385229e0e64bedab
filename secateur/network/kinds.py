"""What kind of thing each argument of a public function is: a call with another is refused in one line.

Functions call the same thing by the same name everywhere, so a table by names says what is wanted and how it is had;
what fits is read off the function's own annotations.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from types import UnionType
from typing import Any, Literal, ParamSpec, SupportsFloat, SupportsIndex, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints_of

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from secateur.errors import UsageError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_BATCHES = ("data", "train", "validation", "test")
_WANTED = {
    "model": "a network, a torch.nn.Module",
    "small": "the pruned network, small = sc.apply(model, plan)",
    "against": "a network, a torch.nn.Module",
    "graph": "a channel graph, graph = sc.trace(model, example_inputs)",
    "plan": "a plan, plan = sc.plan(graph, scores, sc.Target(macs=0.5))",
    "target": "a target, such as sc.Target(macs=0.5)",
    "scores": 'a score for each channel of a group, scores = sc.score(model, graph, "l1")',
    "removed": 'group -> channels, such as {"conv1": [0, 3]}',
    "remove": 'a fraction, or group -> number of channels, such as {"conv1": 4}',
    "costs": "times of layers, costs = sc.latency(model, graph)",
    "criterion": 'a criterion: its name, such as "l1", a secateur.Criterion or a function',
    "method": 'a criterion: its name, such as "l1", a secateur.Criterion or a function',
    "optimizer": "an optimizer of torch.optim",
    "example_inputs": "what the network is called on: a tensor, a tuple of arguments or a dict of keyword arguments",
    "path": 'a file, such as "small.safetensors"',
    "folder": 'a folder, such as "runs/small"',
    "run_dir": 'a folder, such as "runs/small"',
    "cls": "a class of layers, such as MyLayer",
    **dict.fromkeys(_BATCHES, "batches: a DataLoader, or a list of tensors or of (inputs, target)"),
}
"""Name of an argument -> what it is, and how it is had."""


def checked(function: Callable[_P, _R], name: str) -> Callable[_P, _R]:
    """Return a function that refuses, before it is called, arguments of another kind than its annotations say.

    What has no annotation that tells kinds apart is left to the function.

    Args:
        function: A function, or the ``__init__`` of a class.
        name: What messages call it.
    """
    signature = inspect.signature(function)
    names = [p.name for p in signature.parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    hints = cache(lambda: hints_of(function))  # resolved at the first call: a class may not be whole before

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        extra = [word for word in kwargs if word not in names]
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            hint = _meant(extra, names) or f"It takes {', '.join(names)}."
            raise UsageError(f"{name}: {error}. {hint}") from None
        for argument in names:
            if argument in given and not _taken(argument, given[argument], hints().get(argument, Any)):
                raise UsageError(_refused(name, argument, given[argument], hints()[argument]))
        try:
            return function(*args, **kwargs)
        except UsageError as error:
            said = str(error)
            hint = _meant([word for word in extra if word in said], names)
            if not hint or "did you mean" in said:
                raise
            raise UsageError(f"{said} {hint}") from error

    return call


def checked_class(cls: type[_R]) -> type[_R]:
    """Decorate a class that users make objects of: it refuses what :func:`checked` does."""
    setattr(cls, "__init__", checked(cls.__init__, cls.__name__))  # noqa: B010 - mypy knows no such assignment
    return cls


def _meant(words: Sequence[str], names: Sequence[str]) -> str:
    for word in words:
        if close := difflib.get_close_matches(word, names, n=1):
            return f"Did you mean {close[0]}, not {word}?"
    return ""


def _taken(argument: str, value: Any, hint: Any) -> bool:
    """Tell whether an argument is of a kind that its function takes."""
    if value is None or not fits(value, hint):
        return fits(value, hint)
    if argument == "example_inputs":  # a network may be called on anything but these
        return not isinstance(value, (nn.Module, DataLoader, Dataset)) and not _ours(value)
    if argument in ("criterion", "method"):  # a network is a function, but none of filters
        return not isinstance(value, nn.Module)
    return argument not in _BATCHES or are_batches(value)


def are_batches(value: Any) -> bool:
    """Tell whether something can be walked through batch by batch; a data set gives single examples."""
    single = isinstance(value, Dataset) and not isinstance(value, IterableDataset)
    walked = hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
    return walked and not single and not isinstance(value, (Tensor, np.ndarray, str, bytes, Mapping, nn.Module))


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of the kind that an annotation says; what is inside of it is looked at in mappings."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in args)
    if hint in (Any, bool) or origin is Literal:
        return True
    if hint in (int, float):
        like = SupportsIndex if hint is int else SupportsFloat
        return isinstance(value, like) and (not isinstance(value, Tensor) or value.numel() == 1)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(one, args[1]) for one in value.values())
    if origin in (Iterable, Sequence, tuple, list):
        keyed = isinstance(value, Mapping) and origin is not Iterable
        return not keyed and _runs_through(value, Any if origin is tuple else args[0])
    try:
        return isinstance(value, origin or hint)
    except TypeError:  # a form of typing that tells nothing apart
        return True


def _runs_through(value: Any, hint: Any) -> bool:
    """Tell whether a value holds things of one kind, one after the other; only those of lists and tuples are seen."""
    if isinstance(value, (list, tuple)):
        return all(fits(one, hint) for one in value)
    if isinstance(value, (Tensor, np.ndarray)):
        return hint in (int, Any)
    if isinstance(value, (str, bytes)) or (hint is not Any and isinstance(value, (nn.Module, DataLoader, Dataset))):
        return False
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")


def _ours(value: Any) -> bool:
    return type(value).__module__.startswith("secateur.") and not isinstance(value, Mapping)


def _refused(name: str, argument: str, value: Any, hint: Any) -> str:
    """Say what was found, what is wanted, and how what is wanted is had."""
    wanted = _WANTED.get(argument) or inspect.formatannotation(hint).replace("collections.abc.", "")
    inside = {"small": "model", **dict.fromkeys(_BATCHES, "train")}.get(argument, argument)
    own = vars(value).get(inside) if _ours(value) and hasattr(value, "__dict__") else None
    remedy = ""
    if own is not None:
        remedy = f" It has one: pass its .{inside}."
    elif argument in _BATCHES and isinstance(value, Dataset):
        remedy = " DataLoader(dataset, batch_size=64) makes batches of it."
    elif argument == "target" and isinstance(value, float):
        remedy = f" Say what of: sc.Target(macs={value:g}) removes {value:.0%} of the MACs."
    elif argument == "example_inputs" and isinstance(value, DataLoader):
        remedy = " The inputs of its first batch will do: next(iter(loader))[0]."
    return f"{name}: {argument}: expected {wanted}; found {described(value)}.{remedy}"


def described(value: Any) -> str:
    """Say in a few words what a value is."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        inside = next(iter(value.items()), None)
        return f"a {kind}" + ("" if inside is None else f" of {inside[0]!r} -> {described(inside[1])}")
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {kind} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (str, int, float)):
        return repr(value) if len(repr(value)) < 60 else f"a {kind}"
    return f"a network ({kind})" if isinstance(value, nn.Module) else f"a {kind}"
