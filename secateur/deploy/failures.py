"""Why a network can't be exported: the operator and the line of the user's code, in one line."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from secateur.errors import UsageError, install

_NEEDS = {"onnx": "ONNX", "int8": "int8 in a .pt2 file"}
"""What the packages of an extra are for."""


def blame(error: BaseException, program: Any = None) -> tuple[str, str]:
    """Find the ATen operator that failed and the line of the user's own code that called it."""
    operator = line = ""
    seen: BaseException | None = error
    while seen is not None:
        found, place = _innermost(seen.__traceback__)
        operator, line = operator or found or _named_operator(str(seen)), line or place
        seen = seen.__cause__ or seen.__context__
    if program is not None:
        for node in program.graph.nodes:
            # A decomposition's name begins with that of the operator it comes from.
            name = str(node.target).removesuffix(".default")
            if node.op == "call_function" and operator and "." in name and operator.startswith(name):
                places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
                own = [f"{file}:{number}" for file, number in places if not _is_torch(file)]
                return operator, own[-1] if own else line
    return operator, line


def _innermost(trace: TracebackType | None) -> tuple[str, str]:
    operator = line = ""
    own = str(Path(__file__).resolve().parent) + os.sep
    for frame, number in traceback.walk_tb(trace):
        file = frame.f_code.co_filename
        for name in ("func", "op", "target"):
            value = frame.f_locals.get(name)
            if isinstance(value, torch._ops.OpOverload):
                operator = str(value)
        if not _is_torch(file) and not file.startswith(own) and not file.startswith("<") and "importlib" not in file:
            line = f"{file}:{number}"
    return operator, line


def _is_torch(file: str) -> bool:
    folders = [
        str(Path(torch.__file__).parent),
        *(os.sep + p + os.sep for p in ("onnxscript", "onnx_ir", "contextlib.py")),
    ]
    return file.startswith(folders[0]) or any(part in file + os.sep for part in folders[1:])


def _named_operator(text: str) -> str:
    match = re.search(r"OpOverload\(op='([\w.:]+)'", text) or re.search(r"\b(aten\.\w+(?:\.\w+)?)\b", text)
    return match.group(1) if match else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def root_cause(error: BaseException) -> str:
    """Say what the innermost cause says, in its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))[:300]


def require(*names: str, extra: str = "onnx", instead: str = "") -> list[Any]:
    """Import optional packages, or say which extra to install, or what does without.

    Raises:
        UsageError: If one is not installed.
    """
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise UsageError(
                f"{name.split('.')[0]} is not installed, and {_NEEDS[extra]} needs it: {install(extra)}{instead}."
            ) from error
    return modules


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries print and log, which would bury the one line that says what went wrong."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)
