"""What the rules assume of the user's own code, and which option of each assumption is in force.

Operators don't tell how their arguments came about: ``x.view(-1, 512)`` and ``x.flatten(1)`` are one and the same
view. So a rule assumes the likeliest, and names what else it may be: the *options*, of which the last is to keep the
channels. A trial pruning decides; what fails takes its next option.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.tracing.labels import Labels

FREEZE = "freeze"
"""The last option of every assumption: the channels stay."""
CUTS = ("widths", "whole", "equal", "share", "parts")
"""Options of a cut, which lay constraints on its parts: without them only another run is."""
Key = tuple[int | str, int | str]
"""An assumption, the same in every run of the network: ordinal of the operator call and what is asked of it; or name
and dimension of a parameter."""


@dataclass(frozen=True)
class Cause:
    """An operator call that fixed channels, or assumed something of the code around it."""

    operator: str
    module: str
    source: str
    reason: str


@dataclass(eq=False)
class Assumption:
    """A place where the user's own code handles channels in a way that may depend on their number."""

    key: Key
    cause: Cause
    labels: Labels
    options: tuple[str, ...]
    """What may be assumed of the code, the likeliest first."""
    choice: int
    """Index of the option in force."""
    blocks: tuple[Labels, ...] = ()
    """Where the code cuts a vector: its parts."""
    asked: tuple[tuple[Labels, Labels], ...] = ()
    """Channels, and those whose number the code gives as their size."""

    @property
    def option(self) -> str:
        """The option in force."""
        return self.options[self.choice]

    @property
    def following(self) -> str:
        """The option after it; empty after the last."""
        return self.options[self.choice + 1] if self.choice + 1 < len(self.options) else ""


class Assumptions:
    """The options in force, from one run of a network to the next."""

    def __init__(self) -> None:
        self._choices: dict[Key, int] = {}
        self._kept: dict[Key, Cause] = {}

    def choice(self, key: Key, options: tuple[str, ...]) -> int:
        """Return the index of the option in force."""
        return min(self._choices.get(key, 0), len(options) - 1)

    def take_next(self, assumption: Assumption) -> None:
        """Put the next option of an assumption in force."""
        assumption.choice += 1
        self._choices[assumption.key] = assumption.choice

    def keep(self, tensor: str, dim: int, cause: Cause) -> None:
        """Keep all channels along a dimension of a parameter: no assumption is left that would explain the failure."""
        self._kept[tensor, dim] = cause

    def kept(self, tensor: str, dim: int) -> Cause | None:
        """Return why the channels along a dimension of a parameter are kept; None where they are not."""
        return self._kept.get((tensor, dim))
