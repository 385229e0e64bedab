"""The files that CIFAR-10 and CIFAR-100 come in: Parquet files of encoded images, and pickles of the first release."""

from __future__ import annotations

import pickle  # nothing but the names below is ever built of it
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.data.image import decode
from secateur.errors import DataError, UsageError, install

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


@dataclass(frozen=True)
class Kind:
    """One of the two data sets, and where its files lie."""

    name: str
    classes: int
    repository: str
    """On the Hugging Face hub."""
    folders: tuple[str, ...]
    """Folders of the Parquet files, below the root; the first that holds some counts."""
    columns: tuple[str, ...]
    """Of the classes in Parquet files; the first that is there counts."""
    pickled: str
    """torchvision's folder."""
    batches: tuple[tuple[str, tuple[str, ...]], ...]
    """Part -> torchvision's files."""
    key: str
    """Of the classes in torchvision's files."""
    loader: str
    """torchvision's class that downloads and unpacks them."""

    def find(self, root: Path, part: str) -> list[Path]:
        """Return the files of a part.

        Raises:
            DataError: If there are none, or a shard is missing.
        """
        for folder in self.folders:
            files = sorted((root / folder).glob(f"{part}-*.parquet"))
            if files:
                announced = [_SHARD.search(file.name) for file in files]
                counts = {int(found[2]) for found in announced if found}
                if counts and counts != {len(files)}:
                    wanted = ", ".join(map(str, sorted(counts)))
                    raise DataError(f"{root / folder}: {len(files)} {part} files of {wanted} announced in their names.")
                return files
        pickled = root / self.pickled
        if pickled.is_dir():
            named = [pickled / name for name in dict(self.batches)[part]]
            lost = next((file for file in named if not file.is_file()), None)
            if lost is None:
                return named
            raise DataError(f"{lost}: is missing; unpack {self.name}'s archive anew.")
        raise DataError(
            f'{root}: no {part}-*.parquet, nor {self.pickled}; get {self.name} by python -c "from torchvision.datasets '
            f"import {self.loader}; {self.loader}('{root}', download=True)\", or put the Parquet files of the Hugging "
            f"Face data set {self.repository} there."
        )

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """Return the images of a file, ``uint8``, shape ``(N, 3, 32, 32)``, and their classes.

        Raises:
            DataError: If the file is damaged or empty, or holds other images.
            UsageError: If pyarrow isn't installed.
        """
        return self._parquet(path) if path.suffix == ".parquet" else self._pickled(path)

    def _parquet(self, path: Path) -> tuple[Tensor, Tensor]:
        contents, labels = self._columns(path)
        images = torch.empty((len(contents), 3, 32, 32), dtype=torch.uint8)
        for row, content in enumerate(contents):
            image = decode(content, f"{path}: row {row}")
            if image.shape != (3, 32, 32):
                raise DataError(
                    f"{path}: row {row}: expected an image of 32x32, found {image.shape[2]}x{image.shape[1]}."
                )
            images[row] = image
        return images, torch.tensor(labels, dtype=torch.long)

    def _columns(self, path: Path) -> tuple[list[Any], list[int]]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UsageError(f"{self.name}: reading Parquet needs pyarrow; {install('data')}.") from None
        try:
            table = parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
        column = next((name for name in ("img", "image") if name in table.column_names), None)
        of_classes = next((name for name in self.columns if name in table.column_names), None)
        if column is None or of_classes is None:
            raise DataError(
                f"{path}: expected columns img (or image) and {self.columns[0]}, found {', '.join(table.column_names)}."
            )
        rows = table[column].to_pylist()
        contents = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
        labels = table[of_classes].to_pylist()
        if not rows:
            raise DataError(f"{path}: holds no image.")
        for row, (content, label) in enumerate(zip(contents, labels, strict=True)):
            if not isinstance(content, bytes) or not isinstance(label, int) or not 0 <= label < self.classes:
                raise DataError(
                    f"{path}: row {row}: expected image bytes and a class from 0 to {self.classes - 1}, found class "
                    f"{label!r}."
                )
        return contents, labels

    def _pickled(self, path: Path) -> tuple[Tensor, Tensor]:
        found = _unpickled(path)
        data, labels = found.get(b"data"), found.get(self.key.encode())
        pixels = data.pixels() if isinstance(data, _Array) else None
        if pixels is None or not isinstance(labels, list) or len(labels) != len(pixels) or not labels:
            raise DataError(f"{path}: expected rows of 3072 bytes under data, and as many classes under {self.key}.")
        if not all(isinstance(label, int) and 0 <= label < self.classes for label in labels):
            raise DataError(f"{path}: classes are 0 to {self.classes - 1}; found others.")
        images = torch.from_numpy(pixels.copy()).reshape(-1, 3, 32, 32)
        return images, torch.tensor(labels, dtype=torch.long)


class _Array:
    """What a pickle says of a numpy array, kept as it stands: no array is built by it."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> np.ndarray | None:
        """Return rows of 3072 bytes; None where there are none."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, kind, columns_first, content = self.state
        rows = isinstance(shape, tuple) and len(shape) == 2 and shape[1] == 3072 and isinstance(content, bytes)
        if not rows or not isinstance(kind, _Kind) or kind.name not in ("u1", b"u1") or columns_first:
            return None
        found = np.frombuffer(content, dtype=np.uint8)
        return found.reshape(shape) if found.size == shape[0] * 3072 else None


class _Kind:
    """What a pickle says of the elements of a numpy array."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, _: Any) -> None:
        """Byte order and fields, which single bytes don't have."""


def _encoded(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


_BUILT: Mapping[tuple[str, str], Callable[..., Any]] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encoded,
}
"""Names that these files use -> what is taken in their place; nothing else is looked up, let alone imported."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BUILT:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of CIFAR does")
        return _BUILT[module, name]


def _unpickled(path: Path) -> Mapping[Any, Any]:
    try:
        with path.open("rb") as file:
            found = _Reader(file, encoding="bytes").load()
    except Exception as error:  # damaged bytes raise errors of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not readable as a batch of CIFAR: {reason}; unpack its archive anew.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected CIFAR's data and labels, found {type(found).__name__}.")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}


CIFAR10 = Kind(
    "cifar10",
    10,
    "uoft-cs/cifar10",
    ("", "plain_text", "data"),
    ("label",),
    "cifar-10-batches-py",
    (("train", tuple(f"data_batch_{n}" for n in range(1, 6))), ("test", ("test_batch",))),
    "labels",
    "CIFAR10",
)

CIFAR100 = Kind(
    "cifar100",
    100,
    "uoft-cs/cifar100",
    ("", "cifar100", "data"),
    ("fine_label", "label"),
    "cifar-100-python",
    (("train", ("train",)), ("test", ("test",))),
    "fine_labels",
    "CIFAR100",
)
