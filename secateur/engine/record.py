"""What a run has written down of itself, compared with what is there when it goes on: data, settings, the machine."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.engine.settings import Settings, parted
from secateur.errors import UsageError
from secateur.pruning.planning import Target
from secateur.training.fingerprint import fingerprint
from secateur.training.passes import Batches
from secateur.training.processes import say_if_other

if TYPE_CHECKING:
    from secateur.engine.loop import Engine

_LOG = logging.getLogger(__name__)

_COMPUTED = ("precision", "channels_last")
"""Settings that a run keeps to as they were decided when it began."""


def surroundings(engine: Engine) -> dict[str, Any]:
    """Return what a run depends on beside its settings: releases and the machine."""
    versions = {}
    for package in ("secateur", "torch", "torchvision", "accelerate", "torchmetrics"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "versions": versions,
        "machine": {
            "system": platform.platform(), "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "device": str(engine.runtime.device), "processes": engine.runtime.num_processes,
        },
    }  # fmt: skip


def fingerprints(**parts: Batches | None) -> dict[str, Any]:
    """Return the fingerprint of each part of the data that there is."""
    return {name: fingerprint(batches) for name, batches in parts.items() if batches is not None}


def compare(path: Path, config: Mapping[str, Any], **parts: Batches | None) -> None:
    """Refuse data that are not those a run began with.

    Args:
        path: The run's folder.
        config: What it has written down.
        **parts: The data, by their part.

    Raises:
        UsageError: If a part differs; the part and both fingerprints are named.
    """
    found = fingerprints(**parts)
    for name, before in config.get("data_fingerprints", {}).items():
        if found.get(name) != before:
            raise UsageError(
                f"{path}: the {name} data are not those that the run began with: {_words(found.get(name))} here, "
                f"{_words(before)} then. Put them back, or begin a new run in another folder."
            )


def _words(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none"
    unit = "examples" if "examples" in found else "batches"
    return f"{found[unit]} {unit} with digest {found['sha256']}"


def compare_machine(path: Path, config: Mapping[str, Any], engine: Engine) -> None:
    """Name what differs of the machine, which may change bits of the result and nothing else."""
    now = surroundings(engine)
    then = {**config.get("machine", {}), **{f"{k} release": v for k, v in config.get("versions", {}).items()}}
    here = {**now["machine"], **{f"{k} release": v for k, v in now["versions"].items()}}
    say_if_other(f"resume: {path}", then.get("processes", 1), here["processes"])
    kinds = ("threads", "device", "capability", "torch release")
    differing = [f"{kind} {here[kind]}, {then[kind]} before" for kind in kinds if then.get(kind) != here.get(kind)]
    if differing:
        advice = " OMP_NUM_THREADS sets the threads." if "threads" in differing[0] else ""
        _LOG.warning(
            "resume: %s: goes on with %s: the result may differ in its last bits from that of an uninterrupted run.%s",
            path,
            "; ".join(differing),
            advice,
        )


def changed(
    config: dict[str, Any],
    tolerance: float | None,
    target: Target | None,
    given: Mapping[str, Any],
    describe: Mapping[str, Any],
) -> tuple[dict[str, Any], bool]:
    """Put other values in place of what a run began with, and record them.

    Args:
        config: What the run has written down.
        tolerance: Another one.
        target: Another one.
        given: Other settings and options.
        describe: Other JSON values; they are no change by themselves.

    Returns:
        The new configuration, and whether it is another.

    Raises:
        UsageError: If a setting is unknown or out of range, or without effect.
    """
    options, settings = (values.plain() for values in parted(given))
    asked = {**config["asked"], **{k: v for k, v in settings.items() if k in given}}
    wanted: dict[str, Any] = {
        "tolerance": config["tolerance"] if tolerance is None else tolerance,
        "target": config["target"] if target is None else target.to_dict(),
        "options": {**config["options"], **{k: v for k, v in options.items() if k in given}},
        "asked": Settings.of(asked).plain(),
    }
    before = {name: config[name] for name in wanted}
    if _plain(wanted) == _plain(before):
        return {**config, **describe}, False
    if wanted["tolerance"] != config["tolerance"] and wanted["target"] is not None:
        raise UsageError("tolerance: is unused with a target, and this run has one; give another target.")
    changes = {name: _difference(_plain(before[name]), _plain(wanted[name])) for name in wanted}
    changes = {name: change for name, change in changes.items() if change is not None}
    kept = {name: config["settings"][name] for name in _COMPUTED if asked[name] == config["asked"][name]}
    return {
        **config, **describe, **wanted,
        "settings": Settings.of({**asked, **kept}).plain(),
        "changes": [*config["changes"], changes],
    }, True  # fmt: skip


def _difference(before: Any, after: Any) -> Any:
    if isinstance(before, dict) and isinstance(after, dict):
        return {k: v for k, v in after.items() if before.get(k) != v} or None
    return None if before == after else after


def _plain(value: Any) -> Any:
    """Return a value as JSON reads it back: with lists in place of tuples."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
