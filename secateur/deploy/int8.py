"""A file in int8, quantised after training and measured again: output, accuracy, size and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.criteria.feature_maps import Batch, batches
from secateur.deploy import int8_onnx, int8_pt2
from secateur.deploy.failures import first_line
from secateur.deploy.program import Runner, batch_of, resized
from secateur.deploy.turns import bound, interleaved
from secateur.errors import DataError, ExportError, UsageError
from secateur.network.inputs import are_images

CALIBRATION = 256
"""Images to calibrate on, unless told otherwise."""
_FEWEST = 16
"""With fewer images the ranges miss what others hold."""
_TIMED = 8
"""Images in the forward passes that are timed."""
_POINT, _ERROR = 0.01, 0.1
"""Lost accuracy, and error of the output where there are no labels, from which on a report says so."""

WHOLE, SMALL, AGAINST = "fp32", "int8", "unpruned fp32"

_WAYS: dict[str, Any] = {"onnx": int8_onnx, "pt2": int8_pt2}


@dataclass(frozen=True)
class FileFigures:
    """What one file was measured to be."""

    network: str
    """``fp32``, ``int8`` or ``unpruned fp32``."""
    file_bytes: int
    accuracy: float | None
    """Share of the measured images whose class is found, in [0, 1]; None without labels of classes."""
    error: float | None
    """Root mean square of the difference to the fp32 outputs, over that of these outputs, the largest over outputs;
    None of the other networks, and where the two return different numbers of values."""
    latency_ms: float
    """Time of a forward pass, one thread."""
    speed_up: float
    """Time of the fp32 file over this file's: the median over rounds in which they took turns."""


@dataclass(frozen=True)
class Int8Report:
    """What an int8 file costs and gains, beside the fp32 file it was made from."""

    path: Path
    format: str
    files: tuple[FileFigures, ...]
    calibrated_on: int
    """Images that the ranges come from."""
    measured_on: int
    """Images that accuracy and error come from; none of them was calibrated on."""
    batch_size: int
    """Images in a timed forward pass."""
    notes: tuple[str, ...]
    """What has to be known before the file is used."""

    def __getitem__(self, network: str) -> FileFigures:
        """Return the figures of ``fp32``, ``int8`` or ``unpruned fp32``."""
        return next(found for found in self.files if found.network == network)


@dataclass(frozen=True)
class Seen:
    """The batches that a file is calibrated on, and those that it is measured on."""

    calibration: list[Batch]
    rest: Iterable[Batch]
    size: int | None = None
    """The one size of the batches, for a file that takes no other."""

    @property
    def example(self) -> Any:
        """Example inputs: two of the images."""
        first = self.calibration[0]
        args, kwargs = resized((first.args, first.kwargs), first.size, 2)
        return kwargs or args

    def fixed(self, size: int) -> Seen:
        """Return the same in batches of one size, for a file that takes no other."""
        return Seen(list(_cut(self.calibration, size)), _cut(self.rest, size), size)


def read(data: Iterable[Any] | None, test: Iterable[Any] | None, calibration: int) -> Seen:
    """Read as many images as are to be calibrated on, and leave the others for measuring.

    Raises:
        UsageError: If there are no data, or so few images are asked for that their ranges say nothing.
        DataError: If there are fewer images than asked for, or none is left to measure on.
    """
    if data is None:
        raise UsageError("export: int8 needs images to find the range of each feature map; pass data (--data).")
    if calibration < _FEWEST:
        raise UsageError(f"export: calibrate on {_FEWEST} images or more (--calibration), found {calibration}.")
    found = batches(data, "cpu")
    chosen: list[Batch] = []
    left: list[Batch] = []
    missing = calibration
    while missing and (batch := next(found, None)) is not None:
        taken = min(missing, batch.size)
        chosen.append(_part(batch, 0, taken))
        left += [_part(batch, taken, batch.size)] if taken < batch.size else []
        missing -= taken
    if missing:
        raise DataError(
            f"export: {calibration} images are to calibrate the ranges, and the data hold {calibration - missing}; "
            f"lower calibration (--calibration) to {_FEWEST} at least, or give more."
        )
    rest = chain(left, found) if test is None else batches(test, "cpu")
    first = next(rest, None)
    if first is None:
        raise DataError(
            "export: no image is left to measure the int8 file on: calibration takes all; lower it, or pass test."
            if test is None
            else "export: test holds no images to measure the int8 file on."
        )
    return Seen(chosen, chain([first], rest))


def quantise(kind: str, source: Path, target: Path, seen: Seen, example: tuple[Any, Any], dynamic: bool) -> None:
    """Quantise an fp32 file.

    Raises:
        UsageError: If a package is not installed.
        ExportError: If the file can't be quantised, or holds nothing to quantise.
    """
    calls = [(batch.args, batch.kwargs) for batch in seen.calibration]
    try:
        with torch.no_grad():
            count = _WAYS[kind].quantise(source, target, calls, example, dynamic)
    except (UsageError, DataError):
        raise
    except Exception as error:  # the passes of either library raise anything
        raise ExportError(f"{target.name}: can't be quantised to int8: {first_line(error)}.") from error
    if not count:
        raise ExportError(f"{target.name}: nothing was quantised; the network has no layer that {kind} takes in int8.")


def measured(target: Path, kind: str, files: dict[str, Path], seen: Seen) -> Int8Report:
    """Measure an int8 file beside its fp32 file: output and accuracy on all batches, time in turns.

    Raises:
        DataError: If the batches don't fit the files.
        ExportError: If the int8 file can't be loaded again.
    """
    way = _WAYS[kind]
    try:
        runners: dict[str, Runner] = {name: way.load(path) for name, path in files.items()}
    except Exception as error:  # whatever an unreadable file raises is the finding
        raise ExportError(f"{target.name}: the int8 file can't be loaded again: {first_line(error)}.") from error
    tallies = {name: _Tally() for name in files}
    images, timed = 0, None
    for number, batch in enumerate(seen.rest, start=1):
        found = {name: _outputs(run, batch, number) for name, run in runners.items()}
        for name, outputs in found.items():
            tallies[name].add(outputs, found[WHOLE], batch)
        images += batch.size
        timed = timed or resized((batch.args, batch.kwargs), batch.size, seen.size or _TIMED)
    if timed is None:
        raise DataError(f"export: not one batch of {seen.size} is left to measure the int8 file on; give more images.")
    calls, notes = {}, []
    for name, path in files.items():
        calls[name], note = way.fast(path, runners[name], timed)
        notes += [f"{name}: {note}"] if note else []
    times, failed = interleaved({name: bound(call, timed) for name, call in calls.items()}, 1, 9, 0.02, "cpu")
    if failed:
        raise ExportError(f"{target.name}: {next(iter(failed))} does not run: {next(iter(failed.values()))}.")
    rows = []
    for name, path in files.items():
        ratios = [w / o for w, o in zip(times[WHOLE].raw_times, times[name].raw_times, strict=True)]
        tally = tallies[name]
        apart = tally.error if name == SMALL else None
        rows.append(
            FileFigures(
                name, path.stat().st_size, tally.accuracy, apart, 1000 * times[name].median, statistics.median(ratios)
            )
        )
    report = Int8Report(
        target, kind, tuple(rows), sum(b.size for b in seen.calibration), images, batch_of(timed), tuple(notes)
    )
    return replace(report, notes=(*_losses(report), *notes))


class _Tally:
    """What the outputs of one file add up to."""

    def __init__(self) -> None:
        self.right = self.labelled = 0
        self.sums: dict[int, tuple[float, float]] = {}
        """Output -> sums of its squared differences to the fp32 file's, and of the squares of these."""
        self.alike = True

    def add(self, found: list[Tensor], expected: list[Tensor], batch: Batch) -> None:
        labels = batch.labels
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() and found[0].ndim == 2:
            self.right += int((found[0].argmax(1) == labels).sum())
            self.labelled += len(labels)
        self.alike &= [one.shape for one in found] == [one.shape for one in expected]
        for place, (own, other) in enumerate(zip(found, expected, strict=True) if self.alike else ()):
            apart, whole = self.sums.get(place, (0.0, 0.0))
            square = float(other.double().square().sum())
            self.sums[place] = apart + float((own.double() - other.double()).square().sum()), whole + square

    @property
    def accuracy(self) -> float | None:
        return self.right / self.labelled if self.labelled else None

    @property
    def error(self) -> float | None:
        ratios = [math.sqrt(apart / whole) for apart, whole in self.sums.values() if whole]
        return max(ratios, default=None) if self.alike else None


def _outputs(run: Runner, batch: Batch, number: int) -> list[Tensor]:
    try:
        with torch.inference_mode():
            return run(*batch.args, **batch.kwargs)
    except Exception as error:  # the images are the user's
        raise DataError(f"export: batch {number} of the images doesn't fit the file: {first_line(error)}.") from error


def _part(batch: Batch, first: int, last: int) -> Batch:
    """Return some of the examples of a batch."""
    places = torch.arange(first, last)

    def cut(leaf: Any) -> Any:
        if are_images(leaf):
            return leaf[first:last] if len(leaf) == batch.size else leaf
        return leaf[places] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == batch.size else leaf

    args, kwargs, labels = pytree.tree_map(cut, (batch.args, batch.kwargs, batch.labels), is_leaf=are_images)
    return Batch(args, kwargs, labels, last - first)


def _cut(found: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield batches of one size; what is left of each falls away."""
    for batch in found:
        for first in range(0, batch.size - size + 1, size):
            yield _part(batch, first, first + size)


def _losses(report: Int8Report) -> list[str]:
    """Say what was lost, where it is more than int8 usually costs."""
    before, after = report[WHOLE], report[SMALL]
    if before.accuracy is not None and after.accuracy is not None:
        lost = before.accuracy - after.accuracy
        return [f"int8 loses {100 * lost:.1f} points of accuracy"] if lost > _POINT else []
    return [f"int8 changes the output by {after.error:.0%}"] if (after.error or 0) > _ERROR else []
