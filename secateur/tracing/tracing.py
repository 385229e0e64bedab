"""From a model to its coupled channels: recorded runs, their groups, and trials of what these can't tell."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import nn

from secateur.errors import TraceError
from secateur.graph.channels import ChannelGraph
from secateur.network.inputs import batch_size, unwrapped, varied
from secateur.network.named import modules_of
from secateur.tracing.code.calls import MOST_FUNCTIONS
from secateur.tracing.code.reachable import Reached, reachable
from secateur.tracing.findings import Cause
from secateur.tracing.grouping import group_channels
from secateur.tracing.recording import record
from secateur.tracing.trial import search
from secateur.tracing.trial.attempt import Trials

_MOST_TRIALS = 12


def _functions(model: nn.Module) -> list[Reached]:
    """Return the functions that a forward may run, as many as are looked at and one."""
    return list(islice(reachable(model), MOST_FUNCTIONS + 1))


@contextmanager
def _rest_aside() -> Iterator[None]:
    """Keep Python's collector to what is made here: it would go through all that the program holds, several times."""
    aside = not gc.get_freeze_count()  # or the program has put it aside itself, and does not want it back
    if aside:
        gc.freeze()
    try:
        yield
    finally:
        if aside:
            gc.unfreeze()


@_rest_aside()
def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Find the coupled channels of a network by running it once, with whatever control flow it has.

    Labels flow through every operator of one forward in eval mode (and of one in train mode where that runs further
    layers, as auxiliary heads, or returns what eval mode drops). Where the network's own code may depend on the number
    of channels, a trial pruning is run and compared with the masked original: by the values of outputs and of what
    layers read, or, where a network is large, by its operators, operands and labels one by one. What does not hold is
    given up and listed in ``graph.refused``.

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
    """
    model = unwrapped(model)
    decisions: dict[int, int] = {}
    banned: dict[tuple[str, int], Cause] = {}
    """Dimensions of parameters that were seen not to be prunable, and why."""
    loose: set[int] = set()
    types = {name: type(module).__name__ for name, module in modules_of(model).items()}
    batch = batch_size(example_inputs)
    functions = _functions(model)
    plain = False
    try:
        first = record(model, example_inputs, functions, decisions, loose)
    except TraceError:  # of code that asks for the type of its numbers, say
        plain = True
        first = record(model, example_inputs, functions, decisions, loose, plain=True)
    trials = Trials(model, varied(example_inputs), functions, first)
    for _ in range(_MOST_TRIALS):
        flow, notes = trials.recording.flow, trials.recording.notes
        grouping = group_channels(flow, types, notes, batch)
        while not flow.certain and (wrong := search.contradicted(grouping)):
            for labels, cause in wrong:
                flow.freeze_for(labels, cause)
            grouping = group_channels(flow, types, notes, batch)
        if not loose.issuperset(grouping.stuck):
            loose.update(grouping.stuck)
        elif grouping.shared:
            for key in grouping.shared:
                decisions[key] = decisions.get(key, 0) + 1
        else:
            failures = search.failing(trials, grouping) if not flow.certain else []
            first.written.put_back()
            if not failures:
                return trials.floored(grouping.graph)
            if not search.give_up(failures, grouping, flow, decisions, banned):
                flow.ban(banned)
                continue
        trials.recording = record(model, example_inputs, functions, decisions, loose, plain=plain)
        trials.recording.flow.ban(banned)
    raise TraceError("trace: what the pruned network computes could not be explained; please report this network.")
