"""Sweep torchvision's and timm's networks with Secateur, and beside it with Torch-Pruning.

Usage: ``python -m bench.zoo [--only PATTERN ...] [--again PATTERN ...] [--limit N] [--part K/N] [--no-peer]
[--pairs RATIO]``.

Every network is measured in a process of its own, on one thread, within limits of time and memory. Results are kept in
a JSON file that later runs continue, and ``docs/benchmarks.md`` is written from it; ``--again`` measures matching
networks anew, and sweeps of different parts can share the file. With ``--pairs``, what is in the file is timed anew, in
turn in one process, on the networks where Secateur took over ``RATIO`` times as long as the peer.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.models import entries
from bench.others import OTHERS
from secateur.checkpoint import write_atomic

Row = dict[str, Any]

MEMORY = 12 * 2**30
"""Bytes that a process may take."""
SMALL = 64 * 2**20
"""Bytes of memory that nobody minds."""

HEADER = (
    "| network | groups | channels | verdict | MACs removed % | with inexact % | s | forward s | peak MB "
    "| model MB | refusals | Torch-Pruning | MACs removed % | s |"
)


Measure = Callable[[Any, Callable[[Row], None]], Row]
"""``measure(entry, stage)``: returns a row, and calls ``stage`` with what is known of it whenever a part is done."""


def _work(measure: Measure, entry: Any, sender: Any, seconds: float) -> None:
    def stage(row: Row) -> None:
        """Hand over what is known so far, and give the next part as many seconds."""
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, resource.RLIM_INFINITY))
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


def _megabytes(row: Row, key: str) -> str:
    return f"{row[key] / 2**20:.0f}" if key in row else ""


def _percent(row: Row, key: str) -> str:
    return f"{100 * row[key]:.1f}" if key in row else ""


def _seconds(row: Row, key: str = "seconds") -> str:
    return f"{row[key]:.2f}" if key in row else ""


def _line(name: str, rows: dict[str, Row]) -> str:
    ours, theirs = rows.get("secateur", {}), rows.get("peer", {})
    verdict = ours.get("verdict", "")
    if verdict == "exact" and ours.get("precision") == "fp32":
        verdict = "exact (fp32)"
    cells = [
        name,
        str(ours.get("groups", "")),
        str(ours.get("channels", "")),
        verdict,
        _percent(ours, "macs_removed"),
        _percent(ours, "macs_removed_all"),
        _seconds(ours),
        _seconds(ours, "forward_seconds"),
        _megabytes(ours, "peak_bytes"),
        _megabytes(ours, "bytes"),
        str(len(ours["refusals"])) if "refusals" in ours else "",
        theirs.get("verdict", ""),
        _percent(theirs, "macs_removed"),
        _seconds(theirs),
    ]
    return "| " + " | ".join(cells) + " |"


def _summary(results: dict[str, dict[str, Row]]) -> list[str]:
    lines = [
        "| | networks | traced | exact | refused | inexact groups run | crash or wrong | timeout |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for title, prefix in (("torchvision, classification", "torchvision/classification"),
                          ("torchvision, other", "torchvision"), ("timm", "timm"),
                          ("further libraries", tuple(OTHERS))):  # fmt: skip
        rows = [
            r["secateur"]
            for n, r in results.items()
            if n.startswith(prefix) and "secateur" in r and (title != "torchvision, other" or "classification" not in n)
        ]
        kinds = Counter(r.get("verdict") for r in rows)
        lines.append(
            f"| {title} | {len(rows)} | {sum(bool(r.get('traced')) for r in rows)} "
            f"| {kinds['exact']} | {kinds['refused']} "
            f"| {sum(r.get('inexact') == 'runs' for r in rows)} of {sum('inexact' in r for r in rows)} "
            f"| {len(rows) - kinds['exact'] - kinds['refused'] - kinds['timeout']} | {kinds['timeout']} |"
        )
    both = [r for r in results.values() if "seconds" in r.get("secateur", {}) and "seconds" in r.get("peer", {})]
    slower = [r for r in both if r["secateur"]["seconds"] > r["peer"]["seconds"]]
    kinds = Counter(r["peer"].get("verdict") for r in results.values() if "peer" in r)
    if both:
        ratio = sorted(r["peer"]["seconds"] / r["secateur"]["seconds"] for r in both)[len(both) // 2]
        alone = [r for r in both if r["secateur"]["seconds"] > r["peer"]["seconds"] - r["peer"]["copy_seconds"]]
        lines += [
            "",
            f"Torch-Pruning on the same networks: {', '.join(f'{n} {k}' for k, n in kinds.most_common())}.",
            f"On the {len(both)} networks that both end on, the median of its seconds over Secateur's is {ratio:.1f};",
            f"Secateur takes longer on {len(slower)}, or {len(alone)} where the copy is not counted.",
        ]
    return lines


HANDLED = ("exact", "inexact", "runs")
"""Verdicts on networks that the peer handles: it pruned them and they run."""


def _reasons(row: Row, theirs: Row) -> str:
    """Say in a few words what keeps channels of a network from going."""
    if theirs["macs_removed"] > 0.76:  # half of what a layer reads and makes is three quarters of its MACs
        return "nothing: Torch-Pruning removes more than the half asked for"
    found: Counter[str] = Counter()
    for refusal in row.get("refusals", ()):
        if refusal["operator"] not in ("model output", "model input"):
            found[f"{refusal['operator']}: {refusal['reason']}"] += refusal["tensors"]
    shown = [reason[:120].replace("|", "/") for reason, _ in found.most_common(3)]
    if row.get("macs_removed_all", 0) > row.get("macs_removed", 0) + 0.005:
        shown.insert(0, f"inexact groups are left out; with them {_percent(row, 'macs_removed_all')}%")
    return "; ".join(shown) or "other channels were chosen, and constraints round down"


LARGE = {"convit_tiny": "its code counts with widths, so that its trials are compared in fp64"}
"""What takes the memory where it is much, as measured step by step."""


def _beside(results: dict[str, dict[str, Row]]) -> list[str]:
    """List the networks on which Secateur removes less than the peer, takes longer, or takes much memory."""
    less, slower, large = [], [], []
    for name, rows in results.items():
        ours, theirs = rows.get("secateur", {}), rows.get("peer", {})
        if theirs.get("verdict") in HANDLED and "macs_removed" in ours:
            if ours["macs_removed"] < theirs["macs_removed"] - 0.005:
                less.append(
                    f"| {name} | {_percent(ours, 'macs_removed')} | {_percent(theirs, 'macs_removed')} "
                    f"| {theirs['verdict']} | {_reasons(ours, theirs)} |"
                )
            if _near(rows, 1.0):
                slower.append((ours["seconds"] / theirs["seconds"], name))
        if "peak_bytes" in ours:
            ratio = ours["peak_bytes"] / (ours["bytes"] + ours["forward_peak_bytes"])
            if ratio > 2 and ours["peak_bytes"] > SMALL:
                large.append((ratio, name))
    lines = ["## Where Torch-Pruning removes more, or is faster", ""]
    if less:
        lines += [
            "Of the networks that it handles, those of which it removes over half a percentage point more MACs:",
            "",
            "| network | Secateur % | Torch-Pruning % | its verdict | what is left, and why |",
            "|---|---:|---:|---|---|",
            *less,
        ]
    else:
        lines.append("It removes more of no network that it handles.")
    told = ", ".join(f"{name.rpartition('/')[2]} {ratio:.1f}×" for ratio, name in sorted(slower, reverse=True))
    lines += ["", f"Secateur takes longer on: {told}." if told else "Secateur takes longer on none of them."]
    many = f"{len(large)} network{'' if len(large) == 1 else 's'}:" if large else "no network."
    lines += [
        "",
        f"Where extra memory of trace + plan + apply is over {SMALL / 2**20:.0f} MB, it is over twice what the network",
        f"and one forward (of it, its pruned copy or its masked one, the largest) take on {many}",
        "",
    ]
    for ratio, name in sorted(large, reverse=True):
        short = name.rpartition("/")[2]
        lines.append(f"- {short}, {ratio:.1f}×: {LARGE.get(short, 'not looked into')}.")
    return lines


def report(results: dict[str, dict[str, Row]], patterns: Path) -> str:
    """Write the sweep, and the score on the patterns, as Markdown."""
    lines = [
        "# Benchmarks",
        "",
        "## Patterns: the wrong-channel score",
        "",
        "Small networks, one for each pattern (`tests/cases`), pruned to half their channels and compared with the",
        "original whose removed channels are zeroed where they are read. `python -m bench.patterns` measures it.",
        "",
        patterns.read_text() if patterns.exists() else "Not measured yet.\n",
        "## Networks of torchvision and timm",
        "",
        "`python -m bench.zoo`, one thread, each network in its own process, random weights, half of the channels of",
        "every group. *MACs removed* is of exact groups; *with inexact* adds groups with a norm over the channels.",
        "Torch-Pruning is told which layers make a network's outputs; of the further libraries' networks, which layers",
        "Secateur leaves alone. Seconds are of processor time for trace + plan + apply (for Torch-Pruning: building",
        "its graph, choosing by magnitude and cutting a copy: it cuts in place, and Secateur leaves the network as it",
        "is), and for one plain forward beside it; where the two are near, they are timed in turn in one process",
        "(`--pairs`). *Peak* is the extra memory of trace + plan + apply, in MB, beside",
        "the model's own size.",
        "",
        *_summary(results),
        "",
        HEADER,
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
        *(_line(name, rows) for name, rows in results.items()),
        "",
        *_beside(results),
        "",
        "## What was refused, and what went wrong",
        "",
    ]
    reasons: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = {}
    for name, rows in results.items():
        for r in rows.get("secateur", {}).get("refusals", ()):
            if r["operator"] not in ("model output", "model input"):
                reasons[r["operator"], r["reason"]] += r["tensors"]
                where.setdefault((r["operator"], r["reason"]), set()).add(name.rpartition("/")[2])
    lines += ["| operator | reason | tensors | networks |", "|---|---|---:|---|"]
    for key, count in reasons.most_common():
        names = sorted(where[key])
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        lines.append(f"| {key[0]} | {key[1][:160]} | {count} | {', '.join(names[:6])}{more} |")
    lines += ["", "| network | tool | verdict | detail |", "|---|---|---|---|"]
    for name, rows in results.items():
        for tool, row in rows.items():
            if row.get("verdict") not in ("exact", "refused"):
                detail = " ".join(str(row.get("detail", "")).split())[:160].replace("|", "/")
                lines.append(f"| {name} | {tool} | {row.get('verdict')} | {detail} |")
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _keep(path: Path, name: str, tool: str, row: Row) -> dict[str, dict[str, Row]]:
    """Add a row to the file, which another sweep may be writing too, and return all rows in the order of the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        latest = _read(path)
        latest.setdefault(name, {})[tool] = row
        results = {e.name: latest[e.name] for e in entries() if e.name in latest}
        write_atomic(path, json.dumps(results, indent=1).encode())
    finally:
        os.close(folder)
    return results


def _near(rows: dict[str, Row], ratio: float) -> bool:
    """Tell whether Secateur took over so many times as long as the peer, on a network that the peer handles."""
    ours, theirs = rows.get("secateur", {}), rows.get("peer", {})
    both = theirs.get("verdict") in HANDLED and "seconds" in ours and "seconds" in theirs
    return both and ours["seconds"] > ratio * theirs["seconds"]


def _pair(
    path: Path, results: dict[str, dict[str, Row]], ratio: float, measure: Measure, timeout: float
) -> dict[str, dict[str, Row]]:
    """Time both tools in turn on the networks where they are near, or Secateur is slower."""
    for entry in entries():
        rows = results.get(entry.name, {})
        if not (entry.installed and _near(rows, ratio)):
            continue
        found = limited(measure, entry, timeout)
        if found["verdict"] != "paired":
            print(f"{entry.name:55s} {found['verdict']} {found.get('detail', '')}", flush=True)
            continue
        for tool in ("secateur", "peer"):
            results = _keep(path, entry.name, tool, {**rows[tool], "seconds": found[tool], "paired": True})
        print(f"{entry.name:55s} {found['secateur']:.3f} s, {found['peer']:.3f} s", flush=True)
    return results


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
    parser.add_argument("--json", type=Path, default=Path("docs/zoo.json"))
    parser.add_argument("--markdown", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--patterns", type=Path, default=Path("docs/patterns.md"))
    options = parser.parse_args()

    import timm  # noqa: F401 - imported once, before the processes fork
    import torch
    import torch_pruning  # noqa: F401

    from bench import measure

    torch.set_num_threads(1)
    results = _read(options.json)
    if options.pairs is not None:
        results = _pair(options.json, results, options.pairs, measure.paired, options.timeout)
        options.markdown.write_text(report(results, options.patterns))
        return
    part, parts = (int(n) for n in options.part.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--part {options.part}: K is 1 to N")
    seconds = {"secateur": options.timeout, "peer": options.peer_timeout}
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
            row = limited(getattr(measure, tool), entry, seconds[tool])
            results = _keep(options.json, entry.name, tool, row)
            print(
                f"{entry.name:55s} {tool:9s} {row.get('verdict', ''):14s} {_seconds(row):>7s} s  "
                f"MACs -{_percent(row, 'macs_removed')}% ({time.perf_counter() - start:.0f} s in all) "
                f"{' '.join(str(row.get('detail', '')).split())[:90]}",
                flush=True,
            )
    options.markdown.write_text(report(results, options.patterns))


if __name__ == "__main__":
    main()
