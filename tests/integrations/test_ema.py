"""A loop of one's own with an average of the weights, in two processes, pruned in the middle: as in one.

In double precision: only the order of sums differs, which training blows up until it is seen in single precision.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur as sc
from secateur.checkpoint.digest import digest
from secateur.training.evaluation import evaluate
from tests.engine.launching import launch
from tests.engine.nets import Batches, Residual, digits

IMAGES, LABELS = (torch.cat([getattr(part, name) for part in digits(1000)[1:]]) for name in ("x", "y"))
TRAIN, _, _ = digits(960)
TRAIN.x = TRAIN.x.double()
HELD = Batches(IMAGES.double(), LABELS, 100)


class Loop:
    """Each process takes its part of every batch, so that a step sees the same images in any number of them."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
        self.rank, self.number = (int(os.environ.get(name, of)) for name, of in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if self.number > 1:
            torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        model = Residual().double()
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
        self.model = self.wrapped(model)
        self.optimizer = optimizer(self.model.parameters(), **options)

    def wrapped(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model) if self.number > 1 else model

    @property
    def plain(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def fit(self, first: int, last: int) -> None:
        self.model.train()
        for epoch in range(first, last):
            TRAIN.generator.manual_seed(epoch)
            for x, y in TRAIN:
                own = slice(self.rank, None, self.number)
                loss = F.cross_entropy(self.model(x[own]), y[own])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.ema.update_parameters(self.plain)

    def prune(self, macs: float) -> None:
        x = TRAIN.x[:2]
        graph = sc.trace(self.model, x)
        plan = sc.plan(graph, sc.score(self.model, graph, "l2"), sc.Target(macs=macs), allocation="global")
        small = sc.apply(self.model, plan)
        assert sc.verify(self.model, small, plan, x).exact
        self.optimizer = sc.carry_optimizer(self.optimizer, self.model, small, plan)
        self.ema, self.model = sc.apply(self.ema, plan), self.wrapped(small)

    def told(self) -> dict[str, Any]:
        parts = {"model": self.plain.state_dict(), "ema": self.ema.module.state_dict()}
        named = dict(self.plain.named_parameters())
        parts["optimizer"] = {
            f"{name} {key}": value for name, own in named.items() for key, value in self.optimizer.state[own].items()
            if isinstance(value, torch.Tensor)
        }  # fmt: skip
        return {
            "bits": {part: digest("", tensors) for part, tensors in parts.items()},
            "shapes": [{name: list(t.shape) for name, t in parts[part].items()} for part in ("model", "ema")],
            "norms": {part: [float(t.norm()) for t in tensors.values()] for part, tensors in parts.items()},
            "updates": int(self.ema.n_averaged),
            "accuracy": [evaluate(net, HELD) for net in (self.plain, self.ema.module)],
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 3e-3})],
    ids=["sgd", "adamw"],
)
def test_a_loop_with_an_average_pruned_in_the_middle_is_the_same_in_two_processes(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any], tmp_path: Path
) -> None:
    def call() -> None:
        loop = Loop(optimizer, **options)
        loop.fit(0, 24)
        told = [loop.told()]
        loop.prune(0.4)
        told.append(loop.told())
        loop.fit(24, 36)
        told.append(loop.told())
        print(json.dumps(told))  # noqa: T201
        if loop.rank == 0:
            sc.save(loop.ema.module, path=tmp_path / f"ema-{loop.number}.safetensors")
        if loop.number > 1:
            torch.distributed.destroy_process_group()

    found = []
    for number in (1, 2):
        place = tmp_path / str(number)
        assert launch(call, place, number) == [0] * number, (place / "err-0").read_text()
        found += [json.loads((place / f"out-{rank}").read_text()) for rank in range(number)]
    alone, first, second = found
    print([[moment["accuracy"] for moment in run] for run in (alone, first)])  # noqa: T201
    assert first == second
    for one, two in zip(alone, first, strict=True):
        assert one["shapes"] == two["shapes"]
        assert one["updates"] == two["updates"]
        assert one["accuracy"] == pytest.approx(two["accuracy"], abs=0.005)
        for part, norms in one["norms"].items():
            assert norms == pytest.approx(two["norms"][part], rel=1e-6), part
    before, cut, end = first
    model, ema = end["shapes"]
    assert model == ema == cut["shapes"][0] != before["shapes"][0]
    assert (before["updates"], cut["updates"], end["updates"]) == (24 * 24, 24 * 24, 36 * 24)
    assert len({moment["bits"][part] for moment in first for part in ("model", "ema")}) == 6
    assert min(end["accuracy"]) > 0.6
    loaded = sc.load(Residual().double(), tmp_path / "ema-2.safetensors")
    assert digest("", loaded.state_dict()) == end["bits"]["ema"]
