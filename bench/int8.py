"""Pruned and quantised to int8: accuracy, output, size and time, each beside the fp32 and the unpruned network.

    python -m bench.int8                      # all; rows that were measured are left out
    python -m bench.int8 --networks lenet5 resnet20 --formats onnx

Half the MACs go by ``sc.prune`` without training, at widths that are multiples of 8, which int8 kernels like. LeNet-5
is trained on MNIST for an epoch, CIFAR's ResNets have their published weights, and all three are measured on the whole
test set and calibrated on 256 training images. Of the other networks weights and images are random, which tells time
and size, and how far the output is off, and nothing of accuracy; the batch norms of these are measured on the images
that they are calibrated on, since fresh ones let feature maps vanish. What was trained and pruned is kept in
``runs/int8``.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import secateur as sc
from bench import criteria
from bench.rows import Row, Store
from bench.sections import Section
from secateur.compensation.batchnorm import recalibrate
from secateur.data import Batches, load
from secateur.deploy.int8 import AGAINST, SMALL, WHOLE, Int8Report
from secateur.deploy.timing.machine import environment
from secateur.models import lenet5
from secateur.training.stages import TrainingSettings, fit

WORK = Path("runs/int8")
STORE = Store("int8.jsonl", ("network", "format"))
FORMATS = ("onnx", "pt2")
MULTIPLE = 8
SEEN = 512
"""Training images that pruning sees."""
RANDOM_IMAGES = 32
"""Images that a network of random weights is calibrated on, and measured on: half and half."""
NOISE_BATCH = 8


def _mnist() -> tuple[nn.Module, Any]:
    data = load(f"mnist:{criteria.SHARED / 'data'}")
    torch.manual_seed(0)
    model = lenet5()
    kept = WORK / "lenet5-trained.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        settings = TrainingSettings(lr=0.02, nesterov=True, schedule="cosine")
        fit(model, Batches(data.train, 64, shuffle=True), epochs=1, settings=settings)
        torch.save(model.state_dict(), kept)
    return model.eval(), data


def _cifar(name: str) -> tuple[nn.Module, Any]:
    return criteria.trained(name), load(f"cifar10:{criteria.SHARED / 'data' / 'cifar10'}", cache=str(WORK / "cifar10"))


def _yolov8n() -> nn.Module:
    from ultralytics.nn import tasks

    network = tasks.DetectionModel("yolov8n.yaml", verbose=False)
    for module in network.modules():
        if hasattr(module, "export"):
            module.export = module.dynamic = True  # one tensor of boxes and classes, of any batch, as their own export
    return network


TRAINED: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "lenet5": _mnist,
    "resnet20": lambda: _cifar("resnet20"),
    "resnet56": lambda: _cifar("resnet56"),
}
RANDOM: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (torchvision.models.resnet50, 224),
    "mobilenet_v3_large": (torchvision.models.mobilenet_v3_large, 224),
    "yolov8n": (_yolov8n, 320),
}


class Setting:
    """A network, the network pruned, and the images to calibrate and measure on."""

    def __init__(self, name: str) -> None:
        self.test: Iterable[Any] | None = None
        if name in TRAINED:
            self.model, data = TRAINED[name]()
            self.data: Any = Batches(data.train, 128, shuffle=True)
            self.test, self.calibration = Batches(data.test, 250), 256
            seen = [batch for batch, _ in zip(self.data, range(SEEN // 128), strict=False)]
            example = seen[0][0][:2]
        else:
            torch.manual_seed(0)
            build, side = RANDOM[name]
            self.model, seen = build().eval(), None
            self.data, self.calibration = _noise(side), RANDOM_IMAGES // 2
            example = next(iter(self.data))[:2]
        kept = WORK / f"{name}-pruned.safetensors"
        if not kept.is_file():
            found = sc.prune(self.model, example, sc.Target(macs=0.5), data=seen, round_to=MULTIPLE)
            sc.save(found.model, path=kept)
        self.small = sc.load(self.model, kept).eval()
        if self.test is None:
            # Fresh weights with fresh batch norms shrink feature maps layer by layer: of mobilenet_v3_large's they end
            # under 2^-12, the least step of PT2E's activations, and an output of zeros remains.
            for network in (self.model, self.small):
                measured = copy.deepcopy(network)  # a detector's head keeps the size of the batch that it has seen
                recalibrate(measured, self.data[: self.calibration // NOISE_BATCH])
                network.load_state_dict(measured.state_dict())
        graph = sc.trace(self.model, example)
        self.macs_left = sc.macs(sc.trace(self.small, example)) / sc.macs(graph)


def _noise(side: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(NOISE_BATCH, 3, side, side, generator=draw) for _ in range(RANDOM_IMAGES // NOISE_BATCH)]


def measure(name: str, setting: Setting, kind: str) -> Row:
    """Export the pruned and the unpruned network in int8, and give what was measured of the four files."""
    images = {"data": setting.data, "test": setting.test, "calibration": setting.calibration}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net.{kind}"
        small = sc.export(setting.small, path, tolerance=1e-3, int8=True, **images, against=setting.model)
        whole = sc.export(setting.model, path, tolerance=1e-3, int8=True, **images)
    first = small[AGAINST].speed_up
    return {
        "network": name, "format": kind, "macs_left": round(setting.macs_left, 3), "images": small.measured_on,
        "unpruned": _figures(small, AGAINST, 1.0),
        "unpruned int8": _figures(whole, SMALL, whole[SMALL].speed_up),
        "pruned": _figures(small, WHOLE, 1 / first),
        "pruned int8": _figures(small, SMALL, small[SMALL].speed_up / first),
        "notes": sorted({*small.notes, *(f"unpruned: {note}" for note in whole.notes)}),
        "machine": f"{environment()['processor']}, {environment()['cpu_capability']}, {platform.system()}",
    }  # fmt: skip


def _figures(report: Int8Report, network: str, speed_up: float) -> Row:
    found = report[network]
    return {
        "accuracy": None if found.accuracy is None else round(found.accuracy, 4),
        "error": None if found.error is None else float(f"{found.error:.2g}"),
        "kilobytes": round(found.file_bytes / 1000),
        "speed_up": round(speed_up, 2),
    }


VARIANTS = ("unpruned", "pruned", "unpruned int8", "pruned int8")
TITLES = {
    "lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10", "resnet56": "ResNet-56, CIFAR-10",
    "resnet50": "resnet50, random weights", "mobilenet_v3_large": "mobilenet_v3_large, random weights",
    "yolov8n": "yolov8n, random weights",
}  # fmt: skip
MEANING = (
    "Half the MACs pruned by `sc.prune` without training, widths multiples of 8; then quantised after training by "
    "`sc.export(…, int8=True)`: .onnx by ONNX Runtime, .pt2 by torchao's PT2E for x86. Accuracy is of the whole test "
    "set. The output's error is that of int8 against the same network in fp32, root mean square, relative; of random "
    "weights it says nothing about trained ones, although their batch norms were measured on the 16 images of the "
    "calibration, since fresh ones let feature maps vanish. Speed-up is against the unpruned fp32 file of the same "
    "format, batch 8, one thread, in turns; .pt2 in int8 is lowered to oneDNN's layers, in fp32 it runs eagerly."
)


def section() -> str:
    """Tabulate the rows."""
    rows = sorted(STORE.read(), key=lambda row: (list(TITLES).index(row["network"]), row["format"]))
    lines = ["## Pruned, then int8", "", MEANING, ""]
    lines += ["| network | file | | accuracy | output's error | size | speed-up |", "|---|---|---|---:|---:|---:|---:|"]
    for row in rows:
        for variant in VARIANTS:
            own = row[variant]
            accuracy = "–" if own["accuracy"] is None else f"{own['accuracy']:.2%}"
            error = "–" if own["error"] is None else f"{own['error']:.1%}"
            full = variant if "int8" in variant else f"{variant} fp32"
            lines.append(
                f"| {TITLES[row['network']]} | .{row['format']} | {full} "
                f"| {accuracy} | {error} | {own['kilobytes']:,} kB | {own['speed_up']:.2f}× |"
            )
    notes = [f"- {TITLES[row['network']]}, .{row['format']}: {note}" for row in rows for note in row["notes"]]
    lines += ["", *notes, *([""] if notes else [])]
    machines = sorted({row["machine"] for row in rows})
    return "\n".join([*lines, f"`python -m bench.int8` on {'; '.join(machines)}, which other work shared."])


SECTION = Section("results.md", "int8", section)


def missing(networks: Iterable[str], formats: Iterable[str], again: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield networks with the formats that are not measured yet."""
    known = set() if again else {STORE.name(row) for row in STORE.read()}
    for name in networks:
        kinds = [kind for kind in formats if (name, kind) not in known]
        if kinds:
            yield name, kinds


def main() -> None:
    """Measure what is not measured yet, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    for name, kinds in missing(given.networks, given.formats, given.again):
        setting = Setting(name)
        for kind in kinds:
            row = measure(name, setting, kind)
            STORE.keep(row)
            print(row, flush=True)
    SECTION.write()


if __name__ == "__main__":
    main()
