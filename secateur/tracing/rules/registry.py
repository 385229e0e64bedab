"""The table of rules: operator name -> how labels flow through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from secateur.tracing.flow import Flow

Rule = Callable[[Flow, tuple[Any, ...], dict[str, Any], Any], None]
"""``rule(flow, args, kwargs, out)``: reads the labels of ``args``, sets those of ``out``, joins and freezes."""

RULES: dict[str, Rule] = {}
"""Qualified operator name without overload, e.g. ``aten::convolution``, -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under one or more operator names.

    >>> @rule("mylib::scale_channels")
    ... def scale_channels(flow, args, kwargs, out):
    ...     flow.set(out, flow.combine(args[:2], out.shape))
    >>> RULES.pop("mylib::scale_channels") is scale_channels
    True
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register
