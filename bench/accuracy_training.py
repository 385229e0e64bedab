"""One cell of ``bench.accuracy``, from the cut to its row: the same training and the same counting for every arm."""

from __future__ import annotations

import copy
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from bench import accuracy_arms, accuracy_peers
from bench.accuracy_arms import BATCH, Setting
from bench.accuracy_cells import IMAGES, Cell
from bench.accuracy_peers import KIRIGAMI, ONE_SHOT, SPARSE, PeerError
from bench.rows import Row
from secateur.checkpoint import write_atomic
from secateur.data import Batches, load
from secateur.models import MODELS
from secateur.training.arithmetic import decide
from secateur.training.evaluation import evaluate
from secateur.training.stages import Distillation, Stage, TrainingSettings, accelerator

DISTILLATION = Distillation(weight=0.9, temperature=4.0)
CUTS = 64
"""So many cut networks are kept for later cells."""
SPARSE_PEAK = 0.01
"""Peak learning rate of the sparse training before the cut."""


def settings(peak: float) -> TrainingSettings:
    """Return how every cell is trained, as the recipes of ResNets train, the rate annealed over the whole cell."""
    return TrainingSettings(lr=peak, momentum=0.9, weight_decay=1e-4, schedule="cosine")


def weights_of(network: str) -> str:
    """Return the name of the file of a network's trained weights."""
    return f"cifar10-{network}.safetensors"


class Half:
    """The first half of each epoch's batches."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return max(1, len(self.batches) // 2)

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            if number == len(self):
                return
            yield batch


@dataclass
class Measuring:
    """What all cells of a process share."""

    weights: Path
    """Folder of the trained weights."""
    data: str
    """As ``secateur.data.load`` takes it."""
    work: Path
    """Folder of half-trained cells and decoded images."""
    device: str = "cpu"
    loaded: dict[tuple[str, str, int], Setting] = field(default_factory=dict)
    """Network, layers and images of an epoch -> setting."""
    cuts: dict[tuple[Any, ...], nn.Module] = field(default_factory=dict)
    """The last cut networks, by what they are of."""

    def setting(self, network: str, layers: str, images: int) -> Setting:
        """Return a network with its layers and images."""
        key = (network, layers, images)
        if key not in self.loaded:
            model = MODELS[network]()
            found = load_file(self.weights / weights_of(network))
            # The published weights lack the counters of batches, which play no part in evaluation.
            counters = {n: v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")}
            model.load_state_dict(counters | found)
            size: dict[str, Any] = {} if images in (0, IMAGES) else {"train_size": images}
            data = load(self.data, cache=str(self.work / "images"), **size)
            self.loaded[key] = Setting(model.eval(), data, layers)
        return self.loaded[key]

    def cut(self, cell: Cell) -> nn.Module:
        """Return the network of a cell before training: a copy of one that is kept for the next cell of the arm.

        Raises:
            PeerError: If the arm can't cut it.
        """
        key = (cell.network, cell.layers, cell.fraction, cell.arm, cell.seed)
        if key not in self.cuts:
            if len(self.cuts) == CUTS:
                self.cuts.clear()
            setting = self.setting(cell.network, cell.layers, 0)
            tool = accuracy_peers if cell.arm in ONE_SHOT or cell.arm in KIRIGAMI else accuracy_arms
            self.cuts[key] = tool.cut(setting, cell.arm, cell.fraction, cell.seed).eval()
        return copy.deepcopy(self.cuts[key])

    def row(self, cell: Cell) -> Row:
        """Measure a cell. What a peer can't do is a row, too, with the reason."""
        began = time.process_time()
        setting = self.setting(cell.network, cell.layers, cell.images)
        try:
            model = self.trained(cell, setting) if cell.epochs else self.cut(cell)
        except PeerError as error:
            return cell.row(failed=str(error))
        measured = {"accuracy": _per_cent(model, setting.data.test)}
        if cell.epochs:
            measured["validation"] = _per_cent(model, setting.data.validation)
        removed = setting.removed(model.cpu())
        return cell.row(**measured, removed=round(removed, 5), seconds=round(time.process_time() - began, 1))

    def trained(self, cell: Cell, setting: Setting) -> nn.Module:
        """Return the network of a cell after its training, which goes on where an earlier call was killed."""
        train: Any = Batches(setting.data.train, BATCH, shuffle=True, augment=True, drop_last=True)
        if cell.arm == SPARSE:
            train = Half(train)
        kept = self.work / "training" / f"{'-'.join(str(v).replace(' ', '_') for v in cell.row().values())}.pt"
        # Unpickled, as this bench wrote the file itself, and a peer's cut network has no plan to be built anew from.
        found: dict[str, Any] = torch.load(kept, weights_only=False) if kept.exists() else {"done": 0}
        model: nn.Module = found["cut"] if found["done"] else self._start(cell, setting, train)
        start = copy.deepcopy(model)
        stage = self._stage(cell, setting, model, cell.peak)
        if found["done"]:
            model.load_state_dict(found["weights"])
            stage.restore(found["stage"])
        for epoch in range(found["done"], cell.epochs):
            stage.run_epoch(train, epoch)
            if epoch + 1 < cell.epochs:
                state = {"cut": start, "weights": model.state_dict(), "stage": stage.state(), "done": epoch + 1}
                _keep(kept, state)
        stage.close()
        kept.unlink(missing_ok=True)
        return model

    def _start(self, cell: Cell, setting: Setting, train: Any) -> nn.Module:
        """Return the network that the training of a cell starts from."""
        if cell.arm != SPARSE:
            return self.cut(cell)
        model = copy.deepcopy(setting.model)
        with accuracy_peers.shrinking(setting, model):
            stage = self._stage(cell, setting, model, SPARSE_PEAK)
            for epoch in range(cell.epochs):
                stage.run_epoch(train, epoch)
            stage.close()
        return accuracy_peers.cut_shrunk(setting, model.cpu(), cell.fraction)

    def _stage(self, cell: Cell, setting: Setting, model: nn.Module, peak: float) -> Stage:
        runtime = accelerator(self.device)
        return Stage(
            model,
            settings(peak),
            epochs=cell.epochs,
            seed=cell.seed,
            runtime=runtime,
            teacher=copy.deepcopy(setting.model) if cell.distilled else None,
            distillation=DISTILLATION,
            arithmetic=decide(model, setting.example, runtime.device),
        )


def _keep(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def _per_cent(model: nn.Module, images: Any) -> float:
    return round(100 * evaluate(model, Batches(images, 100)), 2)
