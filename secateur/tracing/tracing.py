"""From a network to its coupled channels: a recorded run, its groups, and trials of what these assume."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from secateur.errors import TraceError
from secateur.graph.channels import ChannelGraph, InputShape
from secateur.network.inputs import batch_size, mapped, unwrapped, varied
from secateur.network.isolation import ONE_AT_A_TIME
from secateur.pruning.leftovers import unfollowed
from secateur.tracing.assumptions import Assumptions
from secateur.tracing.grouping import group_channels
from secateur.tracing.recording import record
from secateur.tracing.trial.attempt import Trials
from secateur.tracing.trial.search import failing, give_up

_MOST_TRIALS = 12


@contextmanager
def _rest_aside() -> Iterator[None]:
    """Keep Python's collector to what is made here: it would go through all that the program holds, several times."""
    aside = not gc.get_freeze_count()  # or the program has put it aside itself, and does not want it back
    if aside:
        gc.freeze()
    try:
        with ONE_AT_A_TIME:  # two threads may trace one network
            yield
    finally:
        if aside:
            gc.unfreeze()


def _shape(tensor: Tensor) -> InputShape:
    return InputShape(() if tensor.is_nested else tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@_rest_aside()
def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Find the coupled channels of a network by running it once, with whatever control flow it has.

    Labels flow through every operator of one forward in eval mode (and of one in train mode where that may run further
    layers, as auxiliary heads, or return what eval mode drops). What they assume of the network's own code is tried: a
    pruned copy is compared with the masked original, by the values of outputs and of what layers read, or, where a
    network is large, by its operators, operands and labels one by one. What does not hold takes the next option of the
    assumption behind it; the last is to keep the channels, and to list them in ``graph.refused``.

    Args:
        model: The network; left as found: parameters, buffers, modes, hooks, random state. Data parallel and compiled
            wrappers are seen through.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments. They should reach
            every layer: give a detector an image in which it finds something. A layer that reads tensors without
            elements goes by the rules alone, and is noted.

    Returns:
        The groups that can be pruned and what can't, each with operator, module, source line and reason.

    Raises:
        TraceError: If the model fails on the example inputs.
        PlanError: If the model can't be copied, so that nothing can be tried.
    """
    model = unwrapped(model)
    assumptions, batch, plain = Assumptions(), batch_size(example_inputs), False
    try:
        first = record(model, example_inputs, assumptions)
    except TraceError:  # of code that asks for the type of its numbers, say
        plain = True
        first = record(model, example_inputs, assumptions, plain=True)
    trials = Trials(model, varied(example_inputs), assumptions, first)
    for _ in range(_MOST_TRIALS):
        grouping = group_channels(trials.recording, assumptions, batch)
        if grouping.stuck:
            rows = [a for a in grouping.stuck if a.option == "together"]
            for assumption in rows or grouping.stuck:
                assumptions.take_next(assumption)
        else:
            failures = failing(trials, grouping)
            first.written.put_back()
            if not failures:
                graph = trials.floored(grouping.graph)
                inputs = mapped(example_inputs, _shape)
                return replace(graph, notes=(*graph.notes, *unfollowed(model, graph)), inputs=inputs)
            if not give_up(trials, grouping, failures):
                continue
        trials.recording = record(model, example_inputs, assumptions, plain=plain)
    raise TraceError("trace: what the pruned network computes could not be explained; please report this network.")
