"""How channels are chosen and adjusted: what a method's name stands for, and what it can't do is refused at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur import compensation, criteria
from secateur.criteria import Criterion
from secateur.errors import UsageError
from secateur.pruning.options import AUTO, SENSITIVITY, Allocation, Options
from secateur.pruning.planning import Target


@dataclass(frozen=True)
class Way:
    """How channels are chosen and adjusted."""

    name: str
    criterion: Criterion
    """It tells which channels of a group go."""
    allocation: Allocation
    """It tells how many."""
    methods: list[str]
    """Of compensation."""
    refit: dict[str, Any]
    """Options of least squares."""
    auto: bool = False
    """Whether the method is ``auto``."""

    @property
    def parts(self) -> dict[str, str]:
        """What each part is called."""
        refitted = ["least_squares everywhere" if self.refit and m == "least_squares" else m for m in self.methods]
        return {
            "method": self.name,
            "allocation": self.allocation if isinstance(self.allocation, str) else SENSITIVITY,
            "selection": self.criterion.name,
            "compensation": ", ".join(refitted) or "none",
        }


def way_of(method: Any, allocation: Allocation | None, compensate: str | Sequence[str] | None, data: bool) -> Way:
    """Return what is asked for; where nothing is, of ``auto`` what has been measured to keep most accuracy.

    Args:
        method: ``auto``, or a criterion.
        allocation: See :class:`secateur.Options`.
        compensate: Names of methods; None for the method's own.
        data: Whether there are any.
    """
    if not isinstance(method, str) or method != AUTO:
        criterion = criteria.get(method)
        return Way(criterion.name, criterion, allocation or "normalized", compensation.parse(compensate or ()), {})
    criterion = criteria.get("l2")
    share: Allocation = allocation or ("sensitivity" if data else "global")
    refit = {"everywhere": True} if compensate is None and data else {}
    if compensate is None:
        compensate = ["least_squares"] if data else []
    return Way(f"{AUTO}: {criterion.name}", criterion, share, compensation.parse(compensate), refit, auto=True)


def require_possible(target: Target | None, way: Way, options: Options, given: Mapping[str, Any], data: bool) -> None:
    """Refuse, before anything is done, what can't be had.

    Args:
        target: How much to remove.
        way: How.
        options: Limits of each group's loss.
        given: The criterion's own options.
        data: Whether there are any.

    Raises:
        UsageError: If nothing is asked for, data are missing, or two requests contradict each other.
    """
    if target is None and not options.ratios:
        raise UsageError(
            "prune: how much? Give a target, such as Target(macs=0.5) (--macs), or ratios (--ratio) for some layers."
        )
    looking = [f"criterion {way.criterion.name}"] if way.criterion.needs_data else []
    looking += [f"compensation {name}" for name in way.methods if name != "merge"]  # merging reads weights alone
    looking += ["allocation by sensitivity"] if way.allocation == SENSITIVITY else []
    if looking and not data:
        raise UsageError(f"prune: {looking[0]} looks at feature maps; give data=batches (--data, e.g. --data digits).")
    require_options(way.criterion, given, options)


def require_options(criterion: Criterion, given: Mapping[str, Any], options: Options) -> None:
    """Refuse options that the criterion has not, and a multiple that its own selection can't keep to.

    Raises:
        UsageError: If there is such an option.
    """
    decided = deciding(criterion, given)
    criterion.check(given, bool(decided))
    if decided and options.round_to != 1:
        raise UsageError(
            f"round_to {options.round_to} can't hold what the option {min(decided)} selects; leave one of them out."
        )


def deciding(criterion: Criterion, options: Iterable[str]) -> set[str]:
    """Return those of the options that decide a selection and change no score, such as a threshold."""
    return set(options) & (criterion.takes(True) - criterion.takes(False))
