"""The law of exactness: the pruned network equals the original with the removed channels zeroed where they are read.

Both networks run on the same inputs. In the original, every layer that the plan names has its removed input channels
set to zero just before it reads them; parameters that the code reads channels with directly, or computes such a kernel
from, have their columns zeroed. The outputs then have to agree; so does what every one of those layers reads, channel
by channel, which tells a wrong channel from a right one even where the outputs happen to agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import UsageError
from secateur.graph.plan import PruningPlan
from secateur.network.inputs import call, mapped, tensors_of, unwrapped, varied
from secateur.network.isolation import left_as_found
from secateur.pruning.comparison import Difference, compare, compare_outputs, doubled, outputs
from secateur.pruning.leftovers import leftovers
from secateur.pruning.ties import jumps

_JUMPING = (
    "outputs: the original's own jump where its inputs, or what its layers make, change by rounding (a sort, a "
    "threshold, non-maximum suppression); what the plan's layers make was compared in their stead"
)
_VARYING = "outputs: the original's own differ from run to run, as where a network keeps state between runs"


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify` found."""

    exact: bool
    """Whether everything compared agrees to the tolerance, and nothing was left unchecked."""
    max_error: float
    """Largest absolute difference of an output, over the largest absolute value of that output."""
    tolerance: float
    dtype: str
    """Precision of the comparison."""
    compared: int
    """Number of output tensors compared."""
    mismatched: tuple[str, ...] = ()
    """Layers that read something else than in the original, in execution order."""
    refused: tuple[str, ...] = ()
    """What could not be checked, and why."""
    training_failure: str = ""
    """How the pruned network fails in train mode, where the original does not."""
    kept: tuple[str, ...] = ()
    """Attributes that did not follow, although they equalled a width that did: another forward may count with them."""

    @property
    def trains(self) -> bool:
        """Whether the pruned network runs in train mode, if the original does."""
        return not self.training_failure

    def __str__(self) -> str:
        """Return the finding in a line, then at most five of what differs and of what could not be checked."""
        found = "exact" if self.exact else "not exact"
        lines = [f"{found}: outputs differ by at most {self.max_error:.1e} of their largest value ({self.dtype})"]
        for what, names in (("differs", self.mismatched), ("unchecked", self.refused), ("kept", self.kept)):
            lines += [f"  {what}: {name}" for name in names[:5]]
            lines += [f"  {what}: ... and {len(names) - 5} more"] if len(names) > 5 else []
        return "\n".join(lines)


def verify(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, *, tolerance: float | None = None
) -> VerificationReport:
    """Check that a pruned network computes what the original does with the removed channels zeroed where they are read.

    Both run in eval mode on the example inputs, in fp64 where the model and its inputs allow it; there, the pruned
    network has to run in train mode, too, if the original does. The check is of structure: run it before fine-tuning
    or compensation, which change what is computed on purpose.

    Args:
        model: The original; left as found.
        small: What :func:`secateur.apply` made of it; left as found.
        plan: The plan applied.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments. Random values take the
            place of those that are all the same.
        tolerance: Largest difference allowed, relative to the largest value of each output and of what each layer
            reads; by default 1e-9 in fp64 (1e-6 where weight norm's magnitudes follow) and 1e-3 in fp32.

    Returns:
        The report: ``exact``, ``max_error``, the layers that read something else, and what could not be checked.

    Raises:
        UsageError: If a tensor is on the meta device.
    """
    model, small = unwrapped(model), unwrapped(small)
    if any(t.is_meta for t in (*model.parameters(), *small.parameters(), *tensors_of(example_inputs))):
        raise UsageError("verify: tensors on the meta device have no values to compare. Give the model its weights.")
    example_inputs = varied(example_inputs)
    try:
        # The magnitudes of weight norm were computed anew, and rounded to the model's own precision.
        dtype, limit = "float64", tolerance if tolerance is not None else 1e-6 if plan.magnitudes else 1e-9
        found, refused, failure = _in_fp64(model, small, plan, example_inputs, limit)
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises in fp64; it is reported
        dtype, limit = "float32", 1e-3 if tolerance is None else tolerance
        try:
            found, failure = compare(model, small, plan, example_inputs, limit), ""
        except Exception as second:  # noqa: BLE001 - as above
            says = f"the pruned network fails: {_first_line(second)}"
            return VerificationReport(False, float("inf"), limit, dtype, 0, (), (says,))
        refused = [f"fp64: the model does not run in it ({_first_line(error)}); compared in fp32"]
    agrees = found.error <= limit and not found.mismatched and found.compared > 0
    if not found.compared:
        refused.append("outputs: the model returns no tensor that could be compared")
    if failure:
        refused.append(f"train mode: the pruned network fails, and the original does not: {failure}")
    if not agrees and not _repeats(model, example_inputs):
        refused.append(_VARYING)
    refused += [note for note in found.notes if note not in refused]
    exact, wrong = agrees and not failure, tuple(found.mismatched)
    kept = leftovers(model, small)
    return VerificationReport(exact, found.error, limit, dtype, found.compared, wrong, tuple(refused), failure, kept)


def _in_fp64(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, limit: float
) -> tuple[Difference, list[str], str]:
    """Compare copies of two networks in fp64, in eval mode, and run them in train mode.

    Returns:
        How they differ; what the comparison can't tell; and how the pruned network alone fails in train mode.
    """
    model, small = doubled(model), doubled(small)
    inputs = mapped(example_inputs, lambda t: t.double() if t.is_floating_point() else t)
    found = compare(model, small, plan, inputs, limit)
    refused = []
    if found.error > limit and not found.mismatched and jumps(model, small, plan, inputs, found, limit):
        found.error = 0.0
        refused.append(_JUMPING)
    return found, refused, _failure_in_training(model, small, inputs)


def _failure_in_training(model: nn.Module, small: nn.Module, example_inputs: Any) -> str:
    """Return how a pruned network fails in train mode where the original runs, and an empty text where it does not.

    What they compute is not compared: there the networks draw other random numbers.
    """
    for network in (model, small):
        with left_as_found(network):
            network.train()
            try:
                call(network, example_inputs)
            except Exception as error:  # noqa: BLE001 - whatever the model's own code raises; it is the finding
                return _first_line(error) if network is small else ""
    return ""


def _repeats(model: nn.Module, example_inputs: Any) -> bool:
    """Tell whether a network gives the same outputs when it is run again."""
    try:
        first, second = ([t.nan_to_num() for t in outputs(model, example_inputs)] for _ in range(2))
    except Exception:  # noqa: BLE001 - a network that fails has been reported already
        return True
    return compare_outputs(first, second).error == 0


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
