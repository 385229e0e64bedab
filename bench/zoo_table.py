"""The sweep of ``bench.zoo`` as a section of ``docs/benchmarks.md``."""

from __future__ import annotations

from collections import Counter

from bench.models import entries
from bench.others import OTHERS
from bench.rows import Row, Store
from bench.sections import Section

STORE = Store("zoo.jsonl", ("network", "tool"))

Results = dict[str, dict[str, Row]]
"""Network -> ``secateur`` or ``peer`` -> row."""

HANDLED = ("exact", "inexact", "runs")
"""Verdicts on networks that the peer handles: it pruned them and they run."""
SMALL_MB = 64
"""Megabytes (2²⁰ bytes) of memory that nobody minds."""
LARGE = {"convit_tiny": "its code counts with widths, so that its trials are compared in fp64"}
"""What takes the memory where it is much, as measured step by step."""

INTRODUCTION = """\
`python -m bench.zoo`, one thread, each network in its own process, random weights, half of the channels of
every group. *MACs removed* is of exact groups; *with inexact* adds groups with a norm over the channels.
Torch-Pruning is told which layers make a network's outputs; of the further libraries' networks, which layers
Secateur leaves alone. Seconds are of processor time for trace + plan + apply (for Torch-Pruning: building
its graph, choosing by magnitude and cutting a copy: it cuts in place, and Secateur leaves the network as it
is), and for one plain forward beside it; where the two are near, they are timed in turn in one process
(`--pairs`). *Peak* is the extra memory of trace + plan + apply, in MB, beside
the model's own size."""
HEADER = (
    "| network | groups | channels | verdict | MACs removed % | with inexact % | s | forward s | peak MB "
    "| model MB | refusals | Torch-Pruning | MACs removed % | s |"
)


def arranged(rows: list[Row]) -> Results:
    """Return the rows by network and tool, in the order of the sweep, then networks that it no longer has."""
    found: Results = {entry.name: {} for entry in entries()}
    for row in rows:
        found.setdefault(row["network"], {})[row["tool"]] = row
    return {
        name: {tool: tools[tool] for tool in ("secateur", "peer") if tool in tools}
        for name, tools in found.items()
        if tools
    }


def near(rows: dict[str, Row], ratio: float) -> bool:
    """Tell whether Secateur took over so many times as long as the peer, on a network that the peer handles."""
    ours, theirs = rows.get("secateur", {}), rows.get("peer", {})
    both = theirs.get("verdict") in HANDLED and "seconds" in ours and "seconds" in theirs
    return both and ours["seconds"] > ratio * theirs["seconds"]


def percent(row: Row, key: str) -> str:
    """Write a fraction."""
    return f"{100 * row[key]:.1f}" if key in row else ""


def seconds(row: Row, key: str = "seconds") -> str:
    """Write a time."""
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
        percent(ours, "macs_removed"),
        percent(ours, "macs_removed_all"),
        seconds(ours),
        seconds(ours, "forward_seconds"),
        str(ours.get("peak_mb", "")),
        str(ours.get("model_mb", "")),
        str(ours.get("refusals", "")),
        theirs.get("verdict", ""),
        percent(theirs, "macs_removed"),
        seconds(theirs),
    ]
    return "| " + " | ".join(cells) + " |"


def _summary(results: Results) -> list[str]:
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
            f"| {title} | {len(rows)} | {sum('groups' in r for r in rows)} "
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


def _reasons(row: Row, theirs: Row) -> str:
    """Say in a few words what keeps channels of a network from going."""
    if theirs["macs_removed"] > 0.76:  # half of what a layer reads and makes is three quarters of its MACs
        return "nothing: Torch-Pruning removes more than the half asked for"
    found = Counter({f"{operator}: {reason}": tensors for operator, reason, tensors in row.get("reasons", ())})
    shown = [reason[:120].replace("|", "/") for reason, _ in found.most_common(3)]
    if row.get("macs_removed_all", 0) > row.get("macs_removed", 0) + 0.005:
        shown.insert(0, f"inexact groups are left out; with them {percent(row, 'macs_removed_all')}%")
    return "; ".join(shown) or "other channels were chosen, and constraints round down"


def _beside(results: Results) -> list[str]:
    """List the networks on which Secateur removes less than the peer, takes longer, or takes much memory."""
    less, slower, large = [], [], []
    for name, rows in results.items():
        ours, theirs = rows.get("secateur", {}), rows.get("peer", {})
        if theirs.get("verdict") in HANDLED and "macs_removed" in ours:
            if ours["macs_removed"] < theirs["macs_removed"] - 0.005:
                less.append(
                    f"| {name} | {percent(ours, 'macs_removed')} | {percent(theirs, 'macs_removed')} "
                    f"| {theirs['verdict']} | {_reasons(ours, theirs)} |"
                )
            if near(rows, 1.0):
                slower.append((ours["seconds"] / theirs["seconds"], name))
        if ours.get("peak_mb", 0) > SMALL_MB:
            ratio = ours["peak_mb"] / (ours["model_mb"] + ours["forward_peak_mb"])
            if ratio > 2:
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
        f"Where extra memory of trace + plan + apply is over {SMALL_MB} MB, it is over twice what the network",
        f"and one forward (of it, its pruned copy or its masked one, the largest) take on {many}",
        "",
    ]
    for ratio, name in sorted(large, reverse=True):
        short = name.rpartition("/")[2]
        lines.append(f"- {short}, {ratio:.1f}×: {LARGE.get(short, 'not looked into')}.")
    return lines


def _refused(results: Results) -> list[str]:
    """List why channels were refused, and the networks on which a tool's result is not exact."""
    reasons: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = {}
    for name, rows in results.items():
        for operator, reason, tensors in rows.get("secateur", {}).get("reasons", ()):
            reasons[operator, reason] += tensors
            where.setdefault((operator, reason), set()).add(name.rpartition("/")[2])
    lines = ["## What was refused, and what went wrong", ""]
    lines += ["| operator | reason | tensors | networks |", "|---|---|---:|---|"]
    for key, count in reasons.most_common():
        names = sorted(where[key])
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        lines.append(f"| {key[0]} | {key[1]} | {count} | {', '.join(names[:6])}{more} |")
    lines += ["", "| network | tool | verdict | detail |", "|---|---|---|---|"]
    for name, rows in results.items():
        for tool, row in rows.items():
            if row.get("verdict") not in ("exact", "refused"):
                detail = row.get("detail", "").replace("|", "/")
                lines.append(f"| {name} | {tool} | {row.get('verdict')} | {detail} |")
    return lines


def render() -> str:
    """Return the sweep as Markdown."""
    results = arranged(STORE.read())
    lines = [
        "## Networks of torchvision and timm",
        "",
        INTRODUCTION,
        "",
        *_summary(results),
        "",
        HEADER,
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
        *(_line(name, rows) for name, rows in results.items()),
        "",
        *_beside(results),
        "",
        *_refused(results),
    ]
    return "\n".join(lines)


SECTION = Section("benchmarks.md", "zoo", render)
