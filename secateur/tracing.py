"""One run of the model under a dispatch mode, in which labels flow through every operator: model → ChannelGraph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules import module as module_registry
from torch.utils._python_dispatch import TorchDispatchMode

from secateur import trial
from secateur.errors import TraceError
from secateur.graph import ChannelGraph
from secateur.grouping import group_channels
from secateur.inputs import arguments, batch_size, left_as_found, mapped, tensors_of, unwrapped
from secateur.layers import layer_rule
from secateur.rules import RULES, Flow
from secateur.rules.flow import Cause
from secateur.rules.pointwise import is_pointwise, pointwise
from secateur.rules.reach import Reached, reachable
from secateur.rules.registry import tensors_in
from secateur.rules.shuffle import carry
from secateur.rules.trust import MOST_FUNCTIONS, Executed, Watch, counting, knows_its_mode

_MOST_TRIALS = 12
_RESHAPING = ("aten::squeeze_", "aten::unsqueeze_", "aten::as_strided_", "aten::as_strided")
"""Operators whose rule has to know the shape that their input had before."""


class _LabelMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator as it is, then lets the labels flow by its rule."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flow = self.flow
        if flow.paused:
            return func(*args, **kwargs)
        name = func._schema.name
        rule = RULES.get(name)
        if rule is None and is_pointwise(func):
            rule = pointwise
        if rule is None:
            # In inference mode an operator made of others arrives whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        flow.ordinal += 1
        flow.operator = str(func)
        if flow.called is None and flow.doubt is None:
            flow.doubt = flow.cause("is called by code that can't be looked into")
        flow.shape_before = tuple(args[0].shape) if name in _RESHAPING else ()
        flow.stride_before = args[0].stride() if name in _RESHAPING else ()
        out = func(*args, **kwargs)
        flow.operands = tensors_in((*args, *kwargs.values()))
        if rule is not None:
            rule(flow, args, kwargs, out)
        else:
            for tensor in flow.operands:
                flow.freeze_tensor(tensor, "no rule says how channels flow through this operator")
            for tensor in tensors_in(out if isinstance(out, (tuple, list)) else (out,)):
                flow.set(tensor, {})
        if flow.loose:
            carry(flow, name, args, kwargs, out)
        flow.operands = ()
        return out


@contextmanager
def _module_paths(model: nn.Module, flow: Flow) -> Iterator[None]:
    """Keep the flow told which module's forward is running."""
    names = {id(m): name for name, m in model.named_modules()}
    stack: list[tuple[str, nn.Module | None]] = [("", None)]

    def enter(module: nn.Module, args: Any) -> None:
        stack.append((names.get(id(module), stack[-1][0]), module))
        flow.module, flow.layer = stack[-1]
        if isinstance(module, nn.MultiheadAttention):
            _keep_embedding(flow, module, args)
        if layer_rule(module) is not None:
            flow.doubt = flow.doubt or Cause("", flow.module, "", "a registered layer")
            flow.paused += 1

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        rule = layer_rule(module)
        if rule is not None:
            flow.paused -= 1
            if not flow.paused:
                flow.operator = type(module).__name__
                rule.flow(flow, module, args, out)
        stack.pop()
        flow.module, flow.layer = stack[-1]

    hooks = [
        module_registry.register_module_forward_pre_hook(enter),
        module_registry.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep_embedding(flow: Flow, attention: nn.MultiheadAttention, inputs: Any) -> None:
    """Keep what PyTorch's attention reads and makes: it holds the numbers, and checks them."""
    flow.operator = type(attention).__name__
    for tensor in (*attention.parameters(), *tensors_in(inputs)):
        axes = flow.axes(tensor)
        for dim in axes if isinstance(tensor, nn.Parameter) else axes.keys() & {tensor.ndim - 1}:
            flow.freeze(axes[dim], "its embedding dimension is a number that it checks")


def _run(model: nn.Module, flow: Flow, example_inputs: Any) -> None:
    positional, keyword = arguments(mapped(example_inputs, lambda t: t.clone()))
    try:
        with _module_paths(model, flow), Watch(flow), _LabelMode(flow):
            outputs = model(*positional, **keyword)
    except Exception as error:
        where = f" in {flow.module}" if flow.module else ""
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(
            f"trace: the model fails on the example inputs{where}: {type(error).__name__}: {text.rstrip('.')}. "
            "Check their shapes, types and device."
        ) from error
    flow.operator, flow.module = "model output", ""
    for tensor in tensors_of(outputs):
        grid = flow.grid(tensor)
        for labels in (*flow.axes(tensor).values(), *([grid.labels] if grid is not None else [])):
            flow.frozen.append((labels.reshape(-1), Cause("model output", "", "", "is returned by the model")))


def _functions(model: nn.Module) -> list[Reached]:
    """Return the functions that a forward may run, as many as are looked at and one."""
    return list(islice(reachable(model), MOST_FUNCTIONS + 1))


def _record(
    model: nn.Module,
    example_inputs: Any,
    functions: list[Reached],
    decisions: Mapping[int, int],
    loose: Set[int] = frozenset(),
) -> tuple[Flow, list[str]]:
    """Let labels flow through one forward in eval mode, and one in train mode where that runs further layers.

    ``functions`` are those that the forward may run.
    """
    notes: list[str] = []
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    with left_as_found(model):
        _evaluate(model)
        layers = (nn.modules.conv._ConvNd, nn.Linear)
        kernels = {f"{name}.weight".lstrip(".") for name, m in model.named_modules() if isinstance(m, layers)}
        flow = Flow(named, decisions, kernels, loose)
        executed = Executed()
        suspect = counting(functions)
        watched = executed if suspect is not None and executed.at_hand else nullcontext()
        flow.doubt = None if watched is executed else suspect
        with watched:
            _run(model, flow, example_inputs)
        idle = _idle(model, flow)
        if idle and knows_its_mode(model, functions):
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            calls = len(flow.calls)
            try:
                with watched:
                    _run(model, flow, example_inputs)
            except TraceError as error:
                notes.append(f"in train mode {error}")
            # Costs are those of inference.
            del flow.calls[calls:]
            idle = _idle(model, flow)
        flow.doubt = flow.doubt or executed.counting()
        notes.extend(f"{name}: never runs, so it is left as it is" for name in idle)
    notes.extend(_without_elements(flow))
    if not flow.calls:
        notes.append("no convolution or linear layer with a weight of its own was seen; quantize after pruning")
    return flow, notes


def _without_elements(flow: Flow) -> list[str]:
    """Keep what layers make out of nothing for code that may loop over no element; return notes on those layers."""
    calls = [call for call in flow.calls if call.kind != "registered" and call.positions == 0]
    if not calls:
        return []
    classes = flow.store.classes()
    read = {int(c) for labels in flow.consumed for c in classes[labels.reshape(-1)]}
    for call in calls:
        if call.outputs is not None and read.isdisjoint(classes[call.outputs.reshape(-1)].tolist()):
            reason = "is made without elements, and read by no layer: give examples that reach it"
            flow.frozen.append((call.outputs.reshape(-1), Cause(call.kind, call.module, "", reason)))
    seeing = {call.module for call in flow.calls if call.positions}
    return [
        f"{name}: reads tensors without elements on the example inputs, so its channels go by the rules alone"
        for name in dict.fromkeys(call.module for call in calls)
        if name not in seeing
    ]


def _evaluate(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError as error:  # a program that torch.export made is of one mode for good
        raise TraceError(
            f"trace: the model can't be put into eval mode: {str(error).rstrip('.')}. Trace what it was made of."
        ) from error


def _idle(model: nn.Module, flow: Flow) -> list[str]:
    """Return the modules none of whose parameters took part in the run."""
    return [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and not any(flow.took_part(p) for p in module.parameters(recurse=False))
    ]


def trace(model: nn.Module, example_inputs: Any) -> ChannelGraph:
    """Find the coupled channels of a network by running it once, with whatever control flow it has.

    Labels flow through every operator of one forward in eval mode (and of one in train mode where that runs further
    layers, as auxiliary heads). Where the network's own code may depend on the number of channels, a trial pruning is
    run and compared with the masked original; what does not hold is given up and listed in ``graph.refused``.

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
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    batch = batch_size(example_inputs)
    trials = trial.Trials(model, example_inputs)
    functions = _functions(model)
    flow, notes = _record(model, example_inputs, functions, decisions, loose)
    for _ in range(_MOST_TRIALS):
        grouping = group_channels(flow, types, tuple(notes), batch)
        if not loose.issuperset(grouping.stuck):
            loose.update(grouping.stuck)
        elif grouping.shared:
            for key in grouping.shared:
                decisions[key] = decisions.get(key, 0) + 1
        else:
            failures = trial.failing(trials, grouping) if not flow.certain else []
            if not failures:
                return grouping.graph
            if not trial.give_up(failures, grouping, flow, decisions, banned):
                flow.ban(banned)
                continue
        flow, notes = _record(model, example_inputs, functions, decisions, loose)
        flow.ban(banned)
    raise TraceError("trace: what the pruned network computes could not be explained; please report this network.")
