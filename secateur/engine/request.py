"""What a run is asked for: checked before anything is done, and filled in where the method leaves it to itself."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compensation.sensitivity import Sensitivity
from secateur.engine.by_pairs import Pairs
from secateur.engine.by_scores import Scores
from secateur.engine.selection import Selection
from secateur.engine.settings import Settings
from secateur.engine.way import require_options, way_of
from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph
from secateur.pruning.comparison import outputs
from secateur.pruning.options import Options
from secateur.pruning.planning import Target
from secateur.training import passes
from secateur.training.passes import Batches
from secateur.training.stages import Loss

_LOG = logging.getLogger(__name__)


def check_batches(**parts: Batches | None) -> None:
    """Refuse what can be walked through only once.

    Raises:
        UsageError: If one of the parts is an iterator.
    """
    for name, batches in parts.items():
        if batches is not None and iter(batches) is batches:
            raise UsageError(f"{name}: an iterator can be walked through only once; give a DataLoader or a list.")


def check_end(target: Target | None, options: Options, settings: Settings, tolerance: float) -> None:
    """Refuse two ends of a run that contradict each other.

    Raises:
        UsageError: If there are two, or the tolerance is out of range.
    """
    if target is not None and target.what == "latency" and settings.rounds not in ((), (1,)):
        raise UsageError("rounds: a target of latency is gone to in one round; leave them out.")
    if target is not None and settings.widths:
        raise UsageError("target: widths are given as well; give one of them.")
    if options.ratios and settings.widths:
        raise UsageError("ratios: widths are given as well; give one of them.")
    if not tolerance >= 0:
        raise UsageError(f"tolerance: is in points of the metric and not negative, found {tolerance}.")


def example(given: Any, validation: Batches, device: torch.device) -> Any:
    """Return what the network is traced on, on the device: what is given, else the first validation example."""
    from accelerate.utils import send_to_device

    if given is None:
        # A network may be called on less than its training batches hold: a detector takes boxes in training alone.
        given = getattr(validation, "example_inputs", None)
    if given is None:
        given = passes.first_example(send_to_device(passes.first_inputs(validation, "validation"), device))
    return send_to_device(given, device)


def filled(
    settings: Settings, model: nn.Module, inputs: Any, loss: Loss | None, *, auto: bool, bounded: bool
) -> tuple[Settings, list[str]]:
    """Fill in what the method leaves open, and say which part of ``auto`` can't be had.

    Args:
        settings: As given.
        model: The unpruned network.
        inputs: Example inputs.
        loss: The training loss; None is cross entropy, and the outputs class scores.
        auto: Whether the method is ``auto``.
        bounded: Whether the tolerance decides when to stop.
    """
    notes, teaches = [], False
    if auto and settings.distillation is None:
        scores = next(iter(outputs(model, inputs)), None)
        teaches = loss is None and isinstance(scores, Tensor) and scores.ndim > 1
        if not teaches:
            notes.append("auto: no distillation, which needs class scores, and cross entropy as the loss")
            _LOG.warning("compress: %s.", notes[0])
    return settings.resolved(auto=auto, bounded=bounded, teaches=teaches), notes


def selection(
    model: nn.Module,
    graph: ChannelGraph,
    method: Any,
    options: Options,
    settings: Settings,
    target: Target | None,
    **reading: Any,
) -> Selection:
    """Make what chooses the channels of a round.

    Args:
        model: The unpruned network.
        graph: Its channel graph.
        method: ``auto``, ``cfp``, or a criterion.
        options: Limits of each group's loss, and the allocation.
        settings: The run's settings.
        target: Fraction to remove.
        **reading: ``train``, ``loss``, ``seed``, ``example_inputs`` and ``runtime`` of :class:`Scores`.

    Raises:
        UsageError: If the method is unknown, or options and settings contradict it or each other.
        PlanError: If a table of sensitivity is another network's.
    """
    if isinstance(method, str) and method == "cfp":
        return Pairs(graph, options, settings, target)
    way = way_of(method, options.allocation, settings.compensate, True)
    require_options(way.criterion, settings.criterion, options)
    if isinstance(way.allocation, Sensitivity):
        way.allocation.require_of(model)
    return Scores(graph, options, settings, target, way=way, **reading)


def require_method(method: Any, options: Options, settings: Settings, target: Target | None) -> None:
    """Refuse, before data are loaded, what the method has not.

    Raises:
        UsageError: If the method is unknown, or an option or a setting is none of its own.
    """
    if isinstance(method, str) and method == "cfp":
        Pairs.check(options, settings, target)
    else:
        way = way_of(method, options.allocation, settings.compensate, True)
        require_options(way.criterion, settings.criterion, options)
        Scores.check(way, settings)


def warn_at_chance(network: nn.Module, inputs: Any, accuracy: float) -> None:
    """Say where the unpruned network scores no more than chance: nothing that pruning costs can be seen of it."""
    scores = next(iter(outputs(network, inputs)), None)
    if isinstance(scores, Tensor) and scores.ndim > 1 and accuracy <= 1.1 / scores.shape[1]:
        _LOG.warning(
            "compress: the unpruned network's accuracy is %.1f%%, which is chance with %d classes: train it first, "
            "or check weights and labels.",
            100 * accuracy,
            scores.shape[1],
        )


FALLEN = 0.05
"""A metric that falls by more of it is said to have fallen by much."""


def warn_if_fallen(command: str, metric: str, figures: tuple[float | None, float | None], remedy: str) -> None:
    """Say where a network that was pruned is far worse than before: by more than :data:`FALLEN`.

    Nothing is said of a metric that is no fraction, of which nobody knows how much is much.

    Args:
        command: What was done.
        metric: The metric's name.
        figures: Its values before and after; None where it was not measured.
        remedy: What helps.
    """
    before, after = figures
    if before is not None and after is not None and before <= 1 and after >= 0 and before - after > FALLEN:
        _LOG.warning("%s: %s falls by %.1f points: %s.", command, metric, 100 * (before - after), remedy)


def warn_if_seen(accuracy: float, tested: float | None, validation: Batches, test: Batches | None) -> None:
    """Say where validation images were probably trained on: their accuracy is far above that of the test images.

    Then every decision is taken on a memory, and a tolerance lets far more go than it says. Far is 3 points and four
    standard errors of the difference; nothing is said of data whose number of examples is not known.

    Args:
        accuracy: Of the unpruned network on the validation data.
        tested: On the test data.
        validation: Validation batches.
        test: Test batches.
    """
    counts = [passes.length_of(getattr(part, "dataset", ())) for part in (validation, test)]
    if tested is None or not counts[0] or not counts[1]:
        return
    pooled = (accuracy * counts[0] + tested * counts[1]) / (counts[0] + counts[1])
    error = (pooled * (1 - pooled) * (1 / counts[0] + 1 / counts[1])) ** 0.5
    if accuracy - tested > max(0.03, 4 * error):
        _LOG.warning(
            "compress: the unpruned network's accuracy is %.1f%% on the validation images and %.1f%% on the test "
            "images: its weights were probably trained on the validation images. Hold out images that they have not "
            "seen, or a tolerance lets more go than it says.",
            100 * accuracy,
            100 * tested,
        )
