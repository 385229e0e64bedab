"""The command that writes a network as a file that runs by itself, in fp32 or in int8."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secateur.cli import console, options
from secateur.cli.deploy_commands import Out
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.data import DataBundle
    from secateur.deploy.int8 import Int8Report
    from secateur.deploy.parity import ParityReport


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(export)


def export(
    model: options.ModelArgument = None,
    model_flag: options.ModelFlag = None,
    model_option: options.ModelOptions = None,
    weights: options.Weights = None,
    data: options.Data = None,
    data_option: options.DataOptions = None,
    input_shape: options.InputShapes = None,
    out: Out = None,
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="pt2 or onnx, where the suffix of --out does not say it.")
    ] = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Export for the example's batch size only.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(metavar="FRACTION", min=0, help="Largest difference allowed, relative to the output.")
    ] = 1e-5,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Write the file in int8: calibrated on training images of --data, measured on its test set beside the "
            "file in fp32.",
        ),
    ] = False,
    calibration: Annotated[
        int | None, typer.Option(metavar="N", help="Training images that --int8 calibrates on; 256 unless given.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|MODEL", help="The unpruned network, by its weights or as MODEL, measured beside --int8."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Export a network to .pt2 (torch.export) or .onnx, load the file again and compare before saying done."""
    with console.running(as_json) as steps:
        from secateur.deploy.export import export as write
        from secateur.runfile import sources, suspicions

        if out is None:
            raise UsageError("export: where to? Give --out FILE.pt2 or --out FILE.onnx.")
        if int8 and data is None:
            raise UsageError("export: --int8 finds the range of each feature map on images; give --data.")
        if not int8 and (calibration is not None or against is not None):
            raise UsageError("export: --calibration and --against are for --int8; give it, or leave them out.")
        if against == "original":
            raise UsageError("export: --against original has fresh weights; name the file of the unpruned network's.")
        bundle = None
        if data is not None:
            with steps.step("loading the data"):
                bundle = sources.data(data, options.values("--data-option", data_option))
        if int8 and bundle is not None and bundle.task == "detection":
            raise UsageError(
                f"export: --int8 takes no data of boxes ({bundle.name}), since torchvision's detectors can't be "
                "exported; one that takes its images in one tensor, such as ultralytics', can be, in Python: "
                "sc.export(model, path, int8=True, data=batches)."
            )
        name, built = options.one(model, model_flag), options.values("--model-option", model_option)
        with steps.step("building the model"):
            found = sources.open_model(name, built, weights, input_shape or (), bundle)
            bundle = found.data
            other = None
            if against is not None:
                same = Path(against).is_file() and ":" not in against
                of, built_with, filled = (name, built, against) if same else (against, None, None)
                other = sources.open_model(of, built_with, filled, input_shape or (), bundle).model
        if found.example_inputs is None:
            raise UsageError(
                f"export: nothing tells the shape of what {name} takes, and the file would be for that shape alone; "
                "give --input SHAPE, e.g. 1x3x32x32, or --data."
            )
        given: dict[str, Any] = {"format": format, "dynamic_batch": not fixed_batch, "tolerance": tolerance}
        report: ParityReport | Int8Report
        if int8 and bundle is not None:
            with steps.step("exporting, quantising and measuring"):
                report = write(found.model, out, **given, int8=True, **_images(bundle, calibration), against=other)
        else:
            with steps.step("exporting and comparing"):
                report = write(found.model, out, found.inputs, **given)
        suspicions.of_fresh_weights(found, weights, "export")
    values: dict[str, Any] = {"model": found.name, **dataclasses.asdict(report), "path": str(out)}
    if as_json:
        console.write_json(values)
    elif int8:
        _show_int8(values)
    else:
        _show(values)


def _images(bundle: DataBundle, calibration: int | None) -> dict[str, Any]:
    """Return training images in a seeded order to calibrate on, and the test set to measure on."""
    from secateur.data import Batches
    from secateur.deploy.int8 import CALIBRATION

    train, test = Batches(bundle.train, 64, shuffle=True), Batches(bundle.test, 64)
    return {"data": train, "test": test, "calibration": CALIBRATION if calibration is None else calibration}


def _show(values: dict[str, Any]) -> None:
    screen = console.output()
    sizes = values["batch_sizes"]
    batch = "any" if len(sizes) > 1 else "fixed"
    screen.print(f"{values['path']}: {console.size(values['file_bytes'])}, batch {batch}")
    screen.print(
        f"largest difference {values['relative_error']:.1e} of the output (allowed {values['tolerance']:.0e}), "
        f"at batch sizes {', '.join(map(str, sizes))}"
    )
    screen.print(
        f"one forward pass {values['latency_ms']:.3g} ms, in eager PyTorch {values['eager_latency_ms']:.3g} ms"
    )


def _show_int8(values: dict[str, Any]) -> None:
    screen = console.output()
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("network")
    for name in ("file", "accuracy", "output error", f"ms, batch {values['batch_size']}", "speed-up"):
        table.add_column(name, justify="right")
    for row in values["files"]:
        table.add_row(
            row["network"],
            console.size(row["file_bytes"]),
            "–" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
            "–" if row["error"] is None else f"{row['error']:.2%}",
            f"{row['latency_ms']:.3g}",
            f"{row['speed_up']:.2f}×",
        )
    screen.print(table)
    screen.print(
        f"\n{values['path']}: calibrated on {values['calibrated_on']} training images, measured on "
        f"{values['measured_on']} test images"
    )
    for note in values["notes"]:
        console.error_line(note, "warning")
