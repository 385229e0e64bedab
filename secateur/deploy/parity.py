"""An exported file held to the network that it came from."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.deploy.failures import first_line, root_cause
from secateur.deploy.program import Runner, batch_of, resized, tensors
from secateur.errors import ExportError


@dataclass(frozen=True)
class ParityReport:
    """How an exported file compares with the network it came from."""

    path: Path
    format: str
    file_bytes: int
    batch_sizes: tuple[int, ...]
    """Batch sizes compared; one where the batch is fixed."""
    max_error: float
    """Largest absolute difference of an output."""
    relative_error: float
    """``max_error`` over the largest absolute output, the greater over outputs and batch sizes."""
    tolerance: float
    latency_ms: float
    """Median time of one forward pass of the reloaded file on the example inputs, CPU."""
    eager_latency_ms: float
    """The same of the PyTorch network, calls interleaved."""


def compared(
    model: nn.Module,
    load: Callable[[], Runner],
    call: tuple[Any, Any],
    own: int,
    sizes: Sequence[int],
    tolerance: float,
) -> dict[str, Any]:
    """Load the file and compare it with the network at every batch size."""
    try:
        runner = load()
    except Exception as error:  # whatever a damaged or unreadable file raises is the finding
        # ONNX Runtime names the node, and a node is named after the operator that it came from.
        node = re.search(r"node(?: with name '| \()node_(\w+?)(?:_\d+)?['\)]", f"{error} {error.__cause__}")
        where = f"aten.{node.group(1)}: the" if node else "The"
        raise ExportError(f"{where} exported file can't be loaded again: {root_cause(error)}.") from error
    largest, relative, size = 0.0, 0.0, batch_of(call)
    for batch in sizes:
        args, kwargs = resized(call, size, batch)
        with torch.no_grad():
            try:
                expected = tensors(model(*args, **kwargs))
            except Exception as error:  # the network is the user's
                raise ExportError(f"The network itself fails at batch size {batch}: {first_line(error)}.") from error
            try:
                found = runner(*args, **kwargs)
            except Exception as error:  # as above
                raise ExportError(f"The exported file fails at batch size {batch}: {first_line(error)}.") from error
        if [e.shape for e in expected] != [f.shape for f in found]:
            raise ExportError(
                f"The exported file returns shapes {[tuple(f.shape) for f in found]} at batch size {batch}, "
                f"the network {[tuple(e.shape) for e in expected]}."
            )
        for i, (e, f) in enumerate(zip(expected, found, strict=True)):
            error_here, scale = difference(e, f)
            largest = max(largest, error_here)
            relative = max(relative, error_here / scale if scale else error_here)
            if not relative <= tolerance:
                raise ExportError(
                    f"The exported file computes something else: output {i} differs by {error_here:.2e}, "
                    f"{relative:.1e} of its scale, at batch size {batch} (allowed {tolerance:.0e}). "
                    "Nothing was kept."
                )
    args, kwargs = resized(call, size, own)
    with torch.no_grad():
        file_ms, eager_ms = _latencies(lambda: runner(*args, **kwargs), lambda: model(*args, **kwargs))
    return {
        "batch_sizes": tuple(sizes),
        "max_error": largest,
        "relative_error": relative,
        "latency_ms": file_ms,
        "eager_latency_ms": eager_ms,
    }


def difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest absolute difference and largest absolute value; infinite where only one is finite."""
    expected, found = expected.double().cpu(), found.double().cpu()
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return float("inf"), 1.0
    finite = expected.isfinite()
    if not finite.any():
        return 0.0, 1.0
    difference = (expected - found)[finite].abs().max().item()
    return difference, expected[finite].abs().max().item()


def _latencies(first: Callable[[], Any], second: Callable[[], Any], repeats: int = 7) -> tuple[float, float]:
    """Median milliseconds of two calls, interleaved so that other load on the machine falls on both."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats + 2):
        for call, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if i >= 2:
                kept.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])
