"""Which line of the user's own code called an operator."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

_SKIPPED = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}", "<")
_STDLIB = sysconfig.get_path("stdlib")


def shown(path: str, line: int) -> str:
    """Return ``file:line``, installed packages by their own path."""
    return f"{_short(path)}:{line}"


@functools.lru_cache(maxsize=4096)
def _short(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[parts.index("site-packages") + 1 :]) if "site-packages" in parts else path


def source_line() -> str:
    """Return ``file:line`` of the innermost frame outside torch, Python and this package; empty if there is none."""
    return next((shown(frame.f_code.co_filename, frame.f_lineno) for frame in user_frames()), "")


def user_frames() -> Iterator[FrameType]:
    """Yield the running frames outside torch, Python and this package, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_SKIPPED) and not (path.startswith(_STDLIB) and "site-packages" not in path):
            yield frame
        frame = frame.f_back
