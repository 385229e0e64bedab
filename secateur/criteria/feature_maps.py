r"""Streamed statistics of feature maps: second moments in fp64, in O(C²) memory however many images pass.

A group's feature maps are taken where they are read: at the inputs of its consumers, so after batch norm and
activation. Where several consumers read a group (a residual stream), each input is an observation of its channels; an
input that several consumers share counts once. :mod:`secateur.criteria.readings` has the rule, also for layers that
read a group in part. Statistics of several batches or processes add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.criteria.moments import Moments, all_reduce
from secateur.criteria.readings import Callback, unseen, watching
from secateur.errors import CriterionError, DataError, SecateurError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup
from secateur.network.inputs import are_images
from secateur.network.isolation import set_modes

POSITIONS = 32
"""Positions of a feature map that are read in each image, unless all are asked for."""
MEMORY = 2**30
"""Bytes of statistics gathered in one pass over the data, unless stated otherwise."""


@dataclass(frozen=True)
class Batch:
    """One batch as the model takes it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    size: int


def batches(data: Iterable[Any], device: torch.device | str) -> Iterator[Batch]:
    """Read batches and move them to a device.

    A batch is a tensor (the input); a tuple or list of two (input, labels); or a dict of keyword arguments, of which
    ``labels`` is set apart. An input may itself be a tuple of positional arguments or a dict of keyword arguments, and
    each argument any nesting of containers that the model takes.

    Raises:
        DataError: If a batch is none of these, holds no tensor, or is empty.
    """
    for number, item in enumerate(data, start=1):
        inputs, labels = item, None
        if isinstance(item, (tuple, list)):
            if len(item) not in (1, 2):
                raise DataError(
                    f"a batch of {len(item)} parts is not understood. Give (input, labels), or the input alone."
                )
            inputs, labels = (item[0], item[1]) if len(item) == 2 else (item[0], None)
        elif isinstance(item, Mapping):
            labels = item.get("labels")
            inputs = {key: value for key, value in item.items() if key != "labels"}
        inputs, labels = moved(inputs, device), moved(labels, device)
        size = _size(inputs, number)
        if isinstance(inputs, Mapping):
            yield Batch((), dict(inputs), labels, size)
        elif isinstance(inputs, tuple):
            yield Batch(inputs, {}, labels, size)
        else:
            yield Batch((inputs,), {}, labels, size)


def moved(value: Any, device: torch.device | str) -> Any:
    """Return nested containers with every tensor on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{one.name: moved(getattr(value, one.name), device) for one in fields(value) if one.init}
        )
    return value


def _size(inputs: Any, number: int) -> int:
    """Return the number of examples of a batch: the length of the first tensor in it, or of a list of images."""
    found = examples(inputs)
    if found is None:
        raise DataError(
            f"batch {number}: its inputs, a {type(inputs).__name__}, hold no tensor. Give (input, labels), or the "
            "input alone."
        )
    if found == 0:
        raise DataError(f"batch {number} is empty: its first tensor has length 0. Leave it out.")
    return found


def examples(inputs: Any) -> int | None:
    """Return the length of the first tensor or list of images, however deep it lies; None where there is none.

    Single numbers count only where there is nothing else, as 1.
    """
    lengths = list(_lengths(inputs))
    return next((length for length in lengths if length >= 0), 1 if lengths else None)


def _lengths(inputs: Any) -> Iterator[int]:
    """Yield the lengths of the tensors and lists of images in nested containers; -1 of a single number."""
    if isinstance(inputs, Tensor):
        yield len(inputs) if inputs.dim() else -1
    elif are_images(inputs):
        yield len(inputs)
    elif isinstance(inputs, Mapping):
        for part in inputs.values():
            yield from _lengths(part)
    elif isinstance(inputs, (tuple, list)):
        for part in inputs:
            yield from _lengths(part)
    elif is_dataclass(inputs):
        yield from _lengths(vars(inputs))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and every module back into the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        set_modes(modes.items())


def forward(model: nn.Module, batch: Batch, number: int) -> Any:
    """Run the model on a batch.

    Raises:
        DataError: If the batch doesn't fit the model.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except SecateurError:
        raise
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves((batch.args, batch.kwargs)) if isinstance(leaf, Tensor)]
        raise DataError(
            f"batch {number} with inputs of shape {shapes} does not fit the model: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error of the user's own code, with what helps where that is known."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "Expected more than 1 value per channel" in text:
        text = (
            f"{text.rstrip('.')}. Batch norm needs more than one value a channel: leave such a batch out (drop_last)."
        )
    return text


def check_finite(maps: Tensor, group: str) -> None:
    """Refuse feature maps with NaN or infinity.

    Raises:
        CriterionError: If there is one.
    """
    if not bool(torch.isfinite(maps.sum(dtype=torch.float64) if maps.dtype != torch.float64 else maps.sum())):
        raise CriterionError(f"{group}: the feature maps hold NaN or infinity. Check weights and inputs.")


def sample_positions(maps: Tensor, positions: int | None, generator: torch.Generator) -> Tensor:
    """Flatten maps ``(N, c, *spatial)`` to observations ``(N·P, c)``, at most ``positions`` of an image at random."""
    flat = maps.flatten(2) if maps.dim() > 2 else maps[..., None]
    if positions is not None and flat.shape[2] > positions:
        chosen = torch.randperm(flat.shape[2], generator=generator)[:positions].sort().values
        flat = flat.index_select(2, chosen.to(flat.device))
    return flat.movedim(1, 2).reshape(-1, flat.shape[1])


def chosen_groups(graph: ChannelGraph, groups: Iterable[str] | None) -> list[ChannelGroup]:
    """Return the groups of those names, all by default.

    Raises:
        UsageError: If the graph has no such group.
    """
    if groups is None:
        return list(graph.groups)
    by_name = {group.name: group for group in graph.groups}
    for name in groups:
        if name not in by_name:
            raise UsageError(f"the graph has no group {name!r}. It has {', '.join(by_name) or 'none'}.")
    return [by_name[name] for name in dict.fromkeys(groups)]


def passes(
    groups: Sequence[ChannelGroup], size_of: Callable[[ChannelGroup], int], memory: int
) -> list[list[ChannelGroup]]:
    """Divide groups into passes over the data whose statistics fit into ``memory`` bytes; at least one group a pass."""
    result: list[list[ChannelGroup]] = []
    used = 0
    for group in groups:
        need = size_of(group)
        if not result or used + need > memory:
            result.append([])
            used = 0
        result[-1].append(group)
        used += need
    return result


def require_passes(data: Any, count: int) -> None:
    """Refuse an iterator that can be read once where several passes are needed.

    Raises:
        DataError: If so.
    """
    if count > 1 and isinstance(data, Iterator):
        raise DataError(
            f"the data must be read {count} times, but can be read once. Pass a DataLoader or a list of batches."
        )


def stream(
    model: nn.Module,
    graph: ChannelGraph,
    rounds: Sequence[Sequence[ChannelGroup]],
    data: Iterable[Any],
    callback: Callback,
    on_batch: Callable[[Batch], None] | None = None,
) -> None:
    """Run the data through the model once a round, handing the feature maps of the round's groups to a callback.

    The model is left as found: mode, hooks and gradients.

    Raises:
        DataError: If there are no batches, or they don't fit the model.
    """
    require_passes(data, len(rounds))
    device = device_of(model)
    for groups in rounds:
        samples = 0
        with evaluating(model), torch.no_grad(), watching(model, graph, groups, callback):
            for number, batch in enumerate(batches(data, device), start=1):
                forward(model, batch, number)
                samples += batch.size
                if on_batch is not None:
                    on_batch(batch)
        require_samples(samples, device)


def require_samples(samples: int, device: torch.device) -> None:
    """Refuse a data set that was empty in every process.

    Raises:
        DataError: If so.
    """
    seen = torch.tensor(samples, device=device)
    all_reduce(seen)
    if int(seen) == 0:
        raise DataError("the data are empty: no batch came from the loader. Check the data set and drop_last.")


def unread(count: Tensor) -> str:
    """Say that channels were read by no layer when the model ran, as ``count`` of each tells; empty if all were."""
    missing = int((count == 0).sum())
    if not missing:
        return ""
    return f"the maps of {missing} of its {len(count)} channels were never seen, as no layer that reads them ran"


def observe(
    model: nn.Module,
    graph: ChannelGraph,
    data: Iterable[Any],
    groups: Iterable[str] | None = None,
    *,
    positions: int = POSITIONS,
    exact: bool = False,
    seed: int = 0,
    memory: int = MEMORY,
) -> dict[str, Moments]:
    """Gather the second moments of the feature maps of channel groups.

    Args:
        model: The network; it is run in eval mode and left as found.
        graph: Its channel graph.
        data: Batches, see :func:`batches`. Where the memory asks for several passes, they are read several times.
        groups: Names of groups; all by default.
        positions: Positions read of each map, drawn at random where a map has more.
        exact: Read every position.
        seed: Seed of the draw.
        memory: Bytes of statistics gathered in one pass; a group needs ``16·C²``, and further groups wait for
            further passes.

    Returns:
        Moments of each group, by name, summed over all processes where there are several.

    Raises:
        DataError: If there are no batches, or they don't fit the model.
        CriterionError: If feature maps hold NaN or infinity, or those of a group can't be seen.
        UsageError: If a group is unknown, or ``positions`` less than 1.
    """
    wanted = chosen_groups(graph, groups)
    for group in wanted:
        if why := unseen(model, graph, group):
            raise CriterionError(f"{group.name}: {why}. Leave the group out.")
    moments = gather_moments(model, graph, data, wanted, positions=positions, exact=exact, seed=seed, memory=memory)
    for name, statistics in moments.items():
        if why := unread(statistics.count.diagonal()):
            raise CriterionError(f"{name}: {why}. Leave the group out.")
    return moments


def gather_moments(
    model: nn.Module,
    graph: ChannelGraph,
    data: Iterable[Any],
    groups: Sequence[ChannelGroup],
    *,
    positions: int,
    exact: bool,
    seed: int,
    memory: int,
) -> dict[str, Moments]:
    """Gather moments as :func:`observe` does, of groups whose maps can be seen; the channels that none saw count 0."""
    if positions < 1:
        raise UsageError(f"positions is {positions}. Use at least 1, or exact=True for all.")
    device = device_of(model)
    if device.type == "mps":  # it has no fp64
        device = torch.device("cpu")
    moments = {group.name: Moments.empty(group.size, device) for group in groups}
    generator = torch.Generator().manual_seed(seed)

    def update(name: str, maps: Tensor, channels: Tensor | None) -> None:
        rows = sample_positions(maps, None if exact else positions, generator)
        check_finite(rows, name)
        moments[name].update(rows, channels)

    stream(model, graph, passes(groups, lambda group: 16 * group.size**2, memory), data, update)
    for statistics in moments.values():
        statistics.all_reduce()
    return moments
