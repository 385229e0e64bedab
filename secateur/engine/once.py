"""Prune once and without training: trace, score, plan, cut, verify and compensate in one call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal, Unpack

from torch import nn

from secateur import compensation
from secateur.compensation.damage import NotComparableError
from secateur.compensation.sensitivity import Sensitivity
from secateur.criteria import Criterion
from secateur.deploy.timing import choose_round_to
from secateur.deploy.timing.measuring import latency
from secateur.deploy.timing.table import Latency
from secateur.engine.choosing import MEASURED_BATCH, Choice, measured, unmeasured
from secateur.engine.events import Steps
from secateur.engine.request import warn_if_fallen
from secateur.engine.result import PruneResult
from secateur.engine.speed import in_time
from secateur.engine.way import Way, require_possible, way_of
from secateur.errors import UsageError, VerificationError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.limits import Limits
from secateur.pruning.options import AUTO, SENSITIVITY, Allocation, OptionKeywords, Options
from secateur.pruning.planning import Target, plan_removal
from secateur.pruning.surgery import cut
from secateur.pruning.verification import VerificationReport, verify
from secateur.tracing.tracing import trace
from secateur.training import evaluation
from secateur.training.evaluation import Metric
from secateur.training.passes import Batches
from secateur.training.stages import Loss

_LOG = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    example_inputs: Any,
    target: Target | None = None,
    *,
    data: Iterable[Any] | None = None,
    method: str | Criterion | Callable[..., Any] = AUTO,
    method_options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    compensate: str | Sequence[str] | None = None,
    test: Batches | None = None,
    metric: Metric | Any = None,
    seed: int = 0,
    steps: Steps | None = None,
    **options: Unpack[OptionKeywords],
) -> PruneResult:
    """Remove the least important channels of a network, once and without training, and verify the result.

    It is the chain of :func:`secateur.trace`, :func:`secateur.score`, :func:`secateur.plan`, :func:`secateur.apply`
    and :func:`secateur.verify`. What is verified is the cut, before compensation changes what the network computes.

    Args:
        model: The network; it is copied, never changed.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments to trace and verify on.
        target: The fraction of MACs, parameters, channels, memory or latency to remove; None to follow ``ratios``
            alone. For latency, times of the layers are measured first (:func:`secateur.latency`), and the whole network
            before and after.
        data: Batches that criterion and compensation see, see :func:`secateur.criteria.feature_maps.batches`.
        method: The criterion that ranks the channels: its name, a :class:`secateur.Criterion` or a function. ``auto``,
            with data, measures the sensitivity of every group, takes from each what costs the network least, channels
            of the lowest ``l2`` first, and refits all layers behind by least squares; without data it ranks the
            channels of all groups together by their ``l2``.
        method_options: The criterion's own options. With one that decides a selection, such as corrnet's
            ``threshold``, the criterion selects by itself and may remove less than asked for.
        loss: ``loss(output, target)``, for criteria of gradients; cross entropy when None.
        compensate: Methods that adjust the kept channels, see :func:`secateur.compensation.compensate`; none where it
            is empty. None is ``least_squares`` for ``auto`` with data, and nothing otherwise.
        test: Batches of inputs and targets on which both networks are measured; None to measure neither.
        metric: What is measured on them, see :func:`secateur.training.evaluation.evaluate`; accuracy when None.
        seed: Seed of what the criterion draws.
        steps: Where to show which step is running.
        **options: ``round_to``, ``min_channels``, ``max_ratio``, ``ratios``, ``skip``, ``allocation`` and ``inexact``,
            see :class:`secateur.Options`.

    Returns:
        The pruned network with its plan, the verification, the channel graph and the figures before and after.

    Raises:
        SecateurError: Of the class that says what is wrong, see :mod:`secateur.errors`; a VerificationError if the
            pruned network is not exact and nothing inexact was asked for, or fails in train mode alone.

    Example:
        >>> import torch, secateur as sc
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
        >>> result = sc.prune(model, torch.randn(1, 1, 8, 8), sc.Target(channels=0.5))
        >>> result.model[0].out_channels, result.check.exact
        (4, True)
    """
    chosen, own = Options.of(options), dict(method_options or {})
    way = way_of(method, chosen.allocation, compensate, data is not None)
    require_possible(target, way, chosen, own, data is not None)
    if metric is not None and test is None:
        raise UsageError("prune: metric has nothing to be measured on; pass test=batches.")
    if isinstance(chosen.allocation, Sensitivity):
        chosen.allocation.require_of(model)
    data, test = _rereadable(data), _rereadable(test)
    with _shown(steps, "tracing"):
        graph = trace(model, example_inputs)
    reading = {"options": own, "loss": loss, "seed": seed}
    planner = _Planner(model, graph, example_inputs, target, way, chosen, data, steps, reading)
    plan, small, report = planner.pruned()
    with _shown(steps, "verifying"):
        check = verify(model, small, plan, example_inputs)
    _require_verified(check, chosen.inexact)
    report |= _figures(graph, plan, target) | {"verification": asdict(check)}
    report |= {"compensation": _compensated(model, small, plan, way, data, graph, example_inputs, steps)}
    _evaluate({"before": model, "after": small}, report, test, evaluation.chosen(metric), steps)
    warn_if_fallen(
        "prune",
        report["metric"],
        (report["before"].get("test"), report["after"].get("test")),
        "'secateur compress' prunes and trains it back; or let less go",
    )
    parts = {**way.parts, "allocation": planner.allocated}
    if target is None:  # ratios alone leave nothing to allocate
        del parts["allocation"]
    report |= {"parts": parts, "notes": planner.notes}
    return PruneResult(small, plan, check, graph, report | {"method": way.name, "allocation": planner.allocated})


class _Planner:
    """Plans for any multiple of channels, on one network scored and measured once."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        example_inputs: Any,
        target: Target | None,
        way: Way,
        options: Options,
        data: Any,
        steps: Steps | None,
        reading: dict[str, Any],
    ) -> None:
        self.model, self.graph, self.target, self.options, self.steps = model, graph, target, options, steps
        self.example_inputs = example_inputs
        names = [group.name for group in graph.groups if group.exact or options.inexact]
        self.times: Latency | None = None
        if target is not None and target.what == "latency":
            self._limits(names, options)  # requests that contradict each other are refused before minutes of timing
            with _shown(steps, "measuring times of layers"):
                self.times = latency(model, graph, **target.setting, example_inputs=example_inputs)
        self.allocation: Allocation = way.allocation
        self.notes: list[str] = []
        """Parts of ``auto`` that can't be had."""
        if way.auto and data is None:
            self.notes.append("auto: without data, channels go by norms of weights, and nothing is refitted")
        if self.allocation == SENSITIVITY:
            # Ratios alone leave nothing to allocate.
            self.allocation = "normalized" if target is None else self._measured(data, names)
        with _shown(steps, f"scoring by {way.criterion.name}"):
            self.choice = Choice(
                model, graph, way.criterion, reading["options"], names,
                data=data, loss=reading["loss"], seed=reading["seed"],
            )  # fmt: skip
            self._limits(self.choice.scores, options)  # requests that contradict each other are refused here

    def _limits(self, names: Iterable[str], options: Options) -> Limits:
        groups = [self.graph.group(name) for name in names]
        return Limits(self.graph, groups, options)

    def _measured(self, data: Any, names: Sequence[str]) -> Allocation:
        steps = self.steps

        def progress(done: int, of: int) -> None:
            if steps is not None:
                steps("measuring sensitivity", done, of)

        limits = self._limits(names, self.options).by_group
        try:
            return measured(
                self.model, self.graph, data, limits, self.target,
                inexact=self.options.inexact, costs=self.times, progress=progress,
            )  # fmt: skip
        except NotComparableError as error:
            if self.options.allocation == SENSITIVITY:
                raise
            self.notes.append(unmeasured(error))
            _LOG.warning("prune: %s", self.notes[-1])
            return "normalized"

    @property
    def allocated(self) -> str:
        """The allocation's name."""
        return self.allocation if isinstance(self.allocation, str) else SENSITIVITY

    def multiple(self) -> tuple[int, dict[str, Any] | None]:
        """Return the multiple of channels that is asked for, or the one that runs fastest, and the times."""
        if self.options.round_to != "auto":
            return self.options.round_to, None
        with _shown(self.steps, "measuring multiples of channels"):
            found = choose_round_to(lambda n: cut(self.model, self(n)), self.example_inputs, batch_size=MEASURED_BATCH)
        return found.round_to, found.to_dict()

    def pruned(self) -> tuple[PruningPlan, nn.Module, dict[str, Any]]:
        """Return the plan, the network that is cut by it, and what was measured to find it."""
        if self.target is not None and self.times is not None:
            return self._in_time(self.target, self.times)
        round_to, times = self.multiple()
        with _shown(self.steps, "pruning"):
            plan = self(round_to)
            small = cut(self.model, plan)
        return plan, small, {"round_to": round_to, "measured": times, "latency": None}

    def _in_time(self, target: Target, times: Latency) -> tuple[PruningPlan, nn.Module, dict[str, Any]]:
        round_to = self.options.round_to
        with _shown(self.steps, "pruning and timing"):
            timed = in_time(
                self.model, self.graph, self.example_inputs, target, times, lambda goal: self(round_to, goal)
            )
        return timed.plan, timed.model, {"round_to": round_to, "measured": None, "latency": timed.report}

    def __call__(self, round_to: int | Literal["auto"], target: Target | None = None) -> PruningPlan:
        """Return the plan whose kept channels are multiples of a number, to another target if one is given."""
        limits = self._limits(self.choice.scores, replace(self.options, round_to=round_to)).by_group
        found = self.choice(
            target or self.target, limits, round_to=round_to, allocation=self.allocation, costs=self.times
        )
        return plan_removal(self.graph, found)


def _compensated(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    way: Way,
    data: Any,
    graph: ChannelGraph,
    inputs: Any,
    steps: Steps | None,
) -> dict[str, Any] | None:
    if not way.methods:
        return None
    with _shown(steps, f"compensating by {','.join(way.methods)}"):
        done = compensation.compensate(
            model, small, plan, way.methods, data, graph=graph, example_inputs=inputs, **way.refit
        )
    return asdict(done)


def _evaluate(
    networks: Mapping[str, nn.Module], report: dict[str, Any], test: Any, metric: Any, steps: Steps | None
) -> None:
    """Measure the networks, each into its part of the report."""
    report["metric"] = evaluation.metric_name(metric)
    for when, network in networks.items() if test is not None else ():
        with _shown(steps, "evaluating"):
            report[when]["test"] = evaluation.evaluate(network, test, metric)
            if (details := evaluation.details(metric)) is not None:
                report[when]["details"] = details


def _require_verified(check: VerificationReport, inexact: bool) -> None:
    if not check.trains:
        raise VerificationError(
            f"train mode: the pruned network fails, and the original does not: {check.training_failure}; nothing was "
            "saved. A size is written in code that runs in train mode alone: leave out the layers whose channels it "
            "counts (--skip)."
        )
    if not check.exact and not inexact:
        raise VerificationError(
            "the pruned network differs from the original with the removed channels zeroed, by "
            f"{check.max_error:.1e} of its output ({'; '.join((*check.mismatched, *check.refused)[:2])}); "
            "nothing was saved. Please report it."
        )


def _figures(graph: ChannelGraph, plan: PruningPlan, target: Target | None) -> dict[str, Any]:
    def costs(of: PruningPlan | None) -> dict[str, float]:
        found: dict[str, float] = {"macs": cost.macs(graph, of), "parameters": cost.parameters(graph, of)}
        if target is not None and target.what == "memory":
            found["memory_bytes"] = cost.run_time_memory(graph, of, target.setting["batch"])
        return found

    def widths(of: PruningPlan | None) -> dict[str, int]:
        return {layer.module: layer.out_channels for layer in cost.layer_costs(graph, of)}

    return {"before": costs(None), "after": costs(plan), "widths": {"before": widths(None), "after": widths(plan)}}


def _rereadable(batches: Iterable[Any] | None) -> Iterable[Any] | None:
    """Keep in a list what can be read only once: criterion, compensation and both evaluations each read anew."""
    return list(batches) if isinstance(batches, Iterator) else batches


def _shown(steps: Steps | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if steps is None else steps.step(name)
