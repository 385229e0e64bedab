"""Secateur makes trained PyTorch CNNs smaller and faster by removing redundant filters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.cost import macs as macs
    from secateur.cost import parameters as parameters
    from secateur.graph import ChannelGraph as ChannelGraph
    from secateur.graph import ChannelGroup as ChannelGroup
    from secateur.planning import PruningPlan as PruningPlan
    from secateur.planning import Target as Target
    from secateur.planning import plan as plan
    from secateur.planning import plan_removal as plan_removal
    from secateur.tracing import trace as trace
    from secateur.verification import VerificationReport as VerificationReport
    from secateur.verification import verify as verify

_HOME = {
    "ChannelGraph": "graph",
    "ChannelGroup": "graph",
    "PruningPlan": "planning",
    "Target": "planning",
    "VerificationReport": "verification",
    "macs": "cost",
    "parameters": "cost",
    "plan": "planning",
    "plan_removal": "planning",
    "trace": "tracing",
    "verify": "verification",
}
"""Public name -> module that defines it. Nothing is imported before it is asked for: torch alone takes seconds."""

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
