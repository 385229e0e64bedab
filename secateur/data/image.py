"""Decode one image, as every data set of image files does."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secateur.errors import DataError, UsageError

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
"""Kinds of images that are read, whatever a file is named; of others, some are programs (EPS)."""
PIXELS = 100_000_000
"""The largest image that is decoded, width times height, unless :data:`PIXELS_SETTING` says otherwise."""
PIXELS_SETTING = "SECATEUR_MAX_PIXELS"
"""Environment variable that raises the limit."""


def decode(source: bytes | Path, where: str) -> Tensor:
    """Decode an image file, given by its content or its path, into ``uint8``, shape ``(3, H, W)``, red first.

    Raises:
        DataError: If it is no image, damaged, or larger than the limit; ``where`` says which.
        UsageError: If the setting of the limit is no number.
    """
    return torch.from_numpy(np.array(opened(source, where))).permute(2, 0, 1).contiguous()


def opened(source: bytes | Path, where: str, mode: str | None = "RGB") -> Image.Image:
    """Return a decoded image in RGB, or in another of PIL's modes; as it is stored for None.

    Raises:
        DataError: If it is no image, damaged, or larger than the limit; ``where`` says which.
        UsageError: If the setting of the limit is no number.
    """
    limit = most_pixels()
    try:
        with (
            _limited_here(),
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image,
        ):
            if image.width * image.height > limit:
                raise DataError(
                    f"{where}: holds {image.width}x{image.height} pixels, more than {limit}; take it away, or raise "
                    f"{PIXELS_SETTING}."
                )
            return image.copy() if mode is None else image.convert(mode)
    except DataError:
        raise
    except Exception as error:  # damaged bytes raise errors of any kind
        reason = " ".join(str(error).split()) if isinstance(source, Path) else "damaged, or of an unknown kind"
        raise DataError(f"{where}: can't be decoded as an image: {reason}; repair it or take it away.") from error


def most_pixels() -> int:
    """Return how many pixels the largest image may have that is decoded.

    Raises:
        UsageError: If :data:`PIXELS_SETTING` is no whole number from 1 up.
    """
    given = os.environ.get(PIXELS_SETTING, "")
    if given and (not given.isascii() or not given.isdecimal() or len(given) > 18 or int(given) < 1):
        raise UsageError(f"{PIXELS_SETTING}: is a whole number from 1 up, found {given!r}.")
    return int(given or PIXELS)


@contextmanager
def _limited_here() -> Iterator[None]:
    """Put off PIL's own limit, which nothing but Python code can raise, while this module's holds."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
