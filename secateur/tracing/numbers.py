"""Numbers that know where they are from: sizes that the code reads off a shape, and attributes of its modules."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, jit, nn

from secateur.network.named import BOOKS
from secateur.tracing.labels import Labels


class Measure:
    """What code did with a number of channels, beside giving it as a size."""

    taken = False
    """Whether the number of a module's attribute was compared, or counted with. A size that the code reads is taken for
    such a number from the start: ``0.25 * width > 1``, ``math.gcd`` or NumPy would take it past all notice."""
    met: tuple[str, int] | None = None
    """Where it was found to differ from the smaller number of other channels, which it must not come to equal."""
    equal: tuple[tuple[Labels, tuple[str, int]], ...] = ()
    """Other channels whose number it was found to equal, and where."""
    above = 1
    """The largest of the smaller numbers that it was found to differ from: more have to stay."""
    divisor = 1
    """What it was divided by to ask for the remainder: it has to lose a multiple of that."""


def _measuring(operate: Callable[..., Any]) -> Any:
    @functools.wraps(operate)
    def method(self: Any, *others: Any) -> Any:
        for measure in self.measures:
            measure.taken = True
        return operate(self, *others)

    return method


def _remaining(operate: Callable[..., Any]) -> Any:
    """Return a way to ask for the remainder of a number, or of a fraction of it."""

    @functools.wraps(operate)
    def method(self: Any, other: Any) -> Any:
        for measure in self.measures:
            measure.taken = True
            if isinstance(other, int):
                divisor = _divisor(other)
                divisor = 1 << divisor.bit_length() if operate is int.__and__ else divisor  # C & 3 is C % 4
                measure.divisor = math.lcm(measure.divisor, divisor * self.part)
        return operate(self, other)

    return method


_REMAINING = "mod divmod and"
"""Ways to ask for a remainder."""
_TAKING = (
    "lt le gt ge rmod rdivmod truediv rtruediv pow rpow rshift lshift rand or ror xor rxor invert bool float round"
)
"""Ways to compare an attribute's number, or to count with it, whose result no longer knows where it is from."""


class Counted(int):
    """A size read off a shape, or a multiple or fraction of it, that knows which channels it is the number of.

    >>> width = counted(8, "eight channels", Measure())
    >>> (width // 4).labels, (2 * width).labels, type(width * width), type(width + 1)
    ('eight channels', 'eight channels', <class 'int'>, <class 'int'>)
    """

    labels: Labels
    measure: Measure
    part = 1
    """Of how many of the channels it counts one."""
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        """Compare; where the larger of two is a number of channels, note that it must not come to equal the other."""
        if not isinstance(other, int):
            return isinstance(other, float) and int.__float__(self) == other
        frame = sys._getframe(1)
        line = frame.f_code.co_filename, frame.f_lineno
        if int.__eq__(self, other):
            if isinstance(other, Counted) and other.labels is not self.labels:
                self.measure.equal += ((other.labels, line),)
            elif isinstance(other, Counted) and other.part != self.part:
                # C // 4 * 4 == C asks for a remainder.
                self.measure.divisor = math.lcm(self.measure.divisor, self.part, other.part)
            return True
        larger, smaller = (self, other) if int.__gt__(self, other) else (other, self)
        if isinstance(larger, Counted) and isinstance(smaller, Counted):
            larger.measure.met = line
        elif isinstance(larger, Counted):
            # Of a part, one more is that many more channels.
            above = (int.__int__(smaller) + 1) * larger.part - 1
            larger.measure.above = max(larger.measure.above, above)
        return False

    def __ne__(self, other: object) -> bool:
        """Compare, as above."""
        return not self == other

    def __floordiv__(self, other: Any) -> Any:
        """Return a fraction."""
        return self._derived(int.__floordiv__(self, other), other, self.part * _divisor(other))

    def __mul__(self, other: Any) -> Any:
        """Return a multiple."""
        return self._derived(int.__mul__(self, other), other, self.part)

    __rmul__ = __mul__

    def _derived(self, result: Any, other: Any, part: int) -> Any:
        plain = type(result) is int and isinstance(other, int) and not isinstance(other, Counted)
        return counted(result, self.labels, self.measure, part) if plain else result

    def __reduce__(self) -> Any:
        """Be copied and stored as a plain number."""
        return int, (int.__int__(self),)

    @property
    def measures(self) -> tuple[Measure]:
        """Where to note what is done with it."""
        return (self.measure,)


for _name in _REMAINING.split():
    setattr(Counted, f"__{_name}__", _remaining(getattr(int, f"__{_name}__")))


def counted(size: int, labels: Labels, measure: Measure, part: int = 1) -> Counted:
    """Return a size so that it knows of which channels it is the number, or which part of that."""
    result = Counted(size)
    result.labels, result.measure, result.part = labels, measure, part
    return result


def _divisor(value: Any) -> int:
    return abs(int.__int__(value)) or 1 if isinstance(value, int) else 1


class Name(NamedTuple):
    """An attribute of a module that holds a number."""

    run: object
    """Of which run it was read: caches of the code's own may hand out numbers of another."""
    module: str
    attribute: str
    """``name``, or ``name[index]`` of an element of a list or tuple."""
    value: int
    measure: Measure
    """Where to note what code does with it."""


def _keeping(operate: Callable[[int, Any], Any]) -> Callable[[Named, Any], Any]:
    def method(self: Named, other: Any) -> Any:
        if isinstance(other, Counted):  # what a size becomes by a number is the size's to tell
            return NotImplemented
        result = operate(self, other)
        if type(result) is not int:
            for measure in self.measures:
                measure.taken = True
            return result
        names, part = self.names, self.part
        if isinstance(other, Named):
            names, part = names | other.names, part * other.part
        return named(result, names, part * _divisor(other) if operate is int.__floordiv__ else part)

    return method


class Named(int):
    """A number that knows which attributes of the code's modules it was computed from.

    >>> names = [Name(None, "attention", name, value, Measure()) for name, value in (("heads", 4), ("width", 8))]
    >>> heads, width = (named(name.value, {name}) for name in names)
    >>> sorted(name.attribute for name in (heads * width + 1).names), type(heads * 0.5), [0] * heads
    (['heads', 'width'], <class 'float'>, [0, 0, 0, 0])
    >>> heads > 2, [name.measure.taken for name in names]
    (True, [True, False])
    """

    names: frozenset[Name]
    part = 1
    """By how much the numbers that it was computed from were divided on the way."""
    __add__ = __radd__ = _keeping(int.__add__)
    __mul__ = __rmul__ = _keeping(int.__mul__)
    __sub__ = _keeping(int.__sub__)
    __rsub__ = _keeping(int.__rsub__)
    __floordiv__ = _keeping(int.__floordiv__)
    __rfloordiv__ = _keeping(int.__rfloordiv__)

    def __neg__(self) -> int:
        """Return the number counted from the end."""
        return named(int.__neg__(self), self.names, self.part)

    def __reduce__(self) -> Any:
        """Be copied and stored as a plain number."""
        return int, (int.__int__(self),)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Where to note what is done with it."""
        return tuple(name.measure for name in self.names)


for _name in _TAKING.split():
    setattr(Named, f"__{_name}__", _measuring(getattr(int, f"__{_name}__")))
for _name in _REMAINING.split():
    setattr(Named, f"__{_name}__", _remaining(getattr(int, f"__{_name}__")))


def named(number: int, names: Any, part: int = 1) -> Named:
    """Return a number so that it knows of which attributes it is made, and by what these were divided."""
    result = Named(number)
    result.names, result.part = frozenset(names), part
    return result


def names_of(values: Any) -> Iterator[Name]:
    """Yield the attributes that the arguments of a call were made of."""
    for value in values:
        if isinstance(value, Named):
            yield from value.names
        elif isinstance(value, (list, tuple)):
            yield from names_of(value)
        elif isinstance(value, slice):
            yield from names_of((value.start, value.stop, value.step))


@contextmanager
def told_apart(
    modules: Mapping[str, nn.Module],
    run: object,
    measures: dict[tuple[str, str], Measure],
    only: Sequence[str] | None = None,
) -> Iterator[None]:
    """Let the numbers that modules hold know which they are, while the code runs.

    Afterwards they are plain again. What the code puts into further attributes is for the caller to put back.

    Args:
        modules: By path.
        run: What the names say that they are of.
        measures: Where to note by module and attribute that the code compares one of them, or counts with it.
        only: Names of the attributes to tell apart, if not all.
    """
    changed: list[tuple[dict[str, Any], str, Any, Any]] = []
    """Of every attribute that holds numbers: the module's own dict, its name, what it is meanwhile, and what it was."""

    def told(value: Any, path: str, attribute: str) -> Any:
        if type(value) is not int:
            return value
        measure = measures.setdefault((path, attribute), Measure())
        return named(value, {Name(run, path, attribute, value, measure)})

    for path, module in modules.items():
        own = vars(module)
        if len(own) == len(BOOKS) or isinstance(module, jit.ScriptModule):  # a container, say
            continue
        for name, value in own.items() if only is None else ((name, own[name]) for name in only if name in own):
            kind = type(value)
            if kind is int:
                changed.append((own, name, told(value, path, name), value))
            elif (kind is tuple or kind is list) and int in map(type, value):
                parts = [told(v, path, f"{name}[{i}]") for i, v in enumerate(value)]
                if kind is list:
                    value[:] = parts
                changed.append((own, name, value if kind is list else tuple(parts), value))
    for own, name, now, _ in changed:
        own[name] = now
    try:
        yield
    finally:
        for own, name, meanwhile, was in changed:
            value = own.get(name)
            if type(value) is list:
                value[:] = map(plain, value)
            elif value is meanwhile:
                own[name] = was
            elif name in own:  # what the code keeps there now
                own[name] = tuple(map(plain, value)) if type(value) is tuple and _tells(value) else plain(value)


def _tells(values: Any) -> bool:
    return any(isinstance(value, (Named, Counted)) for value in values)


def plain(value: Any) -> Any:
    """Return a value, of a number that knows where it is from the number alone."""
    return int.__int__(value) if isinstance(value, (Named, Counted)) else value


VIEWS = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand}
"""Functions that are given the sizes of what they make, in order."""


def sizes_given(args: tuple[Any, ...]) -> Sequence[Any]:
    """Return the sizes that a view is given, one by one or in a list."""
    return args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
