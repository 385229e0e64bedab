"""The table of rules: operator name -> how labels flow through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.network.named import tensors_in
from secateur.tracing.call import Call
from secateur.tracing.labels import Axes

Flow = Callable[..., Axes | Sequence[Axes] | None]
"""``flow(call, *arguments)``, with the operator's own arguments, returns the axes of what the operator makes."""


@dataclass(frozen=True)
class Rule:
    """How labels flow through an operator."""

    flow: Flow
    keeps_weights: bool
    """Whether what is computed from parameters alone can itself serve as a layer's weight."""

    def __call__(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the labels flow to what the operator has made."""
        axes = self.flow(call, *args, **kwargs) or {}
        made = [call.out] if isinstance(call.out, Tensor) else tensors_in((call.out,))
        weight = self.keeps_weights and _are_weights(call)
        for tensor, own in zip(made, [axes] * len(made) if isinstance(axes, dict) else axes, strict=False):
            call.give(tensor, own, weight=weight)


def _are_weights(call: Call) -> bool:
    """Tell whether an operator reads nothing but parameters, buffers, and numbers in tensors of no dimension."""
    found = [call.is_weight(tensor) for tensor in call.operands]
    return any(found) and all(is_weight or t.ndim == 0 for is_weight, t in zip(found, call.operands, strict=True))


RULES: dict[str, Rule] = {}
"""Qualified operator name without overload, e.g. ``aten::convolution``, -> its rule."""


def rule(*names: str, keeps_weights: bool = False) -> Callable[[Flow], Flow]:
    """Register a rule under one or more operator names.

    A rule is called after its operator, as ``flow(call, *args, **kwargs)`` with the operator's own arguments. It reads
    the labels of its operands with ``call.axes``, joins, freezes and assumes with the call's other methods, and returns
    the axes of ``call.out``: one dict, which holds for all its tensors, or a list of one for each; None where nothing
    of it carries labels.

    >>> @rule("mylib::scale_channels")
    ... def scale_channels(call, x, gains):
    ...     return call.combine([x, gains], call.out.shape)
    >>> RULES.pop("mylib::scale_channels").flow is scale_channels
    True

    Args:
        *names: Qualified names without overload.
        keeps_weights: Whether what the operator makes of parameters alone can itself serve as a layer's weight.
    """

    def register(flow: Flow) -> Flow:
        for name in names:
            RULES[name] = Rule(flow, keeps_weights)
        return flow

    return register
