"""Every criterion, compensation and two rounds of pruning on one small network, and whether its clean errors are true.

An attempt ends in a result or in a :class:`secateur.SecateurError` of one line. Whatever else it ends in is a fault.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import secateur as sc
from secateur.compensation import METHODS, compensate
from secateur.criteria import feature_maps, names
from secateur.criteria.readings import unseen
from secateur.engine import pairing
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.plan import PruningPlan
from tests import oracle
from tests.cases import CASES
from tests.criteria.networks import NETWORKS

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
ROUNDS = {torch.float32: "redundancy", torch.float64: "cfp"}
"""Method of the two rounds in each precision."""


def loss(outputs: Any, _: Any) -> Tensor:
    """Turn whatever a network returns into a number that depends on all of it."""
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.float().square().mean() for leaf in found]).sum()


def constant(_model: nn.Module, _batches: Any) -> float:
    """Measure nothing, so that every round is accepted."""
    return 0.5


@dataclass
class Reach:
    """What was tried on one network, and what came of it."""

    name: str
    model: nn.Module
    inputs: Any
    graph: ChannelGraph | None = None
    results: Counter[str] = field(default_factory=Counter)
    """Kind of attempt -> number of results."""
    errors: dict[str, sc.SecateurError] = field(default_factory=dict)
    """Attempt -> its clean error."""

    def attempt(self, kind: str, what: str, run: Callable[[], Any]) -> Any:
        """Return a result, or None where there was a clean error; whatever else is raised goes on."""
        try:
            result = run()
        except sc.SecateurError as error:
            self.errors[f"{kind} {what}".strip()] = error
            return None
        self.results[kind] += 1
        return result

    @property
    def batch(self) -> tuple[Any, Tensor]:
        """Inputs and labels."""
        return self.inputs, torch.arange(feature_maps.examples(self.inputs) or 1) % 3

    @property
    def exact(self) -> list[ChannelGroup]:
        """The groups that are scored by default."""
        return [] if self.graph is None else [group for group in self.graph.groups if group.exact]


def built(name: str, dtype: torch.dtype) -> Reach:
    """Return a network of the tables with random values and its example inputs, in a precision."""
    torch.manual_seed(0)
    source = CASES[name] if name in CASES else NETWORKS[name]
    model = oracle.randomise(source.build()).to(dtype).eval()
    inputs = source.inputs() if callable(source.inputs) else source.inputs
    return Reach(name, model, oracle.doubled(inputs) if dtype is torch.float64 else inputs)


def finite(model: nn.Module, inputs: Any) -> bool:
    """Tell whether a network returns numbers only."""
    return all(bool(leaf.isfinite().all()) for leaf in oracle.run(model, inputs) if isinstance(leaf, Tensor))


def reach(name: str, dtype: torch.dtype) -> Reach:
    """Try everything on a network."""
    found = built(name, dtype)
    found.graph = found.attempt("trace", "", lambda: sc.trace(found.model, found.inputs))
    if not found.exact:
        return found
    check_moments(found)
    plans: dict[str, PruningPlan] = {}
    for criterion in names():
        if (plan := _criterion(found, criterion)) is not None and plan.removed:
            plans.setdefault(str(plan.removed), plan)
    # Single precision proves nothing that double does not, and what a trace meets are widths.
    widths: set[str] = set()
    for plan in plans.values() if dtype is torch.float64 else ():
        counts = str({group: len(channels) for group, channels in plan.removed.items()})
        _cut(found, plan, again=counts not in widths)
        widths.add(counts)
    for plan, method in itertools.product(itertools.islice(plans.values(), 2), METHODS):
        _compensate(found, plan, method)
    _rounds(found, ROUNDS[dtype])
    return found


def check_moments(found: Reach) -> None:
    """See that second moments are those of something: positive semi-definite."""
    graph, model = found.graph, found.model
    assert graph is not None
    groups = [group.name for group in found.exact if not unseen(model, graph, group)]
    for name, moments in feature_maps.observe(model, graph, [found.batch], groups).items():
        for matrix in (moments.second, moments.covariance, moments.correlation):
            lowest, scale = float(torch.linalg.eigvalsh(matrix).min()), float(moments.second.diagonal().max())
            assert lowest >= -1e-9 * max(scale, 1.0), name
    found.results["moments"] += len(groups)


def _criterion(found: Reach, name: str) -> PruningPlan | None:
    graph, model, data = found.graph, found.model, [found.batch]
    assert graph is not None
    scores = found.attempt("score", name, lambda: sc.score(model, graph, name, data, loss=loss))
    if scores is not None:
        assert scores.keys() <= {group.name for group in found.exact}
        assert all(bool(values.isfinite().all()) for values in scores.values()), name
    chosen = found.attempt("select", name, lambda: sc.select(model, graph, name, 0.5, data, loss=loss))
    if chosen is None:
        return None
    # No attempt: what is selected can be planned.
    return sc.plan_removal(graph, {group: list(one.removed) for group, one in chosen.items() if one.removed})


def _cut(found: Reach, plan: PruningPlan, *, again: bool) -> None:
    """Cut the network, see that it computes what the original with the channels zeroed does, and trace it again."""
    small = sc.apply(found.model, plan)
    modes = CASES[found.name].modes if found.name in CASES else ("eval",)
    verdict = oracle.judge(found.model, small, plan, found.inputs, modes=modes)
    tied = verdict.exact or oracle.ties(found.model, small, plan, found.inputs)
    assert tied, f"{verdict}; removed {plan.removed}"
    small.eval()
    if again:
        found.attempt("trace again", "", lambda: sc.trace(small, found.inputs))


def _compensate(found: Reach, plan: PruningPlan, method: str) -> None:
    small = sc.apply(found.model, plan)

    def run() -> nn.Module:
        report = compensate(
            found.model, small, plan, method, [found.batch], graph=found.graph, example_inputs=found.inputs
        )
        assert all(entry.applied or entry.reason for entry in report)
        return small

    done = found.attempt("compensate", method, run)
    assert done is None or finite(done, found.inputs) or not finite(found.model, found.inputs), method


def _rounds(found: Reach, method: str) -> None:
    """Run two rounds; the finished network has the widths that its plan says, and the plan is exact."""
    # Each stage of training ends in a collection of garbage, which takes as long as all the rest.
    with tempfile.TemporaryDirectory() as folder, mock.patch("gc.collect"):
        result = found.attempt(
            "compress", method,
            lambda: sc.compress(
                found.model, method, train=[found.batch], validation=[found.batch], example_inputs=found.inputs,
                phases=(1,), max_rounds=2, fraction=0.3, loss=loss, metric=constant, run_dir=folder, lr=1e-9,
                optimise_epochs=1, finetune_epochs=1, linear=True, criterion_batches=1, clip_norm=1.0,
            ),
        )  # fmt: skip
    if result is None:
        return
    assert result.plan.removed
    expected = sc.apply(found.model, result.plan).state_dict()
    assert {n: t.shape for n, t in result.model.state_dict().items()} == {n: t.shape for n, t in expected.items()}
    assert not result.report["verification"]["mismatched"]


# Whether a clean error is true, found out in another way


def _gradients(found: Reach) -> list[Tensor | None]:
    """Differentiate the loss by every parameter, as plainly as can be."""
    inputs = found.inputs
    parameters = [p for p in found.model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        if isinstance(inputs, dict):
            outputs = found.model(**inputs)
        else:
            outputs = found.model(*inputs) if isinstance(inputs, tuple) else found.model(inputs)
        return list(torch.autograd.grad(loss(outputs, None), parameters, allow_unused=True))


def _not_differentiable(found: Reach) -> bool:
    try:
        _gradients(found)
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error) or "inference" in str(error).lower()
    return False


def _independent(found: Reach) -> bool:
    """Tell whether the loss depends on no parameter that makes channels of an exact group."""
    making = {member.tensor for group in found.exact for member in group.producers}
    named = [name for name, p in found.model.named_parameters() if p.is_floating_point()]
    return all(g is None for name, g in zip(named, _gradients(found), strict=True) if name in making)


def _hidden(found: Reach) -> bool:
    """Tell whether, of every exact group, some channel reaches no convolution or linear layer that is called."""
    graph = found.graph
    assert graph is not None
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in found.model.named_modules()
        if isinstance(module, (*oracle.CONVOLUTIONS, nn.Linear))
    ]
    oracle.run(found.model, found.inputs)
    for hook in hooks:
        hook.remove()
    for group in found.exact:
        index, seen = graph.groups.index(group), set()
        readers = {member.tensor for member in group.consumers}
        for port in graph.layers:
            if port.module in called and port.in_group is not None and port.weight in readers:
                assert port.in_channel is not None
                seen |= set(port.in_channel[port.in_group == index].tolist())
        if len(seen) == group.size:
            return False
    return True


def _one_example(found: Reach) -> bool:
    return len(found.batch[1]) == 1


def _nothing_eligible(found: Reach) -> bool:
    assert found.graph is not None
    return not pairing.eligible(found.graph, linear=True)


TRUE: dict[str, Callable[[Reach], bool]] = {
    "the loss can't be differentiated: ": _not_differentiable,
    "the loss depends on no filter of the groups": _independent,
    "one observation of a channel has no correlation": _one_example,
    "all 1 samples are of one class": _one_example,
    "channels can't be seen, as ": _hidden,
    "so its maps can't be told by example": lambda found: found.name in ("windows", "unbatched", "regions_by_level"),
    "no group of filters that these settings let go": _nothing_eligible,
    "it has no filters of 2 elements or more to correlate": lambda found: all(
        p.numel() < 2 * group.size
        for group in found.exact
        for member in group.producers
        for name, p in found.model.named_parameters()
        if name == member.tensor
    ),
}
"""Part of a clean error -> whether it is true of a network."""


def untrue(found: Reach) -> dict[str, str]:
    """Return the clean errors that are not one line, or whose reason is unknown or does not hold."""
    return {
        what: str(error)
        for what, error in found.errors.items()
        if "\n" in str(error) or not any(part in str(error) and holds(found) for part, holds in TRUE.items())
    }
