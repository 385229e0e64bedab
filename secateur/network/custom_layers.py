"""Layers of the user's own: how channels flow through them, and what changes in them when channels are removed.

Tracing sees operators, so most layers need no registration. Register a class whose code holds what a plan has to
change, such as an index that names channels:

    import numpy as np
    from secateur.network.custom_layers import register_layer

    class Reorder(nn.Module):
        def __init__(self, order):                  # output channel i copies input channel order[i]
            super().__init__()
            self.order = list(order)

        def forward(self, x):
            return x[:, self.order]

    def flow(call, layer, args, out):
        labels = call.axes(args[0]).get(1)          # the labels of the input's channels; None where there are none
        if labels is not None:
            call.give(out, {1: labels[layer.order]})
            call.registered_layer(labels, labels[layer.order])

    def resize(layer, kept_inputs, kept_outputs):   # ascending indices of the unpruned layer; None: all of them
        new = {old: i for i, old in enumerate(kept_inputs)}
        layer.order = [new[layer.order[i]] for i in kept_outputs]

    register_layer(Reorder, flow, resize)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Resize = Callable[[Any, list[int] | None, list[int] | None], None]
"""``resize(layer, kept_inputs, kept_outputs)`` changes the copied layer in place; its parameters are already cut."""


@dataclass(frozen=True)
class LayerRule:
    """What is registered for one class."""

    flow: Callable[[Any, Any, tuple[Any, ...], Any], None]
    resize: Resize


_REGISTERED: dict[type[nn.Module], LayerRule] = {}


def register_layer(
    cls: type[nn.Module], flow: Callable[[Any, Any, tuple[Any, ...], Any], None], resize: Resize
) -> None:
    """Register a layer class: ``flow`` and ``resize`` stand for its operators, which are not traced.

    Args:
        cls: The class; its subclasses are registered, too.
        flow: ``flow(call, layer, args, out)``: reads the labels of ``args`` by ``call.axes``, gives ``out`` its own by
            ``call.give``, and tells ``call.registered_layer`` what the layer reads and makes; see
            :class:`secateur.tracing.call.Call`.
        resize: Changes a copy of the layer once the channels are known that it keeps.
    """
    _REGISTERED[cls] = LayerRule(flow, resize)


def layer_rule(layer: nn.Module | None) -> LayerRule | None:
    """Return what is registered for the layer's class or the nearest of its bases."""
    if not _REGISTERED or layer is None:
        return None
    return next((_REGISTERED[base] for base in type(layer).__mro__ if base in _REGISTERED), None)
