"""Decode one image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secateur.errors import DataError


def decode(source: bytes | Path, where: str) -> Tensor:
    """Decode an image file, given by its content or its path, into ``uint8``, shape ``(3, H, W)``, red first.

    Raises:
        DataError: If it is no image, or damaged; ``where`` says which.
    """
    return torch.from_numpy(np.array(opened(source, where))).permute(2, 0, 1).contiguous()


def opened(source: bytes | Path, where: str) -> Image.Image:
    """Return a decoded image in RGB.

    Raises:
        DataError: If it is no image, or damaged; ``where`` says which.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # A damaged PNG is a SyntaxError to PIL.
        reason = " ".join(str(error).split()) if isinstance(source, Path) else "damaged, or of an unknown kind"
        raise DataError(f"{where}: can't be decoded as an image: {reason}; repair it or take it away.") from error
