"""What a criterion is made of, taken out of the network and, where it asks for it, the data, group by group.

A group of which a criterion can't have what it needs (its maps are read by code that calls no layer, nothing that makes
it has filters) does not stop the others: it is put aside with the reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from secateur.criteria import feature_maps, weights
from secateur.criteria.feature_maps import Batch
from secateur.criteria.moments import Average, Moments, several_processes
from secateur.criteria.readings import unseen
from secateur.criteria.registry import Criterion, Need, NotDefinedError, options_of
from secateur.errors import CriterionError, DataError, SecateurError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup

Loss = Callable[[Any, Any], Tensor]


class Gatherer:
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
        self.left: dict[str, str] = {}
        """Groups that the criterion is not defined on -> why."""
        self.averages: dict[str, Tensor] = {}
        self.waiting: list[list[ChannelGroup]] = []
        """Groups whose moments are still to be gathered, a list a pass over the data."""
        self.moments: dict[str, Moments] = {}

    def gather(self) -> None:
        """Gather everything but moments, which are gathered as they are asked for.

        Raises:
            UsageError: If data are missing.
            DataError: If the data are empty or don't fit the model.
            CriterionError: If feature maps or losses hold NaN or infinity, or no gradient can be had.
        """
        needs = self.criterion.needs
        if self.criterion.needs_data and self.data is None:
            what = ", ".join(sorted(need for need in needs if need in _FROM_DATA))
            raise UsageError(f"criterion {self.criterion.name} needs data ({what}). Pass data=batches.")
        self._put_aside()
        for group in self.groups:
            given = self.given[group.name]
            if Need.FILTERS in needs:
                given["filters"] = weights.filters(self.model, self.graph, group)
            if Need.PRODUCERS in needs:
                given["producers"] = weights.producers(self.model, self.graph, group)
            if Need.CONSUMERS in needs:
                given["consumers"] = weights.consumers(self.model, self.graph, group)
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

    def _put_aside(self) -> None:
        """Set apart the groups of which the criterion can't have what it needs."""
        needs = self.criterion.needs
        for group in self.groups:
            if needs & _FROM_MAPS and (why := unseen(self.model, self.graph, group)):
                self.left[group.name] = why
            elif needs & _FROM_FILTERS and not weights.making(self.model, self.graph, group):
                self.left[group.name] = NO_FILTERS
        self._leave()

    def _leave(self) -> None:
        self.groups = [group for group in self.groups if group.name not in self.left]

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
        device, needs = feature_maps.device_of(self.model), self.criterion.needs
        sizes = {group.name: group.size for group in self.groups}
        averages = {name: Average.empty(size, "cpu") for name, size in sizes.items()}
        pooled = _Pooled(sizes)
        labels: list[Tensor] = []

        def see(name: str, maps: Tensor, channels: Tensor | None) -> None:
            feature_maps.check_finite(maps, name)
            index = None if channels is None else channels.cpu()
            if Need.MAPS in needs:
                averages[name].update(self._per_batch(name, {"maps": maps}), index)
            if Need.POOLED in needs:
                pooled.see(name, maps, index)

        def end(batch: Batch) -> None:
            if Need.POOLED in needs:
                pooled.end(batch.size)
            if Need.LABELS in needs:
                labels.append(_class_labels(batch, self.criterion.name).cpu())

        feature_maps.stream(self.model, self.graph, [self.groups], data, see, end)
        self.left |= pooled.left
        for name in sizes:
            if Need.MAPS in needs:
                averages[name].all_reduce()
                if why := feature_maps.unread(averages[name].count):
                    self.left[name] = why
            self.averages[name] = averages[name].mean.to(device)
            if Need.POOLED in needs:
                self.given[name]["pooled"] = _gather(pooled.of(name))
            if Need.LABELS in needs:
                self.given[name]["labels"] = _gather(torch.cat(labels) if labels else torch.empty(0, dtype=torch.long))
        self._leave()

    def _stream_gradients(self, data: Iterable[Any]) -> None:
        device, loss_of = feature_maps.device_of(self.model), self.settings["loss"]
        found = {group.name: weights.making(self.model, self.graph, group) for group in self.groups}
        every = {(one.module, one.attribute): one for slices in found.values() for one in slices}
        averages = {group.name: Average.empty(group.size, device) for group in self.groups}
        samples = 0
        with (
            feature_maps.evaluating(self.model),
            torch.inference_mode(False),
            torch.enable_grad(),
            self._thawed(every.values()),
            weights.computed_kept(self.model),
        ):
            if (prepare := getattr(loss_of, "prepare", None)) is not None:
                prepare(self.model)
            for number, batch in enumerate(feature_maps.batches(data, device), start=1):
                batch = Batch(_plain(batch.args), _plain(batch.kwargs), _plain(batch.labels), batch.size)
                # A weight that is computed is computed once, so that it is the one that the outputs depend on.
                with parametrize.cached():
                    outputs = feature_maps.forward(self.model, batch, number)
                    loss = _loss(outputs, batch, loss_of, number, self.criterion.name)
                    applied = {key: getattr(self.model.get_submodule(key[0]), key[1]) for key in every}
                gradients = _gradients(loss, applied, f"criterion {self.criterion.name}: batch {number}")
                samples += batch.size
                for group in self.groups:
                    parts = [one.filters(gradients[one.module, one.attribute], group.size) for one in found[group.name]]
                    values = self._per_batch(group.name, {"gradients": torch.cat(parts, 1)})
                    averages[group.name].update(values, weight=batch.size)
        feature_maps.require_samples(samples, device)
        for name, average in averages.items():
            average.all_reduce()
            self.averages[name] = average.mean

    @contextmanager
    def _thawed(self, found: Iterable[weights.Slices]) -> Iterator[None]:
        """Have the parameters that some weights are, or are computed from, require gradients meanwhile."""
        parameters: dict[int, nn.Parameter] = {}
        for slices in found:
            module = self.model.get_submodule(slices.module)
            own = module._parameters.get(slices.attribute)
            parameters |= {id(p): p for p in ([own] if own is not None else module.parameters())}
        if any(p.is_inference() for p in parameters.values()):
            raise CriterionError(
                f"criterion {self.criterion.name}: the model was made in inference mode, so it has no gradients. "
                "Make or load it outside, or use a criterion without gradients, such as l1."
            )
        frozen = [p for p in parameters.values() if not p.requires_grad and p.is_floating_point()]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _observe(self, groups: Iterable[ChannelGroup]) -> dict[str, Moments]:
        assert self.data is not None
        chosen = {key: self.settings[key] for key in ("positions", "exact", "seed", "memory")}
        return feature_maps.gather_moments(self.model, self.graph, self.data, list(groups), **chosen)

    def _moments(self, group: ChannelGroup) -> Moments:
        """Return the moments of a group; those of one pass over the data are held at a time, so the memory suffices."""
        while group.name not in self.moments:
            self.moments = {}  # let go of before the next are made
            self.moments = self._observe(self.waiting.pop(0))
        return self.moments[group.name]

    def call(self, group: ChannelGroup, function: Callable[..., Any], extra: Mapping[str, Any]) -> Any:
        """Call a function of the criterion for a group; one that was called per batch has been called already.

        Raises:
            NotDefinedError: If the criterion is not defined on what there is of the group.
        """
        criterion = self.criterion
        if criterion.streamed and criterion.per_batch is None and function is criterion.function:
            return self.averages[group.name]
        given = dict(self.given[group.name])
        if Need.MOMENTS in criterion.needs:
            moments = given.get("moments") or self._moments(group)
            if why := feature_maps.unread(moments.count.diagonal()):
                raise NotDefinedError(why)
            given["moments"] = moments
        if criterion.per_batch is not None:
            given["average"] = self.averages[group.name]
        return function(**given, **extra, **options_of(function, self.options))


class _Pooled:
    """Every example's maps, averaged over positions; of a group that is read several times the mean of its readings."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.left: dict[str, str] = {}
        """Groups whose maps can't be told by example -> why."""
        self._batch: dict[str, Average] = {}
        self._all: dict[str, list[Tensor]] = {name: [] for name in sizes}

    def see(self, name: str, maps: Tensor, index: Tensor | None) -> None:
        """Add the maps ``(N, c, *spatial)`` of some channels."""
        size = self.sizes[name]
        mean = maps.flatten(2).double().mean(2) if maps.dim() > 2 else maps.double()
        flat = self._batch.setdefault(name, Average.empty(len(maps) * size))
        if len(flat.total) != len(maps) * size:
            found = f"{len(flat.total) // size} samples and once for {len(maps)}"
            self.left[name] = f"layers read it once for {found}, so its maps can't be told by example"
            return
        where = torch.arange(size) if index is None else index
        flat.update(mean.cpu().flatten(), (torch.arange(len(maps))[:, None] * size + where).flatten())

    def end(self, examples: int) -> None:
        """Close a batch."""
        for name, size in self.sizes.items():
            flat = self._batch.get(name, Average.empty(size))
            counts = flat.count.reshape(-1, size)
            if why := feature_maps.unread(counts[0]):
                self.left[name] = why
            elif len(counts) != examples:
                found = f"{len(counts)} samples of a batch of {examples}"
                self.left.setdefault(name, f"layers read {found}, so its maps can't be told by example")
            self._all[name].append(flat.mean.reshape(-1, size))
        self._batch.clear()

    def of(self, name: str) -> Tensor:
        """Return a group's pooled maps of all batches, shape ``(N, C)``."""
        return torch.cat(self._all[name]) if self._all[name] else torch.empty(0, self.sizes[name], dtype=torch.float64)


_FROM_MAPS = frozenset({Need.MOMENTS, Need.MAPS, Need.POOLED})
_FROM_DATA = _FROM_MAPS | {Need.GRADIENTS, Need.LABELS}
_FROM_FILTERS = frozenset({Need.FILTERS, Need.PRODUCERS, Need.GRADIENTS})
NO_FILTERS = "none of what makes its channels has filters"


def _plain(inputs: Any) -> Any:
    """Return nested inputs with clones of the tensors made in inference mode, which backward can't save."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, inputs)


def _gradients(loss: Tensor, applied: Mapping[tuple[str, str], Tensor], where: str) -> dict[tuple[str, str], Tensor]:
    """Differentiate a loss by the weights that its outputs were computed with; zeros where it depends on none.

    Raises:
        CriterionError: If it can't be differentiated, or depends on none of them.
    """
    remedy = "Use a criterion without gradients, such as l1"
    if not loss.requires_grad:
        raise CriterionError(
            f"{where}: the loss has no gradient: the network or the loss detaches its values, or runs without "
            f"gradients. {remedy}, or give another loss."
        )
    asked = {key: tensor for key, tensor in applied.items() if tensor.requires_grad}
    try:
        found = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
    except RuntimeError as error:
        text = feature_maps.first_line(error).rstrip(".")
        raise CriterionError(f"{where}: the loss can't be differentiated: {text}. {remedy}.") from error
    if all(gradient is None for gradient in found):
        raise CriterionError(f"{where}: the loss depends on no filter of the groups. {remedy}, or give another loss.")
    gradients = {key: gradient for key, gradient in zip(asked, found, strict=True) if gradient is not None}
    return {key: gradients.get(key, torch.zeros_like(tensor)) for key, tensor in applied.items()}


def _gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor of every process along its first dimension."""
    if not several_processes():
        return tensor
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, tensor.cpu())
    return torch.cat(parts)


def _class_labels(batch: Batch, name: str) -> Tensor:
    labels = batch.labels
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        found = "none" if labels is None else f"{type(labels).__name__} of shape {tuple(getattr(labels, 'shape', ()))}"
        raise DataError(
            f"criterion {name} needs one class index a sample as label, and found {found}. Pass (input, labels)."
        )
    return labels


def _loss(outputs: Any, batch: Batch, loss_of: Loss | None, number: int, name: str) -> Tensor:
    try:
        if loss_of is not None:
            loss = loss_of(outputs, batch.labels)
        else:
            loss = torch.nn.functional.cross_entropy(outputs, _class_labels(batch, name))
    except SecateurError:
        raise
    except Exception as error:
        first = feature_maps.first_line(error).rstrip(".")
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
