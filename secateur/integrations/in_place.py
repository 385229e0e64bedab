"""Prune a network under the hands of a trainer that holds it: the same module, the same optimizer, fewer channels.

Everything else in this package makes a new network. A trainer of another library holds the network, its optimizers and
its averages in places that are its own; what is put in there has to be the object that was there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.engine.once import prune
from secateur.errors import CheckpointError, PlanError, UsageError
from secateur.graph.plan import PruningPlan
from secateur.network.inputs import mapped
from secateur.network.named import modules_of
from secateur.pruning.applied import plans_of
from secateur.pruning.surgery import carry_optimizer, cut
from secateur.pruning.target import Target


class Schedule:
    """What is pruned before which epoch, and what of it is done.

    Args:
        targets: Epoch, counted from 0, before which the network is pruned -> what is removed then. A fraction counts
            from the network as it is at that moment.
        example_inputs: As :func:`secateur.prune` takes them; they are moved to the network's device.
        options: Further arguments of :func:`secateur.prune`.

    Raises:
        UsageError: If an epoch is no whole number from 0 on, or a target no :class:`secateur.Target`.
    """

    def __init__(self, targets: Mapping[int, Target], example_inputs: Any, options: Mapping[str, Any]) -> None:
        for epoch, target in targets.items():
            if type(epoch) is not int or epoch < 0 or not isinstance(target, Target):
                raise UsageError(
                    "schedule: maps epochs, whole numbers from 0 on, to targets, as {3: Target(macs=0.5)}; found "
                    f"{epoch!r}: {target!r}."
                )
        self.targets, self.example_inputs, self.options = dict(targets), example_inputs, dict(options)
        self.done: list[int] = []
        """Epochs before which the network was pruned; a run that goes on within one does not prune again."""

    def prune(
        self, epoch: int, network: nn.Module, optimizers: Iterable[Optimizer], averages: Iterable[nn.Module] = ()
    ) -> bool:
        """Prune a network in place if the schedule says so, see :func:`prune_in_place`; tell whether it did."""
        if epoch in self.done or epoch not in self.targets:
            return False
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        inputs = mapped(self.example_inputs, lambda tensor: tensor.to(device))
        result = prune(network, inputs, self.targets[epoch], **self.options)
        prune_in_place(network, result.model, result.plan, optimizers, averages)
        self.done.append(epoch)
        return True

    def state(self, network: nn.Module | None) -> dict[str, Any]:
        """Return, as plain data, what :meth:`restore` needs."""
        return {"done": list(self.done), "plans": [p.to_json() for p in plans_of(network)] if network else []}

    def restore(
        self, state: Any, network: nn.Module, averages: Iterable[nn.Module] = (), where: str = "checkpoint"
    ) -> None:
        """Prune a freshly built network in place as a checkpoint's was, so that its weights fit.

        Raises:
            CheckpointError: If the state is none, or the network was pruned otherwise, or further.
        """
        texts, done = (state.get(key) if isinstance(state, dict) else None for key in ("plans", "done"))
        if not isinstance(texts, list) or not isinstance(done, list) or any(type(n) is not int for n in done):
            raise CheckpointError(f"{where}: holds no plans; it was not written with this callback.")
        try:
            plans = [PruningPlan.from_json(str(text)) for text in texts]
            known = list(plans_of(network))
            if known != plans[: len(known)]:
                raise PlanError("the network given was pruned otherwise, or further. Build it anew.")
            for plan in plans[len(known) :]:
                prune_in_place(network, cut(network, plan), plan, (), averages)
        except PlanError as error:
            raise CheckpointError(f"{where}: the network can't be pruned as it says: {error}") from error
        self.done = list(done)


def prune_in_place(
    network: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    optimizers: Iterable[Optimizer] = (),
    averages: Iterable[nn.Module] = (),
) -> None:
    """Let a network become its pruned copy, and optimizers go on with what is left of its parameters.

    Nothing is changed if anything can't be: optimizers and averages are cut first.

    Args:
        network: The network, or a part of what the optimizers hold the parameters of.
        small: What applying the plan made of it.
        plan: The plan.
        optimizers: PyTorch's own, or Accelerate's wrappers of them. State of parameters outside the network stays.
            Schedulers need nothing: their optimizer is the one that they know.
        averages: Networks of the same class, as an average of its weights, cut by the same plan.

    Raises:
        PlanError: If the plan fits not all of them, or an optimizer holds state that can't be cut.
    """
    carried = [(inner, _carried(inner, network, small, plan)) for inner in map(_unwrapped, optimizers)]
    cuts = [(average, cut(average, plan)) for average in averages]
    mine = {id(p) for p in network.parameters()}
    for inner, new in carried:
        for group, own in zip(inner.param_groups, new.param_groups, strict=True):
            left = iter(own["params"])
            group["params"] = [next(left) if id(p) in mine else p for p in group["params"]]
        others = {p: state for p, state in inner.state.items() if id(p) not in mine}
        inner.state.clear()
        inner.state.update({**others, **new.state})
    for whole, part in [(network, small), *cuts]:
        _become(whole, part)


def _unwrapped(optimizer: Any) -> Optimizer:
    """Return PyTorch's optimizer inside Accelerate's wrapper."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _carried(optimizer: Optimizer, network: nn.Module, small: nn.Module, plan: PruningPlan) -> Optimizer:
    """Carry what an optimizer holds of a network, and leave out what it holds of other parameters."""
    mine = {id(p) for p in network.parameters()}
    own = copy.copy(optimizer)
    own.param_groups = [{**g, "params": [p for p in g["params"] if id(p) in mine]} for g in optimizer.param_groups]
    own.state = {p: state for p, state in optimizer.state.items() if id(p) in mine}  # type: ignore[assignment]
    return carry_optimizer(own, network, small, plan)


def _become(network: nn.Module, small: nn.Module) -> None:
    """Let every module of a network hold what its counterpart in a copy holds; the modules stay the ones they are."""
    ours, theirs = modules_of(network), modules_of(small)
    if {path: type(m) for path, m in ours.items()} != {path: type(m) for path, m in theirs.items()}:
        raise PlanError(f"{type(network).__name__}: its pruned copy has other modules; it can't take its place.")
    # Both share one dict, so that a method or hook of the copy's acts on the network.
    counterpart = {id(theirs[path]): module for path, module in ours.items()}
    for path, module in ours.items():
        object.__setattr__(module, "__dict__", vars(theirs[path]))
        children = module._modules
        children.update({name: counterpart[id(child)] for name, child in children.items() if child is not None})
