"""The figures of a run, and those that set several runs side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from secateur.report.curves import curves
from secateur.report.figures import Figure, Series, Tone, byte_size, percent, quantity
from secateur.report.naming import bounded
from secateur.report.reading import Layer, Measurement, Run, State, Swept

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def total_memory(layers: Sequence[Layer], batch_size: int) -> int:
    r"""Compute the total run-time memory of a network.

    Singh et al. 2020, eqs. 4-6 and 13: :math:`\mathrm{TRM} = \sum_l 4 w_o h_o c_o B + 4 k_w k_h c_i c_o`, feature maps
    and weights of every layer at once. Departures: biases count among the weights.

    Args:
        layers: Cost of every layer.
        batch_size: Number of examples, B.

    Returns:
        Bytes.
    """
    return sum(4 * layer.positions * layer.out_channels * batch_size + 4 * layer.parameters for layer in layers)


def charts(run: Run) -> list[Figure]:
    """Draw every figure that the run has the numbers for."""
    figures = [
        history(run),
        macs_per_layer(run),
        chosen_widths(run),
        sensitivity(run),
        predictions(run),
        throughput(run),
        memory(run),
        largest_correlation(run),
    ]
    return [figure for figure in figures if figure is not None]


def comparison(runs: Sequence[Run], sweeps: Sequence[Swept] = ()) -> list[Figure]:
    """Draw the figures that set several runs, and the trials of sweeps, side by side."""
    return [pareto(runs, sweeps), *([layers_kept(runs)] if runs else [])]


def history(run: Run) -> Figure:
    """Metric against MACs over the rounds, those that were reverted marked."""
    result, episodes = run.result, run.history
    start = result.baseline
    metric = metric_name(run)
    kept = [e for e in episodes if e.accepted and e.metric_tuned is not None]
    reverted = [e for e in episodes if not e.accepted and e.metric_tuned is not None]
    series = []
    dropped = [e for e in episodes if e.metric_dropped is not None]
    if dropped:
        series.append(
            Series(
                "after dropping, before fine-tuning",
                [1 - e.macs / start.macs for e in dropped],
                [e.metric_dropped for e in dropped],
                "points",
                Tone.BEFORE,
                [f"round {e.round}" for e in dropped],
            )
        )
    first_x: list[float] = [0.0] if start.validation is not None else []
    first_y: list[float | int | None] = [start.validation] if start.validation is not None else []
    series.append(
        Series(
            "after fine-tuning, accepted",
            [*first_x, *(1 - e.macs / start.macs for e in kept)],
            [*first_y, *(e.metric_tuned for e in kept)],
            "line",
            Tone.AFTER,
            [*(["original"] * len(first_x)), *(f"round {e.round}" for e in kept)],
        )
    )
    if reverted:
        series.append(
            Series(
                "after fine-tuning, reverted",
                [1 - e.macs / start.macs for e in reverted],
                [e.metric_tuned for e in reverted],
                "points",
                Tone.REVERTED,
                [f"round {e.round}, reverted" for e in reverted],
            )
        )
    far = max((x for s in series for x in s.x if isinstance(x, float)), default=0.0)
    floor = tolerance_floor(run)
    if floor is not None:
        series.append(Series(f"least {metric} allowed", [0.0, far], [floor, floor], "rule", Tone.LIMIT))
    decisive = [y for s in series if s.tone in (Tone.AFTER, Tone.LIMIT) for y in s.y if y is not None]
    span = metric_range(decisive, [y for s in series for y in s.y if y is not None])
    low = [e.metric_dropped for e in dropped if e.metric_dropped is not None and e.metric_dropped < span[0]]
    below = f" Below the axis: {len(low)} before fine-tuning, the lowest {percent(min(low))}." if low else ""
    return Figure(
        id="history",
        title="History of the run",
        summary=f"{len(episodes)} rounds, {len(kept)} accepted and {len(episodes) - len(kept)} reverted, took the MACs "
        f"from {quantity(start.macs)} to {quantity(result.final.macs)}.{below}",
        x_label="MACs removed",
        y_label=f"validation {metric}",
        series=series,
        x_format="percent",
        y_format="metric",
        y_range=span,
    )


def metric_range(decisive: Sequence[float], others: Sequence[float] = ()) -> tuple[float, float]:
    """Return the axis of a metric: a point at least, so that its ticks are tenths apart, and no more than decides.

    Args:
        decisive: Values that must be seen.
        others: Values that are shown where they lie no further off than the decisive ones, or 2 points, lie apart.
    """
    low, high = min(decisive, default=0.0), max(decisive, default=1.0)
    reach = max(0.02, high - low)
    near = [value for value in others if low - reach <= value <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    pad = max(0.1 * (high - low), (0.01 - (high - low)) / 2)
    return low - pad, high + pad


def chosen_widths(run: Run) -> Figure | None:
    """Filters of every layer before and after."""
    before, after = run.result.baseline.widths, run.result.final.widths
    if not before:
        return None
    narrowed = [name for name in before if after.get(name, before[name]) < before[name]]
    return Figure(
        id="filters",
        title="Widths that were chosen",
        summary=f"Filters of each layer before and after; {len(narrowed)} of {len(before)} layers are narrower.",
        x_label="layer",
        y_label="filters",
        x_scale="category",
        series=[
            Series("original", list(before), list(before.values()), "bar", Tone.BEFORE),
            Series("pruned", list(before), [after.get(name) for name in before], "bar", Tone.AFTER),
        ],
    )


def sensitivity(run: Run) -> Figure | None:
    """What each group loses, as the run measured it last, and the widths it came to."""
    table = run.sensitivity
    if table is None or not table.damage:
        return None
    final = run.result.final.widths
    drawn = curves(table, {name: size - final[name] for name, size in table.sizes.items() if name in final})
    return replace(drawn, summary=f"{drawn.summary} Marked is where the run has cut.")


def predictions(run: Run) -> Figure | None:
    """Shares of time and memory that are left: as predicted, and as measured."""
    rows = run.benchmark.rows if run.benchmark else []
    series = []
    if (asked := run.result.latency) is not None:
        series.append(
            Series(
                "time, predicted from the times of layers", [asked.predicted], [asked.measured], "points", Tone.AFTER,
                [asked.setting],
            )
        )  # fmt: skip
    before, after = run.result.baseline, run.result.final
    times, memories = [], []
    for setting, variants in _settings(rows).items():
        for first, last in _pairs(variants):
            where = f"{setting}, batch {first.batch_size}"
            times.append((share_left(run), last.seconds / first.seconds, where))
            own, other = (row.peak_bytes and row.peak_bytes + (row.weight_bytes or 0) for row in (first, last))
            if own and other and before.layers and after.layers:
                computed = [total_memory(state.layers, first.batch_size) for state in (before, after)]
                memories.append((computed[1] / computed[0], other / own, where))
    for name, points, tone, place in (
        ("time, predicted by MACs", times, Tone.BEFORE, 0),
        ("memory, predicted by its sum over layers", memories, Tone.BEFORE_COMPUTED, 1),
    ):
        if points:
            x, y, labels = (list(column) for column in zip(*points, strict=True))
            series.append(Series(name, x, y, "points", tone, labels, place=place))
    if not series:
        return None
    far = 1.05 * max(1.0, *(value for s in series for value in (*s.x, *s.y) if isinstance(value, float)))
    said = ""
    if asked is not None:
        said = f" Of the time, {percent(asked.asked)} was to be left at {asked.setting}: predicted were "
        said += f"{percent(asked.predicted)}, measured are {percent(asked.measured)}."
    series.append(Series("as predicted", [0.0, far], [0.0, far], "rule", Tone.LIMIT, ["as predicted", "as predicted"]))
    return Figure(
        id="predictions",
        title="Predictions against measurements",
        summary="Share of the original's time and memory that is left; above the line it is more than predicted."
        + said,
        x_label="predicted share left",
        y_label="measured share left",
        series=series,
        x_format="percent",
        y_format="percent",
        x_range=(0.0, far),
        y_range=(0.0, far),
    )


def _pairs(variants: Mapping[str, Sequence[Measurement]]) -> list[tuple[Measurement, Measurement]]:
    """Return the measurements of the original and of the pruned network at every batch size that both have."""
    first = {row.batch_size: row for row in variants.get("original", [])}
    return [(first[row.batch_size], row) for row in variants.get("pruned", []) if row.batch_size in first]


def macs_per_layer(run: Run) -> Figure | None:
    """MACs of every layer before and after, as CFP's figure 3."""
    before, after = run.result.baseline, run.result.final
    if not before.layers:
        return None
    later = {layer.module: layer.macs for layer in after.layers}
    names = [layer.module for layer in before.layers]
    heaviest = max(before.layers, key=lambda layer: layer.macs)
    return Figure(
        id="macs",
        title="MACs per layer",
        summary=f"Per image, before and after. The heaviest layer, {heaviest.module}, went from "
        f"{quantity(heaviest.macs)} to {quantity(later.get(heaviest.module, 0))}.",
        x_label="layer",
        y_label="MACs",
        x_scale="category",
        y_format="quantity",
        source="Singh et al. 2020, fig. 3",
        series=[
            Series("original", names, [layer.macs for layer in before.layers], "bar", Tone.BEFORE),
            Series("pruned", names, [later.get(name) for name in names], "bar", Tone.AFTER),
        ],
    )


def throughput(run: Run) -> Figure | None:
    """Images per second against batch size on every device measured, as CFP's figure 4."""
    rows = run.benchmark.rows if run.benchmark else []
    if not rows:
        return None
    series, gains = [], []
    for place, (setting, variants) in enumerate(_settings(rows).items()):
        for variant, points in variants.items():
            tone = Tone.AFTER if variant == "pruned" else Tone.BEFORE
            series.append(
                Series(
                    f"{variant}, {setting}",
                    [p.batch_size for p in points],
                    [p.batch_size / p.seconds for p in points],
                    "line",
                    tone,
                    error=[p.batch_size * p.iqr / 2 / p.seconds**2 for p in points],
                    place=place,
                )
            )
        gains += speed_ups(variants)
    return Figure(
        id="throughput",
        title="Throughput",
        summary="Images per second against batch size"
        + (f"; over all settings {statistics.median(gains):.2f} times as many once pruned (median)." if gains else "."),
        x_label="batch size",
        y_label="images per second",
        x_scale="log",
        y_scale="log",
        x_format="integer",
        y_format="quantity",
        source="Singh et al. 2020, fig. 4",
        series=series,
    )


def memory(run: Run) -> Figure | None:
    """Run-time memory against batch size, computed and measured, as CFP's figure 5."""
    before, after = run.result.baseline, run.result.final
    if not before.layers or not after.layers:
        return None
    rows = [row for row in (run.benchmark.rows if run.benchmark else []) if row.peak_bytes is not None]
    sizes = sorted({row.batch_size for row in rows}) or list(BATCH_SIZES)
    series = [
        Series(
            "original, computed", sizes, [total_memory(before.layers, b) for b in sizes], "line", Tone.BEFORE_COMPUTED
        ),
        Series("pruned, computed", sizes, [total_memory(after.layers, b) for b in sizes], "line", Tone.AFTER_COMPUTED),
    ]
    for place, (setting, variants) in enumerate(_settings(rows).items()):
        for variant, points in variants.items():
            tone = Tone.AFTER if variant == "pruned" else Tone.BEFORE
            series.append(
                Series(
                    f"{variant}, measured, {setting}",
                    [p.batch_size for p in points],
                    [(p.peak_bytes or 0) + (p.weight_bytes or 0) for p in points],
                    "line",
                    tone,
                    place=place,
                )
            )
    largest = sizes[-1]
    first, last = total_memory(before.layers, largest), total_memory(after.layers, largest)
    return Figure(
        id="memory",
        title="Run-time memory",
        summary=f"Total run-time memory against batch size. Computed for {largest} images: {byte_size(first)} before, "
        f"{byte_size(last)} after." + (" Measured is the peak of one forward pass and its weights." if rows else ""),
        x_label="batch size",
        y_label="bytes",
        x_scale="log",
        y_scale="log",
        x_format="integer",
        y_format="bytes",
        source="Singh et al. 2020, fig. 5, eqs. 4-6 and 13",
        series=series,
    )


def largest_correlation(run: Run) -> Figure | None:
    """Largest |ρ| among the filters of each layer, before and after."""
    rho = run.result.max_abs_rho
    if not rho.before:
        return None
    names = list(rho.before)
    after = [rho.after.get(name) for name in names]
    known = [value for value in after if value is not None]
    mean = sum(rho.before.values()) / len(names)
    summary = f"Mean over the layers: {mean:.2f} before"
    summary += f", {sum(known) / len(known):.2f} after." if known else "."
    return Figure(
        id="correlation",
        title="Largest correlation among filters",
        summary=summary,
        x_label="layer",
        y_label="largest |ρ|",
        x_scale="category",
        y_range=(0.0, 1.0),
        source="Singh et al. 2020, eq. 7",
        series=[
            Series("original", names, list(rho.before.values()), "bar", Tone.BEFORE),
            Series("pruned", names, after, "bar", Tone.AFTER),
        ],
    )


def pareto(runs: Sequence[Run], sweeps: Sequence[Swept] = ()) -> Figure:
    """Test metric against the MACs removed, one point a run or a trial, and the Pareto front of all."""
    everything = [*runs, *(run for sweep in sweeps for run in sweep.runs)]
    points = [(1 - share_left(run), score(run.result.final), run.name) for run in everything]
    front = pareto_front([(-x, y) for x, y, _ in points])
    names = "; ".join(points[i][2] for i in front)
    series = [
        Series(name, [x], [y], "points", Tone.RUN, [name], place=place)
        for place, (x, y, name) in enumerate(points[: len(runs)])
    ]
    first = len(runs)
    for place, sweep in enumerate(sweeps, start=len(runs)):
        own = points[first : first + len(sweep.runs)]
        first += len(own)
        if own:
            x, y, labels = (list(column) for column in zip(*own, strict=True))
            series.append(Series(f"trials of {sweep.name}", x, y, "points", Tone.TRIAL, labels, place=place))
    starts = sorted({score(run.result.baseline) for run in everything})
    series.append(Series("original", [0.0] * len(starts), starts, "points", Tone.BEFORE, ["original"] * len(starts)))
    ordered = sorted(front, key=lambda i: points[i][0])
    series.insert(
        0,
        Series(
            "Pareto front",
            [points[i][0] for i in ordered],
            [points[i][1] for i in ordered],
            "rule",
            Tone.LIMIT,
            [points[i][2] for i in ordered],
        ),
    )
    return Figure(
        id="pareto",
        title=f"{capitalized(metric_name(everything[0]))} against cost",
        summary=f"Each run's {metric_name(everything[0])} against the share of MACs it removed. On the front: {names}.",
        x_label="MACs removed",
        y_label=f"test {metric_name(everything[0])}",
        series=series,
        x_format="percent",
        x_range=(-0.03, 1.0),
        y_format="metric",
        y_range=metric_range([y for _, y, _ in points] + starts),
    )


def layers_kept(runs: Sequence[Run]) -> Figure:
    """Share of the filters of each layer that each run kept."""
    names = list(dict.fromkeys(module for run in runs for module in run.result.baseline.widths))
    series = []
    for place, run in enumerate(runs):
        before, after = run.result.baseline.widths, run.result.final.widths
        kept: list[float | int | None] = [
            after[name] / before[name] if name in before and name in after else None for name in names
        ]
        series.append(Series(run.name, names, kept, "bar", Tone.RUN, place=place))
    return Figure(
        id="kept",
        title="Filters kept per layer",
        summary=f"Share of each layer's filters left by each of the {len(runs)} runs.",
        x_label="layer",
        y_label="share kept",
        x_scale="category",
        series=series,
        y_range=(0.0, 1.0),
        y_format="percent",
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other point beats.

    Args:
        points: Pairs of a cost, lower better, and a metric, higher better.

    Returns:
        Ascending indices of the points such that no other has at most the cost and at least the metric, one of the
        two strictly better.
    """
    return [
        i
        for i, (cost, metric) in enumerate(points)
        if not any(c <= cost and m >= metric and (c < cost or m > metric) for c, m in points)
    ]


def capitalized(name: str) -> str:
    """Begin a sentence with a name, unless it has capitals of its own, such as mAP."""
    return name.capitalize() if name.islower() else name


def metric_name(run: Run) -> str:
    """Name of the run's metric as read in a sentence."""
    return run.result.metric.replace("_", " ")


def score(state: State) -> float:
    """Test metric, or where none was measured the validation metric."""
    value = state.test if state.test is not None else state.validation
    return float("nan") if value is None else value


def share_left(run: Run) -> float:
    """MACs of the pruned network as a fraction of the original's."""
    return run.result.final.macs / run.result.baseline.macs if run.result.baseline.macs else 1.0


def tolerance_floor(run: Run) -> float | None:
    """Least validation metric that the run was allowed; None where a target, widths or ratios end it."""
    tolerance, start = run.config.get("tolerance"), run.result.baseline.validation
    if start is None or tolerance is None or not bounded(run.config):
        return None
    return start - float(tolerance) / 100


def speed_ups(variants: dict[str, list[Measurement]]) -> list[float]:
    """Time of the original over time of the pruned network, at every batch size that both have."""
    return [first.seconds / last.seconds for first, last in _pairs(variants)]


def _settings(rows: Sequence[Measurement]) -> dict[str, dict[str, list[Measurement]]]:
    """Rows by setting, then by network, in order of batch size."""
    found: dict[str, dict[str, list[Measurement]]] = {}
    for row in sorted(rows, key=lambda row: (row.variant, row.batch_size)):
        found.setdefault(row.setting, {}).setdefault(row.variant, []).append(row)
    return found


def describe_change(before: float, after: float) -> str:
    """Write the change of a size in percent: ``−61.5%``."""
    return f"{'+' if after > before else '−'}{percent(abs(before - after) / before)}" if before else ""
