"""A network as one file that runs without its class: torch.export or ONNX, held to the original's output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from secateur.criteria.feature_maps import evaluating
from secateur.deploy import int8 as eight_bits
from secateur.deploy.failures import require
from secateur.deploy.int8 import CALIBRATION, Int8Report
from secateur.deploy.parity import ParityReport, compared
from secateur.deploy.program import batch_of, program_of, resized, write_onnx, write_pt2
from secateur.deploy.target_file import replacing
from secateur.errors import UsageError
from secateur.network.inputs import arguments

FORMATS = {".pt2": "pt2", ".onnx": "onnx"}

ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]


@overload
def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs,
    format: str | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-5,
    *,
    int8: Literal[False] = False,
) -> ParityReport: ...


@overload
def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs | None = None,
    format: str | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-5,
    *,
    int8: Literal[True],
    data: Iterable[Any] | None,
    test: Iterable[Any] | None = None,
    calibration: int = CALIBRATION,
    against: nn.Module | None = None,
) -> Int8Report: ...


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: ExampleInputs | None = None,
    format: str | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-5,
    *,
    int8: bool = False,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    calibration: int = CALIBRATION,
    against: nn.Module | None = None,
) -> ParityReport | Int8Report:
    """Export a network, load the file again, and compare it with the network before saying done.

    The file takes its place only after the comparison, so a file under ``path`` is one that has passed. The network
    is exported in eval mode and left in the mode it was in.

    With ``int8`` the file that was compared is quantised after training, and what that does to output, accuracy, size
    and time is measured and reported: an int8 file is never as exact as the network. Weights are int8 a channel,
    activations a whole feature map, with ranges from calibration images. ONNX is quantised by ONNX Runtime in the QDQ
    form, weights to 7 bits; ``.pt2`` by torchao's PT2E for x86, activations to 7 bits: with 8 bits of both, processors
    without VNNI saturate in the sums of products, and accuracy is lost without a word.

    Args:
        model: The network.
        path: Target; ``.pt2`` (torch.export) or ``.onnx``.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Dimension 0 of
            the first tensor is the batch; every tensor whose dimension 0 is as long shares it. With ``int8`` taken
            from ``data`` where it is None.
        format: ``pt2`` or ``onnx`` where the suffix does not say it.
        dynamic_batch: Whether the file takes any batch size; it is then compared at 1, at the example's and at one
            more.
        tolerance: Largest difference allowed, relative to the largest absolute output; of the fp32 file with ``int8``.
        int8: Whether to quantise the file.
        data: Batches to calibrate on, see :func:`secateur.criteria.feature_maps.batches`; training images, whose
            labels are not needed, and never those of a test set.
        test: Batches to measure on; those of ``data`` that calibration leaves where it is None. Accuracy is measured
            where there are labels.
        calibration: Number of images to calibrate on, at least 16.
        against: The unpruned network, to be measured beside the two.

    Returns:
        The comparison; with ``int8`` what the int8 file costs and gains.

    Raises:
        UsageError: If the format is unknown, the target can't be written, a package is not installed, or ``data`` is
            missing, or given without ``int8``.
        DataError: If ``data`` holds too few images, or images that don't fit the network.
        ExportError: If the network can't be exported (operator and source line are named), the file computes
            something else, or can't be quantised.
    """
    target = Path(path)
    kind = format or FORMATS.get(target.suffix, "")
    if kind not in FORMATS.values():
        raise UsageError(
            f"{target}: unknown export format {format or target.suffix or 'without a suffix'!r}. "
            "End the name in .pt2 (torch.export) or .onnx."
        )
    if kind == "onnx":
        require("onnx", "onnxscript", "onnxruntime")
    if not int8:
        if any(given is not None for given in (data, test, against)):
            raise UsageError("export: data, test and against are for int8 files; pass int8=True.")
        if example_inputs is None:
            raise UsageError("export: example_inputs is missing; only int8 files take it from data.")
        return _whole(model, target, kind, example_inputs, dynamic_batch, tolerance)
    seen = eight_bits.read(data, test, calibration)
    example: Any = example_inputs if example_inputs is not None else seen.example
    seen = seen.fixed(batch_of(arguments(example))) if not dynamic_batch else seen
    with replacing(target) as part, tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for name, network in ((eight_bits.WHOLE, model), (eight_bits.AGAINST, against)):
            if network is not None:
                files[name] = Path(folder) / f"{len(files)}.{kind}"
                _whole(network, files[name], kind, example, dynamic_batch, tolerance)
        eight_bits.quantise(kind, files[eight_bits.WHOLE], part, seen, arguments(example), dynamic_batch)
        return eight_bits.measured(target, kind, files | {eight_bits.SMALL: part}, seen)


def _whole(
    model: nn.Module, target: Path, kind: str, example_inputs: ExampleInputs, dynamic: bool, tolerance: float
) -> ParityReport:
    """Export a network in fp32 and hold the file to it."""
    args, kwargs = arguments(example_inputs)
    batch = batch_of((args, kwargs))
    if dynamic and batch == 1:
        # torch.export takes a dimension of 1 for a constant, so the example is made two.
        args, kwargs = resized((args, kwargs), 1, 2)
    with evaluating(model), torch.no_grad():
        sizes = (batch,) if not dynamic else tuple(sorted({1, batch, max(batch, 2) + 1}))
        program = program_of(model, args, kwargs, dynamic)
        with replacing(target) as part:
            load = write_pt2(program, part) if kind == "pt2" else write_onnx(program, part)
            report = compared(model, load, (args, kwargs), batch, sizes, tolerance)
            size = part.stat().st_size
    return ParityReport(path=target, format=kind, file_bytes=size, tolerance=tolerance, **report)
