"""Accuracy at equal MACs, images and training: Secateur's ways, Torch-Pruning's, random and from scratch, side by side.

    python -m bench.accuracy --quick                # one point of one network, within half an hour on two cores
    python -m bench.accuracy --accepted --jobs 2    # the points that the documents show
    python -m bench.accuracy --full --dry           # every cell there is, and what it costs
    python -m bench.accuracy --publish              # what was measured becomes rows of bench/results, and tables

A cell is a network, the layers that may lose filters, the fraction of the MACs that goes, an arm, epochs and a seed.
Each is measured right after the cut on the full test set; then trained: SGD, momentum 0.9, weight decay 1e-4, batches
of 128, cropped and flipped, the rate annealed by a cosine to 0 over the cell's epochs, with and without distillation
from the unpruned network. Each arm has the best peak of three on training images held out, after one epoch. The last
epoch counts. Finished cells are rows in a file of their own (``--rows``), so an interrupted run goes on where it was, a
training at its last whole epoch. ``auto`` comes last.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch

from bench import criteria
from bench.accuracy_arms import AUTO
from bench.accuracy_cells import PARTS, Cell, Part, failing, of_row, peaks, store, trained, trials, untrained
from bench.accuracy_tables import FIGURE, SECTION, STORE
from bench.accuracy_training import Measuring, weights_of
from bench.rows import Row, Store

ROWS = criteria.ROOT / "runs" / "accuracy" / "rows.jsonl"
_MEASURING: list[Measuring] = []


def waves(
    parts: Iterable[Part], rows: Callable[[], list[Row]], arms: Collection[str] | None = None
) -> Iterator[list[Cell]]:
    """Yield the cells that are missing, in waves: what a wave holds may follow from the rows of those before it.

    Right after the cut; so, too, with the other seeds, of those that did best; one epoch from every peak; and from the
    best of these, all trainings. ``auto`` goes the same way after all others. Of ``arms`` alone, if given.
    """
    parts = list(parts)
    for last in (False, True):
        for planned in (untrained, untrained, trials, trained):
            known = rows()
            done, never = {of_row(row) for row in known}, failing(known)
            cells = [cell for part in parts for cell in planned(part, known) if (cell.arm == AUTO) == last]
            cells = [cell for cell in cells if (cell.network, cell.layers, cell.arm, cell.fraction) not in never]
            cells = [cell for cell in cells if arms is None or cell.arm in arms]
            if planned is trained:
                peak = peaks(known)
                cells = [replace(cell, peak=peak[cell.trial]) for cell in cells if cell.trial in peak]
            yield [cell for cell in dict.fromkeys(cells) if cell not in done]


def supposed(parts: Iterable[Part], rows: list[Row], arms: Collection[str] | None = None) -> list[Cell]:
    """Return all cells that are missing, with figures made up: which of the peer's do best is not known yet."""
    known, found = list(rows), list[Cell]()
    for wave in waves(parts, known.copy, arms):
        found += wave
        known += [cell.row(accuracy=-float(n), removed=0.0, validation=0.0) for n, cell in enumerate(wave)]
    return found


def cost(cells: list[Cell], jobs: int = 1) -> str:
    """Say what cells cost."""
    hours = sum(cell.seconds for cell in cells) / 3600
    return f"{len(cells)} cells to measure, about {hours:.1f} hours of one core, {hours / jobs:.1f} in {jobs} processes"


def _begin(measuring: Measuring) -> None:
    torch.set_num_threads(1)
    _MEASURING.append(measuring)


def _row(cell: Cell) -> Row:
    return _MEASURING[0].row(cell)


def measured(cells: list[Cell], measuring: Measuring, jobs: int) -> Iterator[Row]:
    """Yield rows as they are measured, in as many processes of one thread."""
    if jobs == 1:
        torch.set_num_threads(1)
        yield from (measuring.row(cell) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _begin, (measuring,)) as pool:
        waiting = [pool.submit(_row, cell) for cell in cells]
        try:
            yield from (future.result() for future in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def run(parts: list[Part], kept: Store, measuring: Measuring, jobs: int, arms: Collection[str] | None = None) -> None:
    """Measure all cells that are missing."""
    for wave in waves(parts, kept.read, arms):
        for row in measured(wave, measuring, min(jobs, max(1, len(wave)))):
            kept.keep(row)
            told = row.get("failed", f"{row.get('accuracy')} at {row.get('removed')}, {row.get('seconds')} s")
            print(f"{of_row(row).label}: {told}", flush=True)


def publish(kept: Store) -> None:
    """Put rows among the results, and make tables and figure of them; an arm's new rows replace its old ones."""
    new = kept.read()
    block = itemgetter("network", "layers", "fraction", "arm", "images")
    renewed = {block(row) for row in new}
    STORE.write([*(row for row in STORE.read() if block(row) not in renewed), *new])
    SECTION.write()
    FIGURE.write()


def forget(kept: Store, arm: str) -> None:
    """Drop the rows of an arm, which has changed since."""
    kept.write([row for row in kept.read() if row["arm"] != arm])


def main() -> None:
    """Measure what is missing, or say what that would be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    for name in PARTS:
        which.add_argument(f"--{name}", dest="part", action="store_const", const=name)
    which.add_argument("--publish", action="store_true", help="put the rows into bench/results and the documents")
    which.add_argument("--forget", metavar="ARM", help="drop the rows of an arm that has changed, such as auto")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="of these arms alone")
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="of these networks alone")
    parser.add_argument("--fractions", nargs="+", type=float, metavar="F", help="at these fractions of the MACs alone")
    parser.add_argument("--seeds", type=int, metavar="N", help="with the first N seeds alone")
    parser.add_argument(
        "--rows", type=Path, default=ROWS, help="file of the finished cells; half-trained ones beside it"
    )
    parser.add_argument("--weights", type=Path, default=criteria.SHARED / "weights", help="folder of trained weights")
    parser.add_argument("--data", default=f"cifar10:{criteria.SHARED / 'data' / 'cifar10'}")
    parser.add_argument("--device", choices=("cpu", "auto"), default="cpu", help="where networks are trained")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, of one thread each")
    parser.add_argument("--dry", action="store_true", help="list the cells and their cost, and measure nothing")
    given = parser.parse_args()
    if given.seeds is not None and given.seeds < 1:
        parser.error(f"--seeds {given.seeds}: is at least 1.")
    kept = store(given.rows.name, folder=given.rows.resolve().parent)
    if given.publish:
        return publish(kept)
    if given.forget:
        return forget(kept, given.forget)
    parts = [
        replace(
            part,
            fractions=tuple(f for f in part.fractions if given.fractions is None or f in given.fractions),
            seeds=part.seeds[: given.seeds],
        )
        for part in PARTS[given.part]
        if given.networks is None or part.network in given.networks
    ]
    missing = supposed(parts, kept.read(), given.arms)
    if given.dry:
        print(*(f"{cell.seconds / 60:6.1f} min  {cell.label}" for cell in missing), sep="\n")
    print(f"--{given.part}: {cost(missing, given.jobs)}.", flush=True)
    if not given.dry:
        for part in parts:
            file = weights_of(part.network)
            if not (given.weights / file).is_file():
                parser.error(f"--weights {given.weights}: there is no {file} in it.")
        run(parts, kept, Measuring(given.weights, given.data, kept.folder, given.device), given.jobs, given.arms)
    return None


if __name__ == "__main__":
    main()
