"""Mutants: of bytes, as disks and networks damage them, and of structure, as a person or a program changes it."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "1", "1.5", "x" * 3000, "\0", "é\u2028", "../../x", "~nobody-here/x", "/", "os:system", "subprocess:run", "a:b:c",
    ":", "conv1", "conv1.weight", "*", "__class__", "training", [], {}, [[]], [None], {"a": 1}, {"": {}}, ["x", 1],
    [0, 0], [-1], [[[[[[]]]]]], {"0": [0]},
)  # fmt: skip
"""Values that somewhere mean something else than they say."""
PIECES = (
    b"\0",
    b"\xff" * 8,
    b"9" * 30,
    b"-",
    b"{",
    b"[",
    b"]",
    b'"',
    b":",
    b"\n",
    b"&a ",
    b"*a",
    b"!!",
    b"<!ENTITY",
    b"%s",
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to three places changed."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        # Headers decide more than what follows them.
        at = rng.randrange(min(at + 1, 200)) if rng.random() < 0.4 else at
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length]
            case 4:
                out[at:at] = rng.choice(PIECES)
            case _:
                if rng.random() < 0.3:
                    del out[at:]
                else:
                    out[at : at + length] = rng.randbytes(length)
    return bytes(out)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in JSON data, but for those deep in long lists of numbers."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 4)):
            found += places(value[i], (*path, i))
    return found


def restructured(value: Any, rng: random.Random) -> Any:
    """Return JSON data with one to two values replaced, removed, renamed, doubled, wrapped or exchanged."""
    out = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2))):
        every = places(out)
        path = rng.choice(every)
        if not path:
            if rng.random() < 0.1:
                return rng.choice(ODD)
            continue
        holder, last = at(out, path[:-1]), path[-1]
        match rng.randrange(8):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[rng.choice([str(odd) for odd in ODD if isinstance(odd, (str, int))])] = holder.pop(last)
            case 2:
                holder[last] = [holder[last]]
            case 3:
                holder[last] = copy.deepcopy(at(out, rng.choice(every)))
            case 4 if isinstance(holder, list):
                holder.insert(last, copy.deepcopy(holder[last]))
            case 5 if isinstance(holder[last], list):
                rng.shuffle(holder[last])
            case 6 if isinstance(holder[last], int) and not isinstance(holder[last], bool):
                holder[last] += rng.choice((-1, 1, -holder[last], 1000))
            case _:
                holder[last] = copy.deepcopy(rng.choice(ODD))
    return out


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path."""
    for key in path:
        value = value[key]
    return value


def same(one: Any, other: Any) -> bool:
    """Tell whether JSON data are the same, numbers of other types apart."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
