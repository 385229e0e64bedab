"""Secateur makes trained PyTorch CNNs smaller and faster by removing redundant filters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from secateur.checkpoint import load as load
    from secateur.checkpoint import save as save
    from secateur.compensation import apply as apply
    from secateur.compensation.sensitivity import Sensitivity as Sensitivity
    from secateur.compensation.sensitivity import sensitivity as sensitivity
    from secateur.criteria import Criterion as Criterion
    from secateur.criteria import criterion as criterion
    from secateur.criteria.scoring import score as score
    from secateur.criteria.scoring import select as select
    from secateur.deploy.export import export as export
    from secateur.deploy.timing.measuring import latency as latency
    from secateur.deploy.timing.table import Latency as Latency
    from secateur.engine import Settings as Settings
    from secateur.engine import compress as compress
    from secateur.engine import resume as resume
    from secateur.engine.once import prune as prune
    from secateur.engine.result import CompressResult as CompressResult
    from secateur.engine.result import PruneResult as PruneResult
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
    from secateur.graph.channels import ChannelGraph as ChannelGraph
    from secateur.graph.channels import ChannelGroup as ChannelGroup
    from secateur.graph.channels import Member as Member
    from secateur.graph.channels import Refusal as Refusal
    from secateur.graph.channels import Role as Role
    from secateur.graph.cost import macs as macs
    from secateur.graph.cost import parameters as parameters
    from secateur.graph.plan import PruningPlan as PruningPlan
    from secateur.integrations.hub import pull as pull
    from secateur.integrations.hub import push as push
    from secateur.network.custom_layers import register_layer as register_layer
    from secateur.pruning.options import Options as Options
    from secateur.pruning.planning import plan as plan
    from secateur.pruning.planning import plan_removal as plan_removal
    from secateur.pruning.surgery import carry_optimizer as carry_optimizer
    from secateur.pruning.target import Target as Target
    from secateur.pruning.verification import VerificationReport as VerificationReport
    from secateur.pruning.verification import verify as verify
    from secateur.tracing.tracing import trace as trace

_HOME = {
    "ChannelGraph": "graph.channels",
    "ChannelGroup": "graph.channels",
    "CheckpointError": "errors",
    "CompressResult": "engine.result",
    "Criterion": "criteria",
    "CriterionError": "errors",
    "DataError": "errors",
    "ExportError": "errors",
    "Latency": "deploy.timing.table",
    "Member": "graph.channels",
    "Options": "pruning.options",
    "PlanError": "errors",
    "PruneResult": "engine.result",
    "PruningPlan": "graph.plan",
    "Refusal": "graph.channels",
    "Role": "graph.channels",
    "RunError": "errors",
    "SecateurError": "errors",
    "Sensitivity": "compensation.sensitivity",
    "Settings": "engine",
    "Target": "pruning.target",
    "TraceError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "VerificationReport": "pruning.verification",
    "apply": "compensation",
    "carry_optimizer": "pruning.surgery",
    "compress": "engine",
    "criterion": "criteria",
    "export": "deploy.export",
    "latency": "deploy.timing.measuring",
    "load": "checkpoint",
    "macs": "graph.cost",
    "parameters": "graph.cost",
    "plan": "pruning.planning",
    "plan_removal": "pruning.planning",
    "prune": "engine.once",
    "pull": "integrations.hub",
    "push": "integrations.hub",
    "register_layer": "network.custom_layers",
    "resume": "engine",
    "save": "checkpoint",
    "score": "criteria.scoring",
    "select": "criteria.scoring",
    "sensitivity": "compensation.sensitivity",
    "trace": "tracing.tracing",
    "verify": "pruning.verification",
}
"""Public name -> module that defines it. Nothing is imported before it is asked for: torch alone takes seconds."""

__all__ = [*_HOME]  # noqa: PLE0604 - its keys are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if not isinstance(value, type):  # a function: what it is given is of the right kind, or refused in one line
        value = import_module(f"{__name__}.network.kinds").checked(value, name)
        value.__module__ = __name__  # where processes that are sent it find the same function
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
