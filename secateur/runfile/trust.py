"""A file that names code, as ``model: net.py:build`` does, runs it only where a person says so.

What a person names on the command line is their own word. What a file names is code from wherever the file is from:
it runs once they have said yes on a terminal, given ``--trust``, or named the file's folder in :data:`TRUSTED`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.data import DATASETS
from secateur.errors import UsageError

TRUSTED = "SECATEUR_TRUST"
"""Environment variable: folders, separated as in PATH, whose files may name code."""

_DATA = {"model": ("torchvision", "timm"), "data": tuple(DATASETS), "method": ()}
"""Key of a file -> heads of names, before the colon, that are no code."""
_READ_BY_TIMM = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
"""Options by which timm loads files and names of a file's choice."""


def code_named(run: Any, said: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return what of a file's values is code: key -> name.

    Args:
        run: The values, as attributes: a :class:`secateur.runfile.config.RunConfig` or ``PruneConfig``.
        said: Values of the command line, which are no file's.
    """
    said = said or {}
    found = {
        key: str(name)
        for key, harmless in _DATA.items()
        if (name := getattr(run, key)) is not None
        and ":" in name
        and name.partition(":")[0] not in harmless
        and not said.get(key)
    }
    if str(run.model).startswith("timm:"):
        own = {n: v for n, v in run.model_options.items() if n not in (said.get("model_options") or {})}
        found |= {f"model_options.{name}": str(own[name]) for name in _READ_BY_TIMM if name in own}
    return found


def resume_command(folder: str | Path, run: Any) -> str:
    """Return the command that goes on with a run, which runs the code that its file names off a terminal, too.

    Args:
        folder: The run's.
        run: Its values, see :func:`code_named`.
    """
    return f"secateur resume {shlex.quote(str(folder))}{' --trust' if code_named(run) else ''}"


def require(file: Path, named: Mapping[str, str], *, given: bool, ask: Callable[[str], bool] | None = None) -> None:
    """Refuse to run what a file names, unless it names nothing or is trusted.

    Args:
        file: The file.
        named: What of it is code, see :func:`code_named`.
        given: Whether the person has said that they trust it.
        ask: Asks a person on their terminal; None where there is none.

    Raises:
        UsageError: If nobody trusts the file.
    """
    if not named or given or _in_trusted_folder(file):
        return
    what = ", ".join(f"{key}: {name}" for key, name in named.items())
    if ask is not None and ask(f"{file} names code that would run here: {what}. Run it?"):
        return
    raise UsageError(
        f"{file}: names code, which was not run: {what}. If you know where the file and that code are from, give "
        f"--trust, or name its folder in {TRUSTED}."
    )


def _in_trusted_folder(file: Path) -> bool:
    folders = [Path(folder).expanduser() for folder in os.environ.get(TRUSTED, "").split(os.pathsep) if folder]
    return any(file.resolve().is_relative_to(folder.resolve()) for folder in folders)
