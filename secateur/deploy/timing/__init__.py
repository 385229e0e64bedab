"""How fast and how large a network runs, measured in pairs so that both have the same machine."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.deploy.export import export
from secateur.deploy.onnx_file import OnnxModel
from secateur.deploy.program import batch_of, resized
from secateur.deploy.timing.machine import (
    ExampleInputs,
    NotAtHandError,
    cpu_peak_bytes,
    cuda_peak,
    environment,
    weight_bytes,
)
from secateur.deploy.timing.result import BenchmarkResult, RoundToChoice, Row, Setting, Skipped, SpeedUp
from secateur.deploy.turns import CLOCKS, Measurement, bound, interleaved, quartiles
from secateur.errors import PlanError, SecateurError, UsageError
from secateur.network.copies import replica
from secateur.network.inputs import arguments

__all__ = [
    "BACKENDS", "CANDIDATES", "MEMORY_FORMATS", "PRECISIONS", "BenchmarkResult", "RoundToChoice", "Row", "Setting",
    "Skipped", "SpeedUp", "benchmark", "choose_round_to", "cpu_peak_bytes", "environment",
]  # fmt: skip

BACKENDS = ("eager", "compile", "onnxruntime")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CANDIDATES = (1, 4, 8, 16, 32)
"""Multiples of channels that vector units and their libraries like."""


def benchmark(
    model: nn.Module,
    against: nn.Module | None = None,
    *,
    example_inputs: ExampleInputs,
    batch_sizes: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    devices: Sequence[str] = ("cpu",),
    precisions: Sequence[str] = ("fp32",),
    backends: Sequence[str] = ("eager",),
    memory_formats: Sequence[str] = ("contiguous",),
    names: tuple[str, str] = ("model", "against"),
    macs: tuple[int, int] | None = None,
    memory: bool = True,
    rounds: int = 9,
    min_seconds: float = 0.05,
    longest: float = math.inf,
    clock: str = "wall",
    progress: Callable[[str], None] = lambda _: None,
) -> BenchmarkResult:
    """Measure a network, or two in turns.

    With two networks every round times one, then the other, in alternating order, and the speed-up is the median of
    the rounds' ratios: what else the machine does falls on both. Warm-up passes (compilation among them) are apart.

    Args:
        model: The network; for a speed-up, the pruned one.
        against: The network it is held against, the original.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        batch_sizes: Batch sizes; the example's tensors are repeated or cut to them.
        threads: Threads of one operator, on a CPU.
        devices: ``cpu``, ``cuda``, ``cuda:1`` …
        precisions: ``fp32``, ``bf16``.
        backends: ``eager``, ``compile`` (torch.compile), ``onnxruntime`` (CPU, fp32).
        memory_formats: ``contiguous``, ``channels_last``.
        names: Names of the two networks in the rows.
        macs: MACs of one example of ``model`` and ``against``; counted by tracing where not given.
        memory: Whether to measure peak memory (on a CPU, in a process of its own).
        rounds: Measurements of each network under each setting.
        min_seconds: Least duration of one measurement; short passes are repeated within it.
        longest: Seconds; once a forward pass takes longer, larger batch sizes of that setting are skipped.
        clock: ``wall``, or ``cpu`` for the processor's time: on a machine that others use, what one thread would take
            alone.
        progress: Called with each setting before it is measured.

    Returns:
        The rows, the speed-ups, and what could not be measured with its reason.

    Raises:
        UsageError: If a backend, device, precision or memory format is unknown or not at hand, or a number is not
            positive.
    """
    _check(batch_sizes, threads, devices, precisions, backends, memory_formats)
    _check_clock(clock, threads, devices)
    models = {names[0]: model} if against is None else {names[0]: model, names[1]: against}
    counted = dict(zip(names, macs, strict=True)) if macs is not None else _count(models, example_inputs)
    theoretical = None
    if counted.get(names[0]) and counted.get(names[1]):
        theoretical = counted[names[1]] / counted[names[0]]
    rows: list[Row] = []
    speed_ups: list[SpeedUp] = []
    skipped: list[Skipped] = []
    for way in _ways(devices, precisions, memory_formats, backends, threads):
        progress(str(way))
        calls, not_at_hand = _prepare_all(models, example_inputs, way)
        measured, not_run = _by_batch_size(calls, way, sorted(batch_sizes), longest, (rounds, min_seconds, clock))
        skipped += not_at_hand + not_run
        for size, timed in measured.items():
            for name, times in timed.items():
                peak = cuda_peak(calls[name](size), way.device) if memory and way.device != "cpu" else None
                held = weight_bytes(models[name], way.precision)
                rows.append(Row(name, *way.at(size), times.median, times.iqr, peak, held))
            if len(timed) == 2:
                speed_ups.append(_speed_up(timed[names[1]], timed[names[0]], theoretical, way.at(size)))
    if memory and "cpu" in devices and "eager" in backends:
        done = sorted({row.batch_size for row in rows})
        rows, missing = _with_cpu_peaks(rows, models, example_inputs, done) if done else (rows, [])
        skipped += missing
    return BenchmarkResult(rows, speed_ups, skipped, environment(), counted)


def choose_round_to(
    prune: Callable[[int], nn.Module],
    example_inputs: ExampleInputs,
    candidates: Sequence[int] = CANDIDATES,
    batch_size: int | None = None,
    threads: int | None = None,
    memory_formats: Sequence[str] = ("contiguous", "channels_last"),
    rounds: int = 7,
    clock: str = "wall",
    margin: float = 0.03,
) -> RoundToChoice:
    """Measure the network pruned to multiples of each candidate, and choose: ``--round-to auto``.

    Args:
        prune: Gives the network pruned with ``round_to`` of its argument, to the same target.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        candidates: Multiples to try.
        batch_size: Batch size to run at; default the example's.
        threads: Threads of one operator; default torch's number.
        memory_formats: Formats to try with each.
        rounds: Measurements of each, all candidates in turns.
        clock: As in :func:`benchmark`.
        margin: A smaller multiple, which follows the scores more closely, and the contiguous format are taken
            unless another is faster by more than this share.

    Returns:
        The choice and every time measured.

    Raises:
        UsageError: If there is no candidate, one is not positive, or the request contradicts itself without rounding.
        PlanError: If the target can't be met with any of them.
    """
    if not candidates or min(candidates) < 1:
        raise UsageError(f"round_to auto: candidates are positive multiples of channels; got {list(candidates)}.")
    size = batch_size or batch_of(arguments(example_inputs))
    number = threads or torch.get_num_threads()
    calls: dict[Any, Callable[[], Any]] = {}
    infeasible = {}
    for candidate in sorted(candidates):
        try:
            network = prune(candidate)
        except (PlanError, UsageError) as error:
            if candidate == 1 and isinstance(error, UsageError):
                raise  # a wrong request whatever the multiple
            infeasible[candidate] = str(error)
            continue
        for layout in memory_formats:
            way = _Way("eager", "cpu", "fp32", layout, number)
            calls[candidate, layout] = _prepare(network, example_inputs, way)(size)
    if not calls:
        raise PlanError(
            f"round_to auto: no candidate of {list(candidates)} can meet the target: {next(iter(infeasible.values()))}"
        )
    timed, failed = interleaved(calls, number, rounds, 0.02, clock)
    if failed:
        raise UsageError(f"round_to auto: the pruned network does not run ({next(iter(failed.values()))}).")
    seconds = {key: measured.median for key, measured in timed.items()}
    fastest = min(seconds.values())
    chosen = next(key for key, value in seconds.items() if value <= fastest * (1 + margin))
    return RoundToChoice(chosen[0], chosen[1], seconds, infeasible)


def _check(
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    devices: Sequence[str],
    precisions: Sequence[str],
    backends: Sequence[str],
    memory_formats: Sequence[str],
) -> None:
    for what, given, known in (
        ("backend", backends, BACKENDS),
        ("precision", precisions, PRECISIONS),
        ("memory format", memory_formats, MEMORY_FORMATS),
    ):
        for value in given:
            if value not in known:
                raise UsageError(f"benchmark: unknown {what} {value!r}; choose from {', '.join(known)}.")
    for what, numbers in (("batch size", batch_sizes), ("number of threads", threads)):
        if not numbers or min(numbers) < 1:
            raise UsageError(f"benchmark: a {what} is at least 1; got {list(numbers)}.")
    for device in devices:
        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            raise UsageError(f"benchmark: unknown device {device!r}; use cpu or cuda.") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"benchmark: no CUDA device on this machine, so {device!r} can't be measured.")


def _check_clock(clock: str, threads: Sequence[int], devices: Sequence[str]) -> None:
    if clock not in CLOCKS:
        raise UsageError(f"benchmark: unknown clock {clock!r}; choose from {', '.join(CLOCKS)}.")
    if clock == "cpu" and (max(threads) > 1 or set(devices) != {"cpu"}):
        raise UsageError(
            "benchmark: the cpu clock adds up the time of all threads; use it with one thread, on the CPU."
        )


@dataclass(frozen=True)
class _Way:
    """How a network is run: a setting without its batch size."""

    backend: str
    device: str
    precision: str
    memory_format: str
    threads: int

    def __str__(self) -> str:
        parts = (self.device, self.backend, self.precision, self.memory_format, f"{self.threads} threads")
        return ", ".join(parts)

    def at(self, batch_size: int) -> Setting:
        """Return the setting of a batch size."""
        return self.backend, self.device, self.precision, self.memory_format, self.threads, batch_size


def _ways(
    devices: Sequence[str],
    precisions: Sequence[str],
    memory_formats: Sequence[str],
    backends: Sequence[str],
    threads: Sequence[int],
) -> list[_Way]:
    """List every combination; numbers of threads differ on a CPU alone."""
    return [
        _Way(backend, device, precision, layout, number)
        for device in devices
        for precision in precisions
        for layout in memory_formats
        for backend in backends
        for number in (threads if device == "cpu" else threads[:1])
    ]


def _prepare_all(
    models: dict[str, nn.Module], example_inputs: ExampleInputs, way: _Way
) -> tuple[dict[str, Callable[[int], Callable[[], Any]]], list[Skipped]]:
    """Prepare every network that can be run this way, and list the others with the reason."""
    calls, skipped = {}, []
    for name, network in models.items():
        try:
            calls[name] = _prepare(network, example_inputs, way)
        except (SecateurError, NotAtHandError) as error:
            skipped.append(Skipped(name, str(way), str(error)))
    return calls, skipped


def _by_batch_size(
    calls: dict[str, Callable[[int], Callable[[], Any]]],
    way: _Way,
    batch_sizes: Sequence[int],
    longest: float,
    timing: tuple[int, float, str],
) -> tuple[dict[int, dict[str, Measurement]], list[Skipped]]:
    """Time the networks at rising batch sizes, until a forward pass takes longer than ``longest`` seconds."""
    measured: dict[int, dict[str, Measurement]] = {}
    skipped: list[Skipped] = []
    slowest = 0.0
    for size in batch_sizes:
        if slowest > longest:
            reason = f"a smaller batch takes {slowest:.1f} s already, and the limit is {longest:g} s"
            failed = dict.fromkeys(calls, reason)
        else:
            calls_here = {name: make(size) for name, make in calls.items()}
            measured[size], failed = interleaved(calls_here, way.threads, *timing)
            slowest = max([slowest, *(times.median for times in measured[size].values())])
        skipped += [Skipped(name, f"{way}, batch {size}", reason) for name, reason in failed.items()]
    return measured, skipped


def _prepare(network: nn.Module, example_inputs: ExampleInputs, way: _Way) -> Callable[[int], Callable[[], Any]]:
    """Make a function from a batch size to a forward pass; the network itself is copied, never changed."""
    args_kwargs = arguments(example_inputs)
    own = batch_of(args_kwargs)
    if way.backend == "onnxruntime":
        if (way.device, way.precision, way.memory_format) != ("cpu", "fp32", "contiguous"):
            raise NotAtHandError("ONNX Runtime is measured on the CPU, in fp32, contiguous.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            export(network, path, example_inputs, tolerance=1e-3)
            session = OnnxModel(path, way.threads)
        return lambda size: bound(session.run, resized(args_kwargs, own, size))
    dtype, layout = PRECISIONS[way.precision], MEMORY_FORMATS[way.memory_format]
    copied = replica(network).eval().to(device=way.device, dtype=dtype).to(memory_format=layout)
    call: Callable[..., Any] = torch.compile(copied) if way.backend == "compile" else copied

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        moved = leaf.to(way.device, dtype if leaf.is_floating_point() else leaf.dtype)
        return moved.contiguous(memory_format=layout) if moved.dim() == 4 else moved

    return lambda size: bound(call, pytree.tree_map(place, resized(args_kwargs, own, size)))


def _speed_up(before: Measurement, after: Measurement, theoretical: float | None, setting: Setting) -> SpeedUp:
    low, middle, high = quartiles(after.raw_times, before.raw_times)
    return SpeedUp(*setting, middle, low, high, theoretical)


def _count(models: dict[str, nn.Module], example_inputs: ExampleInputs) -> dict[str, int]:
    """MACs of every network, of one example."""
    from secateur.graph.cost import macs
    from secateur.tracing.tracing import trace

    args_kwargs = arguments(example_inputs)
    args, kwargs = resized(args_kwargs, batch_of(args_kwargs), 1)
    return {name: macs(trace(network, kwargs or args)) for name, network in models.items()}


def _with_cpu_peaks(
    rows: list[Row], models: dict[str, nn.Module], example_inputs: ExampleInputs, sizes: Sequence[int]
) -> tuple[list[Row], list[Skipped]]:
    """Add to every eager fp32 CPU row the peak memory of a process that runs nothing else."""
    peaks: dict[tuple[str, int], int] = {}
    skipped = []
    for name, network in models.items():
        try:
            measured = cpu_peak_bytes(network, example_inputs, sizes)
        except (SecateurError, NotAtHandError) as error:
            skipped.append(Skipped(name, "peak memory, cpu", str(error)))
            continue
        peaks |= {(name, size): peak for size, peak in zip(sizes, measured, strict=True)}

    def completed() -> Iterator[Row]:
        for row in rows:
            plain = (row.backend, row.device, row.precision, row.memory_format) == (
                "eager",
                "cpu",
                "fp32",
                "contiguous",
            )
            yield Row(**{**asdict(row), "peak_bytes": peaks.get((row.variant, row.batch_size))}) if plain else row

    return list(completed()), skipped
