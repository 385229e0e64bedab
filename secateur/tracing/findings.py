"""What a run of a network finds out about its channels, call by call."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.tracing.labels import Labels


@dataclass(frozen=True)
class Cause:
    """An operator call that fixed channels, or assumed something of the code around it."""

    operator: str
    module: str
    source: str
    reason: str


@dataclass(eq=False)
class Site:
    """A place where the user's own code handles channels in a way that may depend on their number.

    ``options`` says what may be assumed of the code, the likeliest first and ``"freeze"`` last. The first that holds
    is found by running the pruned network; ``choice`` is the one in force.
    """

    key: int
    """Ordinal of the operator call in the run, the same in every run of the model."""
    cause: Cause
    labels: Labels
    options: tuple[str, ...]
    choice: int
    blocks: tuple[Labels, ...] = ()
    """Where the code cuts a vector: its parts."""
    asked: tuple[tuple[Labels, Labels], ...] = ()
    """Channels, and those whose number the code gives as their size."""


@dataclass(eq=False)
class Shuffled:
    """A place where channels are cut into rows that may be merged in another order.

    Taken strictly, the channels at one place of every row go together, and what is left keeps its order. Taken loosely,
    rows lose any channels, equally many, and what is left lies in another order than in the unpruned network.
    """

    key: int
    """Ordinal of the operator call in the run."""
    labels: Labels


@dataclass(eq=False)
class Share:
    """Blocks of channels that must all lose the same fraction."""

    cause: Cause
    blocks: tuple[Labels, ...]


@dataclass(eq=False)
class Call:
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


@dataclass(eq=False)
class Attribute:
    """An attribute of a module that counts the distinct labels left."""

    module: str
    name: str
    labels: Labels
    value: int
    guessed: bool = False
    """Whether only its name and its value tell what it counts."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Two dimensions of a tensor that one vector of channels was cut into, until they are merged again."""

    row: int
    """The dimension that counts the rows."""
    column: int
    labels: Labels
    """Shape ``(rows, columns)``."""
    key: int
    """Ordinal of the operator call that cut the vector."""
