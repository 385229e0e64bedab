"""Times of single layers over numbers of channels in and out, on this machine.

All widths of a layer run one after the other, round after round, as the layers of a network do: each finds its weights
where other layers have left the caches. What else the machine does only ever adds time, so that of the rounds the
fastest count; and what one thread takes is told by the processor's clock, which stands while others have the processor.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.deploy.failures import quiet, require
from secateur.graph.channels import LayerPort, Window

_SECONDS, _LEAST, _MOST = 1.0, 3, 15
"""How long the rounds of one layer take together, and how many there are at least and at most."""
_ELEMENTS = 1 << 26
"""So many weights are held at once."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of ``mallopt``."""
_SLICE = 0.004
"""Seconds; a process that runs longer may lose the processor to another meanwhile."""

Cell = tuple[int, int]
"""Channels in and out."""


@dataclass(frozen=True)
class Layer:
    """What the time of a layer depends on, besides its numbers of channels."""

    kind: str
    """``conv``, ``conv_transposed`` or ``linear``."""
    rows: int
    """Examples; of a linear layer the vectors that it reads."""
    groups: int
    """0 for one group a channel (depthwise)."""
    window: Window | None

    @classmethod
    def of(cls, port: LayerPort, batch: int, traced: int) -> Layer | None:
        """Return the layer of a call, at a batch size where it was traced at another; None where it is no plain one."""
        if port.kind == "linear":
            return cls("linear", max(port.positions * batch // traced, 1), 1, None)
        if port.window is None:
            return None
        depthwise = port.groups > 1 and port.groups == port.in_channels
        return cls(port.kind, max(port.batch * batch // traced, 1), 0 if depthwise else port.groups, port.window)

    def blocks(self, cell: Cell) -> int:
        """Return the number of groups at a width."""
        return self.groups or cell[0]

    def weight(self, cell: Cell) -> tuple[int, ...]:
        """Return the weight's shape, as torch has it."""
        wide, made = cell
        if self.window is None:
            return made, wide
        first, second = (wide, made) if self.kind == "conv_transposed" else (made, wide)
        return first, second // self.blocks(cell), *self.window.kernel

    def input(self, wide: int) -> tuple[int, ...]:
        """Return the input's shape."""
        return self.rows, wide, *(self.window.space if self.window else ())


def eager(layer: Layer, cells: Sequence[Cell], threads: int) -> list[float]:
    """Return the seconds that a layer takes in PyTorch at each of several widths."""
    inputs = {wide: torch.randn(layer.input(wide)) for wide in sorted({wide for wide, _ in cells})}
    with steady(threads), torch.inference_mode():
        calls = [_call(layer, inputs[cell[0]], cell) for cell in cells]

        clock = time.thread_time if threads == 1 else time.perf_counter

        def one_round() -> list[float]:
            taken = []
            for call in calls:
                start = clock()
                call()
                taken.append(clock() - start)
            return taken

        one_round()
        rounds = [one_round()]
        while len(rounds) < _rounds(sum(rounds[0])):
            rounds.append(one_round())
    return [typical(times) for times in zip(*rounds, strict=True)]


def _call(layer: Layer, x: Tensor, cell: Cell) -> Callable[[], Tensor]:
    weight = torch.randn(layer.weight(cell)) / 100
    if layer.window is None:
        return lambda: nn.functional.linear(x, weight)
    window, transposed = layer.window, layer.kind == "conv_transposed"
    stride, padding, dilation, extra = (
        list(sizes) for sizes in (window.stride, window.padding, window.dilation, window.output_padding)
    )
    blocks = layer.blocks(cell)
    return lambda: torch.convolution(x, weight, None, stride, padding, dilation, transposed, extra, blocks)


@contextmanager
def steady(threads: int) -> Iterator[None]:
    """Run operators in so many threads, and have the C library keep the memory that is freed meanwhile.

    Otherwise it gives large blocks back to the system, now and then and depending on all that went before, and to have
    their pages cleared again may take longer than a convolution. Where it is not glibc, it is left as it is.
    """
    before = torch.get_num_threads()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    keeps = libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    torch.set_num_threads(threads)
    if libc is not None and keeps:
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if libc is not None and keeps:  # as in a process that has held large blocks for long
            libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
            libc.mallopt(_TRIM_THRESHOLD, 1 << 26)
            libc.malloc_trim(0)


def onnxruntime(layer: Layer, cells: Sequence[Cell], threads: int) -> list[float]:
    """Return the seconds that a layer takes in ONNX Runtime at each of several widths, by its own profile.

    Its reordering of inputs and outputs is left out, since within a network layers hand on what is in order.
    """
    found: list[float] = []
    some: list[Cell] = []
    for cell in cells:
        if some and sum(int(np.prod(layer.weight(c))) for c in (*some, cell)) > _ELEMENTS:
            found += _profiled(layer, some, threads)
            some = []
        some.append(cell)
    return found + _profiled(layer, some, threads)


def _profiled(layer: Layer, cells: Sequence[Cell], threads: int) -> list[float]:
    (runtime,) = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    draw = np.random.default_rng(0)
    feed = {f"x{w}": draw.standard_normal(layer.input(w), dtype=np.float32) for w in {wide for wide, _ in cells}}
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        with quiet():
            session = runtime.InferenceSession(_file(layer, cells, draw), options, providers=["CPUExecutionProvider"])
        shares: list[float] = []
        taken, rounds = 0.0, 1
        while len(shares) <= rounds:
            start, own = time.perf_counter(), time.thread_time()
            session.run(None, feed)
            taken = time.perf_counter() - start
            # The profile has no clock of the processor, so that what is longer than a slice of time is corrected.
            shares.append((time.thread_time() - own) / taken if threads == 1 else 1.0)
            rounds = _rounds(taken) if len(shares) == 1 else rounds
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for event in events:
        # A node keeps the name of the layer or of its output, with something added, whatever is made of it.
        named = re.match(r"[cy](\d+)_(\d+)(_.*)?_kernel_time$", event["name"]) if event["cat"] == "Node" else None
        if named:
            times[int(named[1]), int(named[2])].append(event["dur"] / 1e6)
    return [
        typical([t * share if t > _SLICE else t for t, share in zip(times[cell], shares, strict=True)][1:])
        for cell in cells
    ]


def _file(layer: Layer, cells: Sequence[Cell], draw: np.random.Generator) -> bytes:
    """Return an ONNX model of the same layer at several widths."""
    (onnx,) = require("onnx")
    make, real = onnx.helper, onnx.TensorProto.FLOAT
    kinds = {"conv": "Conv", "conv_transposed": "ConvTranspose", "linear": "Gemm"}
    nodes, weights, outputs = [], [], []
    for wide, made in cells:
        own = f"{wide}_{made}"
        weight = draw.standard_normal(layer.weight((wide, made)), dtype=np.float32) / 100
        bias = np.zeros(made, dtype=np.float32)
        weights += [onnx.numpy_helper.from_array(weight, f"w{own}"), onnx.numpy_helper.from_array(bias, f"b{own}")]
        nodes.append(
            make.make_node(
                kinds[layer.kind], [f"x{wide}", f"w{own}", f"b{own}"], [f"y{own}"], name=f"c{own}",
                **_attributes(layer, (wide, made)),
            )
        )  # fmt: skip
        outputs.append(make.make_tensor_value_info(f"y{own}", real, None))
    inputs = [
        make.make_tensor_value_info(f"x{w}", real, list(layer.input(w))) for w in sorted({wide for wide, _ in cells})
    ]
    graph = make.make_graph(nodes, "layer", inputs, outputs, weights)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _attributes(layer: Layer, cell: Cell) -> dict[str, Any]:
    window = layer.window
    if window is None:
        return {"transB": 1}
    found = {
        "kernel_shape": window.kernel,
        "strides": window.stride,
        "pads": (*window.padding, *window.padding),
        "dilations": window.dilation,
        "group": layer.blocks(cell),
    }
    return found | ({"output_padding": window.output_padding} if layer.kind == "conv_transposed" else {})


def _rounds(seconds: float) -> int:
    return min(max(int(_SECONDS / max(seconds, 1e-9)), _LEAST), _MOST)


def typical(times: Sequence[float]) -> float:
    """Return the mean of the fastest third."""
    return float(np.mean(sorted(times)[: max(1, len(times) // 3)]))


TIMERS: dict[str, Callable[[Layer, Sequence[Cell], int], list[float]]] = {"eager": eager, "onnxruntime": onnxruntime}
"""Runtime -> what times a layer in it: the layer, its widths, threads -> seconds of each."""
