"""What a run of a network finds out about its channels, call by call."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from secateur.graph.channels import Magnitude, Window
from secateur.tracing.assumptions import Assumption, Cause
from secateur.tracing.labels import Labels
from secateur.tracing.numbers import Measure


@dataclass(frozen=True, eq=False)
class Share:
    """Blocks of channels that must all lose the same fraction."""

    cause: Cause
    blocks: tuple[Labels, ...]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer: the labels of its input and output channels, and what its cost depends on."""

    module: str
    kind: str
    weight: str
    owned: bool
    inputs: Labels | None
    outputs: Labels | None
    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: int = 1
    positions: int = 1
    batch: int = 1
    parts: tuple[str, ...] = ()
    """Where the weight is not the layer's own: the parameters and buffers that it is computed from."""
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class Attribute:
    """An attribute of a module that counts the distinct labels left."""

    module: str
    name: str
    labels: Labels
    value: int
    guessed: bool = False
    """Whether only its name and its value tell what it counts."""


@dataclass(frozen=True, eq=False)
class Moved:
    """A vector of labels read in rows and laid out in columns: a channel shuffle whose rows may lose different indices.

    Position ``s · rows + r`` of the result holds the ``s``-th of row ``r``. Once labels are gone, it holds the ``s``-th
    of those left: the result's labels go with the source's, but their order after removal isn't that of the labels.
    """

    labels: Labels
    """Of the result; they follow one another."""
    source: Labels
    rows: int
    cause: Cause

    @property
    def size(self) -> int:
        """Number of labels."""
        return int(self.source.size)


@dataclass(eq=False)
class Findings:
    """Everything that a run found, apart from the labels themselves."""

    frozen: list[tuple[Labels, Cause]] = field(default_factory=list)
    """Channels that never go, and why."""
    inexact: list[tuple[Labels, Cause]] = field(default_factory=list)
    """Channels whose removal can't equal zeroing, and why."""
    assumptions: list[Assumption] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    layers: list[LayerCall] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    magnitudes: dict[Magnitude, None] = field(default_factory=dict)
    staying: list[tuple[Labels, int]] = field(default_factory=list)
    """Dimensions of channels and how many have to stay: two, where code would drop a dimension of one index."""
    multiples: list[tuple[Labels, int]] = field(default_factory=list)
    """Dimensions of channels and by what the code divides their number and asks for the remainder."""
    produced: list[Labels] = field(default_factory=list)
    """What layers make."""
    consumed: list[Labels] = field(default_factory=list)
    """What weights read."""
    moved: list[Moved] = field(default_factory=list)
    """Shuffles whose rows may lose different indices."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of labels of equal copies, which an expansion makes: any of them may go for any other."""
    counted: list[tuple[Labels, Measure]] = field(default_factory=list)
    """Channels whose number the code was told, and what it did with that number."""
    numbers: dict[tuple[str, str], Measure] = field(default_factory=dict)
    """Module and attribute -> what the code did with the number that it holds."""
    widths: dict[tuple[str, str], Measure] = field(default_factory=dict)
    """The same of layers, whose numbers of channels follow by rules."""
    by_value: bool = False
    """Whether the code read a tensor's values, on which what it does next may depend."""

    def freeze(self, labels: Labels, cause: Cause) -> None:
        """Keep every channel of these labels."""
        self.frozen.append((labels.reshape(-1), cause))

    def measure(self, labels: Labels) -> Measure:
        """Return where to note what the code does with the number of these channels, which it is told."""
        self.counted.append((labels, Measure()))
        return self.counted[-1][1]

    def are_copies(self, labels: Labels) -> bool:
        """Tell whether the labels are of equal copies that an expansion made."""
        first = int(labels[0])
        return any(start <= first < stop for start, stop in self.copies)

    def used(self, classes: Labels) -> np.ndarray:
        """Return for every class of labels whether a weight reads it, or it is kept for some reason."""
        found = np.zeros(len(classes), dtype=bool)
        for labels in (*self.consumed, *(labels for labels, _ in self.frozen)):
            found[classes[labels.reshape(-1)]] = True
        return found
