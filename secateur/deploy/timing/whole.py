"""Times of whole networks in turns, as a target of latency counts them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.criteria.feature_maps import evaluating
from secateur.deploy.failures import require
from secateur.deploy.onnx_file import OnnxModel
from secateur.deploy.program import batch_of, program_of, resized, write_onnx
from secateur.deploy.timing.layers import steady
from secateur.deploy.turns import bound, interleaved
from secateur.errors import UsageError
from secateur.network.copies import replica
from secateur.network.inputs import arguments

ROUNDS = 9


def whole(
    networks: Sequence[nn.Module], example_inputs: Any, batch: int, runtime: str, threads: int, rounds: int = ROUNDS
) -> list[list[float]]:
    """Time forward passes of several networks in turns.

    Args:
        networks: The networks; copied, never changed.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
        batch: The example's tensors are repeated or cut to it.
        runtime: ``eager`` or ``onnxruntime``.
        threads: Threads of one operator. The time of one is the processor's, whatever else the machine does.
        rounds: Measurements of each.

    Returns:
        Of each network the seconds of every round.

    Raises:
        UsageError: If a network doesn't run, or the runtime is not installed.
        ExportError: If a network can't be written as ONNX.
    """
    call = arguments(example_inputs)
    sized = resized(call, batch_of(call), batch)
    make = _onnxruntime if runtime == "onnxruntime" else _eager
    calls = {i: make(network, sized, threads) for i, network in enumerate(networks)}
    with steady(threads):
        timed, failed = interleaved(calls, threads, rounds, 0.02, "cpu" if threads == 1 else "wall")
    if failed:
        raise UsageError(f"latency: the network does not run at batch {batch} ({next(iter(failed.values()))}).")
    return [list(timed[i].raw_times) for i in calls]


def _eager(network: nn.Module, call: tuple[Any, Any], threads: int) -> Callable[[], Any]:
    return bound(replica(network).eval(), call)


def _onnxruntime(network: nn.Module, call: tuple[Any, Any], threads: int) -> Callable[[], Any]:
    """Write a network as it is fed here; that the file computes the same is held by :func:`export`, not here."""
    require("onnx", "onnxscript", "onnxruntime")
    with tempfile.TemporaryDirectory() as folder, evaluating(network):
        path = Path(folder) / "network.onnx"
        write_onnx(program_of(network, *call, False), path)
        session = OnnxModel(path, threads)
    return bound(session.run, call)
