"""The headline and the tables of a run: its result in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report.charts import capitalized, describe_change, metric_name, pareto_front, score, share_left
from secateur.report.figures import Cell, Format, Table, byte_size, percent, quantity, significant
from secateur.report.reading import Measurement, Run


@dataclass(frozen=True)
class Headline:
    """One figure of the headline, before and after."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None
    """Whether the change is for the better; None where there is no change."""
    left: float | None = None
    """The size after pruning as a fraction of the original's; None for a metric."""
    note: str = ""


def headline(run: Run) -> list[Headline]:
    """Set metric, MACs, parameters, file size and latency before beside after."""
    before, after = run.result.baseline, run.result.final
    items = []
    for name, first, last in (
        (f"Test {metric_name(run)}", before.test, after.test),
        (f"Validation {metric_name(run)}", before.validation, after.validation),
    ):
        if first is None or last is None:
            continue
        points = 100 * (last - first)
        items.append(
            Headline(
                name,
                percent(first, 2),
                percent(last, 2),
                f"{points:+.2f} points".replace("-", "−"),
                None if abs(points) < 0.005 else points > 0,
            )
        )
        top5 = [(state.details or {}).get("top-5") for state in (before, after)]
        if None not in top5:
            was5, now5 = (float(value) for value in top5 if value is not None)
            gain = f"{100 * (now5 - was5):+.2f} points".replace("-", "−")
            same = abs(now5 - was5) < 0.00005
            items.append(
                Headline(f"{name}, top-5", percent(was5, 2), percent(now5, 2), gain, None if same else now5 > was5)
            )
        break
    was_ms, now_ms, at = latency(run)
    sizes: list[tuple[str, float | None, float | None, Any]] = [
        ("MACs", before.macs, after.macs, quantity),
        ("Parameters", before.parameters, after.parameters, quantity),
        ("File size", before.file_bytes, after.file_bytes, byte_size),
        ("Latency", was_ms, now_ms, lambda value: f"{significant(value)} ms"),
    ]
    notes = {"MACs": "for one image", "Latency": at}
    for name, was, now, write in sizes:
        if was is None or now is None or not was:
            continue
        change = f"{was / now:.2f}× faster" if name == "Latency" and now else describe_change(was, now)
        if name == "Latency" and now > was:
            change = f"{now / was:.2f}× slower"
        asked = run.result.latency
        noisy = after.latency_within_noise if asked is None else asked.within_noise
        if name == "Latency" and (noisy or abs(now - was) < 0.02 * was):
            change = "no change"
        items.append(
            Headline(
                name,
                write(was),
                write(now),
                change,
                None if change == "no change" else now <= was,
                now / was,
                notes.get(name, ""),
            )
        )
    return items


def latency(run: Run) -> tuple[float | None, float | None, str]:
    """Return the time before and after, in milliseconds, at the setting that was asked for, and that setting.

    A run without a target of latency has timed both networks on its example inputs, eagerly.
    """
    if (asked := run.result.latency) is not None:
        return 1000 * asked.before, 1000 * asked.after, asked.setting
    machine = run.config.get("machine")
    device = machine.get("device", "") if isinstance(machine, dict) else ""
    at = f"eager, example inputs{', ' if device else ''}{device}"
    return run.result.baseline.latency_ms, run.result.final.latency_ms, at


def sentence(run: Run) -> str:
    """Say the run's result in one sentence."""
    before, after = run.result.baseline, run.result.final
    text = (
        f"{percent(1 - share_left(run))} of the MACs and "
        f"{percent(1 - after.parameters / before.parameters) if before.parameters else '0%'} of the parameters removed"
    )
    if before.test is not None and after.test is not None:
        text += f"; test {metric_name(run)} {percent(before.test, 2)} before, {percent(after.test, 2)} after"
    return text + "."


def exactness(run: Run) -> tuple[str, bool | None]:
    """Say whether the surgery was verified exact, and whether that is good, bad or unknown."""
    check = run.result.verification
    if "exact" not in check:
        return "not verified", None
    error = check.get("max_error")
    detail = f", largest error {error:.1e}" if isinstance(error, int | float) else ""
    return (f"verified exact{detail}", True) if check["exact"] else (f"not exact{detail}", False)


def widths(run: Run) -> Table:
    """Output channels, MACs and parameters of every layer, before and after."""
    before, after = run.result.baseline, run.result.final
    earlier = {layer.module: layer for layer in before.layers}
    later = {layer.module: layer for layer in after.layers}
    rows: list[list[Cell]] = []
    for module, width in before.widths.items():
        now = after.widths.get(module)
        row: list[Cell] = [module, width, now, None if now is None or not width else now / width]
        first, last = earlier.get(module), later.get(module)
        row += [first.macs if first else None, last.macs if last else None]
        row += [first.parameters if first else None, last.parameters if last else None]
        rows.append(row)
    columns = [
        "Layer",
        "Filters before",
        "Filters after",
        "Kept",
        "MACs before",
        "MACs after",
        "Parameters before",
        "Parameters after",
    ]
    formats: dict[str, Format] = dict.fromkeys(columns[4:], "quantity")
    return Table(columns, rows, "Width of every layer", {**formats, "Kept": "percent"})


def details(run: Run) -> Table | None:
    """The metric's further figures before and after, then those of each class; None where it has none."""
    before, after = (_by_name(state.details) for state in (run.result.baseline, run.result.final))
    if not before or not after:
        return None
    rows: list[list[Cell]] = [
        [of, name, was, after.get((of, name))] for (of, name), was in before.items() if isinstance(was, float)
    ]
    columns = ["Of", "Figure", "Before", "After"]
    return Table(columns, rows, f"{capitalized(metric_name(run))} in detail", dict.fromkeys(columns[2:], "percent"))


def _by_name(found: Mapping[str, Any] | None) -> dict[tuple[str, str], Any]:
    """Return figures by what they are of, all classes or one, and by their name."""
    own = {("all", name): value for name, value in (found or {}).items() if name != "classes"}
    for label, figures in (found or {}).get("classes", {}).items():
        own |= {(label, name): value for name, value in figures.items()}
    return own


def rounds(run: Run) -> Table:
    """Every round of the run, reverted ones too."""
    metric = metric_name(run)
    rows: list[list[Cell]] = []
    for e in run.history:
        after = max(e.abs_rho_after.values(), default=None)
        rows.append(
            [
                e.round,
                "" if e.phase is None else str(e.phase),
                e.group or "all",
                e.channels,
                e.metric_before,
                max(e.abs_rho_before.values(), default=None),
                after,
                e.metric_dropped,
                e.metric_tuned,
                e.macs,
                "accepted" if e.accepted else "reverted",
                e.seconds,
            ]
        )
    columns = [
        "Round",
        "Phase",
        "Group",
        "Channels removed",
        f"{capitalized(metric)} before",
        "Largest |ρ| before",
        "after optimising",
        f"{capitalized(metric)} dropped",
        "fine-tuned",
        "MACs",
        "Outcome",
        "Seconds",
    ]
    empty = [i for i in range(len(columns)) if all(row[i] in (None, "") for row in rows)]
    return Table(
        [c for i, c in enumerate(columns) if i not in empty],
        [[c for i, c in enumerate(row) if i not in empty] for row in rows],
        "Every round",
        {columns[4]: "percent", columns[7]: "percent", columns[8]: "percent", "MACs": "quantity"},
    )


def refusals(run: Run) -> Table:
    """What could not be pruned, and why."""
    rows: list[list[Cell]] = [[r.module or "the model", r.operator, r.reason, r.source] for r in run.result.refused]
    return Table(["Module", "Operator", "Reason", "Source line"], rows, "What was left alone, and why")


def speeds(run: Run) -> Table | None:
    """Theoretical against measured speed-up of every setting and batch size."""
    if run.benchmark is None:
        return None
    theoretical = 1 / share_left(run) if run.result.final.macs else float("inf")
    pairs: dict[tuple[str, int], dict[str, Measurement]] = {}
    for row in run.benchmark.rows:
        pairs.setdefault((row.setting, row.batch_size), {})[row.variant] = row
    rows: list[list[Cell]] = [
        [
            setting,
            size,
            theoretical,
            p["original"].seconds / p["pruned"].seconds,
            1000 * p["original"].seconds,
            1000 * p["pruned"].seconds,
        ]
        for (setting, size), p in pairs.items()
        if {"original", "pruned"} <= set(p)
    ]
    columns = ["Setting", "Batch size", "Theoretical speed-up", "Measured speed-up", "Original, ms", "Pruned, ms"]
    return Table(columns, rows, "Theoretical against measured speed-up") if rows else None


def settings(run: Run) -> Table:
    """Configuration and environment, flattened to dotted keys."""
    rows: list[list[Cell]] = [[key, value] for key, value in _flatten(run.config)]
    return Table(["Setting", "Value"], rows, "Configuration and environment")


def side_by_side(runs: Sequence[Run]) -> Table:
    """One row a run: its metric, the MACs and parameters removed, and whether it is on the Pareto front."""
    front = pareto_front([(share_left(run), score(run.result.final)) for run in runs])
    rows: list[list[Cell]] = []
    for i, run in enumerate(runs):
        before, after = run.result.baseline, run.result.final
        change = score(after) - score(before)
        _, now_ms, at = latency(run)
        rows.append(
            [
                run.name,
                score(before),
                score(after),
                100 * change,
                1 - share_left(run),
                1 - after.parameters / before.parameters if before.parameters else None,
                after.file_bytes,
                now_ms,
                at,
                i in front,
                run.path.resolve().name,
            ]
        )
    metric = metric_name(runs[0])
    columns = [
        "Run",
        f"{capitalized(metric)} before",
        f"{capitalized(metric)} after",
        "Change, points",
        "MACs removed",
        "Parameters removed",
        "File",
        "Latency, ms",
        "timed with",
        "On the front",
        "Folder",
    ]
    formats: dict[str, Format] = {columns[i]: "percent" for i in (1, 2, 4, 5)}
    return Table(columns, rows, "Runs side by side", {**formats, columns[6]: "bytes"})


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Cell]]:
    if isinstance(value, dict):
        return [
            pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)) or "none")]
    if value is None or isinstance(value, bool):
        return [(prefix, {None: "none", True: "yes", False: "no"}[value])]
    return [(prefix, f"{value:g}" if isinstance(value, float) else str(value))]
