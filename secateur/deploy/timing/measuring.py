"""``secateur.latency``: the times of a network's layers over their widths, measured once on a machine."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.checkpoint import write_atomic
from secateur.deploy.failures import require
from secateur.deploy.timing import layers, whole
from secateur.deploy.timing.layers import Cell, Layer
from secateur.deploy.timing.machine import environment
from secateur.deploy.timing.table import Grid, Latency, checksum, ports_of
from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup, InputShape, LayerPort
from secateur.graph.plan import PruningPlan
from secateur.graph.steps import steps
from secateur.network.inputs import mapped, unwrapped
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.pruning.target import RUNTIMES

_LEVELS = 8
"""Widths that a wide layer is measured at, and below the smallest its halves."""
_FITTED = {"eager": (0.0, 1 / 3, 2 / 3, 1.0), "onnxruntime": (0.0, 0.5, 1.0)}
"""What the networks have lost, of what may go, that the whole is fitted to; to write one as ONNX takes a while."""

Progress = Callable[[int, int], None]


def latency(
    model: nn.Module,
    graph: ChannelGraph,
    *,
    batch: int = 8,
    runtime: str = "onnxruntime",
    threads: int = 1,
    example_inputs: Any = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Latency:
    """Measure how long each layer of a network takes at each width on this machine.

    Layers of one shape are measured once, and kept in a file for other networks and later runs; then the whole network
    is timed unpruned and at a few smaller widths, which tells what is between the layers and how much slower they run
    among others.

    Args:
        model: The network; left as it is.
        graph: Its channel graph.
        batch: Examples in a forward pass.
        runtime: ``onnxruntime`` or ``eager``.
        threads: Threads of one operator.
        example_inputs: What the network is timed on; random tensors of the shapes that it was traced on by default.
        cache: Folder of the file; ``secateur`` in the user's folder of caches by default.
        progress: Called with how many shapes of layers are measured, and how many there are.

    Raises:
        UsageError: If an argument is out of range, the runtime is not installed, or the network does not run.
        ExportError: If the network can't be written for the runtime.
        DataError: If the file can't be read.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"latency: runtime is {' or '.join(RUNTIMES)}; found {runtime!r}.")
    for name, value in (("batch", batch), ("threads", threads)):
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"latency: {name} is a whole number from 1 up; found {value!r}.")
    machine = fingerprint(runtime, threads)
    kept = _Kept(Path(cache) if cache is not None else _folder(), machine)
    step = _step(runtime)
    ports = ports_of(graph)
    keys = [_shape(port, graph, batch, step, runtime) for port in ports]
    shapes = list(dict.fromkeys(key for key in keys if key is not None))
    grids, odd = [], []
    for number, shape in enumerate(shapes):
        if progress is not None:
            progress(number, len(shapes))
        grids.append(_measured(shape[0], shape[1], runtime, threads, kept))
        odd.append(_measured(shape[0], shape[2], runtime, threads, kept) if shape[2] is not None else None)
        kept.write()
    places = [-1 if key is None else shapes.index(key) for key in keys]
    bare = Latency(batch, runtime, threads, machine, checksum(graph), places, grids, odd, 0.0, 1.0, 0.0, [])
    fitted = _fitted(bare, unwrapped(model), graph, _given(graph, example_inputs), kept)
    kept.write()
    if progress is not None:
        progress(len(shapes), len(shapes))
    return fitted


def fingerprint(runtime: str, threads: int) -> dict[str, Any]:
    """Return what times depend on: the machine, the runtime and its version, threads, precision."""
    names = ("processor", "cores", "cpu_capability", "torch")
    found = {name: value for name, value in environment().items() if name in names}
    if runtime == "onnxruntime":
        require("onnx", "onnxscript", "onnxruntime", instead=", or measure in PyTorch (--runtime eager)")
        found["onnxruntime"] = importlib.metadata.version("onnxruntime")
    return {**found, "runtime": runtime, "threads": threads, "dtype": "float32"}


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def _step(runtime: str) -> int:
    """Return the channels that a vector unit takes at once."""
    wide = runtime == "onnxruntime" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return 16 if wide else 8


class _Kept:
    """The file of what was measured on a machine: seconds of layers at widths, and of whole networks."""

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        self._machine = machine
        self._path = folder / f"latency-{zlib.crc32(json.dumps(machine, sort_keys=True).encode()):08x}.json"
        self.seconds: dict[str, Any] = {}
        if self._path.exists():
            try:
                found = json.loads(self._path.read_bytes())
                self.seconds = found["seconds"] if found["machine"] == machine else {}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{self._path}: can't be read as times of layers ({error}); delete it.") from error

    def write(self) -> None:
        """Write the file, whole or not at all."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps({"machine": self._machine, "seconds": self.seconds}).encode())
        except OSError as error:
            raise UsageError(f"{self._path}: can't be written: {error.strerror}; pass cache=FOLDER.") from error


_Nodes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]
"""Channels in, channels out, and the steps of both."""
_Shape = tuple[Layer, _Nodes, _Nodes | None]


def _shape(port: LayerPort, graph: ChannelGraph, batch: int, step: int, runtime: str) -> _Shape | None:
    """Return what the times of a layer's call are measured at: its kind, its widths, and those off the step."""
    layer = Layer.of(port, batch, graph.batch)
    if layer is None:
        return None
    own = [
        (1 if group is None or (group < 0).all() else 4 if runtime == "eager" and size <= 16 else step)
        for size, group in ((port.in_channels, port.in_group), (port.out_channels, port.out_group))
    ]
    free = [group is not None and bool((group >= 0).any()) for group in (port.in_group, port.out_group)]
    made = _nodes(port.out_channels, free[1], own[1], layer.groups)
    if layer.groups == 0:
        rows: tuple[int, ...] = (0,)
        odd = _off(port.out_channels, step, 1) if free[1] and runtime == "onnxruntime" else ()
        return layer, (rows, made, (own[1], own[1])), (rows, odd, (1, 1)) if odd else None
    wide = _nodes(port.in_channels, free[0], own[0], layer.groups)
    off = _off(port.in_channels, step, layer.groups) if free[0] and runtime == "onnxruntime" else ()
    few = tuple(sorted({made[0], made[len(made) // 2], made[-1]}))
    steps_of = (own[0], own[1])
    return layer, (wide, made, steps_of), (off, few, (1, own[1])) if off and layer.window is not None else None


def _nodes(size: int, free: bool, step: int, groups: int) -> tuple[int, ...]:
    """Return the widths that a side of a layer is measured at: at steps, from some size on far apart."""
    if not free:
        return (size,)
    if size <= _LEVELS * step:
        found = set(range(step, size, step))
    else:
        found = {-(-size * level // _LEVELS // step) * step for level in range(1, _LEVELS)}
        found |= {n for n in (step * 2**k for k in range(10)) if n < size / _LEVELS}
    blocks = max(groups, 1)
    return tuple(sorted({min(-(-n // blocks) * blocks, size) for n in found} | {size}))


def _off(size: int, step: int, groups: int) -> tuple[int, ...]:
    """Return a few widths that are no multiples of the step."""
    found = {int(size * share) // step * step - step // 2 for share in (0.25, 0.5, 1.0)}
    return tuple(sorted(n for n in found if n > step and n % groups == 0))


def _measured(layer: Layer, nodes: _Nodes, runtime: str, threads: int, kept: _Kept) -> Grid:
    """Time a layer at its widths, as far as the file does not know them."""
    wide, made, sizes = nodes
    cells: list[Cell] = [(i or o, o) for i, o in itertools.product(wide, made)]
    names = {cell: f"{layer} {cell[0]} {cell[1]}" for cell in cells}
    if missing := [cell for cell in cells if names[cell] not in kept.seconds]:
        found = layers.TIMERS[runtime](layer, missing, threads)
        kept.seconds |= {names[cell]: seconds for cell, seconds in zip(missing, found, strict=True)}
    table = [[kept.seconds[names[i or o, o]] for o in made] for i in wide]
    return Grid(list(wide), list(made), table, sizes)


def _given(graph: ChannelGraph, example_inputs: Any) -> Any:
    """Return example inputs; where there are none, random ones of the shapes that the network was traced on."""
    if example_inputs is not None:
        return example_inputs
    draw = torch.Generator().manual_seed(0)

    def made(value: Any) -> Any:
        if isinstance(value, InputShape):
            dtype = getattr(torch, value.dtype)
            if dtype.is_floating_point:
                return torch.randn(value.shape, generator=draw).to(dtype)
            return torch.zeros(value.shape, dtype=dtype)
        if isinstance(value, dict):
            return {key: made(one) for key, one in value.items()}
        return type(value)(made(one) for one in value) if isinstance(value, (list, tuple)) else value

    return mapped(made(graph.inputs), torch.clone)


def _fitted(table: Latency, model: nn.Module, graph: ChannelGraph, example_inputs: Any, kept: _Kept) -> Latency:
    """Fit what the layers' times leave out to the whole network at a few widths."""
    plans = _smaller(graph, _FITTED[table.runtime], _step(table.runtime))
    name = f"network {table.network} batch {table.batch}"
    if len(kept.seconds.get(name, ())) != len(plans):
        networks = [cut(model, plan) if plan.removed else model for plan in plans]
        rounds = whole.whole(networks, example_inputs, table.batch, table.runtime, table.threads, 7)
        # Each is held against the unpruned network of the same round: what else the machine does falls on both.
        first = layers.typical(rounds[0])
        shares = [np.median(np.array(times) / np.array(rounds[0])) for times in rounds]
        kept.seconds[name] = [float(first * share) for share in shares]
    seen = np.array(kept.seconds[name])
    unit = {"overhead": 0.0, "scale": 0.0, "per_value": 0.0}
    parts = np.array(
        [
            [_with(table, **{**unit, part: 1.0}).seconds(graph, plan) for part in unit]
            for plan in plans
        ]
    )  # fmt: skip
    overhead, scale, per_value = _least_squares(parts / seen[:, None])
    fitted = _with(table, overhead=overhead, scale=scale, per_value=per_value)
    pairs = [(float(s), fitted.seconds(graph, plan)) for s, plan in zip(seen, plans, strict=True)]
    return _with(fitted, fit=pairs)


def _with(table: Latency, **changes: Any) -> Latency:
    return Latency(**{**vars(table), **changes})


def _least_squares(parts: np.ndarray) -> list[float]:
    """Return the factors, none negative, by which the columns come closest to 1 in sum; the layers' is at least a half.

    With so few columns every choice of those that are not 0 is tried.
    """
    best, error = [0.0, 1.0, 0.0], np.inf
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        if 1 not in used or len(used) > len(parts):
            continue
        found = np.linalg.lstsq(parts[:, used], np.ones(len(parts)), rcond=None)[0]
        off = float(((parts[:, used] @ found - 1) ** 2).sum())
        if (found >= 0).all() and off < error - 1e-12:
            best = [0.0, 0.0, 0.0]
            for place, value in zip(used, found, strict=True):
                best[place] = float(value)
            error = off
    return best


def _smaller(graph: ChannelGraph, shares: Sequence[float], step: int) -> list[PruningPlan]:
    """Return plans by which every exact group loses a share of what may go, at steps; equal ones once."""

    def removed(group: ChannelGroup, share: float) -> Iterable[int]:
        found = steps(group, range(group.size))
        counts = np.cumsum([0, *(len(one) for one in found)])
        left = group.size - counts
        asked = max(-(-(group.size - share * counts[-1]) // step) * step, left[-1])
        number = int((left >= min(asked, group.size)).sum()) - 1
        return [c for one in found[:number] for c in one]

    plans: list[PruningPlan] = []
    for share in shares:
        chosen = {g.name: sorted(removed(g, share)) for g in graph.groups if g.exact}
        plan = plan_removal(graph, {name: gone for name, gone in chosen.items() if gone})
        if plan not in plans:
            plans.append(plan)
    return plans
