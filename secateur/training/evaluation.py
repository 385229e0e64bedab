"""Measure a network on data: accuracy, or whatever metric one has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur.errors import DataError, DivergedError, UsageError
from secateur.network.isolation import set_modes
from secateur.training.passes import Batches, called, explained, kind_of, seeded, walk
from secateur.training.processes import together

if TYPE_CHECKING:
    from accelerate import Accelerator

Metric: TypeAlias = Callable[[nn.Module, Batches], float]
"""``metric(model, batches)`` -> higher is better; a fraction, so that tolerances count hundredths of it as points."""

TOP5_CLASSES = 10
"""Where a network scores more classes than this, top-5 accuracy is measured beside top-1."""


class Accuracy:
    """Top-1 accuracy over all examples; where there are more than :data:`TOP5_CLASSES` classes, top-5 beside it.

    The number is top-1, on which every decision is taken; :attr:`details` holds ``top-5``.
    """

    name = "accuracy"
    """The metric's name in tables and reports."""

    def __init__(self) -> None:
        self.details: dict[str, float] = {}
        """``top-5``, a fraction of the examples measured last; empty where there are few classes."""
        self._counts: dict[int, Any] = {}

    def reset(self) -> None:
        """Forget what was measured."""
        self.details, self._counts = {}, {}

    def prepare(self, output: Tensor) -> None:
        """Make the counts for a network's outputs ``(N, classes, ...)``, which every process needs to share them."""
        from torchmetrics.classification import MulticlassAccuracy

        classes = output.shape[1]
        ranks = (1, 5) if classes > TOP5_CLASSES and output.ndim == 2 else (1,)
        self._counts = {
            k: MulticlassAccuracy(num_classes=classes, average="micro", top_k=k, validate_args=False).to(output.device)
            for k in ranks
        }

    @property
    def prepared(self) -> bool:
        """Whether the number of classes is known."""
        return bool(self._counts)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch."""
        for count in self._counts.values():
            count.update(output, target)

    def compute(self) -> Tensor:
        """Return top-1 accuracy, and set :attr:`details`."""
        found: dict[int, Tensor] = {k: count.compute() for k, count in self._counts.items()}
        self.details = {"top-5": float(found[5])} if 5 in found else {}
        return found[1]


def chosen(metric: Metric | Any = None) -> Metric | Any:
    """Return the metric that is measured: accuracy where None is given."""
    return Accuracy() if metric is None else metric


def evaluate(
    model: nn.Module, batches: Batches, metric: Metric | Any = None, *, runtime: Accelerator | None = None
) -> float:
    """Measure a model on data, in eval mode and without gradients.

    Args:
        model: Left as found.
        batches: Pairs ``(inputs, target)``.
        metric: None for accuracy, top-1; a ``torchmetrics.Metric`` (updated with output and target); or a callable
            ``metric(model, batches) -> float``.
        runtime: Accelerate runtime; the model stays on its own device when None.

    Returns:
        The metric as a fraction: accuracy 0.9914, not 99.14.

    Raises:
        DataError: If there is no batch, a batch is not a pair, or targets are no class indices.
        UsageError: If the metric is neither.
        DivergedError: If the metric is not a finite number.
    """
    from torchmetrics import Metric as TorchMetric

    metric = chosen(metric)
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    device = (
        runtime.device if runtime is not None else parameter.device if parameter is not None else torch.device("cpu")
    )
    if runtime is not None:
        model.to(device)
    model.eval()
    try:
        with torch.no_grad(), seeded(0):
            if isinstance(metric, (Accuracy, TorchMetric)):
                value = _measure(model, batches, metric, device, runtime)
            elif callable(metric):
                name = f"metric {metric_name(metric)}"
                with explained(UsageError, name, "fails", "It is called as metric(model, batches)."):
                    measured = metric(model, batches)
                value = _number(measured, name)
            else:
                raise UsageError(
                    "metric: is a torchmetrics.Metric or a function (model, batches) -> float, found "
                    f"{kind_of(metric)}."
                )
    finally:
        set_modes(modes.items())
    if not math.isfinite(value):
        raise DivergedError(f"evaluation: the metric is {value}; the model's outputs or the metric are at fault.")
    return value


def _classes(output: Any, target: Any) -> bool:
    """Tell whether targets are indices of the classes that a model scores."""
    return (
        isinstance(output, Tensor)
        and isinstance(target, Tensor)
        and output.ndim >= 2
        and not target.is_floating_point()
        and target.shape == output.shape[:1] + output.shape[2:]
    )


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name}: returns {kind_of(value)}; it has to be one number, higher is better.") from error


def metric_name(metric: Metric | Any = None) -> str:
    """Return what a metric is called where it is shown: its ``name`` where it has one; ``accuracy`` for None."""
    if metric is None:
        return "accuracy"
    return str(getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__))


def details(metric: Metric | Any = None) -> dict[str, Any] | None:
    """Return the further figures that a metric has of what it measured last (``details``); None where it has none."""
    found = getattr(metric, "details", None)
    return dict(found) if isinstance(found, Mapping) and found else None


def _adds_up(metric: Any) -> bool:
    """Tell whether all that a torchmetrics.Metric keeps is tensors, which are reduced over the processes."""
    return all(isinstance(kept, Tensor) for part in _parts(metric) for kept in part._defaults.values())


def _parts(metric: Any) -> list[Any]:
    from torchmetrics import Metric as TorchMetric

    return [part for part in metric.modules() if isinstance(part, TorchMetric)]


@contextmanager
def _unsynced(metric: Any) -> Iterator[None]:
    """Let a metric compute of what this process has given it."""
    before = [(part, part.sync_on_compute) for part in _parts(metric)]
    for part, _ in before:
        part.sync_on_compute = False
    try:
        yield
    finally:
        for part, synced in before:
            part.sync_on_compute = synced


def _measure(
    model: nn.Module, batches: Batches, metric: Any, device: torch.device, runtime: Accelerator | None
) -> float:
    from accelerate.utils import send_to_device

    accuracy = isinstance(metric, Accuracy)
    metric.reset()
    if not accuracy:
        metric.to(device)
    measured = False
    # What is kept in lists can't be gathered of processes that have not as many batches: each measures all of them.
    gathers = accuracy or _adds_up(metric)
    mine, of = (runtime.process_index, runtime.num_processes) if runtime is not None and gathers else (0, 1)
    for number, (inputs, target) in enumerate(walk(batches, 0, "evaluation")):
        own = number % of == mine
        # A process without a batch of its own still makes its counts, for which it needs the number of classes.
        measured = True
        if not own and (not accuracy or number > 0):
            continue
        inputs, target = send_to_device((inputs, target), device)
        where = f"evaluation, batch {number + 1}"
        output = called(model, inputs, where)
        if accuracy and _classes(output, target) and len(target):
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= output.shape[1]:
                raise DataError(
                    f"{where}: labels run from {low} to {high}, and the network scores {output.shape[1]} classes, 0 to "
                    f"{output.shape[1] - 1}. Number the classes so, or give a metric of your own."
                )
        if accuracy and not metric.prepared:
            if not _classes(output, target):
                raise DataError(
                    "evaluation: accuracy needs class scores (N, classes) and indices (N,), found "
                    f"{kind_of(output)} and {kind_of(target)}; give a metric of your own."
                )
            metric.prepare(output)
        if own:
            what = f"metric {metric_name(metric)} takes no {kind_of(output)} and {kind_of(target)}"
            with explained(UsageError, where, what, "Give a metric of such outputs and targets."):
                metric.update(output.float() if isinstance(output, Tensor) else output, target)
    if not measured:
        raise DataError("evaluation: the data is empty; give at least one batch.")
    with together(), nullcontext() if gathers else _unsynced(metric):
        computed = metric.compute()
    return _number(computed, f"metric {metric_name(metric)}")
