"""The callback of Lightning, in trainings by Lightning itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.errors import CheckpointError, UsageError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
lightning = pytest.importorskip("lightning.pytorch")

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, 8, 8, generator=GENERATOR), torch.randint(0, 4, (24,), generator=GENERATOR)


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, name: str = "Adam") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.model(x).flatten(1))
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.name)(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def batches() -> Any:
    return DataLoader(TensorDataset(X, Y), 8)


def trainer(folder: Path, epochs: int, *callbacks: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=len(callbacks) > 1,
    )  # fmt: skip


def pruning(schedule: dict[int, float] | None = None) -> Any:
    from secateur.integrations.lightning import ScheduledPruning

    targets = {epoch: sc.Target(channels=part) for epoch, part in (schedule or {1: 0.5}).items()}
    return ScheduledPruning(targets, X[:2], method="l1")


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items()) and a.keys() == b.keys()


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "averaged"])
def test_a_training_goes_on_over_the_cut_and_from_its_checkpoints(averaged: bool, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    def extras(name: str) -> list[Any]:
        saving = ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{epoch}", every_n_epochs=1)
        return [saving, *([EMAWeightAveraging(decay=0.8)] if averaged else [])]

    whole = Classifier()
    at_once = trainer(tmp_path, 3, pruning({1: 0.5, 2: 0.25}), *extras("whole"))
    at_once.fit(whole, batches(), batches())
    assert whole.model[0].out_channels < 4
    assert whole.head.in_features == 8  # the part's outputs stay
    (optimizer,) = at_once.optimizers
    assert set(optimizer.state) == set(whole.parameters())
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in whole.parameters())
    assert all(optimizer.state[p]["step"] == 9 for p in whole.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.01 / 8

    # The same in two sittings: the second starts from a fresh, unpruned module.
    trainer(tmp_path, 2, pruning(), *extras("parted")).fit(Classifier(), batches(), batches())
    parted = Classifier()
    file = tmp_path / "parted/epoch=1.ckpt"
    second = trainer(tmp_path, 3, pruning({1: 0.5, 2: 0.25}), *extras("again"))
    second.fit(parted, batches(), batches(), ckpt_path=file)
    assert same(parted.state_dict(), whole.state_dict())
    assert same(second.optimizers[0].state_dict()["state"][0], optimizer.state_dict()["state"][0])

    for epoch, channels in ((0, 8), (1, 4), (2, 3)):
        fresh = Classifier()
        trainer(tmp_path, 1, pruning()).validate(
            fresh, batches(), ckpt_path=tmp_path / f"whole/epoch={epoch}.ckpt", verbose=False
        )
        assert fresh.model[0].out_channels == channels
    assert "on_load_checkpoint" not in vars(fresh)
    last = torch.load(tmp_path / "whole/epoch=2.ckpt", weights_only=True)["state_dict"]
    assert same(fresh.state_dict(), last)
    with pytest.raises(CheckpointError, match="otherwise, or further"):
        trainer(tmp_path, 1, pruning()).validate(whole, batches(), ckpt_path=file, verbose=False)

    sc.save(whole.model, path=tmp_path / "small.safetensors")
    again = sc.load(Classifier().model, tmp_path / "small.safetensors")
    assert same(again.state_dict(), whole.model.state_dict())


def test_what_is_trained_over_the_cut_is_what_a_loop_of_ones_own_trains(tmp_path: Path) -> None:
    by_callback = Classifier("SGD")
    trainer(tmp_path, 2, pruning()).fit(by_callback, batches())

    module = Classifier("SGD")
    (optimizer,), (scheduler,) = module.configure_optimizers()
    for epoch in range(2):
        if epoch == 1:
            result = sc.prune(module.model, X[:2], sc.Target(channels=0.5), method="l1")
            module.model = copy.deepcopy(result.model)
            lr = optimizer.param_groups[0]["lr"]
            optimizer = torch.optim.SGD(module.parameters(), lr=lr)  # without momentum it holds no state
        for batch in batches():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
        if epoch == 0:
            scheduler.step()
    assert same(by_callback.state_dict(), module.state_dict())


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    from secateur.integrations.lightning import ScheduledPruning

    callback = ScheduledPruning({1: sc.Target(macs=0.5)}, X[:2], part="net")
    with pytest.raises(UsageError, match="no part 'net'"):
        trainer(tmp_path, 1, callback).fit(Classifier(), batches())
