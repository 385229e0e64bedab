"""One run of a model under a dispatch mode, in which labels flow through every operator: model → Flow."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_registry
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import TraceError
from secateur.network.custom_layers import layer_rule
from secateur.network.inputs import arguments, leaves_of, mapped, tensors_of
from secateur.network.isolation import left_as_found
from secateur.network.named import modules_of, tensors_in, tensors_named
from secateur.network.writes import Written, targets
from secateur.tracing.code.calls import Executed, Watch, counting, knows_its_mode, naming
from secateur.tracing.code.reachable import Reached
from secateur.tracing.findings import Cause
from secateur.tracing.flow import LAYERS, WIDTHS, ValueNeeded
from secateur.tracing.numbers import Counted, told_apart
from secateur.tracing.program import BY_VALUE, WORTH, Program
from secateur.tracing.rules import RULES, Flow
from secateur.tracing.rules.pointwise import is_pointwise, pointwise
from secateur.tracing.rules.registry import Rule
from secateur.tracing.shuffles.rule import carry

_RESHAPING = ("aten::squeeze_", "aten::unsqueeze_", "aten::as_strided_", "aten::as_strided")
"""Operators whose rule has to know the shape that their input had before."""
_PLAIN = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers whose numbers PyTorch itself compares, which follow by rules."""
_LIGHT = Cause("", "", "", "is not asked for")


class _LabelMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator, then lets the labels flow by its rule, and notes the call.

    With ``light``, of operators that take long only the shapes of what they make are right.
    """

    def __init__(
        self, flow: Flow, program: Program, light: bool, written: Written, executed: Executed | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow, self.program, self.light, self.written = flow, program, light, written
        self.executed = executed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Be called as it is: the wrapper that PyTorch puts around modes imports its compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flow = self.flow
        name, text, writes, elementwise = _known(func)
        if flow.spared and name in BY_VALUE:
            raise ValueNeeded
        if writes:
            self.written.before(func, args, kwargs)
        if flow.paused:
            return func(*args, **kwargs)
        rule = RULES.get(name) or (pointwise if elementwise else None)
        if rule is None:
            # In inference mode an operator made of others arrives whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        flow.ordinal += 1
        flow.operator = text
        if flow.called is None and flow.doubt is None:
            flow.doubt = flow.cause("is called by code that can't be looked into")
        flow.shape_before = tuple(args[0].shape) if name in _RESHAPING else ()
        flow.stride_before = args[0].stride() if name in _RESHAPING else ()
        out = self.program.shaped(func, args, kwargs) if self.light else func(*args, **kwargs)
        if self.executed is None:
            self._carry(rule, name, args, kwargs, out)
            return out
        self.executed.rest()
        try:
            self._carry(rule, name, args, kwargs, out)
        finally:
            self.executed.go_on()
        return out

    def _carry(self, rule: Rule | None, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Let the labels flow through an operator that has run, and note the call."""
        flow = self.flow
        flow.operands = tensors_in((*args, *kwargs.values()) if kwargs else args)
        if rule is not None:
            rule(flow, args, kwargs, out)
        else:
            for tensor in flow.operands:
                flow.freeze_tensor(tensor, "no rule says how channels flow through this operator")
            for tensor in tensors_in((out,)):
                flow.set(tensor, {})
        if flow.shuffled:
            carry(flow, name, args, out)
        flow.operands = ()
        self.program.note(flow, name, args, kwargs, out)


@functools.lru_cache(maxsize=4096)
def _known(func: Any) -> tuple[str, str, bool, bool]:
    """Return the name of an operator that its rule has, the one shown, whether it writes, and is element-wise."""
    return func._schema.name, str(func), bool(targets(func)), is_pointwise(func)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Switch cuDNN's fused kernels off: without them a recurrent layer is made of operators that have rules."""
    backend: Any = torch.backends.cudnn
    before = backend.enabled
    try:
        backend.enabled = False
        yield
    finally:
        backend.enabled = before


@contextmanager
def _module_paths(modules: Mapping[str, nn.Module], flow: Flow, watch: Watch) -> Iterator[None]:
    """Keep the flow told which module's forward is running."""
    names = {id(module): name for name, module in modules.items()}
    stack: list[tuple[str, nn.Module | None, bool]] = [("", None, False)]
    fused = ExitStack()

    def enter(module: nn.Module, args: Any) -> None:
        stack.append((names.get(id(module), stack[-1][0]), module, id(module) not in names))
        flow.module, flow.layer, flow.foreign = stack[-1]
        watch.look_at_callers(of_module=True)
        if isinstance(module, nn.RNNBase):
            fused.enter_context(_plain_kernels())
        if isinstance(module, nn.MultiheadAttention):
            with torch._C.DisableTorchFunction():  # what is asked here is not asked by the code
                _keep_embedding(flow, module, args)
        if layer_rule(module) is not None:
            flow.doubt = flow.doubt or Cause("", flow.module, "", "a registered layer")
            flow.paused += 1

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(module, nn.RNNBase):
            fused.close()
        rule = layer_rule(module)
        if rule is not None:
            flow.paused -= 1
            if not flow.paused:
                flow.operator = type(module).__name__
                rule.flow(flow, module, args, out)
        stack.pop()
        flow.module, flow.layer, flow.foreign = stack[-1]

    hooks = [
        module_registry.register_module_forward_pre_hook(enter),
        module_registry.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        fused.close()
        for hook in hooks:
            hook.remove()


def _keep_embedding(flow: Flow, attention: nn.MultiheadAttention, inputs: Any) -> None:
    """Keep what PyTorch's attention reads and makes: it holds the numbers, and checks them."""
    flow.operator = type(attention).__name__
    for tensor in (*attention.parameters(), *tensors_in(inputs)):
        axes = flow.axes(tensor)
        for dim in axes if isinstance(tensor, nn.Parameter) else axes.keys() & {tensor.ndim - 1}:
            flow.freeze(axes[dim], "its embedding dimension is a number that it checks")


@contextmanager
def _numbers(modules: Mapping[str, nn.Module], flow: Flow) -> Iterator[None]:
    """Have the numbers that modules hold told apart; of layers, those that count channels and follow by rules."""
    layers = {path: module for path, module in modules.items() if isinstance(module, LAYERS)}
    others = {p: module for p, module in modules.items() if p not in layers and not isinstance(module, _PLAIN)}
    with told_apart(others, flow.token, flow.numbers), told_apart(layers, flow.token, flow.widths, WIDTHS):
        yield


def _run(model: nn.Module, labelling: _LabelMode, example_inputs: Any, plain: bool) -> None:
    """Run a network once; its labels are in the flow of ``labelling`` then, its calls in the program."""
    flow, program = labelling.flow, labelling.program
    positional, keyword = arguments(mapped(example_inputs, lambda t: t.clone()))
    program.begin(tensors_of((positional, keyword)))
    try:
        watch = Watch(flow)
        modules = modules_of(model)
        numbers = _numbers({} if plain else modules, flow)
        with numbers, _module_paths(modules, flow, watch), watch, labelling, labelling.executed or nullcontext():
            # Taken out here, as what an iterator yields may be computed only now.
            returned = list(leaves_of(model(*positional, **keyword), {}))
    except Exception as error:
        where = f" in {flow.module}" if flow.module else ""
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(
            f"trace: the model fails on the example inputs{where}: {type(error).__name__}: {text.rstrip('.')}. "
            "Check their shapes, types and device."
        ) from error
    flow.operator, flow.module = "model output", ""
    _keep_returned(flow, returned)
    program.end(flow, (leaf for leaf in returned if isinstance(leaf, Tensor)))


def _keep_returned(flow: Flow, returned: list[Any]) -> None:
    """Keep the channels of what a model returns, and those whose number it returns; all where it returns no tensor."""
    for leaf in returned:
        if isinstance(leaf, Counted):
            flow.freeze_for(leaf.labels, Cause("model output", "", "", "are counted, and their number is returned"))
        if not isinstance(leaf, Tensor):
            continue
        grid = flow.grid(leaf)
        loose = [grid.labels] if grid is not None and grid.key in flow.loose else []
        for labels in (*flow.axes(leaf).values(), *loose):
            flow.freeze_for(labels, Cause("model output", "", "", "is returned by the model"))
    if not any(isinstance(leaf, Tensor) for leaf in returned):
        for labels in flow.produced:
            flow.freeze_for(labels, Cause("model output", "", "", "no tensor is returned that would tell what is made"))


@dataclass(frozen=True)
class Recording:
    """One run of a network."""

    flow: Flow
    """Its labels."""
    program: Program
    """Its operator calls."""
    notes: tuple[str, ...]
    """What was noticed: layers that never run, and the like."""
    written: Written
    """What the code wrote into, which has its values again."""


def record(
    model: nn.Module,
    example_inputs: Any,
    functions: list[Reached],
    decisions: Mapping[int, int],
    loose: Set[int] = frozenset(),
    *,
    light: Program | None = None,
    plain: bool = False,
) -> Recording:
    """Let labels flow through one forward in eval mode, and one in train mode where that may run or return more.

    Args:
        model: The network; left as found.
        example_inputs: What to run it on.
        functions: Those that the forward may run.
        decisions: What to assume of the user's code; see ``Flow``.
        loose: Shuffles to take loosely; see ``Flow``.
        plain: Whether numbers of modules stay plain, of which code then can't be seen to give which.
        light: Given to note a run without what layers compute, which asks no more of the code than its operators.

    Raises:
        TraceError: If the model fails on the example inputs.
    """
    notes: list[str] = []
    modules = modules_of(model)
    named = tensors_named(model, modules)
    written = Written(named)
    with left_as_found(model), _put_back(written):
        _evaluate(model)
        layers = (nn.modules.conv._ConvNd, nn.Linear)
        kernels = {f"{name}.weight".lstrip(".") for name, m in modules.items() if isinstance(m, layers)}
        program = light or Program()
        flow = Flow(named, dict(decisions), kernels, set(loose))
        executed = Executed()
        suspect = _LIGHT if light is not None else counting(functions)
        watched = executed if suspect is not None and executed.at_hand and light is None else None
        flow.doubt = None if watched is executed else suspect
        labelling = _LabelMode(flow, program, light is not None, written, watched)
        _run(model, labelling, example_inputs, plain)
        idle = _idle(model, flow)
        if knows_its_mode(model, functions) and (idle or _unread(model, flow) or _dropped(flow)):
            model.train()
            for module in modules_of(model).values():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            calls = len(flow.calls)
            try:
                # What eval mode computes has been seen; here it matters which layers run.
                if light is not None or not (
                    _worth_sparing(flow, program) and _spared(model, labelling, example_inputs, plain)
                ):
                    _run(model, labelling, example_inputs, plain)
            except TraceError as error:
                notes.append(f"in train mode {error}")
            # Costs are those of inference.
            del flow.calls[calls:]
            idle = _idle(model, flow)
        flow.keep_numbers()
        flow.doubt = flow.doubt or executed.counting() or naming(model, functions)
        notes.extend(f"{name}: never runs, so it is left as it is" for name in idle)
    notes.extend(_without_elements(flow))
    if not flow.calls:
        notes.append("no convolution or linear layer with a weight of its own was seen; quantize after pruning")
    return Recording(flow, program, tuple(notes), written)


def _worth_sparing(flow: Flow, program: Program) -> bool:
    """Tell whether running a network's products once more takes long, and nothing was seen to go by their values."""
    products = sum(c.positions * c.kernel * c.in_channels * c.out_channels // c.groups for c in flow.calls)
    return not flow.by_value and not program.random and products > WORTH * len(program.steps)


def _spared(model: nn.Module, labelling: _LabelMode, example_inputs: Any, plain: bool) -> bool:
    """Run a network once more without its products' values; tell whether it did without them."""
    flow, program = labelling.flow, labelling.program
    labelling.light = flow.spared = True
    try:
        _run(model, labelling, example_inputs, plain)
        return not program.kept()
    except ValueNeeded:
        flow.paused = 0
        return False
    except TraceError:  # which zeros may be the reason for
        return False
    finally:
        labelling.light = flow.spared = False
        program.failed = None


@contextmanager
def _put_back(written: Written) -> Iterator[None]:
    try:
        yield
    finally:
        written.put_back()


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
            flow.freeze_for(call.outputs, Cause(call.kind, call.module, "", reason))
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


def _unread(model: nn.Module, flow: Flow) -> bool:
    """Tell whether a module has a parameter, or a buffer of its own kind, that took no part in the run."""
    for module in modules_of(model).values():
        if not isinstance(module, nn.modules.batchnorm._NormBase):  # it counts batches
            own = (*module._parameters.values(), *module._buffers.values())
            if any(t is not None and t.ndim and not flow.took_part(t) for t in own):
                return True
    return False


def _dropped(flow: Flow) -> bool:
    """Tell whether nothing reads or returns what some layer makes: heads whose outputs are for train mode, say."""
    classes = flow.store.classes()
    used = np.zeros(len(classes), dtype=bool)
    for labels in (*flow.consumed, *(labels for labels, _ in flow.frozen)):
        used[classes[labels.reshape(-1)]] = True
    made = (call.outputs.reshape(-1) for call in flow.calls if call.outputs is not None)
    return any(labels.size and not used[classes[labels]].any() for labels in made)


def _idle(model: nn.Module, flow: Flow) -> list[str]:
    """Return the modules none of whose parameters took part in the run."""
    held = {name: [p for p in m._parameters.values() if p is not None] for name, m in modules_of(model).items()}
    return [name for name, parameters in held.items() if parameters and not any(map(flow.took_part, parameters))]
