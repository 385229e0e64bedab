"""One run of a network under a dispatch mode, in which labels flow through every operator."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_registry
from torch.nn.parameter import is_lazy

from secateur.errors import TraceError
from secateur.network.custom_layers import layer_rule
from secateur.network.inputs import arguments, leaves_of, mapped, tensors_of
from secateur.network.isolation import left_as_found
from secateur.network.modes import OperatorMode
from secateur.network.named import modules_of, tensors_in, tensors_named
from secateur.network.writes import Written, targets
from secateur.tracing.assumptions import Assumptions
from secateur.tracing.call import Call
from secateur.tracing.findings import Findings
from secateur.tracing.functions import FunctionMode
from secateur.tracing.keeping import keep_numbers, keep_returned, without_elements
from secateur.tracing.numbers import told_apart
from secateur.tracing.program import Program
from secateur.tracing.rules.pointwise import POINTWISE, is_pointwise
from secateur.tracing.rules.registry import RULES
from secateur.tracing.shuffles.rule import carry_grids
from secateur.tracing.tensor_labels import TensorLabels

_RESHAPING = ("aten::squeeze_", "aten::unsqueeze_", "aten::as_strided_", "aten::as_strided")
"""Operators whose rule has to know the shape that their input had before."""
_COMPARED_BY_PYTORCH = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Layers whose numbers PyTorch itself compares, which follow by rules."""
_LAYERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU,
    nn.Embedding,
)  # fmt: skip
"""Layers whose attributes follow their weights, whatever else they are equal to."""
_WIDTHS = (
    "embedding_dim", "in_channels", "in_features", "num_channels", "num_embeddings", "num_features", "num_parameters",
    "out_channels", "out_features",
)  # fmt: skip
"""Their attributes that count channels, and that no forward of PyTorch's own reads."""
_MODE_ALONE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Layers of which train mode runs no others: they stay in eval mode, so that nothing is drawn and no moment moves."""


@dataclass(frozen=True)
class Recording:
    """One run of a network."""

    labels: TensorLabels
    found: Findings
    program: Program
    """Its operator calls."""
    notes: tuple[str, ...]
    """What was noticed: layers that never run, and the like."""
    written: Written
    """What the code wrote into, which has its values again."""
    types: dict[str, str]
    """Class name of every module."""
    kernels: tuple[str, ...]
    """Names of the convolution and linear layers."""


def record(
    model: nn.Module,
    example_inputs: Any,
    assumptions: Assumptions,
    *,
    light: Program | None = None,
    plain: bool = False,
) -> Recording:
    """Let labels flow through one forward in eval mode, and one in train mode where that may run or return more.

    Args:
        model: The network; left as found.
        example_inputs: What to run it on.
        assumptions: What to assume of the user's code.
        light: Given to note a run without what layers compute.
        plain: Whether numbers of modules stay plain, of which code then can't be seen to give which.

    Raises:
        TraceError: If the model fails on the example inputs.
    """
    modules = modules_of(model)
    lazy = [n for n, m in modules.items() if any(is_lazy(p) for p in m._parameters.values() if p is not None)]
    if lazy:
        raise TraceError(f"trace: {lazy[0]} is a lazy layer, whose shape is not known yet: run the network once.")
    labels = TensorLabels(tensors_named(model))
    written = Written(labels.named)
    run = _Run(model, modules, Call(labels, Findings(), assumptions), light or Program(), light is not None, written)
    notes: list[str] = []
    with left_as_found(model), _put_back(written):
        _evaluate(model)
        run(example_inputs, plain=plain)
        if run.idle() or run.unread() or run.dropped():
            model.train()
            for module in modules_of(model).values():
                if isinstance(module, _MODE_ALONE):
                    module.eval()
            calls = len(run.found.layers)
            try:
                run(example_inputs, plain=plain)
            except TraceError as error:
                notes.append(f"in train mode {error}")
            # Costs are those of inference.
            del run.found.layers[calls:]
        keep_numbers(labels, run.found)
        notes.extend(_scripted(modules))
        notes.extend(f"{name}: never runs, so it is left as it is" for name in run.idle())
    notes.extend(without_elements(labels, run.found))
    if not run.found.layers:
        notes.append("no convolution or linear layer with a weight of its own was seen; quantize after pruning")
    types = {name: type(module).__name__ for name, module in modules.items()}
    kernels = tuple(n for n, m in modules.items() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)))
    return Recording(labels, run.found, run.program, tuple(notes), written, types, kernels)


def _scripted(modules: Mapping[str, nn.Module]) -> list[str]:
    """Note the outermost modules that are programs of TorchScript."""
    scripted = {name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)}
    return [
        f"{name or 'the network'}: is compiled by TorchScript, whose copies run with whole weights; prune what it was "
        "made of"
        for name in sorted(scripted)
        if not name or name.rpartition(".")[0] not in scripted
    ]


@contextmanager
def _put_back(written: Written) -> Iterator[None]:
    try:
        yield
    finally:
        written.put_back()


def _evaluate(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError as error:  # a program that torch.export made is of one mode for good
        raise TraceError(
            f"trace: the model can't be put into eval mode: {str(error).rstrip('.')}. Trace what it was made of."
        ) from error


class _LabelMode(OperatorMode):  # type: ignore[no-untyped-call]
    """Runs every operator, then lets the labels flow by its rule, and notes the call in the program.

    With ``light``, of operators that take long only the shapes of what they make are right.
    """

    def __init__(self, call: Call, program: Program, light: bool, written: Written, functions: FunctionMode) -> None:
        super().__init__()
        self.call, self.program, self.light, self.written, self.functions = call, program, light, written, functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self.call
        name, text, writes, elementwise = _known(func)
        if writes:
            self.written.before(func, args, kwargs)
        if self.functions.paused:
            return func(*args, **kwargs)
        rule = RULES.get(name) or (POINTWISE if elementwise else None)
        if rule is None:
            # In inference mode an operator made of others arrives whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        call.ordinal += 1
        call.operator = text
        call.shape_before = tuple(args[0].shape) if name in _RESHAPING else ()
        call.stride_before = args[0].stride() if name in _RESHAPING else ()
        call.out = out = self.program.shaped(func, args, kwargs) if self.light else func(*args, **kwargs)
        call.operands = tensors_in((*args, *kwargs.values()) if kwargs else args)
        if rule is not None:
            rule(call, args, kwargs)
        else:
            for tensor in call.operands:
                call.freeze_tensor(tensor, "no rule says how channels flow through this operator")
            for tensor in tensors_in((out,)):
                call.give(tensor, {}, weight=False)
        if call.grids:
            carry_grids(call, name, args)
        if call.grid is not None:
            call.labels.put_grid(out, call.grid)
            call.grid, call.grids = None, True
        call.operands, call.out = (), None
        self.program.note(call.labels, name, args, kwargs, out)
        return out


@functools.lru_cache(maxsize=4096)
def _known(func: Any) -> tuple[str, str, bool, bool]:
    """Return the name of an operator that its rule has, the one shown, whether it writes, and is element-wise."""
    return func._schema.name, str(func), bool(targets(func)), is_pointwise(func)


class _Run:
    """Forwards of a network, one after another, whose labels and findings come together."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        call: Call,
        program: Program,
        light: bool,
        written: Written,
    ) -> None:
        self.model, self.modules, self.call, self.program = model, modules, call, program
        self.found = call.found
        self.functions = FunctionMode(call)
        self.labelling = _LabelMode(call, program, light, written, self.functions)

    def __call__(self, example_inputs: Any, *, plain: bool) -> None:
        """Run the network once.

        Raises:
            TraceError: If it fails.
        """
        call = self.call
        self.modules = modules_of(self.model)  # whose mode may have been set meanwhile
        positional, keyword = arguments(mapped(example_inputs, lambda t: t.clone()))
        self.program.begin(tensors_of((positional, keyword)))
        try:
            with self._numbers(plain), self._module_paths(), self.functions, self.labelling:
                # Taken out here, as what an iterator yields may be computed only now.
                returned = list(leaves_of(self.model(*positional, **keyword), {}))
        except Exception as error:
            where = f" in {call.module}" if call.module else ""
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            # A tuple is positional arguments, and one of numbers alone was mostly meant as a shape.
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of((positional, keyword)))
            of = f" of shape {shapes}" if shapes else ""
            shape = not keyword and len(positional) > 1 and all(isinstance(value, int) for value in positional)
            remedy = "Check their shapes, types and device."
            raise TraceError(
                f"trace: the model fails on the example inputs{of}{where}: {type(error).__name__}: {text.rstrip('.')}. "
                + (f"For a shape, give torch.randn{tuple(positional)}." if shape else remedy)
            ) from error
        call.operator, call.module = "model output", ""
        keep_returned(call, returned)
        self.program.end(call.labels, (leaf for leaf in returned if isinstance(leaf, Tensor)))

    @contextmanager
    def _numbers(self, plain: bool) -> Iterator[None]:
        """Have the numbers that modules hold told apart; of layers, those that count channels and follow by rules."""
        modules = {} if plain else self.modules
        layers = {path: module for path, module in modules.items() if isinstance(module, _LAYERS)}
        others = {p: m for p, m in modules.items() if p not in layers and not isinstance(m, _COMPARED_BY_PYTORCH)}
        token, found = self.call.labels.token, self.found
        with told_apart(others, token, found.numbers), told_apart(layers, token, found.widths, _WIDTHS):
            yield

    @contextmanager
    def _module_paths(self) -> Iterator[None]:
        """Keep the call told which module's forward is running."""
        call, functions = self.call, self.functions
        names = {id(module): name for name, module in self.modules.items()}
        stack: list[tuple[str, nn.Module | None, bool]] = [("", None, True)]
        here = get_ident()  # the hooks are of all modules that run, in whatever thread
        paused = 0
        fused = ExitStack()

        def enter(module: nn.Module, args: Any) -> None:
            nonlocal paused
            if get_ident() != here:
                return
            stack.append((names.get(id(module), stack[-1][0]), module, id(module) in names))
            call.module, call.layer, call.registered = stack[-1]
            if isinstance(module, nn.RNNBase):
                fused.enter_context(_plain_kernels())
            if isinstance(module, nn.MultiheadAttention):
                with torch._C.DisableTorchFunction():  # what is asked here is not asked by the code
                    _keep_embedding(call, module, args)
            paused += layer_rule(module) is not None
            functions.paused = paused > 0

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal paused
            if get_ident() != here:
                return
            if isinstance(module, nn.RNNBase):
                fused.close()
            rule = layer_rule(module)
            if rule is not None:
                paused -= 1
                functions.paused = paused > 0
                if not paused:
                    call.operator = type(module).__name__
                    rule.flow(call, module, args, out)
            stack.pop()
            call.module, call.layer, call.registered = stack[-1]

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

    def idle(self) -> list[str]:
        """Return the modules none of whose parameters took part in the runs."""
        took_part = self.call.labels.took_part
        held = {name: [p for p in m._parameters.values() if p is not None] for name, m in self.modules.items()}
        return [name for name, parameters in held.items() if parameters and not any(map(took_part, parameters))]

    def unread(self) -> bool:
        """Tell whether a module has a parameter, or a buffer of its own kind, that took no part in the runs."""
        for module in self.modules.values():
            if not isinstance(module, nn.modules.batchnorm._NormBase):  # it counts batches
                own = (*module._parameters.values(), *module._buffers.values())
                if any(t is not None and t.ndim and not self.call.labels.took_part(t) for t in own):
                    return True
        return False

    def dropped(self) -> bool:
        """Tell whether nothing reads or returns what some layer makes: a head whose outputs are for train mode, say."""
        classes = self.call.labels.store.classes()
        used = self.found.used(classes)
        made = (layer.outputs.reshape(-1) for layer in self.found.layers if layer.outputs is not None)
        return any(labels.size and not used[classes[labels]].any() for labels in made)


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


def _keep_embedding(call: Call, attention: nn.MultiheadAttention, inputs: Any) -> None:
    """Keep what PyTorch's attention reads and makes: it holds the numbers, and checks them."""
    call.operator = type(attention).__name__
    for tensor in (*attention.parameters(), *tensors_in(inputs)):
        axes = call.axes(tensor)
        for dim in axes if isinstance(tensor, nn.Parameter) else axes.keys() & {tensor.ndim - 1}:
            call.freeze(axes[dim], "its embedding dimension is a number that it checks")
