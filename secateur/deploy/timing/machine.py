"""The machine that a time depends on, its processor and versions; and bytes of weights and of peak memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.deploy.export import export
from secateur.deploy.program import batch_of
from secateur.network.inputs import arguments

ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]


class NotAtHandError(Exception):
    """A backend can't run this setting."""


def environment() -> dict[str, Any]:
    """What a time depends on: processor, threads, versions, load."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    return found


def weight_bytes(network: nn.Module, precision: str) -> int:
    """Return the bytes of all parameters and buffers, at two bytes a number in bf16."""
    width = 2 if precision == "bf16" else None
    return sum(
        t.numel() * (width if width and t.is_floating_point() else t.element_size())
        for t in (*network.parameters(), *network.buffers())
    )


def cuda_peak(call: Callable[[], Any], device: str) -> int:
    """Return the bytes that one call allocates on a CUDA device at its peak, beyond what is there before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del output
    return int(peak)


_PEAK = """
import json, sys, torch
torch.set_num_threads(1)
def memory(field):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))
program, inputs, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
module = torch.export.load(program).module()
leaves, own = torch.load(inputs, weights_only=True), None
args, kwargs = leaves["args"], leaves["kwargs"]
found = []
with torch.inference_mode():
    for size in sizes:
        def resized(leaf):
            same = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == leaves["batch"]
            return leaf[torch.arange(size) % leaf.shape[0]] if same else leaf
        a, k = torch.utils._pytree.tree_map(resized, (args, kwargs))
        module(*a, **k)
        before = memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        module(*a, **k)
        found.append(max(0, memory("VmHWM") - before))
print(json.dumps(found))
"""
"""Peak resident memory of a forward pass, in a process that has loaded nothing else. The process returns freed memory
at once (see the environment that it is started with), so that the peak is of memory in use at one time."""


def cpu_peak_bytes(network: nn.Module, example_inputs: ExampleInputs, sizes: Sequence[int]) -> list[int]:
    """Measure the peak memory of a forward pass in a process of its own.

    The network travels as a ``.pt2`` file, so its class need not be importable there.

    Args:
        network: The network.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        sizes: Batch sizes.

    Returns:
        Bytes beyond the loaded network and its inputs, one a batch size.

    Raises:
        ExportError: If the network can't be exported.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise NotAtHandError("peak memory on a CPU is read from /proc, which this system does not have")
    args, kwargs = arguments(example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        program, inputs = Path(folder) / "network.pt2", Path(folder) / "inputs.pt"
        export(network, program, example_inputs, tolerance=1e-3)
        torch.save({"args": args, "kwargs": kwargs, "batch": batch_of((args, kwargs))}, inputs)
        run = subprocess.run(
            [sys.executable, "-c", _PEAK, str(program), str(inputs), json.dumps(list(sizes))],
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
                "OMP_NUM_THREADS": "1",
            },
        )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise NotAtHandError(f"the process that measures peak memory failed: {last}")
    found: list[int] = json.loads(run.stdout.splitlines()[-1])
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
