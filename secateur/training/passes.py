"""One pass over the data: its order and what is drawn in it follow a seed, and what goes wrong is told in one line."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.criteria.feature_maps import examples, first_line
from secateur.errors import DataError, RunError, SecateurError
from secateur.network.inputs import are_images
from secateur.training.processes import together

Batches: TypeAlias = Iterable[Any]
"""Pairs ``(inputs, target)``, or mappings of keyword arguments with ``labels`` among them, walked once an epoch:
a DataLoader, a list, or one of :mod:`secateur.data`."""


def derived_seed(*parts: int) -> int:
    """Mix integers into one seed of 63 bits, the same on every machine."""
    high, low = np.random.SeedSequence([p & 0xFFFFFFFFFFFFFFFF for p in parts]).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


@contextmanager
def seeded(*parts: int) -> Iterator[int]:
    """Seed every generator that data and layers draw from; afterwards, put back what the caller had."""
    seed = derived_seed(*parts)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - transforms use the global state
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        try:
            yield seed
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def kind_of(value: Any) -> str:
    """Say what a value is: its type, or of a tensor its kind and shape."""
    name = type(value).__name__
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else name


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


@contextmanager
def explained(error: type[SecateurError], where: str, what: str, remedy: str) -> Iterator[None]:
    """Turn what the user's own code raises into one line that says where and what helps."""
    try:
        with together():
            yield
    except SecateurError:
        raise
    except Exception as raised:
        said = _said(raised).rstrip(".")
        if isinstance(raised, _NO_MEMORY) or "can't allocate memory" in said:
            raise RunError(f"{where}: out of memory: {said}. Take smaller batches.") from raised
        raise error(f"{where}: {what}: {said}. {remedy}") from raised


_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)


def _said(raised: Exception) -> str:
    """Return what an error says in a line; of one that a DataLoader brings from a worker, the last of its many."""
    lines = str(raised).strip().splitlines()
    return lines[-1].strip() if lines and lines[0].startswith("Caught ") else first_line(raised)


def called(model: nn.Module, inputs: Any, where: str) -> Any:
    """Call a model on a batch.

    Raises:
        DataError: If the batch is empty or doesn't fit the network.
    """
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if examples(inputs) == 0:
        raise DataError(f"{where}: the batch is empty, its inputs of shape {shapes}; leave it out.")
    what = f"the network fails on inputs of shape {shapes}"
    with explained(DataError, where, what, "The data have to fit the network, in training mode too."):
        return forward(model, inputs)


def order(batches: Batches, seed: int) -> None:
    """Let the order of the next walk over batches follow ``seed``."""
    sampler = getattr(batches, "sampler", None)
    for owner in (batches, sampler):
        if callable(getattr(owner, "set_epoch", None)):
            owner.set_epoch(seed)  # type: ignore[union-attr]
    for owner in (batches, sampler, getattr(batches, "batch_sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def walk(batches: Batches, seed: int, where: str) -> Iterator[tuple[Any, Any]]:
    """Yield the inputs and targets of an epoch whose order follows ``seed``.

    Raises:
        DataError: If a batch is neither a pair nor a mapping with labels, or can't be read.
    """
    order(batches, seed)
    for batch in _read(batches, where):
        if isinstance(batch, Mapping) and "labels" in batch:
            yield {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
            continue
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            kind = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else "")
            raise DataError(f"{where}: a batch is a pair (inputs, target), or a mapping with labels; found {kind}.")
        yield batch[0], batch[1]


def _read(batches: Batches, where: str) -> Iterator[Any]:
    with explained(DataError, where, "the data can't be read", "The run goes on once they can."):
        source = iter(batches)
    while True:
        with explained(DataError, where, "the data can't be read", "The run goes on once they can."):
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch


def first_inputs(batches: Batches, where: str) -> Any:
    """Return the inputs of the first batch.

    Raises:
        DataError: If there is no batch, or it is not a pair.
    """
    for inputs, _ in walk(batches, 0, where):
        return inputs
    raise DataError(f"{where}: the data is empty; give at least one batch.")


def first_example(inputs: Any) -> Any:
    """Return the first example of a batch's inputs, as a batch of one."""
    if isinstance(inputs, list):  # positional arguments; a tracer takes them as a tuple
        return inputs[:1] if are_images(inputs) else tuple(map(_first_of, inputs))
    return _first_of(inputs)


def _first_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:1] if value.dim() else value
    if are_images(value):
        return value[:1]
    if isinstance(value, Mapping):
        return {key: _first_of(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_first_of, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_first_of, value))
    return value


def length_of(batches: Batches) -> int | None:
    """Return the number of batches, where it is known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None
