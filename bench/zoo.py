"""Sweep torchvision's and timm's networks with Secateur, and beside it with Torch-Pruning.

Usage: ``python -m bench.zoo [--only PATTERN ...] [--again PATTERN ...] [--limit N] [--part K/N] [--no-peer]
[--pairs RATIO]``.

Every network is measured in a process of its own, on one thread, within limits of time and memory. Rows go to
``bench/results/zoo.jsonl``, which later runs continue, and from there to ``docs/benchmarks.md``, as ``python -m
bench.pages`` writes it; ``--again`` measures matching networks anew, and sweeps of different parts can run at once.
With ``--pairs``, what is in the file is timed anew, in turn in one process, on the networks where Secateur took over
``RATIO`` times as long as the peer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.models import entries
from bench.rows import Row
from bench.zoo_table import SECTION, STORE, arranged, near, percent, seconds

MEMORY = 12 * 2**30
"""Bytes that a process may take."""

Measure = Callable[[Any, Callable[[Row], None]], Row]
"""``measure(entry, stage)``: returns a row, and calls ``stage`` with what is known of it whenever a part is done."""


def _work(measure: Measure, entry: Any, sender: Any, limit: float) -> None:
    def stage(row: Row) -> None:
        """Hand over what is known so far, and give the next part as many seconds."""
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + limit) + 1, resource.RLIM_INFINITY))
        sender.send(row)

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    stage({})
    try:
        sender.send(measure(entry, stage))
    except Exception as error:  # noqa: BLE001 - a crash is a result
        full = isinstance(error, MemoryError) or "allocate memory" in str(error)
        detail = f"{type(error).__name__}: {str(error)[:300]}"
        sender.send({"verdict": "crash", "detail": f"over {MEMORY / 2**30:g} GiB of memory" if full else detail})


def limited(measure: Measure, entry: Any, seconds: float) -> Row:
    """Measure one network in a forked process, and give up after so many seconds of processor time.

    Each part has as many: to build the network, to prune it, and to find out whether the result is right. A network
    that could be pruned, but not judged in time, ``runs``. Busy machines give a process a part of the clock's seconds
    only: ten times as many are waited for at most.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(measure, entry, sender, seconds))
    process.start()
    sender.close()
    row: Row = {}
    try:
        while "verdict" not in row:
            if not receiver.poll(10 * seconds):
                return _late(row, f"{10 * seconds:g} s by the clock")
            row = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return _late(row, f"{seconds:g} s of processor time")
        return {"verdict": "crash", "detail": f"the process ended with code {process.exitcode}"}
    finally:
        if process.is_alive():
            process.join(2)
            process.kill()
        process.join()
    return row


def _late(row: Row, limit: str) -> Row:
    """Return the row of a network that took too long."""
    if "seconds" in row:
        return row | {"verdict": "runs", "detail": f"not judged: comparing took over {limit}"}
    return {"verdict": "timeout", "detail": f"no end after {limit}"}


KEPT = {
    "secateur": ("verdict", "precision", "groups", "channels", "macs_removed", "macs_removed_all", "inexact"),
    "peer": ("verdict", "precision", "macs_removed"),
}
"""What of a measurement is kept as it is; fractions to six places."""
TIMES = {"secateur": ("seconds", "forward_seconds"), "peer": ("seconds", "copy_seconds")}
BYTES = {"peak_bytes": "peak_mb", "bytes": "model_mb", "forward_peak_bytes": "forward_peak_mb"}


def kept(name: str, tool: str, measured: Row) -> Row:
    """Return the row of a measurement: what the tables say, in as many digits as mean something.

    Megabytes are 2²⁰ bytes. Reasons for a refusal are added up over the places where they hold.
    """
    row: Row = {"network": name, "tool": tool}
    for key in KEPT[tool]:
        if key in measured:
            value = measured[key]
            row[key] = round(value, 6) if isinstance(value, float) else value
    row |= {key: _rounded(measured[key]) for key in TIMES[tool] if key in measured}
    if row["verdict"] not in ("exact", "refused"):
        row["detail"] = " ".join(str(measured.get("detail", "")).split())[:160]
    if tool == "secateur":
        row |= {short: round(measured[key] / 2**20) for key, short in BYTES.items() if key in measured}
        if "refusals" in measured:
            reasons: Counter[tuple[str, str]] = Counter()
            for refusal in measured["refusals"]:
                if refusal["operator"] not in ("model output", "model input"):
                    reasons[refusal["operator"], refusal["reason"][:160]] += refusal["tensors"]
            row["refusals"] = len(measured["refusals"])
            row["reasons"] = [[*reason, tensors] for reason, tensors in reasons.items()]
    return row


def _rounded(seconds: float) -> float:
    return round(seconds, 2 if seconds >= 1 else 4)


def _pair(ratio: float, measure: Measure, timeout: float) -> None:
    """Time both tools in turn on the networks where they are near, or Secateur is slower."""
    results = arranged(STORE.read())
    for entry in entries():
        rows = results.get(entry.name, {})
        if not (entry.installed and near(rows, ratio)):
            continue
        found = limited(measure, entry, timeout)
        if found["verdict"] != "paired":
            print(f"{entry.name:55s} {found['verdict']} {found.get('detail', '')}", flush=True)
            continue
        for tool in ("secateur", "peer"):
            STORE.keep({**rows[tool], "seconds": _rounded(found[tool]), "paired": True})
        print(f"{entry.name:55s} {found['secateur']:.3f} s, {found['peer']:.3f} s", flush=True)


def main() -> None:
    """Sweep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="names with wildcards")
    parser.add_argument("--again", nargs="*", default=[], metavar="PATTERN", help="measure these anew")
    parser.add_argument("--limit", type=int, default=None, help="at most so many networks")
    parser.add_argument("--timeout", type=float, default=300, help="processor seconds for a network")
    parser.add_argument("--peer-timeout", type=float, default=120, help="the same for Torch-Pruning")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="every Nth network from the Kth: N sweeps at once")
    parser.add_argument("--pairs", type=float, default=None, metavar="RATIO", help="time near ones in turn; see above")
    parser.add_argument("--secateur", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()

    import timm  # noqa: F401 - imported once, before the processes fork
    import torch
    import torch_pruning  # noqa: F401

    from bench import measure

    torch.set_num_threads(1)
    if options.pairs is not None:
        _pair(options.pairs, measure.paired, options.timeout)
        SECTION.write()
        return
    part, parts = (int(n) for n in options.part.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--part {options.part}: K is 1 to N")
    results = arranged(STORE.read())
    limits = {"secateur": options.timeout, "peer": options.peer_timeout}
    tools = [t for t, wanted in (("secateur", options.secateur), ("peer", options.peer)) if wanted]
    chosen = [
        e
        for e in entries()
        if e.installed
        and any(fnmatchcase(e.name, p) or fnmatchcase(e.name.rpartition("/")[2], p) for p in options.only)
    ][part - 1 :: parts]
    measured = 0
    for entry in chosen:
        again = any(fnmatchcase(entry.name, p) or fnmatchcase(entry.name.rpartition("/")[2], p) for p in options.again)
        missing = [t for t in tools if again or t not in results.get(entry.name, {})]
        if not missing:
            continue
        if options.limit is not None and measured >= options.limit:
            break
        measured += 1
        for tool in missing:
            start = time.perf_counter()
            row = kept(entry.name, tool, limited(getattr(measure, tool), entry, limits[tool]))
            STORE.keep(row)
            print(
                f"{entry.name:55s} {tool:9s} {row.get('verdict', ''):14s} {seconds(row):>7s} s  "
                f"MACs -{percent(row, 'macs_removed')}% ({time.perf_counter() - start:.0f} s in all) "
                f"{row.get('detail', '')[:90]}",
                flush=True,
            )
    SECTION.write()


if __name__ == "__main__":
    main()
