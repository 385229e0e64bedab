"""What becomes of sizes that the code reads off a shape: which dimensions it goes on to use, and what it asks for.

Which are used is read off the instructions that follow: ``x.shape[-2:]`` and ``n, _, h, w = x.shape`` read it whole
and use the positions only. Where the instructions are not of a known form, every dimension counts as used.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

from secateur.labels import Labels

_CONSTANTS = ("LOAD_CONST", "LOAD_SMALL_INT")
_SUBSCRIPTS = ("BINARY_SUBSCR", "BINARY_SLICE", "BINARY_OP")


class Counted(int):
    """A size read off a shape, or a multiple or fraction of it, that knows which channels it is the number of.

    >>> width = Counted(8)
    >>> width.labels = "eight channels"
    >>> (width // 4).labels, (2 * width).labels, type(width + 1), type(width * width)
    ('eight channels', 'eight channels', <class 'int'>, <class 'int'>)
    """

    labels: Labels

    def __floordiv__(self, other: Any) -> Any:
        """Return a fraction."""
        return counted(int(self) // other, self.labels if type(other) is int else None)

    def __mul__(self, other: Any) -> Any:
        """Return a multiple."""
        plain = int(other) if isinstance(other, Counted) else other
        return counted(int(self) * plain, self.labels if type(other) is int else None)

    __rmul__ = __mul__

    def __reduce__(self) -> Any:
        """Be copied and stored as a plain number."""
        return int, (int(self),)


def counted(size: Any, labels: Labels | None) -> Any:
    """Return a size so that it knows of which channels it is the number; as it is where they are not known."""
    if labels is None:
        return size
    result = Counted(size)
    result.labels = labels
    return result


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
