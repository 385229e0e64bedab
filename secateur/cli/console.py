"""What people see in the terminal: tables, numbers with units, progress bars, and errors of one line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from secateur.cli import signals
from secateur.training.launched import process

if TYPE_CHECKING:
    from pathlib import Path

    from secateur.compensation.sensitivity import Sensitivity
    from secateur.graph.channels import ChannelGraph, Member

WIDTH = 120
"""Columns of what is written to a file or a pipe, where there is no terminal to ask."""

LINE_SECONDS = 30.0
"""Where there is no terminal, progress is a line in so many seconds at most."""

PICTURE_WIDTH = 100
"""Columns of a picture of the terminal."""


def output(*, record: bool = False) -> Console:
    """Return the console for results, on standard output; ``record`` keeps what is printed, for a picture."""
    width = PICTURE_WIDTH if record else None if sys.stdout.isatty() else WIDTH
    return Console(width=width, record=record, highlight=False, emoji=False)


_warned: list[str] = []
"""Warnings of the command under way."""


def error_line(text: str, kind: str = "error") -> None:
    """Write one line to standard error, whatever line breaks the text holds; processes but the first give a number."""
    if kind == "warning":
        _warned.append(" ".join(text.split()))
    text = f"process {process()}: {text}" if process() else text
    colour = "red" if kind == "error" else "yellow"
    line = Text.assemble((f"{kind}:", f"bold {colour}"), " ", " ".join(text.split()))
    Console(stderr=True, highlight=False, emoji=False).print(line, soft_wrap=True)


def write_json(value: Any) -> None:
    """Write ``value`` as the one JSON document of a command, with its ``warnings`` where there are any."""
    if _warned and isinstance(value, dict):
        value = {**value, "warnings": list(_warned)}
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class Steps:
    """Progress of a command's steps on standard error.

    On a terminal a step is a line with a spinner until its length is known, and with a bar from then on. Elsewhere a
    step that takes long writes a line now and then.
    """

    def __init__(self, *, quiet: bool = False, every: float = LINE_SECONDS) -> None:
        console = Console(stderr=True, highlight=False, emoji=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=21)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
            # A narrow terminal cuts the note, and nothing else.
            TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            expand=True,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._console, self._said, self._every = console, time.monotonic(), every
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int | None = None, note: str = "") -> None:
        """Show that ``done`` of ``total`` units of ``step`` are finished; stop here, if a signal asks to."""
        signals.check()
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=total, note=note)
        self._progress.update(self._tasks[step], completed=done, total=total, note=note)
        if (total or 1) > 1 and not self._console.is_terminal and time.monotonic() - self._said > self._every:
            self._said = time.monotonic()
            of = f" ({note})" if note else ""
            self._console.print(f"{step.strip()}: {done} of {total}{of}", markup=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show ``name`` as running until the block ends."""
        self(name, 0)
        yield
        self(name, 1, 1)


class _OneLine(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            error_line(record.getMessage(), "warning" if record.levelno < logging.ERROR else "error")
        else:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(record.getMessage().split())}"
            Console(stderr=True, highlight=False, emoji=False, markup=False).print(line, soft_wrap=True)


@contextmanager
def log_lines() -> Iterator[None]:
    """Show the package's own log messages as lines on standard error: from WARNING up, unless ``running`` says else."""
    logger, handler = logging.getLogger("secateur"), _OneLine()
    _warned.clear()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def quantity(value: float) -> str:
    """Write a count with three digits and an SI prefix.

    Example:
        >>> quantity(2293000), quantity(980), quantity(0)
        ('2.29 M', '980', '0')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Write a number of bytes with a decimal prefix.

    Example:
        >>> size(1728000)
        '1.73 MB'
    """
    return f"{quantity(count)}{'' if abs(count) >= 1e3 else ' '}B"


def change(before: float, after: float) -> str:
    """Write how a quantity changed, in percent of what it was.

    Example:
        >>> change(200, 13), change(4, 5), change(0, 1)
        ('−93.5%', '+25.0%', '')
    """
    if before == 0:
        return ""
    percent = 100 * (after - before) / before
    return f"{'−' if percent < 0 else '+'}{abs(percent):.1f}%"


def comparison(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    metric: str = "accuracy",
    timed: Mapping[str, Any] | None = None,
) -> Table:
    """Tabulate a network's figures before and after pruning; those that were not measured are left out.

    Args:
        before: Any of ``test``, ``validation`` (fractions), ``details`` with ``top-5``, ``macs``, ``parameters``,
            ``memory_bytes``, ``file_bytes``, ``latency_ms``.
        after: The same of the pruned network, and ``latency_within_noise``.
        metric: Name of the metric that ``test`` and ``validation`` hold.
        timed: What a target of latency measured, which stands in place of ``latency_ms``.
    """
    if timed is not None:
        before, after = (
            {**of, "latency_ms": 1000 * timed[key], "latency_within_noise": timed.get("within_noise")}
            for of, key in ((before, "before"), (after, "after"))
        )
    table = _table("", "before>", "after>", "change>")
    top5 = [(values.get("details") or {}).get("top-5") for values in (before, after)]
    of = "test" if before.get("test") is not None else "validation"
    measured: list[tuple[str, Any, Any]] = [
        (f"{metric}, test set", before.get("test"), after.get("test")),
        (f"{metric}, validation set", before.get("validation"), after.get("validation")),
        (f"top-5, {of} set", top5[0], top5[1]),
    ]
    for name, was, now in measured:
        if was is not None and now is not None:
            points = 100 * (now - was)
            sign = "−" if points < 0 else "+"
            table.add_row(name, f"{was:.2%}", f"{now:.2%}", f"{sign}{abs(points):.2f} points")
    for key, name, write in (
        ("macs", "MACs", quantity),
        ("parameters", "parameters", quantity),
        ("memory_bytes", "run-time memory", size),
        ("file_bytes", "file size", size),
        ("latency_ms", "CPU latency" if timed is None else f"latency ({_setting(timed)})", lambda ms: f"{ms:.3g} ms"),
    ):
        if before.get(key) is not None and after.get(key) is not None:
            noisy = key == "latency_ms" and after.get("latency_within_noise")
            changed = "within noise" if noisy else change(before[key], after[key])
            table.add_row(name, write(before[key]), write(after[key]), changed)
    return table


def widths(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Tabulate the number of filters of every layer before and after, narrower layers marked by a bar."""
    table = _table("layer", "before>", "after>", "kept")
    for name, old in before.items():
        new = after.get(name, old)
        full = max(1, round(24 * new / old)) if new else 0
        table.add_row(name, str(old), str(new), "[green]" + "█" * full + "[/][dim]" + "░" * (24 - full) + "[/]")
    return table


def graph_values(graph: ChannelGraph) -> dict[str, Any]:
    """Return a channel graph as JSON values: its groups, what can't be pruned, and what it costs."""
    from secateur.graph import cost

    return {
        "macs": cost.macs(graph),
        "parameters": cost.parameters(graph),
        "prunable_channels": _prunable(graph),
        "groups": [
            {
                "name": group.name,
                "channels": group.size,
                "prunable_channels": int(group.removable.sum()),
                "producers": _layers(graph, group.producers),
                "consumers": _layers(graph, group.consumers),
                "constraint": group.constraint,
                "exact": group.exact,
                "reason": group.reason,
                "macs": macs,
            }
            for group, macs in zip(graph.groups, _group_macs(graph), strict=True)
        ],
        "refused": [asdict(refusal) for refusal in graph.refused],
        "notes": list(graph.notes),
    }


def show_graph(graph: ChannelGraph, name: str, seconds: float, figure: Path | None = None) -> None:
    """Print the groups of a network, what can't be pruned, a line that sums it up, and where the figure is."""
    from secateur.graph import cost
    from secateur.graph.channels import MACS_OF_A_GROUP

    out = output()
    table = _table("group", "channels>", "written by", "read by", "constraint", "MACs>")
    total = cost.macs(graph) or 1
    for group, macs in zip(graph.groups, _group_macs(graph), strict=True):
        rules = [group.constraint] if group.constraint else []
        rules += [] if group.exact else [f"inexact: {group.reason}"]
        table.add_row(
            escape(group.name),
            str(group.size),
            escape(_some(_layers(graph, group.producers))),
            escape(_some(_layers(graph, group.consumers))),
            escape(", ".join(rules)),
            f"{macs / total:.1%}",
        )
    out.print(table)
    if graph.groups:
        out.print(f"MACs: {MACS_OF_A_GROUP}", markup=False, soft_wrap=True)
    if graph.refused:
        refused = _table("not pruned", "in module", "at", "because")
        for refusal in graph.refused:
            row = (refusal.operator, refusal.module, refusal.source, refusal.reason)
            refused.add_row(*map(escape, row))
        out.print()
        out.print(refused)
    for note in graph.notes:
        out.print(f"note: {note}", markup=False)
    out.print(
        f"\n{name}: {len(graph.groups)} groups, {_prunable(graph)} prunable channels, {quantity(total)} MACs, "
        f"{quantity(cost.parameters(graph))} parameters, traced in {seconds:.2f} s",
        style="bold",
        markup=False,
    )
    if figure is not None:
        out.print(f"drawn: {figure}", markup=False, soft_wrap=True)


def show_sensitivity(table: Sensitivity, name: str, seconds: float, files: Mapping[str, str | None]) -> None:
    """Print what each group loses, the most harmful first, and where table and figure are."""
    out = output()
    out.print(table.table(), markup=False, soft_wrap=True)
    out.print(
        f"\n{name}: {len(table.damage)} groups measured on {table.images} images in {seconds:.0f} s",
        style="bold",
        markup=False,
    )
    if files["file"]:
        out.print(f"saved: {files['file']}", markup=False, soft_wrap=True)
    if files["figure"]:
        out.print(f"drawn: {files['figure']}", markup=False, soft_wrap=True)


def show_pruned(values: Mapping[str, Any], *, advised: bool = False) -> None:
    """Print the result of pruning once; ``advised`` tells to give data."""
    out = output()
    out.print(widths(values["widths"]["before"], values["widths"]["after"]))
    out.print()
    out.print(comparison(values["before"], values["after"], values["metric"]))
    out.print()
    out.print(verdict(values["verification"]), markup=False)
    _show_parts(out, values)
    if advised:
        out.print(
            "accuracy was not measured; next: the same with --data, e.g. --data cifar10:ROOT, which measures it before "
            "and after, and keeps more of it",
            soft_wrap=True,
        )
    for layer in (values["compensation"] or {}).get("layers", ()):
        if layer["reason"]:
            out.print(f"not compensated: {layer['module']}: {layer['reason']}", markup=False)
    if values["file"]:
        out.print(f"saved: {values['file']}, {size(values['after']['file_bytes'])}", markup=False, soft_wrap=True)
    else:
        out.print("nothing was saved; --out FILE.safetensors writes the pruned network")


def _show_parts(out: Console, values: Mapping[str, Any]) -> None:
    """Say what each part of the method was, and what could not be had."""
    out.print("; ".join(f"{part}: {name}" for part, name in values["parts"].items()), markup=False)
    for note in values["notes"]:
        out.print(f"note: {note}", markup=False, soft_wrap=True)


def show_run(values: Mapping[str, Any], out: Console | None = None) -> None:
    """Print the result of a compression run."""
    out = out or output()
    before, after = values["baseline"], values["final"]
    out.print(comparison(before, after, values["metric"], values.get("latency")))
    out.print()
    out.print(widths(before["widths"], after["widths"]))
    out.print()
    out.print(verdict(values["verification"], tuned=True), markup=False)
    _show_parts(out, values)
    if values.get("latency") is not None:
        show_latency(values["latency"], out)
    out.print(f"files: {values['run_dir']}", markup=False, soft_wrap=True)


def show_latency(timed: Mapping[str, Any], out: Console | None = None) -> None:
    """Say what the network takes of the original's time, what was predicted, and where it is no faster."""
    at, noise = _setting(timed), " (within noise)" if timed.get("within_noise") else ""
    (out or output()).print(
        f"time of a forward pass ({at}): {1000 * timed['before']:.3g} ms → {1000 * timed['after']:.3g} ms, "
        f"{timed['measured']:.1%} left{noise}; asked {timed['asked']:.1%}, predicted {timed['predicted']:.1%} from the "
        "times of layers"
    )
    if timed["slower"]:
        error_line(f"the pruned network is not faster than the original ({at})", "warning")


def _setting(timed: Mapping[str, Any]) -> str:
    return f"{timed['runtime']}, batch {timed['batch']}, {timed['threads']} thread{'s' if timed['threads'] > 1 else ''}"


def show_demo(values: Mapping[str, Any], picture: Path | None = None) -> None:
    """Print the demo's result, with what to try next; and draw it as an SVG file if asked for."""
    out = output(record=picture is not None)
    parts = values["examples"]
    out.print(
        f"[bold]LeNet-5 on {sum(parts.values()):,} handwritten digits[/] ({parts['train']:,} to train on, "
        f"{parts['validation']} to decide on, {parts['test']} to test on): trained, then pruned where measured "
        f"to cost least and refitted in {values['rounds']} rounds, fine-tuned, {values['seconds']:.0f} s.\n"
    )
    show_run(values, out)
    model = f"{values['run_dir']}/model.safetensors"
    out.print(
        f"saved and loaded again: {model}, {values['reloaded']:.2%} on the test set", markup=False, soft_wrap=True
    )
    out.print("\nNext, a network of yours:", style="bold")
    out.print("  secateur trace torchvision:resnet18", markup=False)
    out.print(
        "  secateur prune network.py:build --weights trained.pth --data data.py:load --macs 0.5",
        markup=False,
    )
    if picture is not None:
        from secateur.checkpoint import write_atomic

        # Rich's own frame fetches its font from a foreign host; any monospaced font does.
        frame = re.sub(r"@font-face \{\{.*?\}\}\s*|<!--.*?-->\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        write_atomic(picture, out.export_svg(title="secateur demo", code_format=frame).encode())


def show_values(values: Mapping[str, Any]) -> None:
    """Print figures, one a line."""
    out, table = output(), _table("", ">")
    table.show_header = False
    for name, value in values.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.2%}")
        elif isinstance(value, Mapping):  # figures of each class
            for key, own in value.items():
                figures = ", ".join(f"{figure} {share:.2%}" for figure, share in own.items() if share is not None)
                table.add_row(escape(key), figures or "none to find")
        elif value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else escape(str(value)))
    out.print(table)


def verdict(check: Mapping[str, Any], *, tuned: bool = False) -> str:
    """Say in a line how the pruned network compares with the original whose removed channels are zeroed.

    Args:
        check: Fields of a :class:`secateur.pruning.verification.VerificationReport`.
        tuned: Whether the network was trained after the cut; the comparison is then of the network before training.
    """
    bits = {"float64": "fp64", "float32": "fp32"}.get(check["dtype"], check["dtype"])
    what = "the network as it was cut, before fine-tuning," if tuned else "it"
    unchecked = f"; unchecked: {'; '.join(check['refused'])}" if check["refused"] else ""
    kept = check.get("kept", ())
    if kept:
        unchecked += f"; of {len(kept)} attributes that did not follow, which another forward may read: {kept[0]}"
    return (
        f"verified {'exact' if check['exact'] else 'not exact'}: {what} differs from the original with the removed "
        f"channels zeroed by at most {check['max_error']:.1e} of the output ({bits}){unchecked}"
    )


def _group_macs(graph: ChannelGraph) -> list[int]:
    """MACs, for one example, that go with all of each group's channels."""
    from secateur.graph import cost

    total = cost.macs(graph)
    return [round(total * graph.share_of_macs(group)) for group in graph.groups]


def _prunable(graph: ChannelGraph) -> int:
    return sum(int(group.removable.sum()) for group in graph.groups)


def _layers(graph: ChannelGraph, members: Iterable[Member]) -> list[str]:
    return list(dict.fromkeys(graph.layer_of(member) for member in members))


def _table(*columns: str) -> Table:
    """Make a plain table; a column whose name ends in ``>`` holds numbers, set to the right."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        if column.endswith(">"):
            table.add_column(column[:-1], justify="right", no_wrap=True)
        else:
            table.add_column(column, overflow="fold")
    return table


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def running(
    as_json: bool, *, quiet: bool = False, level: str = "warning", every: float = LINE_SECONDS
) -> Iterator[Steps]:
    """Show progress; with ``--json``, keep what the user's own code prints off standard output.

    Args:
        as_json: Whether standard output is for one JSON document.
        quiet: Whether neither progress nor lines below a warning are shown.
        level: Least level of the lines of the package's log.
        every: Seconds between two lines of progress, where there is no terminal.
    """
    logger = logging.getLogger("secateur")
    before = logger.level
    if process():  # the first says the same
        quiet, level = True, "error"
    logger.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())) if quiet else level.upper())
    try:
        with Steps(quiet=quiet, every=every) as steps, redirect_stdout(sys.stderr) if as_json else nullcontext():
            yield steps
    finally:
        logger.setLevel(before)
