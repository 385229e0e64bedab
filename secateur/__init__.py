"""Secateur makes trained PyTorch CNNs smaller and faster by removing redundant filters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.checkpoint import load as load
    from secateur.checkpoint import save as save
    from secateur.compensate import apply as apply
    from secateur.cost import macs as macs
    from secateur.cost import parameters as parameters
    from secateur.criteria import Criterion as Criterion
    from secateur.criteria import criterion as criterion
    from secateur.engine import Settings as Settings
    from secateur.engine import compress as compress
    from secateur.engine import resume as resume
    from secateur.engine.result import CompressResult as CompressResult
    from secateur.errors import CheckpointError as CheckpointError
    from secateur.errors import CriterionError as CriterionError
    from secateur.errors import DataError as DataError
    from secateur.errors import ExportError as ExportError
    from secateur.errors import PlanError as PlanError
    from secateur.errors import RunError as RunError
    from secateur.errors import SecateurError as SecateurError
    from secateur.errors import TraceError as TraceError
    from secateur.errors import UsageError as UsageError
    from secateur.errors import VerificationError as VerificationError
    from secateur.graph import ChannelGraph as ChannelGraph
    from secateur.graph import ChannelGroup as ChannelGroup
    from secateur.graph import Member as Member
    from secateur.graph import Refusal as Refusal
    from secateur.graph import Role as Role
    from secateur.layers import register_layer as register_layer
    from secateur.planning import PruningPlan as PruningPlan
    from secateur.planning import Target as Target
    from secateur.planning import plan as plan
    from secateur.planning import plan_removal as plan_removal
    from secateur.scoring import score as score
    from secateur.scoring import select as select
    from secateur.surgery import carry_optimizer as carry_optimizer
    from secateur.tracing import trace as trace
    from secateur.verification import VerificationReport as VerificationReport
    from secateur.verification import verify as verify

_HOME = {
    "ChannelGraph": "graph",
    "ChannelGroup": "graph",
    "CheckpointError": "errors",
    "CompressResult": "engine.result",
    "Criterion": "criteria",
    "CriterionError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "Member": "graph",
    "PlanError": "errors",
    "PruningPlan": "planning",
    "Refusal": "graph",
    "Role": "graph",
    "RunError": "errors",
    "SecateurError": "errors",
    "Settings": "engine",
    "Target": "planning",
    "TraceError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "VerificationReport": "verification",
    "apply": "compensate",
    "carry_optimizer": "surgery",
    "compress": "engine",
    "criterion": "criteria",
    "load": "checkpoint",
    "macs": "cost",
    "parameters": "cost",
    "plan": "planning",
    "plan_removal": "planning",
    "register_layer": "layers",
    "resume": "engine",
    "save": "checkpoint",
    "score": "scoring",
    "select": "scoring",
    "trace": "tracing",
    "verify": "verification",
}
"""Public name -> module that defines it. Nothing is imported before it is asked for: torch alone takes seconds."""

__all__ = [*_HOME]  # noqa: PLE0604 - its keys are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
