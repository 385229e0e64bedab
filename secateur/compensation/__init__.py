"""Moves that keep accuracy before any fine-tuning: merging, least squares, and batch-norm recalibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.compensation import batchnorm, least_squares, merging
from secateur.compensation.report import CompensationReport, LayerCompensation
from secateur.criteria import feature_maps
from secateur.errors import UsageError
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.network.inputs import arguments, batch_size, unwrapped
from secateur.pruning.part import for_whole
from secateur.pruning.soundness import require_sound
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace

METHODS = ("merge", "least_squares", "bn")
"""Names of the methods."""

__all__ = ["METHODS", "CompensationReport", "LayerCompensation", "apply", "compensate"]


def compensate(
    original: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    methods: str | Sequence[str],
    data: Iterable[Any] | None = None,
    *,
    graph: ChannelGraph | None = None,
    example_inputs: Any = None,
    pairs: Mapping[str, Mapping[int, int]] | None = None,
    **options: Any,
) -> CompensationReport:
    """Move what the removed channels knew into what remains, in place.

    Methods, applied in the order given:

    - ``merge``: fold each removed filter into the kept one most like it (:func:`secateur.compensation.merging.merge`).
      Needs no data, only an example to run the model on. It starts from the original's weights, so it comes first.
    - ``least_squares``: refit the layers that read pruned channels (:func:`secateur.compensation.least_squares.refit`).
    - ``bn``: measure batch norms' running moments again (:func:`secateur.compensation.batchnorm.recalibrate`).

    Where a method is not defined for a layer, that layer is left alone and listed in the report with the reason.

    Args:
        original: The network before pruning.
        pruned: The pruned network; its weights are replaced.
        plan: What was pruned.
        methods: Names of methods, or one name; ``"merge,least_squares"`` is taken as a list.
        data: Batches, see :func:`secateur.criteria.feature_maps.batches`; labels are not read. A list or
            a loader: they are read more than once.
        graph: The original's channel graph, for ``merge``; traced where it is missing.
        example_inputs: Inputs to run the original on, for ``merge``; the first batch of the data by default.
        pairs: See :func:`secateur.compensation.merging.merge`.
        **options: Of :func:`secateur.compensation.least_squares.refit`.

    Returns:
        What was done to each layer, and what was left alone and why.

    Raises:
        UsageError: If a method is unknown or out of order, or its data are missing.
        DataError: If the data are empty, don't fit, or can be read only once.
        CriterionError: If feature maps hold NaN or infinity.
        PlanError: If plan and models don't fit each other.
    """
    names = parse(methods)
    if options and "least_squares" not in names:
        raise UsageError(f"compensation: {next(iter(options))} is an option of least_squares, which is not asked for.")
    original, pruned = unwrapped(original), unwrapped(pruned)
    report = CompensationReport()
    for name in names:
        if name == "merge":
            example = _example(original, data, example_inputs)
            graph = trace(original, example.args or example.kwargs) if graph is None else graph
            merged, entries = merging.merge(original, graph, plan, example, pairs)
            pruned.load_state_dict(cut(merged, plan).state_dict())
            report.layers += entries
        elif data is None:
            raise UsageError(f"compensation {name} needs data. Pass data=batches; a few hundred unlabelled images do.")
        elif name == "least_squares":
            report.layers += least_squares.refit(original, pruned, plan, data, **options)
        else:
            report.layers += batchnorm.recalibrate(pruned, data)
    return report


def parse(methods: str | Sequence[str]) -> list[str]:
    """Return a list of methods, checked.

    Raises:
        UsageError: If one is unknown, or ``merge`` comes after another.
    """
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    for place, name in enumerate(names):
        if name not in METHODS:
            raise UsageError(f"unknown compensation {name!r}. Known: {', '.join(METHODS)}.")
        if name == "merge" and place:
            raise UsageError(f"compensation: merge undoes {names[place - 1]} before it. Put merge first.")
    return names


def _example(model: nn.Module, data: Iterable[Any] | None, example_inputs: Any) -> feature_maps.Batch:
    device = feature_maps.device_of(model)
    if example_inputs is not None:
        args, kwargs = arguments(feature_maps.moved(example_inputs, device))
        return feature_maps.Batch(args, kwargs, None, batch_size(example_inputs))
    if data is None:
        raise UsageError(
            "compensation merge needs an example to run the model on. Pass example_inputs=, or data=batches."
        )
    feature_maps.require_passes(data, 2)
    for batch in feature_maps.batches(data, device):
        return batch
    feature_maps.require_samples(0, device)
    raise AssertionError("unreachable")


def apply(
    model: nn.Module,
    plan: PruningPlan,
    compensate: str | Sequence[str] | None = None,
    data: Iterable[Any] | None = None,
    *,
    prefix: str = "",
    **options: Any,
) -> nn.Module:
    """Return a pruned copy of the model, compensated if asked for; the model itself is untouched.

    Args:
        model: The network the plan was made for.
        plan: What to keep.
        prefix: Name of the part of the model that the plan is for, such as ``backbone.body``, where it was made for
            another network with these layers. What reads the part follows, so ``graph`` of the model, or
            ``example_inputs`` to trace it on, are needed, too; the result knows the plan of the whole.
        compensate: Methods, see :func:`secateur.compensation.compensate`.
        data: Batches for the methods that need data.
        **options: Further arguments of :func:`secateur.compensation.compensate`. To see which layers were left alone,
            call that function on the result of this one.

    Raises:
        PlanError: If the plan does not fit the model.
        UsageError: As :func:`secateur.compensation.compensate`; or if neither graph nor inputs come with ``prefix``.
        DataError: As :func:`secateur.compensation.compensate`.
        CriterionError: As :func:`secateur.compensation.compensate`.
    """
    if prefix:
        model = unwrapped(model)
        if options.get("graph") is None:
            if options.get("example_inputs") is None:
                raise UsageError(f"apply: what reads {prefix} is found by a trace; pass example_inputs=, or graph=.")
            options["graph"] = trace(model, options["example_inputs"])
        plan = for_whole(plan, options["graph"], prefix)
    require_sound(model, plan)
    small = cut(model, plan)
    if compensate is not None:
        _compensate(model, small, plan, compensate, data, **options)
    return small


_compensate = compensate
