"""Prune once and without training: trace, score, plan, cut, verify and compensate in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from secateur import compensation, criteria
from secateur.compensation.sensitivity import Sensitivity, refined, sensitivity
from secateur.criteria import Criterion
from secateur.criteria.feature_maps import examples
from secateur.criteria.scoring import score, select
from secateur.deploy.timing import choose_round_to
from secateur.engine.events import Steps
from secateur.engine.result import PruneResult
from secateur.engine.selection import deciding
from secateur.errors import UsageError, VerificationError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.limits import matches
from secateur.pruning.planning import Allocation, Target, plan, plan_removal
from secateur.pruning.surgery import cut
from secateur.pruning.verification import VerificationReport, verify
from secateur.tracing.tracing import trace
from secateur.training import evaluation
from secateur.training.evaluation import Metric
from secateur.training.passes import Batches
from secateur.training.stages import Loss

AUTO = "auto"
"""The name of the default method."""
MEASURED_IMAGES = 512
"""So many images are enough to measure sensitivity on."""
REFINEMENTS = 2
"""So often the table is measured more finely around the widths planned by it."""
MEASURED_BATCH = 8
"""Examples in the forward passes that ``round_to="auto"`` times."""


def prune(
    model: nn.Module,
    example_inputs: Any,
    target: Target | None = None,
    *,
    data: Iterable[Any] | None = None,
    method: str | Criterion | Callable[..., Any] = AUTO,
    method_options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    ratios: Mapping[str, float] | None = None,
    max_ratio: float | Mapping[str, float] = 1.0,
    skip: Sequence[str] = (),
    round_to: int | Literal["auto"] = 1,
    min_channels: int = 1,
    allocation: Allocation | Literal["sensitivity"] | None = None,
    inexact: bool = False,
    compensate: str | Sequence[str] | None = None,
    test: Batches | None = None,
    metric: Metric | Any = None,
    seed: int = 0,
    steps: Steps | None = None,
) -> PruneResult:
    """Remove the least important channels of a network, once and without training, and verify the result.

    It is the chain of :func:`secateur.trace`, :func:`secateur.score`, :func:`secateur.plan`, :func:`secateur.apply`
    and :func:`secateur.verify`, each with the arguments that have its words here. What is verified is the cut, before
    compensation changes on purpose what the network computes.

    Args:
        model: The network; it is copied, never changed.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments to trace and verify on.
        target: The fraction of MACs, parameters or channels to remove; None to follow ``ratios`` alone.
        data: Batches that criterion and compensation see, see :func:`secateur.criteria.feature_maps.batches`; what can
            be read only once is kept in a list.
        method: The criterion that ranks the channels: its name, a :class:`secateur.Criterion` or a function. ``auto``,
            with data, measures the sensitivity of every group, takes from each what costs the network least, channels
            of the lowest ``l2`` first, and refits all layers behind by least squares; without data it is ``l1``.
        method_options: The criterion's own options. With one that decides a selection, such as corrnet's
            ``threshold``, the criterion selects by itself and may remove less than asked for.
        loss: ``loss(output, target)``, for criteria of gradients; cross entropy when None.
        ratios: As in :func:`secateur.plan`.
        max_ratio: As in :func:`secateur.plan`.
        skip: As in :func:`secateur.plan`.
        round_to: As in :func:`secateur.plan`; ``auto`` measures which of 1, 4, 8, 16 and 32 runs fastest on this CPU.
        min_channels: As in :func:`secateur.plan`.
        allocation: As in :func:`secateur.plan`; ``sensitivity`` measures the table first. None is ``sensitivity`` for
            ``auto`` with data, and ``normalized`` otherwise.
        inexact: As in :func:`secateur.plan`.
        compensate: Methods that adjust the kept channels, see :func:`secateur.compensation.compensate`; none where it
            is empty. None is ``least_squares`` for ``auto`` with data, and nothing otherwise.
        test: Batches of inputs and targets on which both networks are measured; None to measure neither.
        metric: What is measured on them, see :func:`secateur.training.evaluation.evaluate`; accuracy when None.
        seed: Seed of what the criterion draws.
        steps: Where to show which step is running.

    Returns:
        The pruned network with its plan, the verification, the channel graph and the figures before and after.

    Raises:
        UsageError: If nothing is asked for, data are missing, an option is unknown or out of range, or two requests
            contradict each other.
        DataError: If the data are empty or don't fit the network.
        CriterionError: If the criterion is not defined on a group's tensors.
        PlanError: If the target can't be met.
        TraceError: If the network can't be run on the example inputs.
        VerificationError: If the pruned network is not exact, and nothing inexact was asked for; or if it fails in
            train mode, and the original does not.

    Example:
        >>> import torch, secateur as sc
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
        >>> result = sc.prune(model, torch.randn(1, 1, 8, 8), sc.Target(channels=0.5))
        >>> result.model[0].out_channels, result.check.exact
        (4, True)
    """
    way, options = way_of(method, allocation, compensate, data), dict(method_options or {})
    criterion, methods, allocation = way.criterion, way.methods, way.allocation
    _require_request(target, ratios, round_to)
    _require_data(way, data)
    _require_options(criterion, options, round_to)
    if metric is not None and test is None:
        raise UsageError("prune: metric has nothing to be measured on; pass test=batches.")
    if isinstance(allocation, Sensitivity):
        allocation.require_of(model)
    data, test = _rereadable(data), _rereadable(test)
    with _shown(steps, "tracing"):
        graph = trace(model, example_inputs)
    few = _few(data) if allocation == "sensitivity" and target is not None else []
    if allocation == "sensitivity":
        allocation = _measured(model, graph, few, inexact, skip, steps) if few else "normalized"
    with _shown(steps, f"scoring by {criterion.name}"):
        planned = _planner(
            model, graph, criterion, options,
            {"data": data, "loss": loss, "seed": seed},
            target=target, ratios=ratios, max_ratio=max_ratio, skip=skip, min_channels=min_channels,
            inexact=inexact,
        )  # fmt: skip
    for _ in range(REFINEMENTS if few else 0):
        table: Any = allocation
        allocation = refined(model, graph, few, table, planned(1, table), progress=_told(steps))
    planned = partial(planned, allocation=allocation)
    measured = None
    if round_to == "auto":
        with _shown(steps, "measuring multiples of channels"):
            choice = choose_round_to(lambda n: cut(model, planned(n)), example_inputs, batch_size=MEASURED_BATCH)
        round_to, measured = choice.round_to, choice.to_dict()
    with _shown(steps, "pruning"):
        chosen = planned(round_to)
        small = cut(model, chosen)
    with _shown(steps, "verifying"):
        check = verify(model, small, chosen, example_inputs)
    _require_verified(check, inexact)
    compensated = None
    if methods:
        with _shown(steps, f"compensating by {','.join(methods)}"):
            compensated = compensation.compensate(
                model, small, chosen, methods, data, graph=graph, example_inputs=example_inputs, **way.refit
            )
    before, after = _costs(graph), _costs(graph, chosen)
    if test is not None:
        for network, figures in ((model, before), (small, after)):
            with _shown(steps, "evaluating"):
                figures["test"] = evaluation.evaluate(network, test, metric)
    report = {
        "method": way.name,
        "allocation": allocation if isinstance(allocation, str) else "sensitivity",
        "metric": evaluation.metric_name(metric),
        "before": before,
        "after": after,
        "widths": {"before": _widths(graph), "after": _widths(graph, chosen)},
        "verification": asdict(check),
        "compensation": None if compensated is None else asdict(compensated),
        "round_to": round_to,
        "measured": measured,
    }
    return PruneResult(small, chosen, check, graph, report)


@dataclass(frozen=True)
class Way:
    """How channels are chosen and adjusted."""

    name: str
    criterion: Criterion
    allocation: Any
    methods: list[str]
    """Of compensation."""
    refit: dict[str, Any]
    """Options of least squares."""


def way_of(method: Any, allocation: Any, compensate: str | Sequence[str] | None, data: Any) -> Way:
    """Return what is asked for; where nothing is, of ``auto`` what has been measured to keep most accuracy."""
    if method != AUTO:
        criterion = criteria.get(method)
        return Way(criterion.name, criterion, allocation or "normalized", compensation.parse(compensate or ()), {})
    best = data is not None
    criterion = criteria.get("l2" if best else "l1")
    allocation = allocation or ("sensitivity" if best else "normalized")
    refit = {"everywhere": True} if compensate is None and best else {}
    if compensate is None:
        compensate = ["least_squares"] if best else []
    return Way(f"{AUTO}: {criterion.name}", criterion, allocation, compensation.parse(compensate), refit)


def _measured(
    model: nn.Module, graph: ChannelGraph, few: list[Any], inexact: bool, skip: Sequence[str], steps: Steps | None
) -> Sensitivity:
    """Measure the sensitivity of the groups that may lose channels."""
    groups = [g.name for g in graph.groups if not any(matches(g, pattern, graph) for pattern in skip)]
    return sensitivity(model, graph, few, groups=groups, inexact=inexact, progress=_told(steps))


def _few(data: Any) -> list[Any]:
    """Return as many of the batches as sensitivity is measured on; a loader may give others the next time."""
    few, images = [], 0
    for batch in data:
        few.append(batch)
        images += examples(batch) or 0
        if images >= MEASURED_IMAGES:
            break
    return few


def _told(steps: Steps | None) -> Callable[[int, int], None] | None:
    return None if steps is None else partial(steps, "measuring sensitivity")


def _require_request(target: Target | None, ratios: Mapping[str, float] | None, round_to: Any) -> None:
    if target is None and not ratios:
        raise UsageError("prune: how much? Give a target, such as Target(macs=0.5), or ratios for some layers.")
    if round_to != "auto" and (not isinstance(round_to, int) or round_to < 1):
        raise UsageError(f"round_to: expected a whole number from 1 up, or 'auto'; found {round_to!r}.")


def _require_data(way: Way, data: Iterable[Any] | None) -> None:
    """Refuse, before anything is done, what looks at images where there are none."""
    if data is not None:
        return
    looking = [f"criterion {way.criterion.name}"] if way.criterion.needs_data else []
    looking += [f"compensation {name}" for name in way.methods if name != "merge"]  # merging reads weights alone
    looking += ["allocation by sensitivity"] if way.allocation == "sensitivity" else []
    if looking:
        raise UsageError(f"prune: {looking[0]} looks at feature maps; pass data=batches.")


def _require_options(criterion: Criterion, options: Mapping[str, Any], round_to: Any) -> None:
    decided = deciding(criterion, options)
    criterion.check(options, bool(decided))
    if decided and round_to != 1:
        raise UsageError(
            f"prune: round_to {round_to} can't hold what the option {min(decided)} selects; leave one of them out."
        )


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


def _planner(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: Criterion,
    options: Mapping[str, Any],
    reading: Mapping[str, Any],
    **request: Any,
) -> Callable[..., PruningPlan]:
    """Score every channel, and return the function that plans on these scores, for a multiple and an allocation.

    Args:
        model: The network.
        graph: Its channel graph.
        criterion: What scores, and selects where one of its options decides that.
        options: The criterion's own.
        reading: ``data``, ``loss`` and ``seed`` of :func:`secateur.score`.
        **request: Arguments of :func:`secateur.plan`.
    """
    decided = deciding(criterion, options)
    scoring = {name: value for name, value in options.items() if name not in decided}
    scores = score(model, graph, criterion, inexact=request["inexact"], **{**reading, **scoring})

    def planned(round_to: int, allocation: Allocation) -> PruningPlan:
        by_scores = plan(graph, scores, round_to=round_to, allocation=allocation, **request)
        if not decided:
            return by_scores
        counts = {name: len(channels) for name, channels in by_scores.removed.items()}
        found = select(model, graph, criterion, counts, **{**reading, **options})
        return plan_removal(graph, {name: list(s.removed) for name, s in found.items() if s.removed})

    return planned


def _costs(graph: ChannelGraph, chosen: PruningPlan | None = None) -> dict[str, float]:
    return {"macs": cost.macs(graph, chosen), "parameters": cost.parameters(graph, chosen)}


def _widths(graph: ChannelGraph, chosen: PruningPlan | None = None) -> dict[str, int]:
    """Output channels of every convolution and linear layer, by module name."""
    return {layer.module: layer.out_channels for layer in cost.layer_costs(graph, chosen)}


def _rereadable(batches: Iterable[Any] | None) -> Iterable[Any] | None:
    """Keep in a list what can be read only once: criterion, compensation and both evaluations each read anew."""
    return list(batches) if isinstance(batches, Iterator) else batches


def _shown(steps: Steps | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if steps is None else steps.step(name)
