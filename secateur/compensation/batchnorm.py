"""Batch norms whose running moments are measured again on the pruned network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.compensation.report import LayerCompensation
from secateur.criteria import feature_maps, moments
from secateur.errors import DataError


def recalibrate(model: nn.Module, data: Iterable[Any]) -> list[LayerCompensation]:
    """Estimate every batch norm's running mean and variance again, as plain averages over the batches.

    Only the batch norms are in training mode meanwhile; dropout and everything else are not. Each batch norm sees the
    inputs that the batch statistics of those before it give, as in training.

    Args:
        model: The pruned network; its running moments are replaced.
        data: Batches, see :func:`secateur.criteria.feature_maps.batches`; of a size as in
            training, since a small batch's variance is noise.

    Returns:
        One entry a batch norm.

    Raises:
        DataError: If the data are empty, don't fit, or hold a batch with one value a channel.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    tracked = {name: norm for name, norm in norms.items() if norm.track_running_stats and norm.running_mean is not None}
    report = [
        LayerCompensation("bn", name, name in tracked, "" if name in tracked else "it keeps no running moments")
        for name in norms
    ]
    if not tracked:
        return report
    device = feature_maps.device_of(model)
    saved = {
        name: (norm.momentum, {key: value.clone() for key, value in norm.named_buffers()})
        for name, norm in tracked.items()
    }
    samples = 0
    done = False
    with feature_maps.evaluating(model), torch.no_grad():
        try:
            for norm in tracked.values():
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            for number, batch in enumerate(feature_maps.batches(data, device), start=1):
                feature_maps.forward(model, batch, number)
                samples += batch.size
            feature_maps.require_samples(samples, device)
            for name, norm in tracked.items():
                _reduce(norm)
                if not bool(torch.isfinite(norm.running_var).all()):  # type: ignore[arg-type]
                    raise DataError(f"{name}: the recalibrated variance is not finite. Check the inputs for NaN.")
            done = True
        finally:
            for name, norm in tracked.items():
                norm.momentum, buffers = saved[name]
                if not done:
                    for key, value in buffers.items():
                        getattr(norm, key).copy_(value)
    return report


def _reduce(norm: _BatchNorm) -> None:
    """Average the running moments over processes, weighted by the batches that each has seen."""
    mean, var, seen = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or seen is None or not moments.several_processes():
        return
    weight = seen.to(mean.dtype)
    mean.mul_(weight)
    var.mul_(weight)
    moments.all_reduce(mean, var, seen)
    mean.div_(seen.clamp(min=1))
    var.div_(seen.clamp(min=1))
