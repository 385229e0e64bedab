"""The papers' data sets and the user's own folders, in three parts, as batches that a seed repeats.

Parts: the test set is the published one, or drawn once and for all; the validation set is held out of the training
set. Batches: what epoch e holds, in which order and how augmented, follows from ``(seed, e)`` alone.
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.data.batches import Batches, DetectionBatches
from secateur.data.boxes import DetectionFiles
from secateur.data.bundle import DataBundle, Normalise
from secateur.data.cifar import cifar10, cifar100
from secateur.data.coco import coco
from secateur.data.digits import digits
from secateur.data.gtsdb import gtsdb
from secateur.data.imagefolder import ImageFiles, imagefolder
from secateur.data.masks import MaskFiles, masks
from secateur.data.mnist import mnist
from secateur.data.tensors import CropFlip, ImageTensors
from secateur.data.voc import voc
from secateur.errors import UsageError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

DATASETS: Mapping[str, Callable[..., DataBundle]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagefolder": imagefolder,
    "masks": masks,
    "voc": voc,
    "coco": coco,
    "gtsdb": gtsdb,
}
"""Name -> loader, called with ``root``, ``validation``, ``seed`` and the loader's own options."""


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    validation: float | None = None,
    seed: int = 0,
    **options: Any,
) -> DataBundle:
    """Load a data set by name, in its three parts.

    Args:
        name: ``digits``, or ``mnist``, ``cifar10``, ``cifar100``, ``imagefolder``, ``masks``, ``voc``, ``coco``,
            ``gtsdb``; with the folder after a colon, as in ``mnist:data``, or as ``root``.
        root: Folder of the files.
        validation: Share of the training set that is held out for validation, in (0, 1); the loader's own where None
            (a quarter for ``digits``, a tenth otherwise). Contradicts a published validation set.
        seed: Seed of that split. The test set never depends on it.
        options: The loader's own, see :data:`DATASETS`.

    Raises:
        UsageError: If the name or an option is unknown, the folder is missing from the call or given twice, or
            ``validation`` is out of range.
        DataError: If files are missing, damaged or empty.

    Example:
        >>> bundle = load("digits")
        >>> [len(part) for part in (bundle.train, bundle.validation, bundle.test)], bundle.input_shape
        ([1077, 360, 360], (1, 28, 28))
    """
    kind, colon, place = name.partition(":")
    if kind not in DATASETS:
        close = difflib.get_close_matches(kind, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(DATASETS)}."
        raise UsageError(f"{name}: no such data set; {hint}")
    if colon and root is not None:
        raise UsageError(f"{name}: the folder is given twice, here and as root={root}; leave one out.")
    folder = place if colon else root
    loader = DATASETS[kind]
    if kind == "digits":
        if folder is not None:
            raise UsageError(f"{name}: digits come with scikit-learn and take no folder; write digits alone.")
    elif folder is None or not str(folder):
        raise UsageError(f"{name}: the folder of the files is missing; write {kind}:FOLDER.")
    else:
        options["root"] = Path(folder).expanduser()
    known = [p for p in inspect.signature(loader).parameters if p not in ("root", "validation", "seed")]
    unknown = next((o for o in options if o not in known and o != "root"), None)
    if unknown is not None:
        raise UsageError(f"{kind}: no option {unknown!r}; known are validation, seed, {', '.join(known)}.")
    if validation is not None and not 0 < validation < 1:
        raise UsageError(
            f"{kind}: validation is the share of the training set held out, in (0, 1), found {validation}."
        )
    return loader(validation=validation, seed=seed, **options)


__all__ = [
    "DATASETS",
    "Batches",
    "CropFlip",
    "DataBundle",
    "DetectionBatches",
    "DetectionFiles",
    "ImageFiles",
    "ImageTensors",
    "MaskFiles",
    "Normalise",
    "load",
]
