"""Cells of ``bench.accuracy``: what one row is of, which cells each part of the table has, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bench.accuracy_arms import AUTO, LEAST_SQUARES, OURS, RANDOM, SCRATCH, UNIFORM, UNPRUNED
from bench.accuracy_peers import KIRIGAMI, ONE_SHOT, SPARSE
from bench.rows import Row, Store

IMAGES = 45_000
"""Of an epoch: CIFAR-10's training images without the 5,000 that are held out."""
PEAKS = (0.003, 0.01, 0.03)
SCRATCH_PEAKS = (0.03, 0.1, 0.3)
"""For the network that starts from nothing."""
RIVALS = 2
"""So many of the peer's settings, the best right after the cut, are trained where not all arms are."""


@dataclass(frozen=True)
class Cell:
    """One network, cut by one arm, and trained for so long."""

    network: str
    layers: str
    """``inner``: the first filters of each block; ``all``: every group."""
    fraction: float
    """Of the MACs, to be removed at least."""
    arm: str
    epochs: int = 0
    images: int = 0
    """Training images of an epoch; 0 right after the cut."""
    seed: int = 0
    distilled: bool = False
    peak: float = 0.0
    """Of the learning rate; 0 where there is no training, or where it is yet to be chosen."""

    def row(self, **measured: Any) -> Row:
        """Return the row of this cell."""
        return {**asdict(self), **measured}

    @property
    def trial(self) -> tuple[Any, ...]:
        """What shares a peak."""
        return (self.network, self.layers, self.arm, self.images, self.distilled)

    @property
    def label(self) -> str:
        """The cell in a line."""
        trained = f", {self.epochs} x {self.images} images from {self.peak:g}" if self.epochs else ""
        how = ", distilled" if self.distilled else ""
        return f"{self.network} {self.layers} {self.fraction:.0%}, {self.arm}{trained}{how}, seed {self.seed}"

    @property
    def seconds(self) -> float:
        """Roughly what it costs, in seconds of one core."""
        left = 1 - 0.8 * self.fraction
        cutting = 2.0 if self.arm in (SCRATCH, RANDOM, "l1", UNIFORM) else 60.0 if self.arm == AUTO else 8.0
        evaluation = 10_000 / FORWARD[self.network] * (1.5 if self.epochs else 1.0)
        step = 1 / TRAINING[self.network] * left + self.distilled / FORWARD[self.network]
        depth = TRAINING["resnet20"] / TRAINING[self.network]
        return cutting * depth + evaluation * left + self.epochs * self.images * step


KEYS = tuple(field.name for field in fields(Cell))
FORWARD = {"resnet20": 550.0, "resnet56": 190.0}
"""Images a second of one core, in evaluation; processors differ by a factor of three."""
TRAINING = {"resnet20": 190.0, "resnet56": 65.0}
"""The same in training, forward and backward."""


def store(file: str = "accuracy.jsonl", **folder: Any) -> Store:
    """Return a file of rows."""
    return Store(file, KEYS, **folder)


def of_row(row: Row) -> Cell:
    """Return the cell that a row is of."""
    return Cell(**{key: row[key] for key in KEYS})


def peaks_of(arm: str) -> tuple[float, ...]:
    """Return the peaks that are tried."""
    return SCRATCH_PEAKS if arm == SCRATCH else PEAKS


@dataclass(frozen=True)
class Part:
    """A block of the table: every combination of these."""

    network: str
    layers: str
    fractions: tuple[float, ...]
    arms: tuple[str, ...]
    """Measured right after the cut."""
    trained: tuple[str, ...]
    """Trained; the peer's best settings come to them."""
    rivals: int
    """How many of the peer's settings are trained, the best right after the cut; 0 where ``trained`` names them."""
    epochs: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    images: int = IMAGES
    distilled: tuple[bool, ...] = (True,)


EVERY = (*ONE_SHOT, *OURS, AUTO)
FEW = (*ONE_SHOT, "l1", UNIFORM, RANDOM, LEAST_SQUARES, AUTO)
AGAINST = (UNIFORM, RANDOM, SCRATCH, AUTO)
PARTS: dict[str, tuple[Part, ...]] = {
    "quick": (Part("resnet20", "inner", (0.5,), FEW, AGAINST, RIVALS, (1,), images=5_000),),
    "accepted": (
        Part("resnet20", "inner", (0.5, 0.4, 0.25), EVERY, AGAINST, RIVALS, (3, 1), (0, 1, 2)),
        Part("resnet56", "inner", (0.5,), EVERY, AGAINST, RIVALS, (3,)),
    ),
    "full": tuple(
        Part(
            network, layers, (0.5, 0.3, 0.7), (*EVERY, *KIRIGAMI), (*EVERY, SCRATCH, SPARSE, *KIRIGAMI), 0,
            (3, 1, 10), distilled=(True, False),
        )
        for network in ("resnet20", "resnet56")
        for layers in ("inner", "all")
    ),
}  # fmt: skip


def rivals(rows: Iterable[Row], part: Part, fraction: float) -> tuple[str, ...]:
    """Return the peer's best settings right after the cut, by the rows of seed 0; they were chosen on the test set.

    Of settings that come to the same network, as the rows tell, the first by name stands for all.
    """
    if not part.rivals:
        return ()
    found: dict[tuple[float, float], str] = {}
    for row in sorted(rows, key=lambda row: str(row["arm"])):
        same = (row["network"], row["layers"], row["fraction"]) == (part.network, part.layers, fraction)
        if same and row["arm"] in ONE_SHOT and row["epochs"] == row["seed"] == 0 and "accuracy" in row:
            found.setdefault((row["accuracy"], row["removed"]), row["arm"])
    return tuple(found[key] for key in sorted(found, reverse=True)[: part.rivals])


def arms_at(rows: list[Row], part: Part, fraction: float) -> tuple[str, ...]:
    """Return the arms that are trained at a fraction; those of the peer as far as rows tell them."""
    return (*rivals(rows, part, fraction), *part.trained)


def untrained(part: Part, rows: list[Row]) -> Iterator[Cell]:
    """Yield the cells right after the cut: every arm with the first seed, and with the others what is also trained."""
    yield Cell(part.network, part.layers, 0.0, UNPRUNED)
    for seed in part.seeds:
        for fraction in part.fractions:
            arms = part.arms if seed == part.seeds[0] else arms_at(rows, part, fraction)
            for arm in arms:
                if arm not in (SCRATCH, SPARSE):  # these do not exist before training
                    yield Cell(part.network, part.layers, fraction, arm, seed=seed)


def trained(part: Part, rows: list[Row]) -> Iterator[Cell]:
    """Yield the trained cells, without their peaks: one seed of everything before the next."""
    for seed in part.seeds:
        for fraction in part.fractions:
            for epochs in part.epochs:
                for arm in arms_at(rows, part, fraction):
                    for distilled in part.distilled:
                        yield Cell(part.network, part.layers, fraction, arm, epochs, part.images, seed, distilled)


def trials(part: Part, rows: list[Row]) -> Iterator[Cell]:
    """Yield one epoch from every peak for each arm, at the first fraction of its cells, with the first seed."""
    known: set[tuple[str, bool]] = set()
    for cell in trained(part, rows):
        if (cell.arm, cell.distilled) not in known:
            known.add((cell.arm, cell.distilled))
            for peak in peaks_of(cell.arm):
                yield replace(cell, epochs=1, peak=peak)


def peaks(rows: Iterable[Row]) -> dict[tuple[Any, ...], float]:
    """Return the peak of each arm that did best on the images held out, after one epoch with the first seed.

    Of equal ones the larger: the weights were trained on the images held out, which favours what moves them less. Where
    every peak was tried at more than one fraction, the one nearest to a half counts.
    """
    found: dict[tuple[Any, ...], dict[float, dict[float, float]]] = {}
    for row in rows:
        cell = of_row(row)
        if cell.epochs == 1 and cell.seed == 0 and "validation" in row:
            found.setdefault(cell.trial, {}).setdefault(cell.fraction, {})[cell.peak] = row["validation"]
    best = {}
    for trial, fractions in found.items():
        complete = [f for f, tried in fractions.items() if set(tried) >= set(peaks_of(trial[2]))]
        if complete:
            tried = fractions[min(complete, key=lambda f: (abs(f - 0.5), f))]
            best[trial] = max(sorted(tried, reverse=True), key=lambda peak: tried[peak])
    return best


def failing(rows: Iterable[Row]) -> set[tuple[str, str, str, float]]:
    """Return network, layers, arm and fraction of all that a peer can't cut."""
    return {(row["network"], row["layers"], row["arm"], row["fraction"]) for row in rows if "failed" in row}
