"""The digest by which a file tells that it still holds what was written: SHA-256 over text and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of a text and then of tensors in the order of their names.

    Of each tensor name, dtype, shape and bytes count.
    """
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        add(found, tensors[name], name)
    return found.hexdigest()


def add(found: Any, value: Tensor, name: str = "") -> None:
    """Let a digest under way cover a tensor, too."""
    found.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
    if value.numel():
        found.update(bits(value).numpy().data)


def bits(value: Tensor) -> Tensor:
    """Return a tensor's bytes, shape ``(bytes,)``."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
