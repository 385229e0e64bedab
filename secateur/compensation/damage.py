"""How far the outputs of a changed network are from those of the network that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria import feature_maps
from secateur.criteria.feature_maps import Batch
from secateur.errors import DataError, UsageError
from secateur.network.inputs import tensors_of

TEMPERATURE = 4.0

Loss = Callable[[Any, Any], Tensor]


class NotComparableError(DataError):
    """What a cut network returns can't be compared with what the whole one does."""


class Reference:
    """The unpruned network's outputs, to which those of a cut one are compared."""

    def __init__(self, model: nn.Module, held: Sequence[Batch], loss: Loss | None) -> None:
        self.held, self.loss = held, loss
        self.images = sum(batch.size for batch in held)
        outputs = [feature_maps.forward(model, batch, n) for n, batch in enumerate(held, start=1)]
        first = outputs[0]
        if loss is not None:
            self.measure = "loss"
        elif isinstance(first, Tensor) and first.ndim == 2 and first.shape[1] > 1 and first.is_floating_point():
            self.measure = "kl"
        else:
            self.measure = "squared error"
        self.wanted = [floats(output) for output in outputs]
        self.power = [max(sum(float(t.double().square().sum()) for t in o), 1e-30) for o in self.wanted]
        if loss is not None:
            self.before = [self._loss(output, batch) for output, batch in zip(outputs, held, strict=True)]

    def _loss(self, output: Any, batch: Batch) -> float:
        if batch.labels is None:
            raise UsageError("sensitivity: loss needs labels. Pass (input, label) batches, or leave loss out.")
        assert self.loss is not None
        return float(self.loss(output, batch.labels)) * batch.size

    def damage(self, place: int, output: Any) -> float:
        """Return the damage that a cut network's output on one batch shows, summed over the batch's images."""
        batch, wanted = self.held[place], self.wanted[place]
        if self.measure == "loss":
            return self._loss(output, batch) - self.before[place]
        found = floats(output)
        if [t.shape for t in found] != [t.shape for t in wanted]:
            raise NotComparableError(
                f"batch {place + 1}: the cut network's outputs have other shapes, so they can't be compared: pass loss."
            )
        if self.measure == "kl":
            p, q = (torch.log_softmax(o[0].double() / TEMPERATURE, 1) for o in (wanted, found))
            return float((p.exp() * (p - q)).sum())
        error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
        return error / self.power[place] * batch.size


def floats(output: Any) -> list[Tensor]:
    """Return copies of an output's floating-point tensors, which another run can't write into."""
    return [t.detach().clone() for t in tensors_of(output) if t.is_floating_point()]
