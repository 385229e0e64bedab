"""Numbers that know where they are from: sizes that the code reads off a shape, and attributes of its modules.

Which dimensions of a shape are used is read off the instructions that follow: ``x.shape[-2:]`` and
``n, _, h, w = x.shape`` read it whole and use the positions only. Where the instructions are not of a known form, every
dimension counts as used.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import jit, nn

from secateur.labels import Labels

_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT")
_SUBSCRIPTS = ("BINARY_SUBSCR", "BINARY_SLICE", "BINARY_OP")


class Measure:
    """Whether a size was compared, or counted with, so that code may do something else below some width."""

    taken = False


def _measuring(operate: Callable[[int, Any], Any]) -> Any:
    @functools.wraps(operate)
    def method(self: Counted, other: Any) -> Any:
        self.measure.taken = True
        return operate(self, other)

    return method


class Counted(int):
    """A size read off a shape, or a multiple or fraction of it, that knows which channels it is the number of.

    >>> width = counted(8, "eight channels", Measure())
    >>> (width // 4).labels, (2 * width).labels, type(width * width)
    ('eight channels', 'eight channels', <class 'int'>)
    >>> type(width + 1), width.measure.taken
    (<class 'int'>, True)
    """

    labels: Labels
    measure: Measure
    __lt__ = _measuring(int.__lt__)
    __le__ = _measuring(int.__le__)
    __gt__ = _measuring(int.__gt__)
    __ge__ = _measuring(int.__ge__)
    __add__ = _measuring(int.__add__)
    __radd__ = _measuring(int.__radd__)
    __sub__ = _measuring(int.__sub__)
    __rsub__ = _measuring(int.__rsub__)
    __mod__ = _measuring(int.__mod__)
    __truediv__ = _measuring(int.__truediv__)
    __rtruediv__ = _measuring(int.__rtruediv__)
    __pow__ = _measuring(int.__pow__)

    def __float__(self) -> float:
        """Return the size as a number to count with."""
        self.measure.taken = True
        return int.__float__(self)

    def __floordiv__(self, other: Any) -> Any:
        """Return a fraction."""
        return self._part(int.__floordiv__(self, other), other)

    def __mul__(self, other: Any) -> Any:
        """Return a multiple."""
        return self._part(int.__mul__(self, other), other)

    __rmul__ = __mul__

    def _part(self, result: Any, other: Any) -> Any:
        plain = type(result) is int and isinstance(other, int) and not isinstance(other, Counted)
        return counted(result, self.labels, self.measure) if plain else result

    def __reduce__(self) -> Any:
        """Be copied and stored as a plain number."""
        return int, (int(self),)


def counted(size: int, labels: Labels, measure: Measure) -> Counted:
    """Return a size so that it knows of which channels it is the number."""
    result = Counted(size)
    result.labels, result.measure = labels, measure
    return result


class Name(NamedTuple):
    """An attribute of a module that holds a number."""

    run: object
    """Of which run it was read: caches of the code's own may hand out numbers of another."""
    module: str
    attribute: str
    """``name``, or ``name[index]`` of an element of a list or tuple."""
    value: int


def _keeping(operate: Callable[[int, Any], Any]) -> Callable[[Named, Any], Any]:
    def method(self: Named, other: Any) -> Any:
        if isinstance(other, Counted):  # what a size becomes by a number is the size's to tell
            return NotImplemented
        result = operate(self, other)
        if type(result) is not int:
            return result
        return named(result, self.names | (other.names if isinstance(other, Named) else frozenset()))

    return method


class Named(int):
    """A number that knows which attributes of the code's modules it was computed from.

    >>> heads, width = named(4, {"heads"}), named(8, {"width"})
    >>> sorted((heads * width + 1).names), type(heads * 0.5), [0] * heads
    (['heads', 'width'], <class 'float'>, [0, 0, 0, 0])
    """

    names: frozenset[Any]
    __add__ = __radd__ = _keeping(int.__add__)
    __mul__ = __rmul__ = _keeping(int.__mul__)
    __sub__ = _keeping(int.__sub__)
    __rsub__ = _keeping(int.__rsub__)
    __floordiv__ = _keeping(int.__floordiv__)
    __rfloordiv__ = _keeping(int.__rfloordiv__)

    def __neg__(self) -> int:
        """Return the number counted from the end."""
        return named(-int(self), self.names)

    def __reduce__(self) -> Any:
        """Be copied and stored as a plain number."""
        return int, (int(self),)


def named(number: int, names: Any) -> Named:
    """Return a number so that it knows of which attributes it is made."""
    result = Named(number)
    result.names = frozenset(names)
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
def told_apart(modules: Mapping[str, nn.Module], run: object, left_out: tuple[type, ...]) -> Iterator[None]:
    """Let the numbers that modules hold know which they are, while the code runs.

    Args:
        modules: By path.
        run: What the names say that they are of.
        left_out: Classes of modules that keep plain numbers.
    """
    tuples: dict[int, tuple[Any, Any]] = {}
    for path, module in modules.items():
        if isinstance(module, (*left_out, jit.ScriptModule)):
            continue
        own = vars(module)
        for name, value in list(own.items()):
            if type(value) is int:
                own[name] = named(value, {Name(run, path, name, value)})
            elif type(value) in (tuple, list) and any(type(v) is int for v in value):
                told = [_element(v, run, path, name, i) for i, v in enumerate(value)]
                if type(value) is list:
                    value[:] = told
                else:
                    own[name] = tuple(told)
                    tuples[id(own[name])] = own[name], value
    try:
        yield
    finally:
        for module in modules.values():
            own = vars(module)
            for name, value in list(own.items()):
                if isinstance(value, (Named, Counted)):  # the module's own, or one that the code keeps now
                    own[name] = int(value)
                elif type(value) is tuple:
                    told_of = tuples.get(id(value))
                    own[name] = told_of[1] if told_of else tuple(map(_plain, value)) if _tells(value) else value
                elif type(value) is list and _tells(value):
                    value[:] = map(_plain, value)


def _tells(values: Any) -> bool:
    return any(isinstance(value, (Named, Counted)) for value in values)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, (Named, Counted)) else value


def _element(value: Any, run: object, path: str, name: str, index: int) -> Any:
    return named(value, {Name(run, path, f"{name}[{index}]", value)}) if type(value) is int else value


def used(frame: types.FrameType, ndim: int) -> set[int]:
    """Return the dimensions used of a shape of ``ndim`` sizes that the instruction at work in a frame gives.

    >>> import sys
    >>> class Shape:
    ...     def __getattr__(self, name):
    ...         print(sorted(used(sys._getframe(1), 4)))
    ...         return (1, 2, 3, 4)
    >>> _ = Shape().shape[-2:]
    [2, 3]
    >>> _ = Shape().shape[0]
    [0]
    >>> print(Shape().shape)
    [0, 1, 2, 3]
    (1, 2, 3, 4)
    """
    every = set(range(ndim))
    steps = _steps(frame.f_code)
    place = next((i for i, step in enumerate(steps) if step.offset == frame.f_lasti), None)
    if place is None:
        return every
    following = steps[place + 1 :]
    if following and following[0].opname == "UNPACK_SEQUENCE":
        names = list(_stored(following[1:], ndim))
        if following[0].arg != ndim or len(names) != ndim:
            return every
        return {dim for dim, name in enumerate(names) if _loads(frame.f_code, name)}
    constants = []
    for step in following:
        if step.opname in _CONSTANTS:
            constants.append(step.argval)
        elif step.opname != "BUILD_SLICE":
            break
    else:
        return every
    if step.opname not in _SUBSCRIPTS or (step.opname == "BINARY_OP" and step.argrepr != "[]"):
        return every
    if len(constants) == 1 and isinstance(constants[0], int):
        return {constants[0] % ndim}
    bounds = constants[0] if len(constants) == 1 and isinstance(constants[0], slice) else slice(*constants)
    return set(range(ndim)[bounds]) if 1 <= len(constants) <= 3 else every


@functools.lru_cache(maxsize=512)
def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def _stored(steps: list[dis.Instruction], count: int) -> Iterator[str]:
    """Yield the local variables that instructions store to one after another."""
    for step in steps:
        if not step.opname.startswith("STORE_FAST") or count <= 0:
            return
        held = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        for name in held[:1] if step.opname == "STORE_FAST_LOAD_FAST" else held:
            count -= 1
            yield name


def _loads(code: types.CodeType, name: str) -> bool:
    """Tell whether code reads a local variable, or lets functions within it read it."""
    if name in code.co_cellvars:
        return True
    for step in _steps(code):
        held = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname.startswith("LOAD_FAST") and name in held:
            return True
        if "LOAD_FAST" in step.opname and step.opname.startswith("STORE_FAST") and held[-1] == name:
            return True
    return False
