"""Read plain state dicts, as training scripts leave them."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from secateur.errors import CheckpointError, UsageError

NESTED = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts store the state dict among other things."""

PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that data parallelism and compilation put before every key."""


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from one that ``torch.save`` wrote.

    The kind is told by the content, not by the name. A state dict nested under one of :data:`NESTED` is found, and
    :data:`PREFIXES` that every key carries are taken off. Only tensors are unpickled.

    Args:
        path: File.

    Returns:
        Name -> tensor, on the CPU, in the file's order.

    Raises:
        UsageError: If there is no such file.
        CheckpointError: If the file is damaged or of another kind, holds pickled objects beside tensors, or no state
            dict.
    """
    content = read_bytes(path)
    state = parse_tensors(path, content) if looks_like_safetensors(content) else _unpickle(path, content)
    for key in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        found = "an empty mapping" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise CheckpointError(
            f"{path}: expected a state dict, at the top or under {', '.join(NESTED)}; found {found}. "
            "Save one by torch.save(model.state_dict(), ...)."
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected a state dict, names and tensors; found {name!r}: {type(value).__name__}. "
                "Save one by torch.save(model.state_dict(), ...)."
            )
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            kind = "on the meta device" if value.device.type == "meta" else "sparse, quantised or nested"
            raise CheckpointError(
                f"{path}: {name} is {kind}; save plain tensors: value.to_dense(), value.dequantize()."
            )
    prefix = _common_prefix(list(state))
    return {name.removeprefix(prefix): value for name, value in state.items()}


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file.

    Raises:
        UsageError: If there is no such file, or it can't be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file.") from None
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}.") from error


def looks_like_safetensors(content: bytes) -> bool:
    """Tell whether bytes begin as a safetensors file does: the header's length, then a JSON object."""
    if len(content) < 9 or content[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", content[:8])
    return 2 <= int(length) <= 100_000_000


def why_unreadable(content: bytes) -> str:
    """Say in words what is wrong with bytes that are no readable safetensors file."""
    if not content:
        return "the file is empty"
    if content[:4] == b"PK\x03\x04":
        return (
            "this is a zip archive, as torch.save writes; expected a safetensors file with a plan: a state dict "
            "alone fits what apply(model, plan) returns"
        )
    if not looks_like_safetensors(content):
        return "this is no safetensors file"
    return "the file is truncated or damaged; copy it again"


def parse_tensors(path: str | os.PathLike[str], content: bytes) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        path: For messages.
        content: Of the file.

    Raises:
        CheckpointError: If the file is damaged or of another kind.
    """
    try:
        return parse_safetensors(content)
    except Exception as error:  # a type or a shape that torch has no form for raises errors of any kind
        raise CheckpointError(f"{path}: {why_unreadable(content)} ({' '.join(str(error).split())}).") from error


def _unpickle(path: str | os.PathLike[str], content: bytes) -> object:
    try:
        with warnings.catch_warnings():
            # torch.load warns of files that it then refuses, or reads all the same.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path}: holds pickled objects beside tensors, and these are never unpickled; "
                "save the state dict alone: torch.save(model.state_dict(), ...)."
            ) from error
        raise CheckpointError(f"{path}: neither a safetensors file nor a state dict saved by torch.") from error
    except Exception as error:  # bytes of any other kind raise errors of any kind
        raise CheckpointError(f"{path}: neither a safetensors file nor a whole state dict saved by torch.") from error


def _common_prefix(names: list[str]) -> str:
    """Return the longest chain of :data:`PREFIXES` that all names begin with."""
    chain = ""
    while True:
        longer = next((chain + p for p in PREFIXES if all(n.startswith(chain + p) for n in names)), None)
        if longer is None:
            return chain
        chain = longer
