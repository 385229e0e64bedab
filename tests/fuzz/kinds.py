"""The kinds of files that are read, each as a whole sample, a way to make mutants of it, and its reader."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load as parse
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from secateur import checkpoint
from secateur.checkpoint import pruned
from secateur.compensation.sensitivity import Sensitivity
from secateur.data.cifar_files import CIFAR10
from secateur.data.image import decode
from secateur.data.mnist import FILES, mnist
from secateur.data.voc import voc
from secateur.deploy.timing.table import Grid, Latency
from secateur.engine.rundir import RunDirectory
from secateur.engine.state import State
from secateur.errors import CheckpointError, DataError, RunError, UsageError
from secateur.integrations.hub import pull, push
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.report import write_report
from secateur.runfile import config, configured_run, trust
from secateur.tracing.tracing import trace
from tests.fuzz.mutants import damaged, restructured, same
from tests.report import synthetic

Read = Callable[[random.Random], None]
"""Make one mutant, read it, and raise AssertionError where it is taken for what it is not."""


@dataclass(frozen=True)
class Kind:
    """Mutants of one kind of file."""

    name: str
    count: int
    """Mutants of a full search."""
    allowed: tuple[type[Exception], ...]
    """What its reader declares to raise."""
    prepare: Callable[[Path], Read]


KINDS: list[Kind] = []


def kind(name: str, count: int, *allowed: type[Exception]) -> Callable[[Callable[[Path], Read]], None]:
    """Enter a kind of file into the table."""
    return lambda prepare: KINDS.append(Kind(name, count, allowed, prepare))


class Net(nn.Module):
    """A small network with everything that a plan names: a grouped layer, a norm, a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 1, groups=6)
        self.conv2 = nn.Conv2d(6, 4, 1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.width = 6
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.bn(self.conv1(x)).relu())
        x = x.view(len(x), self.width, -1, 2)
        return self.fc(self.norm(self.conv2(x).relu()).flatten(1))


EXAMPLE = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def _pruned_file(folder: Path) -> tuple[Path, bytes, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    model = Net().eval()
    plan = plan_removal(trace(model, EXAMPLE), {"conv1": [0, 3]})
    small = cut(model, plan)
    path = folder / "small.safetensors"
    checkpoint.save(small, plan, path, extra={"note": [1, 2]})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][pruned.KEY]
    return path, content, json.loads(header), small(EXAMPLE)


def _loads_as(path: Path, expected: Tensor, header: dict[str, Any]) -> None:
    found = checkpoint.load(Net(), path).eval()
    plans = [plan.to_dict()["attributes"].get("") for plan in checkpoint.read_header(path).plans]
    if plans == [plan["attributes"][""] for plan in header["plans"]]:
        # Which numbers of one's own modules count channels, nothing but the trace can tell.
        assert torch.equal(found(EXAMPLE), expected), "a damaged file loads, and computes something else"


@kind("model file, bytes", 600, CheckpointError)
def _model_bytes(folder: Path) -> Read:
    path, content, header, expected = _pruned_file(folder)

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged(content, rng))
        checkpoint.is_checkpoint(path)
        _loads_as(path, expected, header)

    return read


@kind("model file, structure", 800, CheckpointError)
def _model_structure(folder: Path) -> Read:
    path, content, header, expected = _pruned_file(folder)
    tensors = parse(content)

    def read(rng: random.Random) -> None:
        # Half of the mutants carry a digest of what they hold, as one made on purpose would.
        change, signed = restructured(header, rng), rng.random() < 0.5
        if signed and isinstance(change, dict) and isinstance(change.get("format_version"), int):
            change["sha256"] = pruned._digest(tensors, change)
        path.write_bytes(to_bytes(tensors, {pruned.KEY: json.dumps(change)}))
        _loads_as(path, expected, header)
        assert signed or same(change, header), "another plan loads under the digest of the first"

    return read


@kind("folder of a hub", 150, CheckpointError, UsageError)
def _hub_folder(folder: Path) -> Read:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    small = cut(model, plan_removal(trace(model, x), {}))
    push(small, folder)
    config = json.loads((folder / "config.json").read_text())
    plans, expected = (folder / "plan.json").read_bytes(), small(x)

    def read(rng: random.Random) -> None:
        changed = rng.random() < 0.7
        (folder / "config.json").write_text(json.dumps(restructured(config, rng) if changed else config))
        (folder / "plan.json").write_bytes(plans if changed else damaged(plans, rng))
        assert torch.equal(pull(folder)(x), expected), "a damaged folder is pulled, and computes something else"

    return read


RUN = {
    "model": "lenet5", "model_options": {"widths": [4, 6], "hidden": 8}, "data": "mnist:data",
    "data_options": {"train_size": 200}, "input": ["1x1x28x28"], "method": "cfp", "weights": "some/weights.pth",
    "settings": {"fraction": 0.125, "finetune_epochs": 2, "widths": [{"conv1": 4}], "compensate": ["bn"]},
    "tolerance": 0.5, "target": {"latency": 0.5, "batch": 8, "runtime": "eager"}, "baseline": {"epochs": 3, "lr": 0.1},
    "batch_size": 32, "workers": 0, "seed": 1, "run_dir": "runs/x", "baselines": "runs/b", "round_to": 8,
    "min_channels": 2, "max_ratio": {"conv1": 0.5}, "ratios": {"conv2": 0.5}, "skip": ["fc"], "allocation": "uniform",
}  # fmt: skip
PRUNE = {k: v for k, v in RUN.items() if k in config.PruneConfig.model_fields} | {"compensate": ["bn"], "out": "x"}


def _read_run_file(path: Path) -> None:
    try:
        run = config.load(path)
    except UsageError as error:
        _require_one_line(error)
        given = config.load_prune(path)
        given.words()
        trust.require(path, trust.code_named(given), given=False)
        return
    config.to_yaml(run)
    configured_run.grounded(run)
    trust.require(path, trust.code_named(run), given=False)


def _require_one_line(error: Exception) -> None:
    assert "\n" not in str(error), f"more than a line: {error}"
    assert len(str(error)) < 2000, f"a line of {len(str(error))} characters"


@kind("run.yaml, bytes", 500, UsageError)
def _run_bytes(folder: Path) -> Read:
    path = folder / "run.yaml"

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged(yaml.safe_dump(rng.choice((RUN, PRUNE)), sort_keys=False).encode(), rng))
        _read_run_file(path)

    return read


@kind("run.yaml, structure", 500, UsageError)
def _run_structure(folder: Path) -> Read:
    path = folder / "run.yaml"

    def read(rng: random.Random) -> None:
        path.write_text(yaml.safe_dump(restructured(rng.choice((RUN, PRUNE)), rng), sort_keys=False))
        _read_run_file(path)

    return read


def _state_file(folder: Path) -> tuple[Path, bytes]:
    state = State(model=Net(), removed={"conv1": [0, 3]}, history=[{"round": 1, "accepted": True}], round=2)
    state.pairs, state.milestones, state.baseline = {"conv1": [[0, 1]]}, [{"macs": 5}], {"macs": 9, "metric": 0.5}
    state.table = {
        "sizes": {"a": 4},
        "damage": {"a": {"1": 0.5}},
        "measure": "kl",
        "images": 8,
        "network": 5,
        "macs": 9,
    }
    state.accepted = {"fc.bias": torch.ones(3)}
    state.training = {"optimizer": {"state": {0: {"momentum": torch.ones(3)}}, "groups": [{"lr": 0.1}]}, "epoch": 1}
    path = folder / "state.safetensors"
    state.save(path)
    return path, path.read_bytes()


def _read_state(path: Path) -> None:
    state, tensors = State.load(path)
    assert isinstance(tensors, dict)
    _ = state.sensitivity
    json.dumps(state.plain())


@kind("run state, bytes", 500, CheckpointError)
def _state_bytes(folder: Path) -> Read:
    path, content = _state_file(folder)

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged(content, rng))
        _read_state(path)

    return read


@kind("run state, structure", 300, CheckpointError)
def _state_structure(folder: Path) -> Read:
    path, content = _state_file(folder)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = parse(content)

    def read(rng: random.Random) -> None:
        changed = {"secateur-run": json.dumps(restructured(json.loads(metadata["secateur-run"]), rng))}
        path.write_bytes(to_bytes(tensors, metadata | changed))
        _read_state(path)

    return read


def _configuration() -> dict[str, Any]:
    from secateur.engine.settings import Settings
    from secateur.pruning.options import Options

    return {
        "method": "cfp", "model": "tests.Net", "tolerance": 0.5, "target": {"macs": 0.5}, "seed": 0,
        "options": Options(ratios={"a": 0.5}, skip=["b"]).plain(), "settings": Settings(widths=({"conv1": 4},)).plain(),
        "arithmetic": "", "versions": {"torch": "2.14"}, "machine": {"threads": 1}, "asked": {}, "data": {},
    }  # fmt: skip


@kind("config.json", 800, CheckpointError)
def _config_json(folder: Path) -> Read:
    path, whole = folder / "config.json", _configuration()
    text = json.dumps(whole, indent=2).encode()

    def read(rng: random.Random) -> None:
        changed = rng.random() < 0.5
        path.write_bytes(json.dumps(restructured(whole, rng)).encode() if changed else damaged(text, rng))
        RunDirectory(folder).configuration()

    return read


@kind("measured tables", 300, UsageError)
def _tables(folder: Path) -> Read:
    path = folder / "table.json"
    damage = {"a": {1: 0.25, 2: 1.5}}
    sensitivity = Sensitivity(sizes={"a": 4}, damage=damage, measure="kl", images=8, network=5)
    grid = Grid(wide=[1, 2], made=[1, 2], seconds=[[0.5, 1.0], [1.0, 2.0]])
    times = Latency(
        batch=8, runtime="eager", threads=1, machine={"cores": 2}, network=5, layers=[0, -1], grids=[grid], odd=[None],
        overhead=0.5, scale=1.0, per_value=0.0, fit=[(1.0, 1.0)],
    )  # fmt: skip

    def read(rng: random.Random) -> None:
        table = rng.choice((sensitivity, times))
        table.save(path)
        assert type(table).load(path) == table
        whole, changed = path.read_bytes(), rng.random() < 0.6
        path.write_bytes(json.dumps(restructured(json.loads(whole), rng)).encode() if changed else damaged(whole, rng))
        str(type(table).load(path))

    return read


REPORTED = ("history.jsonl", "result.json", "config.json", "benchmark.json", "run.yaml", "model.safetensors")


@kind("report inputs", 960, UsageError, RunError, DataError)
def _report(folder: Path) -> Read:
    run = synthetic.write_run(folder / "run", {"conv1": (1, 4, 16), "conv2": (4, 4, 4)}, rounds=3)
    (run / "run.yaml").write_text("model: os:system\nmodel_options: {command: 'true'}\ndata: digits\n")
    whole = {name: (run / name).read_bytes() for name in REPORTED}

    def read(rng: random.Random) -> None:
        name = rng.choice(REPORTED[:4] if rng.random() < 0.9 else REPORTED[4:])
        content = whole[name]
        if name.endswith(".json") and rng.random() < 0.7:
            content = json.dumps(restructured(json.loads(content), rng)).encode()
        elif name.endswith(".jsonl") and rng.random() < 0.7:
            lines = [json.loads(line) for line in content.splitlines()]
            content = "".join(json.dumps(line) + "\n" for line in [*lines[1:], restructured(lines[0], rng)]).encode()
        else:
            content = damaged(content, rng)
        (run / name).write_bytes(content)
        try:
            write_report(run)
        finally:
            (run / name).write_bytes(whole[name])

    return read


def _image_kind(suffix: str, count: int) -> None:
    @kind(f"images, {suffix}", count, DataError)
    def _(folder: Path) -> Read:
        path = folder / f"x.{suffix}"
        pixels = torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        Image.fromarray(pixels.numpy()).save(path)
        content = path.read_bytes()

        def read(rng: random.Random) -> None:
            path.write_bytes(damaged(content, rng))
            found = decode(path, str(path))
            assert found.dtype == torch.uint8
            assert found.shape[0] == 3

        return read


for _suffix, _count in (("png", 400), ("jpg", 400), ("bmp", 300)):
    _image_kind(_suffix, _count)


@kind("images, VOC xml", 300, DataError)
def _voc(folder: Path) -> Read:
    for sub in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / sub).mkdir(parents=True)
    whole = (
        b"<?xml version='1.0' encoding='utf-8'?>\n<annotation><size><width>40</width><height>32</height></size><object>"
        b"<name>cell</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>20</xmax><ymax>30</ymax>"
        b"</bndbox></object></annotation>"
    )
    for part in ("train", "val", "test"):
        (folder / "ImageSets/Main" / f"{part}.txt").write_text(f"{part}0\n{part}1\n")
        for i in (0, 1):
            Image.new("RGB", (40, 32)).save(folder / "JPEGImages" / f"{part}{i}.jpg")
            (folder / "Annotations" / f"{part}{i}.xml").write_bytes(whole)
    listed = folder / "ImageSets/Main/val.txt"

    def read(rng: random.Random) -> None:
        path, content = rng.choice(((folder / "Annotations/train0.xml", whole), (listed, b"val0\nval1\n")))
        path.write_bytes(damaged(content, rng))
        try:
            bundle = voc(folder)
            _, target = bundle.train[0]
            assert torch.isfinite(target["boxes"]).all()
        finally:
            path.write_bytes(content)

    return read


@kind("images, MNIST idx", 200, DataError)
def _mnist(folder: Path) -> Read:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        count = 40
        images, labels = bytes(count * 28 * 28), bytes(i % 10 for i in range(count))
        size = count.to_bytes(4, "big")
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + size + (28).to_bytes(4, "big") * 2 + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + size + labels)
    whole = {name: (raw / name).read_bytes() for name in FILES}

    def read(rng: random.Random) -> None:
        name = rng.choice(FILES)
        (raw / name).write_bytes(damaged(whole[name], rng))
        try:
            mnist(folder, validation=0.25)
        finally:
            (raw / name).write_bytes(whole[name])

    return read


@kind("images, CIFAR parquet", 200, DataError)
def _cifar(folder: Path) -> Read:
    import pyarrow
    from pyarrow import parquet

    path, rows = folder / "train-00000-of-00001.parquet", []
    for i in range(5):
        held = io.BytesIO()
        Image.new("RGB", (32, 32), (40 * i, 0, 9)).save(held, "PNG")
        rows.append({"bytes": held.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({"img": rows, "label": list(range(5))}), path)
    content = path.read_bytes()

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged(content, rng))
        images, labels = CIFAR10.read(path)
        assert len(images) == len(labels)

    return read
