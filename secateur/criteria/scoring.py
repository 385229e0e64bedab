"""From a model and data to what a criterion is made of, and from a criterion to scores or a selection.

The criteria themselves (:mod:`secateur.criteria`) are pure functions of tensors; this module takes those tensors out of
the network, group by group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria import Criterion, Need, Returns, Selection, feature_maps, get
from secateur.criteria.moments import Average, Moments, several_processes
from secateur.criteria.registry import options_of
from secateur.criteria.weights import arrange, consumers, filters, producers, producing_weights
from secateur.errors import CriterionError, DataError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.graph.steps import steps
from secateur.network.inputs import unwrapped

Loss = Callable[[Any, Any], Tensor]


class _Gatherer:
    """What one criterion needs of each group, gathered from the model and, where it asks for it, the data."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        criterion: Criterion,
        data: Iterable[Any] | None,
        groups: list[ChannelGroup],
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self.model, self.graph, self.criterion, self.data = model, graph, criterion, data
        self.groups, self.settings, self.options = groups, settings, options
        self.given: dict[str, dict[str, Any]] = {group.name: {} for group in groups}
        self.averages: dict[str, Tensor] = {}
        self.waiting: list[list[ChannelGroup]] = []
        """Groups whose moments are still to be gathered, a list a pass over the data."""
        self.moments: dict[str, Moments] = {}

    def gather(self) -> None:
        needs = self.criterion.needs
        if self.criterion.needs_data and self.data is None:
            what = ", ".join(sorted(need for need in needs if need in _FROM_DATA))
            raise UsageError(f"criterion {self.criterion.name} needs data ({what}). Pass data=batches.")
        for group in self.groups:
            given = self.given[group.name]
            if Need.FILTERS in needs:
                given["filters"] = filters(self.model, group, self.graph.magnitudes)
            if Need.PRODUCERS in needs:
                given["producers"] = producers(self.model, group, self.graph.magnitudes)
            if Need.CONSUMERS in needs:
                given["consumers"] = consumers(self.model, group, self.graph.magnitudes)
            if Need.GENERATOR in needs:
                seed = int(self.settings["seed"]) ^ zlib.crc32(group.name.encode())
                given["generator"] = torch.Generator().manual_seed(seed)
        if self.data is None or not self.groups:
            return
        kinds = [
            bool(needs & {Need.MAPS, Need.POOLED, Need.LABELS}),
            Need.MOMENTS in needs,
            Need.GRADIENTS in needs,
        ]
        if kinds[1]:
            self.waiting = feature_maps.passes(self.groups, lambda group: 16 * group.size**2, self.settings["memory"])
        feature_maps.require_passes(self.data, kinds[0] + len(self.waiting) + kinds[2])
        if kinds[1] and self.criterion.streamed and self.criterion.per_batch is None:
            for name, moments in self._observe(self.groups).items():
                self.given[name]["moments"] = moments
        if kinds[0]:
            self._stream_maps(self.data)
        if kinds[2]:
            self._stream_gradients(self.data)

    def _per_batch(self, group: str, tensors: dict[str, Any]) -> Tensor:
        function = self.criterion.per_batch or self.criterion.function
        given = {key: value for key, value in self.given[group].items() if key in self.criterion.needs}
        if self.criterion.per_batch is not None:
            given = {}
        if Need.GRADIENTS in self.criterion.needs and Need.FILTERS in self.criterion.needs:
            given["filters"] = self.given[group]["filters"]
        values = function(**given, **tensors, **options_of(function, self.options))
        return torch.as_tensor(values)

    def _stream_maps(self, data: Iterable[Any]) -> None:
        device = feature_maps.device_of(self.model)
        averages = {group.name: Average.empty(group.size, "cpu") for group in self.groups}
        pooled: dict[str, list[Tensor]] = {group.name: [] for group in self.groups}
        current: dict[str, Average] = {}
        labels: list[Tensor] = []
        needs = self.criterion.needs
        sizes = {group.name: group.size for group in self.groups}

        def see(name: str, maps: Tensor, channels: Tensor | None) -> None:
            feature_maps.check_finite(maps, name)
            index = None if channels is None else channels.cpu()
            if Need.MAPS in needs:
                averages[name].update(self._per_batch(name, {"maps": maps}), index)
            if Need.POOLED in needs:
                mean = maps.flatten(2).double().mean(2) if maps.dim() > 2 else maps.double()
                # Sums a sample; a group that is read several times has the mean of its readings.
                flat = current.setdefault(name, Average.empty(len(maps) * sizes[name], "cpu"))
                if len(flat.total) != len(maps) * sizes[name]:
                    raise CriterionError(
                        f"{name}: it is read once for {len(flat.total) // sizes[name]} samples and once for "
                        f"{len(maps)}, so its maps can't be told by sample. Use another criterion, or leave it out."
                    )
                where = torch.arange(sizes[name]) if index is None else index
                at = (torch.arange(len(maps))[:, None] * sizes[name] + where).flatten()
                flat.update(mean.cpu().flatten(), at)

        def end(batch: feature_maps.Batch) -> None:
            for name in sizes if Need.POOLED in needs else ():
                flat = current.get(name, Average.empty(sizes[name]))
                feature_maps.require_seen(flat.count.reshape(-1, sizes[name])[0], name)
                pooled[name].append(flat.mean.reshape(-1, sizes[name]))
            current.clear()
            if Need.LABELS in needs:
                labels.append(_class_labels(batch, self.criterion.name).cpu())

        feature_maps.stream(self.model, [self.groups], data, see, end)
        for name in sizes:
            if Need.MAPS in needs:
                averages[name].all_reduce()
                feature_maps.require_seen(averages[name].count, name)
            self.averages[name] = averages[name].mean.to(device)
            if Need.POOLED in needs:
                self.given[name]["pooled"] = _gather(
                    torch.cat(pooled[name]) if pooled[name] else torch.empty(0, sizes[name], dtype=torch.float64)
                )
            if Need.LABELS in needs:
                self.given[name]["labels"] = _gather(torch.cat(labels) if labels else torch.empty(0, dtype=torch.long))

    def _stream_gradients(self, data: Iterable[Any]) -> None:
        device, loss_of = feature_maps.device_of(self.model), self.settings["loss"]
        weights = {group.name: producing_weights(self.model, group) for group in self.groups}
        unique = {id(tensor): tensor for pairs in weights.values() for tensor, _ in pairs}
        frozen = [tensor for tensor in unique.values() if not tensor.requires_grad]
        averages = {group.name: Average.empty(group.size, device) for group in self.groups}
        samples = 0
        with feature_maps.evaluating(self.model), torch.enable_grad():
            if (prepare := getattr(loss_of, "prepare", None)) is not None:
                prepare(self.model)
            try:
                for tensor in frozen:
                    tensor.requires_grad_(True)
                for number, batch in enumerate(feature_maps.batches(data, device), start=1):
                    outputs = feature_maps.forward(self.model, batch, number)
                    loss = _loss(outputs, batch, loss_of, number, self.criterion.name)
                    found = torch.autograd.grad(loss, list(unique.values()), allow_unused=True)
                    gradient = {
                        key: torch.zeros_like(tensor) if grad is None else grad
                        for (key, tensor), grad in zip(unique.items(), found, strict=True)
                    }
                    samples += batch.size
                    for group in self.groups:
                        parts = [arrange(gradient[id(tensor)], m, group.size) for tensor, m in weights[group.name]]
                        values = self._per_batch(group.name, {"gradients": torch.cat(parts, 1)})
                        averages[group.name].update(values, weight=batch.size)
            finally:
                for tensor in frozen:
                    tensor.requires_grad_(False)
        feature_maps.require_samples(samples, device)
        for name, average in averages.items():
            average.all_reduce()
            self.averages[name] = average.mean

    def _observe(self, groups: Iterable[ChannelGroup]) -> dict[str, Moments]:
        assert self.data is not None
        chosen = {key: self.settings[key] for key in ("positions", "exact", "seed", "memory")}
        return feature_maps.observe(self.model, self.graph, self.data, [group.name for group in groups], **chosen)

    def _moments(self, group: ChannelGroup) -> Moments:
        """Return the moments of a group; those of one pass over the data are held at a time, so the memory suffices."""
        while group.name not in self.moments:
            self.moments = {}  # let go of before the next are made
            self.moments = self._observe(self.waiting.pop(0))
        return self.moments[group.name]

    def call(self, group: ChannelGroup, function: Callable[..., Any], extra: Mapping[str, Any]) -> Any:
        """Call a function of the criterion for a group; one that was called per batch has been called already."""
        criterion = self.criterion
        if criterion.streamed and criterion.per_batch is None and function is criterion.function:
            return self.averages[group.name]
        given = dict(self.given[group.name])
        if Need.MOMENTS in criterion.needs and "moments" not in given:
            given["moments"] = self._moments(group)
        if criterion.per_batch is not None:
            given["average"] = self.averages[group.name]
        return function(**given, **extra, **options_of(function, self.options))


_FROM_DATA = frozenset({Need.MOMENTS, Need.MAPS, Need.GRADIENTS, Need.POOLED, Need.LABELS})


def _gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of every process along its first dimension."""
    if not several_processes():
        return tensor
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts)


def _class_labels(batch: feature_maps.Batch, name: str) -> Tensor:
    labels = batch.labels
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        found = "none" if labels is None else f"{type(labels).__name__} of shape {tuple(getattr(labels, 'shape', ()))}"
        raise DataError(
            f"criterion {name} needs one class index a sample as label, and found {found}. Pass (input, labels)."
        )
    return labels


def _loss(outputs: Any, batch: feature_maps.Batch, loss_of: Loss | None, number: int, name: str) -> Tensor:
    try:
        if loss_of is not None:
            loss = loss_of(outputs, batch.labels)
        else:
            loss = torch.nn.functional.cross_entropy(outputs, _class_labels(batch, name))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"batch {number}: no loss of its outputs and labels: {first}. Pass loss=function(outputs, labels)."
        ) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(
            f"batch {number}: the loss must be a scalar tensor, found {found}. Take the mean over the batch."
        )
    if not bool(torch.isfinite(loss)):
        raise CriterionError(
            f"criterion {name}: the loss of batch {number} is {loss.item()}. Check weights and inputs."
        )
    return loss


def _prepare(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion | Callable[..., Any],
    data: Iterable[Any] | None,
    groups: Iterable[str] | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    selecting: bool,
) -> _Gatherer:
    model = unwrapped(model)
    found = get(criterion)
    found.check(options, selecting)
    if "seed" in found.takes(selecting):  # k-means draws with the same seed as everything else
        options = {"seed": settings["seed"], **options}
    gatherer = _Gatherer(model, graph, found, data, feature_maps.chosen_groups(graph, groups), settings, options)
    gatherer.gather()
    return gatherer


def score(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion | Callable[..., Any],
    data: Iterable[Any] | None = None,
    *,
    groups: Iterable[str] | None = None,
    loss: Loss | None = None,
    positions: int = feature_maps.POSITIONS,
    exact: bool = False,
    seed: int = 0,
    memory: int = feature_maps.MEMORY,
    **options: Any,
) -> dict[str, Tensor]:
    """Score every channel of every group by a criterion.

    Args:
        model: The network; it is run in eval mode where data are needed, and left as found.
        graph: Its channel graph.
        criterion: Name of a criterion, a :class:`secateur.criteria.Criterion`, or a function whose parameters are
            named after what it needs, e.g. ``lambda filters: filters.abs().amax(1)``.
        data: Batches, see :func:`secateur.criteria.feature_maps.batches`; only for criteria that need data.
        groups: Names of groups; all by default.
        loss: Function of outputs and labels, for criteria of gradients; cross-entropy by default. Where it has a
            method ``prepare``, that is called with the model in eval mode, which is put back afterwards.
        positions: See :func:`secateur.criteria.feature_maps.observe`.
        exact: See :func:`secateur.criteria.feature_maps.observe`.
        seed: Seed of everything that is drawn.
        memory: See :func:`secateur.criteria.feature_maps.observe`.
        **options: The criterion's own.

    Returns:
        Group name -> scores, shape ``(C,)``, fp64, on the CPU; higher = keep.

    Raises:
        UsageError: If the criterion, an option or a group is unknown, or data are missing.
        DataError: If the data are empty or don't fit the model.
        CriterionError: If the criterion isn't defined on a group's tensors, or returns something that is not a score
            a channel.
    """
    settings = {"loss": loss, "positions": positions, "exact": exact, "seed": seed, "memory": memory}
    gatherer = _prepare(model, graph, criterion, data, groups, settings, options, selecting=False)
    found = gatherer.criterion
    result = {}
    for group in gatherer.groups:
        if found.returns is Returns.SCORES or found.scores is not None:
            values = gatherer.call(group, found.scores or found.function, {})
        else:
            picked = gatherer.call(group, found.function, {"remove": group.size - 1})
            values = _by_order(_checked(picked, group, found, group.size - 1), group.size)
        result[group.name] = _checked_scores(values, group, found)
    return result


def _by_order(selection: Selection, size: int) -> Tensor:
    scores = torch.ones(size, dtype=torch.float64)
    for place, channel in enumerate(selection.removed):
        scores[channel] = place / size
    return scores


def _checked_scores(values: Any, group: ChannelGroup, criterion: Criterion) -> Tensor:
    where = f"criterion {criterion.name}, group {group.name}"
    if not isinstance(values, Tensor) or tuple(values.shape) != (group.size,):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise CriterionError(f"{where}: returned {found} in place of one score for each of {group.size} channels.")
    result: Tensor = values.detach().double().cpu()
    if bool(result.isnan().any()):
        raise CriterionError(f"{where}: {int(result.isnan().sum())} scores are NaN. Check the weights for NaN.")
    return result


def _checked(selection: Any, group: ChannelGroup, criterion: Criterion, remove: int) -> Selection:
    where = f"criterion {criterion.name}, group {group.name}"
    if not isinstance(selection, Selection):
        raise CriterionError(f"{where}: returned {type(selection).__name__} in place of a Selection.")
    chosen = selection.removed
    if len(set(chosen)) != len(chosen) or len(chosen) > remove or any(not 0 <= c < group.size for c in chosen):
        raise CriterionError(
            f"{where}: selected {list(chosen)}, not at most {remove} different channels of {group.size}."
        )
    return selection


def select(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion | Callable[..., Any],
    remove: Mapping[str, int] | float,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    positions: int = feature_maps.POSITIONS,
    exact: bool = False,
    seed: int = 0,
    memory: int = feature_maps.MEMORY,
    **options: Any,
) -> dict[str, Selection]:
    """Select channels to remove, of each group a given number.

    A criterion that returns scores gives its lowest. One with a threshold may select fewer than asked for. In a group
    whose channels aren't free (blocks that lose equal fractions, fixed channels) the lowest scores go that the rule
    allows, never more channels than asked for.

    Args:
        model: See :func:`score`.
        graph: See :func:`score`.
        criterion: See :func:`score`.
        remove: Group name -> number of channels to remove; or one fraction of each group, in [0, 1), rounded down.
        data: See :func:`score`.
        loss: See :func:`score`.
        positions: See :func:`score`.
        exact: See :func:`score`.
        seed: See :func:`score`.
        memory: See :func:`score`.
        **options: The criterion's own.

    Returns:
        Group name -> selection; ``{name: list(s.removed)}`` is what :func:`secateur.plan_removal` takes.

    Raises:
        UsageError: If a number is out of range; and as :func:`score`.
        DataError: As :func:`score`.
        CriterionError: As :func:`score`.
    """
    counts = _counts(graph, remove)
    settings = {"loss": loss, "positions": positions, "exact": exact, "seed": seed, "memory": memory}
    names = [name for name, count in counts.items() if count]
    gatherer = _prepare(model, graph, criterion, data, names, settings, options, selecting=True)
    found = gatherer.criterion
    result = {name: Selection(()) for name in counts}
    for group in gatherer.groups:
        wanted = counts[group.name]
        if found.returns is not Returns.SCORES and not group.constraint:
            picked = gatherer.call(group, found.function, {"remove": wanted})
            result[group.name] = _checked(picked, group, found, wanted)
            continue
        if found.returns is Returns.SCORES or found.scores is not None:
            values = gatherer.call(group, found.scores or found.function, {})
        else:
            picked = gatherer.call(group, found.function, {"remove": group.size - 1})
            values = _by_order(_checked(picked, group, found, group.size - 1), group.size)
        result[group.name] = Selection(lowest(group, _checked_scores(values, group, found), wanted))
    return result


def _counts(graph: ChannelGraph, remove: Mapping[str, int] | float) -> dict[str, int]:
    if isinstance(remove, Mapping):
        groups = {group.name: group for group in feature_maps.chosen_groups(graph, remove)}
        for name, count in remove.items():
            if not 0 <= count < groups[name].size:
                raise UsageError(
                    f"{name}: cannot remove {count} of {groups[name].size} filters; a layer keeps at least 1."
                )
        return dict(remove)
    if not 0.0 <= remove < 1.0:
        raise UsageError(f"the fraction to remove is {remove}, not in [0, 1). Half of the filters is 0.5.")
    return {group.name: int(remove * group.size + 1e-9) for group in graph.groups}


def lowest(group: ChannelGroup, scores: Tensor, count: int) -> tuple[int, ...]:
    """Pick the lowest-scoring channels that may go together, at most ``count``, the lowest first.

    Every block loses the same fraction of its channels and keeps one, and fixed channels stay.
    """
    picked: set[int] = set()
    for step in steps(group, np.argsort(scores.numpy(), kind="stable").tolist()):
        if len(picked) + len(step) > count:
            break
        picked |= set(step)
    return tuple(sorted(picked, key=lambda channel: float(scores[channel])))
