r"""Streamed statistics of feature maps: second moments in fp64, in O(C²) memory however many images pass.

A group's feature maps are taken where they are read: at the inputs of its consumers, so after batch norm and
activation. Where several consumers read a group (a residual stream), each input is an observation of its channels; an
input that several consumers share counts once. Statistics of several batches or processes add up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria.moments import Moments, all_reduce
from secateur.errors import CriterionError, DataError, SecateurError, UsageError
from secateur.graph.channels import ChannelGraph, ChannelGroup, Member
from secateur.network.inputs import are_images
from secateur.network.isolation import set_modes

POSITIONS = 32
"""Positions of a feature map that are read in each image, unless all are asked for."""
MEMORY = 2**30
"""Bytes of statistics gathered in one pass over the data, unless stated otherwise."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
READERS = (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


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
    ``labels`` is set apart. An input may itself be a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        DataError: If a batch is none of these.
    """
    for item in data:
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
        size = _size(inputs)
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
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    return value


def _size(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return len(inputs) if inputs.dim() else 1
    if isinstance(inputs, list):
        return len(inputs)
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    tensors = [p for p in parts if isinstance(p, Tensor) or are_images(p)] if isinstance(parts, Iterable) else []
    if not tensors:
        raise DataError(
            f"a batch of type {type(inputs).__name__} holds no tensor. Give (input, labels), or the input alone."
        )
    return _size(tensors[0])


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
        shapes = [tuple(v.shape) for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"batch {number} with inputs of shape {shapes} does not fit the model: {first}") from error


@dataclass(frozen=True)
class Reading:
    """How one layer reads a group: channel ``channels[i]`` at input positions ``positions[i]``."""

    module: str
    channels: Tensor
    """Shape ``(c,)``."""
    positions: Tensor
    """Shape ``(c, q)``: q > 1 where a feature map was flattened."""

    def maps(self, x: Tensor, layer: nn.Module) -> Tensor:
        """Take the channels out of the layer's input, shape ``(N, c, *spatial)``.

        A map that was flattened comes back as a matrix, as nearly square as its number of positions allows.
        """
        if isinstance(layer, nn.Linear):
            x = x[None] if x.dim() == 1 else x
            x = x.movedim(-1, 1)
        elif x.dim() == layer.weight.dim() - 1:  # type: ignore[operator]
            x = x[None]
        count, q = self.positions.shape
        flat = self.positions.flatten().to(x.device)
        if len(flat) == x.shape[1] and bool((flat == torch.arange(len(flat), device=x.device)).all()):
            picked = x
        else:
            picked = x.index_select(1, flat)
        if q == 1:
            return picked
        height = max(h for h in range(1, int(q**0.5) + 1) if q % h == 0)
        return picked.reshape(len(x), count, height, q // height, *x.shape[2:])


def positions_of(member: Member) -> tuple[Tensor, Tensor]:
    """Arrange a member's positions by channel.

    Returns:
        The channels it holds, ascending, shape ``(c,)``, and their positions, shape ``(c, q)``; -1 fills up where a
        channel has fewer than q.
    """
    order = np.lexsort((member.positions, member.channels))
    channels, counts = np.unique(member.channels, return_counts=True)
    table = np.full((len(channels), int(counts.max()) if len(counts) else 0), -1, dtype=np.int64)
    table[np.arange(table.shape[1])[None, :] < counts[:, None]] = member.positions[order]
    return torch.from_numpy(channels.astype(np.int64)), torch.from_numpy(table)


def readings(model: nn.Module, group: ChannelGroup) -> list[Reading]:
    """Find the layers at whose inputs the group's feature maps can be seen.

    Raises:
        CriterionError: If no convolution or linear layer reads the group.
    """
    found = []
    for member in group.consumers:
        layer = model.get_submodule(member.module)
        if not isinstance(layer, READERS) or member.tensor.rpartition(".")[2] != "weight":
            continue
        channels, table = positions_of(member)
        if table.numel() and bool((table >= 0).all()):
            found.append(Reading(member.module, channels, table))
    if not found:
        raise CriterionError(
            f"{group.name}: no convolution or linear layer reads its {group.size} channels whole, so their maps "
            "can't be seen. Use a criterion of weights, such as l1, or leave the group out."
        )
    return found


Callback = Callable[[str, Tensor, Tensor | None], None]
"""Called with the group's name, its maps ``(N, c, *spatial)``, and their channels (None = all, in order)."""


@contextmanager
def watching(model: nn.Module, groups: Sequence[ChannelGroup], callback: Callback) -> Iterator[None]:
    """Hand every feature map of the groups to a callback whenever the model runs."""
    with ExitStack() as stack:
        for group in groups:
            seen: list[tuple[weakref.ref[Tensor], int]] = []
            for reading in readings(model, group):
                layer = model.get_submodule(reading.module)
                hook = _hook(group, reading, layer, seen, callback)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hook(
    group: ChannelGroup,
    reading: Reading,
    layer: nn.Module,
    seen: list[tuple[weakref.ref[Tensor], int]],
    callback: Callback,
) -> Callable[..., None]:
    whole = len(reading.channels) == group.size

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        # Two layers that read one tensor see one feature map; a tensor written to in between is another one.
        seen[:] = [(ref, version) for ref, version in seen if ref() is not None]
        now = -1 if x.is_inference() else x._version
        if any(ref() is x and version == now for ref, version in seen):
            return
        seen.append((weakref.ref(x), now))
        maps = reading.maps(x.detach(), layer)
        callback(group.name, maps, None if whole else reading.channels.to(x.device))

    return hook


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
        with evaluating(model), torch.no_grad(), watching(model, groups, callback):
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


def require_seen(count: Tensor, group: str) -> None:
    """Refuse a group with channels that no hooked layer has read: its statistics would be zeros, not measurements.

    Raises:
        CriterionError: If so.
    """
    unseen = int((count == 0).sum())
    if unseen:
        raise CriterionError(
            f"{group}: the maps of {unseen} of its {len(count)} channels were never seen, as the layer that reads them "
            "is not called as a module. Use a criterion of weights, such as l1, or leave the group out."
        )


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
    if positions < 1:
        raise UsageError(f"positions is {positions}. Use at least 1, or exact=True for all.")
    wanted = chosen_groups(graph, groups)
    device = device_of(model)
    if device.type == "mps":  # it has no fp64
        device = torch.device("cpu")
    moments = {group.name: Moments.empty(group.size, device) for group in wanted}
    generator = torch.Generator().manual_seed(seed)

    def update(name: str, maps: Tensor, channels: Tensor | None) -> None:
        rows = sample_positions(maps, None if exact else positions, generator)
        check_finite(rows, name)
        moments[name].update(rows, channels)

    stream(model, passes(wanted, lambda group: 16 * group.size**2, memory), data, update)
    for name, statistics in moments.items():
        statistics.all_reduce()
        require_seen(statistics.count.diagonal(), name)
    return moments
