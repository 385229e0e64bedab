"""How channel labels flow through each operator of ATen: one file a family, one function an operator.

An operator without a rule freezes every channel it touches; nothing is guessed. To add a rule, write a function
``flow(call, *arguments)`` in the file of its family and register it with
:func:`secateur.tracing.rules.registry.rule`.
"""

from secateur.tracing.rules import contraction, creation, cuts, indexing, movement, pointwise, reduction
from secateur.tracing.rules.registry import RULES, rule

__all__ = [
    "RULES",
    "contraction",
    "creation",
    "cuts",
    "indexing",
    "movement",
    "pointwise",
    "reduction",
    "rule",
]
