"""The commands that show and measure a network: report, benchmark."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secateur.cli import console, options
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.deploy.timing import BenchmarkResult
    from secateur.runfile.sources import SourceModel

RunDirs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="RUN_DIR...",
        help="Directories that `secateur compress` wrote, or `secateur sweep`.",
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Hold it against another model, or the same one with the weights of a file; 'original': unpruned.",
    ),
]
REPORT_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that a report shows, up to the first whose forward pass takes too long."""

Out = Annotated[
    Path | None,
    typer.Option(*options.OUT, metavar="FILE", help="Where to write; a missing folder is made.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command()(report)
    app.command()(benchmark)


def report(
    run_dir: RunDirs = None,
    out: Annotated[
        Path | None,
        typer.Option(
            *options.OUT,
            metavar="FILE",
            help="The HTML file, about 5 MB; its JSON goes beside it; a missing folder is made. RUN_DIR/report.html "
            "unless given.",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write every figure here as PNG and SVG, for a paper; the folder is made."),
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="Draw the correlation of this layer; repeatable.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Build the networks of a run that has not been measured yet, by the code that its run.yaml names, and "
            "measure their time and memory (RUN_DIR/benchmark.json). Without it nothing that a run names is run.",
        ),
    ] = False,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Write the report of a run as one HTML page that needs no network; of several, and of sweeps, side by side."""
    swept = [folder for folder in run_dir or () if (folder / "sweep.yaml").is_file()]
    own = [folder for folder in run_dir or () if folder not in swept]
    if swept and not own and (measure or layer):
        raise UsageError("report: --measure and --layer are for runs, and a sweep is given; name one of its runs.")
    if len(swept) == 1 and not own:
        _report_sweep(swept[0], out, figures, as_json)
        return
    for folder in own if measure else ():
        options.require_trust_of_run(folder, trust)
    with console.running(as_json) as steps:
        from secateur.report import read_run, write_report
        from secateur.runfile import config

        for folder in own:
            read_run(folder)
            if measure and (folder / config.FILE).is_file() and not (folder / "benchmark.json").exists():
                _measure_run(folder, steps)
        with steps.step("writing the report"):
            files = write_report([*(run_dir or ())], out, figures, layer)
    if as_json:
        console.write_json(json.loads(files.json.read_text(encoding="utf-8")))
        return
    screen = console.output()
    for run in files.runs:
        screen.print(f"\n[bold]{run.name}[/]  {run.path}")
        before, after = run.result.baseline.model_dump(), run.result.final.model_dump()
        asked = run.result.latency
        timed = None if asked is None else asked.model_dump()
        screen.print(console.comparison(before, after, run.result.metric, timed))
    for sweep in files.sweeps:
        screen.print(f"\n[bold]{sweep.name}[/]  {sweep.path}: {len(sweep.runs)} trials")
    screen.print(f"\nReport: {files.html}\nNumbers: {files.json}")
    if files.figures:
        screen.print(f"Figures: {len(files.figures)} files in {figures}")


def _report_sweep(folder: Path, out: Path | None, figures: Path | None, as_json: bool) -> None:
    with console.running(as_json) as steps:
        from secateur.report.sweep import sentence, write_sweep_report

        with steps.step("writing the report"):
            files = write_sweep_report(folder, out, figures)
    if as_json:
        console.write_json(json.loads(files.json.read_text(encoding="utf-8")))
        return
    screen = console.output()
    screen.print(f"{sentence(files.found)}\n\nReport: {files.html}\nNumbers: {files.json}", markup=False)
    if files.figures:
        screen.print(f"Figures: {len(files.figures)} files in {figures}", markup=False)


def benchmark(
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    model_option: options.ModelOptions = None,
    weights: options.Weights = None,
    against: Against = None,
    input_shape: options.InputShapes = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            min=1,
            help="Batch size; repeatable. Unless given: that of --input, or 1 and 8.",
        ),
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(metavar="N", min=1, help="CPU threads; repeatable.")] = None,
    device: Annotated[list[str] | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1; repeatable.")] = None,
    precision: Annotated[list[str] | None, typer.Option(metavar="NAME", help="fp32, bf16; repeatable.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="eager, compile, onnxruntime; repeatable.")
    ] = None,
    memory_format: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="contiguous, channels_last; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=2, help="Measurements of each setting.")] = 9,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="Measure this run's network against its original, for its report."),
    ] = None,
    out: Out = None,
    trust: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Measure time and peak memory of a network, or of two in turns: theoretical against measured speed-up."""
    if run_dir is not None:
        options.require_trust_of_run(run_dir, trust)
    with console.running(as_json) as steps, ExitStack() as files:
        from secateur.deploy.program import batch_of
        from secateur.deploy.target_file import replacing
        from secateur.network.inputs import arguments
        from secateur.runfile.configured_run import networks
        from secateur.runfile.sources import open_model

        names = ("pruned", "original")
        if run_dir is not None:
            if model or model_flag or weights or against or out:
                raise UsageError(
                    "benchmark: --run-dir names both networks and the file; leave out MODEL, --weights, "
                    "--against and --out."
                )
            out = run_dir / "benchmark.json"
            first, other = networks(run_dir, steps)
        else:
            name = options.one(model, model_flag)
            built = options.values("--model-option", model_option)
            if against not in (None, "original"):
                names = (Path(weights).name if weights else name, Path(against).name if "/" in against else against)
                names = names if names[0] != names[1] else (names[0], f"{names[1]} (against)")
            with steps.step("building the model"):
                first = open_model(name, built, weights, input_shape or ())
                other = None
                if against is not None:
                    if against == "original":
                        other = open_model(name, built, None, input_shape or ())
                    elif Path(against).is_file() and ":" not in against:
                        other = open_model(name, built, against, input_shape or ())
                    else:
                        other = open_model(against, None, None, input_shape or ())
        # A batch of one in --input is that of an example.
        asked = batch_of(arguments(first.inputs)) if input_shape else 1
        # The file is opened before anything is measured, so that a wrong path doesn't cost minutes of work.
        part = None if out is None else files.enter_context(replacing(out))
        result = _measure(
            first,
            other,
            steps,
            names=names,
            batch_sizes=batch_size or ((1, 8) if asked == 1 else (asked,)),
            threads=threads or (1,),
            devices=device or ("cpu",),
            precisions=precision or ("fp32",),
            backends=backend or ("eager",),
            memory_formats=memory_format or ("contiguous",),
            rounds=rounds,
        )
        if not result.rows:
            raise UsageError(f"benchmark: nothing could be measured: {result.skipped[0].reason}")
        if part is not None:
            part.write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    console.write_json(result.to_dict()) if as_json else _show(result, out)


def _measure(first: SourceModel, other: SourceModel | None, steps: console.Steps, **given: Any) -> BenchmarkResult:
    from secateur.deploy.timing import benchmark as measure

    done = 0

    def progress(setting: str) -> None:
        nonlocal done
        steps("measuring", done, note=setting)
        done += 1

    return measure(
        first.model,
        None if other is None else other.model,
        example_inputs=first.inputs,
        progress=progress,
        **given,
    )


def _measure_run(folder: Path, steps: console.Steps) -> None:
    """Measure a run's two networks for its report, on every device at hand."""
    import importlib.util

    import torch

    from secateur.deploy.target_file import replacing
    from secateur.runfile.configured_run import networks

    first, other = networks(folder, steps)
    with replacing(folder / "benchmark.json") as part:
        result = _measure(
            first,
            other,
            steps,
            names=("pruned", "original"),
            batch_sizes=REPORT_BATCH_SIZES,
            devices=("cpu", "cuda") if torch.cuda.is_available() else ("cpu",),
            backends=("eager", "onnxruntime") if importlib.util.find_spec("onnxruntime") else ("eager",),
            rounds=5,
            longest=1.0,
        )
        part.write_text(json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _show(result: BenchmarkResult, out: Path | None) -> None:
    screen = console.output()
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for name, justify in (
        ("network", "left"),
        ("setting", "left"),
        ("batch", "right"),
        ("ms", "right"),
        ("± IQR", "right"),
        ("images/s", "right"),
        ("peak memory", "right"),
    ):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for row in result.rows:
        setting = f"{row.device}, {row.backend}, {row.precision}, {row.memory_format}, {row.threads} threads"
        table.add_row(
            row.variant,
            setting,
            str(row.batch_size),
            f"{1000 * row.seconds:.3g}",
            f"{1000 * row.iqr:.2g}",
            f"{row.batch_size / row.seconds:.4g}",
            "–" if row.peak_bytes is None else console.size(row.peak_bytes),
        )
    screen.print(table)
    if result.speed_ups:
        table = Table(show_edge=False, pad_edge=False, header_style="bold", title="Speed-up", title_justify="left")
        table.add_column("setting")
        for name in ("batch", "theoretical", "measured", "quartiles"):
            table.add_column(name, justify="right")
        for s in result.speed_ups:
            table.add_row(
                f"{s.device}, {s.backend}, {s.precision}, {s.memory_format}, {s.threads} threads",
                str(s.batch_size),
                "–" if s.theoretical is None else f"{s.theoretical:.2f}×",
                f"{s.measured:.2f}×{', within noise' if s.within_noise else ''}",
                f"{s.low:.2f}–{s.high:.2f}",
            )
        screen.print()
        screen.print(table)
    for skipped in result.skipped:
        console.error_line(f"{skipped.variant}, {skipped.setting}: not measured: {skipped.reason}", "warning")
    if out is not None:
        screen.print(f"\nWritten to {out}")
