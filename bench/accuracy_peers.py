"""The peers' arms of ``bench.accuracy``: Torch-Pruning's importances and scopes, its sparse training, torch-kirigami.

Torch-Pruning takes a fraction of the channels; the least that removes the MACs asked for is found by bisection, each
trial on a copy of the trained network. What its importances need to see are the images that Secateur's arms see.
"""

from __future__ import annotations

import copy
import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.accuracy_arms import Setting
from secateur.models import PadShortcut

STEPS = 512
"""Fractions of the channels that are told apart."""
SLACK = 0.01
"""So much less of the MACs may be removed: with one fraction for all layers the steps are coarse."""
IMPORTANCES: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("MagnitudeImportance", {"p": 1}),
    "l2": ("MagnitudeImportance", {"p": 2}),
    "l1 of the first layer": ("MagnitudeImportance", {"p": 1, "group_reduction": "first", "normalizer": None}),
    "LAMP": ("LAMPImportance", {}),
    "FPGM": ("FPGMImportance", {}),
    "BN scale": ("BNScaleImportance", {}),
    "Taylor": ("TaylorImportance", {}),
    "Hessian": ("HessianImportance", {}),
    "activation": ("ActivationImportance", {}),
}
"""Name -> class of ``torch_pruning.importance`` and its arguments where they are not the library's own."""
SCOPES: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}
ONE_SHOT = {f"TP {name} {scope}": (name, scope) for name in IMPORTANCES for scope in SCOPES}
"""Arm -> importance and scope."""
SPARSE = "TP group-norm sparse training"
"""Half of the training goes before the cut, under the penalty that shrinks whole groups of weights."""
PENALTY = 5e-4
"""Its strength, as the library's own CIFAR-10 runs have it."""
KIRIGAMI = {
    f"torch-kirigami {name} {scope}": (metric, scope)
    for name, metric in (("magnitude", "Magnitude"), ("group magnitude", "GroupMagnitude"), ("Taylor", "WeightTaylor"))
    for scope in ("local", "global")
}
"""Arm -> class of ``torch_kirigami.pruning`` that scores, and the scope of the fraction of the channels."""
KIRIGAMIS_STEPS = 32
"""Fractions of the channels that are told apart for it: a trial takes minutes on ResNet-20."""


class PeerError(Exception):
    """An arm can't cut this network, or its library isn't there; the message is one line."""


def cut(setting: Setting, arm: str, fraction: float, seed: int) -> nn.Module:
    """Return the network as a peer's arm cuts it.

    Raises:
        PeerError: If it can't.
    """
    if arm in KIRIGAMI:
        return _least(setting, lambda ratio: _folded(setting, arm, ratio, seed), fraction, KIRIGAMIS_STEPS)
    importance, scope = ONE_SHOT[arm]
    gradients = None
    if importance in ("Taylor", "Hessian"):
        key = (importance, seed)
        gradients = setting.remembered(key, lambda: _gradients(setting, seed, squared=importance == "Hessian"))

    def trial(ratio: float) -> nn.Module:
        model = copy.deepcopy(setting.model).eval()
        with _seeing(model, setting, importance, gradients, seed) as scorer:
            _pruner(setting, model, scorer, ratio, scope).step()
        return _stripped(model)

    return _least(setting, trial, fraction)


def _least(setting: Setting, trial: Callable[[float], nn.Module], fraction: float, steps: int = STEPS) -> nn.Module:
    """Return the network that loses the fewest channels of those that lose the MACs asked for."""
    tried: dict[int, nn.Module] = {}

    def enough(step: int) -> bool:
        try:
            tried[step] = trial(step / steps)
            return setting.removed(tried[step]) >= fraction - SLACK
        except Exception as error:  # whatever it is, it is the finding
            raise PeerError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error

    found = bisect_left(range(steps), True, key=enough)
    if found == steps:  # a scope that skips layers that would vanish can lose less where more is asked for
        found = next((step for step in range(0, steps, max(1, steps // 32)) if enough(step)), steps)
    if found == steps:
        raise PeerError(f"the MACs asked for can't be removed, {fraction:.0%}")
    return tried[found]


def _folded(setting: Setting, arm: str, ratio: float, seed: int) -> nn.Module:
    """Return the network as torch-kirigami cuts it, with a fraction of its channels gone.

    It follows calls by FX, which can't follow the check of the padded shortcut's input: a plain one stands in its
    place.
    """
    from torch_kirigami import DependencyGraph, pruning

    metric, scope = KIRIGAMI[arm]
    model = _plain_shortcuts(copy.deepcopy(setting.model)).eval()
    if metric == "WeightTaylor":
        gradients = setting.remembered(("Taylor", seed), lambda: _gradients(setting, seed, squared=False))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    pruner = pruning.Pruner(model, graph=DependencyGraph.build(model, args=(setting.example,)))
    small, _ = pruner.prune(
        pruner.discover_candidates(targets=[name for name in names if _may_go(name, setting.layers)]),
        budget=pruning.ChannelRatio(ratio, scope=scope),
        strategy=pruning.Greedy(getattr(pruning, metric)()),
    )
    return _stripped(small)


class PlainShortcut(nn.Module):
    """A padded shortcut without a check of its input: every ``stride``-th pixel, channels of zeros around them."""

    def __init__(self, shortcut: PadShortcut) -> None:
        super().__init__()
        before = shortcut.source.index(0)
        self.stride = shortcut.stride
        self.zeros = (0, 0, 0, 0, before, len(shortcut.source) - before - shortcut.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Copy and pad."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.zeros)


def _plain_shortcuts(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, PadShortcut):
            model.set_submodule(name, PlainShortcut(module))
    return model


def _pruner(setting: Setting, model: nn.Module, scorer: Any, ratio: float, scope: str, kind: str = "BasePruner") -> Any:
    """Make a pruner of a model that ignores the layers that may lose nothing."""
    import torch_pruning as tp

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    kept = [m for name, m in layers if not _may_go(name, setting.layers)]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return getattr(tp.pruner, kind)(
            model, setting.example, importance=scorer, pruning_ratio=ratio, ignored_layers=kept,
            customized_pruners={PadShortcut: _shortcut_pruner()}, root_module_types=[nn.Conv2d, nn.Linear],
            **SCOPES[scope],
        )  # fmt: skip


def _may_go(layer: str, layers: str) -> bool:
    return layer != "linear" and (layers == "all" or re.fullmatch(r"layer\d\.\d+\.conv1", layer) is not None)


def _shortcut_pruner() -> Any:
    """Tell Torch-Pruning how the zero-padded shortcut loses channels of either side: as Secateur is told."""
    import torch_pruning as tp

    class ShortcutPruner(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: PadShortcut, idxs: list[int]) -> PadShortcut:
            kept = [o for o in range(layer.out_channels) if o not in set(idxs)]
            layer.in_channels, layer.source = layer.pruned(range(layer.in_channels), kept)
            return layer

        def prune_in_channels(self, layer: PadShortcut, idxs: list[int]) -> PadShortcut:
            kept = [i for i in range(layer.in_channels) if i not in set(idxs)]
            layer.in_channels, layer.source = layer.pruned(kept, range(layer.out_channels))
            return layer

        def get_out_channels(self, layer: PadShortcut) -> int:
            return layer.out_channels

        def get_in_channels(self, layer: PadShortcut) -> int:
            return layer.in_channels

    return ShortcutPruner()


@contextmanager
def _seeing(
    model: nn.Module, setting: Setting, importance: str, gradients: dict[str, Tensor] | None, seed: int
) -> Iterator[Any]:
    """Make an importance, and let it see what it needs.

    ``HessianImportance.accumulate_grad`` of 1.6.1 keeps the last sample alone, so it gets one gradient whose square is
    the mean of the samples' squares.
    """
    import torch_pruning as tp

    kind, options = IMPORTANCES[importance]
    scorer = getattr(tp.importance, kind)(**options)
    for name, parameter in model.named_parameters():
        parameter.grad = None if gradients is None else gradients[name].clone()
    if importance == "Hessian":
        scorer.accumulate_grad(model)
    if importance == "activation":
        with torch.no_grad(), scorer.compute_importance(model):
            model(torch.cat([x for x, _ in setting.few(seed)]))
    yield scorer


def _gradients(setting: Setting, seed: int, squared: bool) -> dict[str, Tensor]:
    """Return the mean gradient of the loss; or the root of the mean of the samples' squared ones."""
    model = copy.deepcopy(setting.model).eval().requires_grad_(True)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    few = setting.few(seed)
    parts = [(x[i : i + 1], y[i : i + 1]) for x, y in few for i in range(len(x))] if squared else few
    count = sum(len(y) for _, y in few)
    for x, y in parts:
        model.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.square() if squared else parameter.grad
    return {name: (total / count).sqrt() if squared else total / count for name, total in sums.items()}


def _stripped(model: nn.Module) -> nn.Module:
    """Take off what importances leave on a model."""
    for module in model.modules():
        vars(module).pop("_importance", None)
    model.zero_grad()
    return model


@contextmanager
def shrinking(setting: Setting, model: nn.Module) -> Iterator[None]:
    """Add Torch-Pruning's group-norm penalty to the gradients of a model before every step of an optimizer."""
    import torch_pruning as tp
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    scorer = tp.importance.MagnitudeImportance(p=2)
    pruner = _pruner(setting, model, scorer, 0.5, "global", kind="GroupNormPruner")
    pruner.reg = PENALTY
    hook = register_optimizer_step_pre_hook(lambda *_: pruner.regularize(model))
    try:
        yield
    finally:
        hook.remove()


def cut_shrunk(setting: Setting, model: nn.Module, fraction: float) -> nn.Module:
    """Return a network that :func:`shrinking` has trained, cut by its groups' norms.

    Raises:
        PeerError: If it can't.
    """
    import torch_pruning as tp

    def trial(ratio: float) -> nn.Module:
        copied = copy.deepcopy(model).eval()
        scorer = tp.importance.MagnitudeImportance(p=2)
        _pruner(setting, copied, scorer, ratio, "global", kind="GroupNormPruner").step()
        return _stripped(copied)

    return _least(setting, trial, fraction)
