"""A network as one file that runs without its class: torch.export or ONNX, held to the original's output."""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import os
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.criteria.feature_maps import evaluating
from secateur.errors import DataError, ExportError, UsageError
from secateur.network.inputs import are_images, arguments

FORMATS = {".pt2": "pt2", ".onnx": "onnx"}

Runner = Callable[..., list[Tensor]]
"""Takes a network's positional and keyword arguments, returns its output's tensors in order."""


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


@dataclass(frozen=True)
class QuantizationReport:
    """Metric, size and latency of a file before and after its quantisation to int8."""

    path: Path
    file_bytes_before: int
    file_bytes: int
    metric_before: float
    metric: float
    latency_ms_before: float
    latency_ms: float


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    format: str | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-5,
) -> ParityReport:
    """Export a network, load the file again, and compare it with the network before saying done.

    The file takes its place only after the comparison, so a file under ``path`` is one that has passed. The network
    is exported in eval mode and left in the mode it was in.

    Args:
        model: The network.
        path: Target; ``.pt2`` (torch.export) or ``.onnx``.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Dimension 0 of
            the first tensor is the batch; every tensor whose dimension 0 is as long shares it.
        format: ``pt2`` or ``onnx`` where the suffix does not say it.
        dynamic_batch: Whether the file takes any batch size; it is then compared at 1, at the example's and at one
            more.
        tolerance: Largest difference allowed, relative to the largest absolute output.

    Returns:
        The comparison.

    Raises:
        UsageError: If the format is unknown, the target can't be written, or a package is not installed.
        ExportError: If the network can't be exported (operator and source line are named), or the file computes
            something else.
    """
    target = Path(path)
    kind = format or FORMATS.get(target.suffix, "")
    if kind not in FORMATS.values():
        raise UsageError(
            f"{target}: unknown export format {format or target.suffix or 'without a suffix'!r}. "
            "End the name in .pt2 (torch.export) or .onnx."
        )
    if kind == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    args, kwargs = arguments(example_inputs)
    batch = _batch_size((args, kwargs))
    if dynamic_batch and batch == 1:
        # torch.export takes a dimension of 1 for a constant, so the example is made two.
        args, kwargs = _resized((args, kwargs), 1, 2)
    with evaluating(model):
        sizes = (batch,) if not dynamic_batch else tuple(sorted({1, batch, max(batch, 2) + 1}))
        program = _program(model, args, kwargs, dynamic_batch)
        with replacing(target) as part:
            load = _write_pt2(program, part) if kind == "pt2" else _write_onnx(program, part)
            report = _compared(model, load, (args, kwargs), batch, sizes, tolerance)
            size = part.stat().st_size
    return ParityReport(path=target, format=kind, file_bytes=size, tolerance=tolerance, **report)


class OnnxModel:
    """An ONNX file as a function of tensors.

    Args:
        path: The file.
        threads: Threads of one operator; 0 leaves it to ONNX Runtime.

    Raises:
        UsageError: If onnxruntime is not installed.
        DataError: If the file can't be read as ONNX.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        (runtime,) = _require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise DataError(f"{path}: ONNX Runtime can't load it ({_first_line(error)}).") from error
        self._inputs = [value.name for value in self.session.get_inputs()]

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return every output, for the arguments the network itself takes."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(self._inputs, tensors, strict=True)}
        return [torch.from_numpy(output) for output in self.session.run(None, feed)]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the first output."""
        return self.run(*args, **kwargs)[0]


def quantize(
    source: str | Path,
    target: str | Path,
    calibration: Iterable[Tensor | tuple[Any, ...] | dict[str, Any]],
    evaluate: Callable[[OnnxModel], float],
) -> QuantizationReport:
    """Quantise an ONNX file to int8 after training, and measure what that does to its accuracy.

    Static quantisation by ONNX Runtime: weights int8 a channel, activations uint8 with ranges from the calibration
    inputs, in the QDQ form.

    Args:
        source: An ONNX file, as :func:`export` writes it.
        target: The quantised file.
        calibration: Inputs of the network, a few hundred images in batches; labels are not needed.
        evaluate: Measures a metric of a file, run as a function of tensors.

    Returns:
        Metric, size and latency before and after.

    Raises:
        UsageError: If a package is not installed, or the target can't be written.
        DataError: If there is no calibration input, or ``source`` is not an ONNX file.
        ExportError: If ONNX Runtime can't quantise the file.
    """
    quantization, shapes, _ = _require("onnxruntime.quantization", "onnxruntime.quantization.shape_inference", "onnx")
    original = OnnxModel(source)
    feeds = [_feed(original, inputs) for inputs in calibration]
    if not feeds:
        raise DataError("No calibration inputs: int8 needs a few hundred images to find the range of each feature map.")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    with replacing(Path(target)) as part, tempfile.TemporaryDirectory() as folder:
        prepared = str(Path(folder) / "prepared.onnx")
        try:
            shapes.quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                str(part),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except Exception as error:  # ONNX Runtime's passes raise anything
            raise ExportError(f"{source}: can't be quantised to int8 ({_first_line(error)}).") from error
        small = OnnxModel(part)
        before, after = evaluate(original), evaluate(small)
        first, last = _latencies(
            lambda: original.session.run(None, feeds[0]), lambda: small.session.run(None, feeds[0])
        )
        size = part.stat().st_size
    return QuantizationReport(Path(target), Path(source).stat().st_size, size, before, after, first, last)


def _feed(model: OnnxModel, inputs: Tensor | tuple[Any, ...] | dict[str, Any]) -> dict[str, Any]:
    leaves = [leaf for leaf in pytree.tree_leaves(arguments(inputs)) if isinstance(leaf, Tensor)]
    return {v.name: leaf.cpu().numpy() for v, leaf in zip(model.session.get_inputs(), leaves, strict=True)}


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Any:
    """torch.export of the network; whatever fails in it is blamed on an operator and a line."""
    shapes = _named_shapes(model, args, kwargs) if dynamic else None
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # anything the network or the tracer raises
        if dynamic and "batch" in str(error) and type(error).__name__ in ("UserError", "ConstraintViolationError"):
            constant = re.search(r"constant \((\d+)\)", str(error))
            found = f"its code makes it the constant {constant.group(1)}" if constant else _reason(error)
            raise ExportError(
                f"The network fixes its batch size ({found}). Pass dynamic_batch=False "
                "(--fixed-batch) to export it for the example's batch only."
            ) from error
        operator, line = _blame(error)
        reason = _reason(error)
        if "DataDependent" in type(error).__name__ or "data-dependent" in reason:
            operator, reason = operator or "aten.item", "Python code there branches on the values of a tensor"
        raise ExportError(
            f"{line or type(model).__name__}: {operator or 'the network'} can't be exported: {reason}."
        ) from error


def _named_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes as torch.export wants them: in order, or with keyword arguments by name of parameter."""
    positional, keyword = _dynamic_shapes((args, kwargs))
    if not keyword:
        return positional
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, positional, strict=False)), **keyword}


def _write_pt2(program: Any, part: Path) -> Callable[[], Runner]:
    torch.export.save(program, part)

    def load() -> Runner:
        module = torch.export.load(part).module()
        return lambda *args, **kwargs: _tensors(module(*args, **kwargs))

    return load


def _write_onnx(program: Any, part: Path) -> Callable[[], Runner]:
    try:
        with quiet():
            torch.onnx.export(program, (), str(part), dynamo=True, external_data=False, verbose=False)
    except OSError:
        raise  # the disk's, not the network's
    except Exception as error:  # the exporter's passes raise anything
        operator, line = _blame(error, program)
        raise ExportError(
            f"{line or 'The network'}: {operator or 'an operator'} can't be exported to ONNX: {_reason(error)}."
        ) from error
    return lambda: OnnxModel(part).run


def _compared(
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
        raise ExportError(f"{where} exported file can't be loaded again: {_reason(error)}.") from error
    largest, relative, size = 0.0, 0.0, _batch_size(call)
    for batch in sizes:
        args, kwargs = _resized(call, size, batch)
        with torch.no_grad():
            try:
                expected = _tensors(model(*args, **kwargs))
            except Exception as error:  # the network is the user's
                raise ExportError(f"The network itself fails at batch size {batch}: {_first_line(error)}.") from error
            try:
                found = runner(*args, **kwargs)
            except Exception as error:  # as above
                raise ExportError(f"The exported file fails at batch size {batch}: {_first_line(error)}.") from error
        if [e.shape for e in expected] != [f.shape for f in found]:
            raise ExportError(
                f"The exported file returns shapes {[tuple(f.shape) for f in found]} at batch size {batch}, "
                f"the network {[tuple(e.shape) for e in expected]}."
            )
        for i, (e, f) in enumerate(zip(expected, found, strict=True)):
            error_here, scale = _difference(e, f)
            largest = max(largest, error_here)
            relative = max(relative, error_here / scale if scale else error_here)
            if not relative <= tolerance:
                raise ExportError(
                    f"The exported file computes something else: output {i} differs by {error_here:.2e}, "
                    f"{relative:.1e} of its scale, at batch size {batch} (allowed {tolerance:.0e}). "
                    "Nothing was kept."
                )
    args, kwargs = _resized(call, size, own)
    with torch.no_grad():
        file_ms, eager_ms = _latencies(lambda: runner(*args, **kwargs), lambda: model(*args, **kwargs))
    return {
        "batch_sizes": tuple(sizes),
        "max_error": largest,
        "relative_error": relative,
        "latency_ms": file_ms,
        "eager_latency_ms": eager_ms,
    }


def _difference(expected: Tensor, found: Tensor) -> tuple[float, float]:
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


def _batch_size(call: tuple[Any, Any]) -> int:
    for leaf in pytree.tree_leaves(call, is_leaf=are_images):
        if are_images(leaf):
            return len(leaf)
        if isinstance(leaf, Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise UsageError("The example inputs hold no tensor with a batch dimension, so there is nothing to run.")


def _resized(call: tuple[Any, Any], size: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat or cut every tensor, and every list of images, of batch size ``size`` to ``batch``."""

    def resize(leaf: Any) -> Any:
        if are_images(leaf):
            return [leaf[i % size] for i in range(batch)] if len(leaf) == size else leaf
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != size:
            return leaf
        return leaf[torch.arange(batch, device=leaf.device) % size]

    resized: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(resize, call, is_leaf=are_images)
    return resized


def _dynamic_shapes(call: tuple[Any, Any]) -> tuple[Any, Any]:
    size, dimension = _batch_size(call), torch.export.Dim("batch", min=1)

    def shape(leaf: Any) -> Any:
        return {0: dimension} if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size else None

    shapes: tuple[Any, Any] = pytree.tree_map(shape, call)
    return shapes


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _blame(error: BaseException, program: Any = None) -> tuple[str, str]:
    """Find the ATen operator that failed and the line of the user's own code that called it."""
    operator = line = ""
    seen: BaseException | None = error
    while seen is not None:
        found, place = _innermost(seen.__traceback__)
        operator, line = operator or found or _named_operator(str(seen)), line or place
        seen = seen.__cause__ or seen.__context__
    if program is not None:
        for node in program.graph.nodes:
            # A decomposition's name begins with that of the operator it comes from.
            name = str(node.target).removesuffix(".default")
            if node.op == "call_function" and operator and "." in name and operator.startswith(name):
                places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
                own = [f"{file}:{number}" for file, number in places if not _is_torch(file)]
                return operator, own[-1] if own else line
    return operator, line


def _innermost(trace: TracebackType | None) -> tuple[str, str]:
    operator = line = ""
    own = str(Path(__file__).resolve())
    for frame, number in traceback.walk_tb(trace):
        file = frame.f_code.co_filename
        for name in ("func", "op", "target"):
            value = frame.f_locals.get(name)
            if isinstance(value, torch._ops.OpOverload):
                operator = str(value)
        if not _is_torch(file) and file != own and not file.startswith("<") and "importlib" not in file:
            line = f"{file}:{number}"
    return operator, line


def _is_torch(file: str) -> bool:
    folders = [
        str(Path(torch.__file__).parent),
        *(os.sep + p + os.sep for p in ("onnxscript", "onnx_ir", "contextlib.py")),
    ]
    return file.startswith(folders[0]) or any(part in file + os.sep for part in folders[1:])


def _named_operator(text: str) -> str:
    match = re.search(r"OpOverload\(op='([\w.:]+)'", text) or re.search(r"\b(aten\.\w+(?:\.\w+)?)\b", text)
    return match.group(1) if match else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _reason(error: BaseException) -> str:
    """Say what the innermost cause says, in its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", _first_line(error))[:300]


def _require(*names: str) -> list[Any]:
    """Import optional packages, or say what to install."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            raise UsageError(
                f"{name.split('.')[0]} is not installed, and ONNX needs it: pip install 'secateur[onnx]'."
            ) from error
    return modules


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries print and log, which would bury the one line that says what went wrong."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file of the same suffix, which replaces the target if the block succeeds and is deleted if not.

    A missing folder is made.
    """
    if path.is_dir():
        raise UsageError(f"{path}: can't be written (it is a directory). Choose another target.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror}). Choose another target.") from error
    part = folder / path.name
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror}). Choose another target.") from error
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
