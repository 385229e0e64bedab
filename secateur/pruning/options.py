"""What a user may ask of a plan: one set of options, with one meaning from Python, command lines and run files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from secateur.errors import UsageError
from secateur.pruning.allocation import Table, require_known

AUTO = "auto"
"""The name of the default method."""
SENSITIVITY = "sensitivity"
"""The allocation that is measured first."""

Allocation = Literal["sensitivity", "normalized", "global", "uniform"] | Table
"""How many channels each group loses."""


class OptionKeywords(TypedDict, total=False):
    """The keywords of :class:`Options`, for signatures."""

    round_to: int | Literal["auto"]
    min_channels: int
    max_ratio: float | Mapping[str, float]
    ratios: Mapping[str, float]
    skip: Sequence[str]
    allocation: Allocation | None
    inexact: bool


@dataclass(frozen=True)
class Options:
    """What :func:`secateur.plan`, :func:`secateur.prune` and :func:`secateur.compress` take as keywords.

    Command lines (``--round-to``) and run files (``round_to:``) have them, too, with the same meaning.

    A *pattern* is the name of a module, with wildcards, or its class; it names the groups whose channels such a layer,
    or a layer in such a module, makes. The pattern ``*`` stands for the groups that no other pattern names.

    Raises:
        UsageError: If a value is out of range or of the wrong kind.
    """

    round_to: int | Literal["auto"] = 1
    """Kept channels are a multiple of this in every group that loses any. ``auto``, of prune and compress, measures
    which of 1, 4, 8, 16 and 32 runs fastest on this CPU."""
    min_channels: int = 1
    """A group keeps at least this many channels."""
    max_ratio: float | Mapping[str, float] = 1.0
    """A group loses at most this fraction of its channels; or pattern -> fraction, for the groups that each names."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Pattern -> fraction of channels to remove from every group that it names, whatever the target says. A ratio of
    ``*`` gives way to ``skip``, ``min_channels``, ``round_to`` and the caps of other patterns, where any other ratio
    that contradicts them is an error."""
    skip: Sequence[str] = ()
    """Patterns of groups that lose nothing."""
    allocation: Allocation | None = None
    """How many channels each group loses. ``normalized`` ranks all channels together, each score divided by its group's
    mean; ``global`` ranks the scores as they are; ``uniform`` removes the same fraction from every group. A table of
    :func:`secateur.sensitivity` says what each group's loss does to the network: the plan has the least such damage in
    sum, exactly solved, and scores decide only which channels of a group go. ``sensitivity``, of prune and compress,
    measures that table first. None is, for the method ``auto``, ``sensitivity`` with data and ``global``
    without, and ``normalized`` for any other;
    ``cfp`` of compress has its pairs in place of an allocation."""
    inexact: bool = False
    """Whether groups whose removal can't equal zeroing (layer norm, softmax over channels) may lose channels."""

    def __new__(cls, *_: Any, **given: Any) -> Options:
        """Refuse a keyword that is none; the dataclass would name no other."""
        cls._require_known(given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuse what can't be meant."""
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        elif isinstance(self.skip, Sequence):
            object.__setattr__(self, "skip", tuple(self.skip))
        if self.round_to != "auto" and not _is_count(self.round_to):
            raise UsageError(f"round_to: expected a whole number from 1 up, or 'auto'; found {self.round_to!r}.")
        if not _is_count(self.min_channels):
            raise UsageError(f"min_channels: expected a whole number from 1 up; found {self.min_channels!r}.")
        if not isinstance(self.inexact, bool):
            raise UsageError(f"inexact: is true or false; found {self.inexact!r}.")
        if not isinstance(self.skip, Sequence) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise UsageError(f"skip: is a list of patterns; found {self.skip!r}.")
        self._check_fractions()
        if self.allocation not in (None, SENSITIVITY):
            require_known(self.allocation)

    def _check_fractions(self) -> None:
        if not isinstance(self.ratios, Mapping):
            raise UsageError(f"ratios: are a mapping, pattern -> fraction; found {self.ratios!r}.")
        for pattern, value in self.ratios.items():
            if not _is_number(value) or not 0 <= value < 1:
                raise UsageError(f"ratio of {pattern}: the fraction to remove is in [0, 1); found {value!r}.")
        if not isinstance(self.max_ratio, Mapping):
            if not _is_number(self.max_ratio) or not 0 < self.max_ratio <= 1:
                raise UsageError(f"max_ratio: expected a fraction in (0, 1]; found {self.max_ratio!r}.")
            return
        for pattern, value in self.max_ratio.items():
            if not _is_number(value) or not 0 <= value <= 1:
                raise UsageError(f"max_ratio of {pattern}: the fraction that may go is in [0, 1]; found {value!r}.")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Make options of keywords.

        Raises:
            UsageError: If one is unknown, or its value can't be meant.
        """
        cls._require_known(given)
        return cls(**given)

    @classmethod
    def _require_known(cls, given: Mapping[str, Any]) -> None:
        known = list(OptionKeywords.__annotations__)
        for name in given:
            if name == "options" or isinstance(given[name], cls):
                raise UsageError(f"{name}: give the fields of Options as keywords, such as round_to=8.")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
                raise UsageError(f"{name}: no such option; {hint}")

    def plain(self) -> dict[str, Any]:
        """Return the options as JSON values, which :meth:`of` takes back; a table is the ``sensitivity`` it holds."""
        named = self.allocation is None or isinstance(self.allocation, str)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"skip": list(self.skip), "ratios": dict(self.ratios)}
        values["max_ratio"] = dict(self.max_ratio) if isinstance(self.max_ratio, Mapping) else self.max_ratio
        return values | {"allocation": self.allocation if named else SENSITIVITY}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
