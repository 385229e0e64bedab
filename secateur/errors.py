"""The exceptions that Secateur raises: each says where, which rule, what was found, what to do."""

from typing import Any


def install(extra: str) -> str:
    """Return the command that installs an extra, which is to be had from a checkout alone."""
    return f"pip install '.[{extra}]' in Secateur's checkout"


class SecateurError(Exception):
    """Base of every error raised on purpose; its text is one clear line."""


class UsageError(SecateurError):
    """The request itself is wrong: an unknown name, a contradictory option, a file that is not there."""


class TraceError(SecateurError):
    """The model could not be run on the example inputs, so nothing is known of its channels."""


class PlanError(SecateurError):
    """A plan can't be made, or does not fit the model it is applied to."""


class VerificationError(SecateurError):
    """A pruned network differs from the original with the removed channels zeroed."""


class CriterionError(SecateurError):
    """A criterion was given tensors that it is not defined on."""


class CheckpointError(SecateurError):
    """A file is not a Secateur checkpoint, is damaged, or belongs to another model."""


class DataError(SecateurError):
    """A data set is missing, empty, or does not fit the model."""


class RunError(SecateurError):
    """A run could not go on: a diverged loss, a run directory in use, a target out of reach."""

    result: Any = None
    """The :class:`secateur.CompressResult` of the last accepted network, where a run has one."""


class DivergedError(RunError):
    """A training loss or a metric is not a finite number."""


class ExportError(SecateurError):
    """A model can't be exported, or the exported file computes something else."""
