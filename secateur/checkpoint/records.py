"""Where something under way stands, as one file: JSON and tensors, nested in any way, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from secateur.checkpoint.atomic import write_atomic
from secateur.checkpoint.digest import digest
from secateur.errors import CheckpointError
from secateur.graph.structure import parsed, shown

_LOG = logging.getLogger(__name__)

Stored = TypeVar("Stored")


_DIGEST = "sha256"
"""Key of the metadata under which the digest of record and tensors stands."""


def before(path: str | os.PathLike[str]) -> Path:
    """Return where :func:`write_record` keeps the file that the one at this path has followed."""
    named = Path(path)
    return named.with_name(f"{named.stem}-before{named.suffix}")


def write_record(
    path: str | os.PathLike[str], key: str, version: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a record with its tensors and a digest of both, atomically; tensors are stored contiguous.

    The file that was there is kept beside, see :func:`before`.

    Args:
        path: File to write.
        key: Key of the safetensors metadata that tells this kind of file from others.
        version: Version of the record's layout.
        record: JSON values; see :func:`flatten` for what has tensors in it.
        tensors: By name.

    Raises:
        UsageError: If the place can't be written to.
        RunError: If the disk fails or is full.
    """
    stored = {k: v.detach().to("cpu").clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    text = json.dumps({"version": version, **record}, separators=(",", ":"))
    write_atomic(path, to_bytes(stored, metadata={key: text, _DIGEST: digest(text, stored)}), keep=before(path))


def read_record(
    path: str | os.PathLike[str], key: str, version: int, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_record` wrote.

    Args:
        path: An existing file.
        key: As it was written.
        version: The one version that is read.
        what: What the file ought to be, for errors: ``the state of a run``.

    Raises:
        CheckpointError: If the file is damaged, something else, or of another version.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            metadata = file.metadata() or {}
            record = parsed(metadata[key])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if not isinstance(record, dict):
            raise ValueError("its record is no mapping")
    except Exception as error:  # a type or a shape that torch has no form for raises errors of any kind
        raise CheckpointError(f"{path}: damaged, or not {what}: {' '.join(str(error).split())}.") from error
    if record.get("version") != version:
        raise CheckpointError(f"{path}: format version {record.get('version')}, this release resumes {version} only.")
    if metadata.get(_DIGEST) != digest(metadata[key], tensors):
        raise CheckpointError(f"{path}: damaged: its content is not what was written, by the digest that it carries.")
    return record, tensors


def newest(path: str | os.PathLike[str], read: Callable[[Path], Stored]) -> Stored:
    """Read a file that :func:`write_record` wrote, or the one before it where that is damaged or missing.

    Args:
        path: As it was written.
        read: Reads one file, and raises :class:`CheckpointError` where it can't.

    Raises:
        CheckpointError: If neither can be read.
    """
    path, older = Path(path), before(path)
    try:
        return read(path)
    except CheckpointError as error:
        try:
            found = read(older)
        except CheckpointError:
            raise error from None
        if path.exists():  # else a process was killed as the two changed places
            _LOG.warning("%s Going on from the one before it, %s.", error, older.name)
        return found


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested data with tensors into JSON, the tensors put aside under names; integer keys are kept as pairs."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[k, flatten(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`flatten`; tuples come back as lists.

    Raises:
        ValueError: If the value is not of the form that :func:`flatten` gives, or a tensor is missing.
    """
    match value:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"items": list(pairs)} if all(_is_pair(pair) for pair in pairs):
            return {k: restore(v, tensors) for k, v in pairs}
        case {"list": list(values)}:
            return [restore(v, tensors) for v in values]
        case {"value": plain}:
            return plain
    raise ValueError(f"no stored value: {shown(value)}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int, float, bool, type(None)))
