"""Calls timed in turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from secateur.deploy.failures import quiet

with quiet():  # torch's benchmark tools look for a CUDA compiler and say so when there is none
    from torch.utils.benchmark import Measurement, Timer
    from torch.utils.benchmark import timer as benchmark_timer

__all__ = ["CLOCKS", "Measurement", "bound", "interleaved", "quartiles", "within_noise"]

CLOCKS = {"wall": benchmark_timer, "cpu": time.process_time}


def bound(call: Callable[..., Any], arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Callable[[], Any]:
    """Bind a network to its arguments, positional and by keyword, without gradients."""
    args, kwargs = arguments

    def run() -> Any:
        with torch.inference_mode():
            return call(*args, **kwargs)

    return run


def quartiles(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of after / before, round by round: what else the machine does falls on both of a round."""
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return low, middle, high


def within_noise(low: float, middle: float, high: float) -> bool:
    """Tell whether the quartiles of a ratio lie as far apart as its median is from 1.

    Example:
        >>> within_noise(0.85, 0.95, 1.05), within_noise(0.48, 0.5, 0.52)
        (True, False)
    """
    return high - low >= abs(middle - 1)


def interleaved(
    calls: dict[Any, Callable[[], Any]], threads: int, rounds: int, min_seconds: float, clock: str
) -> tuple[dict[Any, Measurement], dict[Any, str]]:
    """Time several calls in turns, the order turned round from round to round."""
    timers, numbers, failed = {}, {}, {}
    for name, call in calls.items():
        timer = Timer("call()", globals={"call": call}, num_threads=threads, timer=CLOCKS[clock])
        try:
            with quiet():
                timer.timeit(2)  # warm-up: compilation, caches, the allocator's first pages
                once = timer.timeit(1).median
        except Exception as error:  # noqa: BLE001 - the network is the user's, the backend a compiler's
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        timers[name], numbers[name] = timer, max(1, round(min_seconds / max(once, 1e-9)))
    times: dict[Any, list[float]] = {name: [] for name in timers}
    for i in range(rounds):
        for name in list(timers) if i % 2 == 0 else list(reversed(timers)):
            times[name].append(timers[name].timeit(numbers[name]).times[0])
    return {name: Measurement(1, measured, timers[name]._task_spec) for name, measured in times.items()}, failed
