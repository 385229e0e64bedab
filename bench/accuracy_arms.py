"""Secateur's arms of ``bench.accuracy``: the network, its layers and images, and how each arm cuts it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.data import DataBundle, ImageTensors

SEEN, BATCH = 512, 128
"""Images that criteria, compensation and sensitivity see, and how many at once."""
AUTO, RANDOM, SCRATCH, UNIFORM, UNPRUNED = "auto", "random", "from scratch", "l1 uniform", "unpruned"
LEAST_SQUARES = "redundancy global + least squares"


@dataclass(frozen=True)
class Way:
    """What an arm is made of."""

    criterion: str
    allocation: str = "normalized"
    """As ``sc.plan`` takes it, or ``sensitivity``, for which the table is measured."""
    compensate: tuple[str, ...] = ()


def _ways() -> dict[str, Way]:
    refit = ("least_squares",)
    criteria = (
        "l1", "l2", "fpgm", "taylor", "hrank", "chip", "redundancy", "cshe", "corrnet", "corrnet_successive",
        "corrnet_su", "cfp",
    )  # fmt: skip
    ways = {name: Way(name) for name in criteria}
    ways |= {f"{name} + least squares": Way(name, compensate=refit) for name in criteria}
    for name in ("l1", "l2", "redundancy"):
        for allocation in ("uniform", "global"):
            ways[f"{name} {allocation}"] = Way(name, allocation)
            ways[f"{name} {allocation} + least squares"] = Way(name, allocation, refit)
    ways |= {f"{name} + merge": Way(name, compensate=("merge",)) for name in ("l1", "l2", "cfp")}
    ways |= {f"{name} sensitivity": Way(name, "sensitivity") for name in ("l2", "redundancy")}
    ways |= {f"{name} sensitivity + least squares": Way(name, "sensitivity", refit) for name in ("l2", "redundancy")}
    return ways | {RANDOM: Way(RANDOM, "uniform")}


OURS = _ways()
"""Name -> what the arm is made of; beside them stand ``auto``, which is ``sc.prune`` as it is, and ``from scratch``."""


@dataclass
class Setting:
    """A trained network, the layers that may lose filters, and the images."""

    model: nn.Module
    data: DataBundle
    layers: str
    """``inner`` or ``all``."""
    seen: int = SEEN
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """Scores, tables and gradients that several cells need, by what they are of."""

    @cached_property
    def example(self) -> Tensor:
        """Two images."""
        return self.few(0)[0][0][:2]

    @cached_property
    def graph(self) -> sc.ChannelGraph:
        """The network's channel graph."""
        return sc.trace(self.model, self.example)

    @property
    def skip(self) -> list[str]:
        """Names of the groups that may lose nothing."""
        names = [group.name for group in self.graph.groups]
        return [name for name in names if self.layers == "inner" and not re.fullmatch(r"layer\d\.\d+\.conv1", name)]

    def few(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return the training images that criteria and compensation see, as they are, in batches."""
        train = self.data.train
        assert isinstance(train, ImageTensors)
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(train))[: self.seen])
        return [train.take(part) for part in chosen.split(BATCH)]

    def removed(self, small: nn.Module) -> float:
        """Return the fraction of the MACs that a cut network lacks, by the one counter for all arms."""
        return 1 - sc.macs(sc.trace(small, self.example)) / sc.macs(self.graph)

    def remembered(self, key: tuple[Any, ...], make: Any) -> Any:
        """Return what is known under a key, or make it."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


def cut(setting: Setting, arm: str, fraction: float, seed: int) -> nn.Module:
    """Return the network as one of Secateur's arms cuts it."""
    if arm == UNPRUNED:
        return setting.model
    target = sc.Target(macs=fraction)
    if arm == AUTO:
        few = setting.few(seed)
        result = sc.prune(setting.model, setting.example, target, data=few, skip=setting.skip, seed=seed)
        return result.model
    if arm == SCRATCH:
        return fresh(cut(setting, UNIFORM, fraction, seed), seed)
    way, few = OURS[arm], setting.few(seed)
    groups = [group.name for group in setting.graph.groups if group.name not in setting.skip]
    scores = _scores(setting, way.criterion, groups, few, seed)
    allocation: Any = way.allocation
    if allocation == "sensitivity":
        allocation = setting.remembered(
            ("sensitivity", seed), lambda: sc.sensitivity(setting.model, setting.graph, few, groups=groups)
        )
    plan = sc.plan(setting.graph, scores, target, skip=setting.skip, allocation=allocation)
    if not way.compensate:
        return sc.apply(setting.model, plan)
    refit = {"everywhere": True} if "least_squares" in way.compensate else {}
    return sc.apply(setting.model, plan, compensate=way.compensate, data=few, graph=setting.graph, **refit)


def _scores(setting: Setting, criterion: str, groups: Sequence[str], few: list[Any], seed: int) -> dict[str, Tensor]:
    def make() -> dict[str, Tensor]:
        return sc.score(setting.model, setting.graph, criterion, few, groups=groups, seed=seed)

    found: dict[str, Tensor] = setting.remembered(("scores", criterion, seed), make)
    return found


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights anew, in place, as :class:`secateur.models.CifarResNet` draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
    return model
