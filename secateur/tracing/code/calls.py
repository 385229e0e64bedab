"""Which calls of the user's code can't depend on the number of channels, and which may: those call for a trial.

Operators alone don't tell how their arguments came about: ``x.view(-1, 512)`` and ``x.flatten(1)`` are one and the same
view. What tells is the function that the code called, its arguments, and whether the code read a size of a tensor
with channels. Functions that take no size at all, such as ``cat`` or ``flatten``, follow whatever is left of the
channels. Anything not known to do so is a doubt, and a graph in doubt is handed out only after a trial pruning.
"""

from __future__ import annotations

import dis
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.network.named import modules_of, tensors_in
from secateur.tracing.code.reachable import Reached, computes_names, is_users_module, names_in
from secateur.tracing.findings import Cause
from secateur.tracing.flow import COUNTS, LAYERS, VIEWS, Flow, ValueNeeded
from secateur.tracing.labels import Labels
from secateur.tracing.numbers import Counted, Named, counted, counts_unseen, plain, used
from secateur.tracing.rules.pointwise import batch_norm
from secateur.tracing.source_lines import shown, sizes_given

_FREE = """
    relu relu_ relu6 gelu silu silu_ mish hardswish hardsigmoid hardtanh sigmoid sigmoid_ logsigmoid tanh tanh_ elu
    selu celu leaky_relu softplus softsign threshold clamp clip exp log sqrt rsqrt square abs neg pow
    add add_ sub mul mul_ div __radd__ __rmul__ __rsub__ __rdiv__ where maximum minimum
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout

    linear batch_norm instance_norm local_response_norm normalize norm matmul bmm __matmul__
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d pixel_shuffle pixel_unshuffle

    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate

    cat concat permute transpose flatten squeeze unsqueeze contiguous mean sum amax amin softmax log_softmax

    zeros_like ones_like prelu addcmul addcdiv lerp stack

    dim is_floating_point is_contiguous to float half double type_as detach clone _assert
"""
"""Functions of which no argument is a number of channels: of single values, layers, positions, whole dimensions."""
_HOMES = (torch, torch.Tensor, F, torch._C._nn)
_TRUSTED = {
    function for name in _FREE.split() for home in _HOMES if (function := getattr(home, name, None)) is not None
}
_TRUSTED |= {
    getattr(torch.Tensor, name).__get__
    for name in ("ndim", "dtype", "device", "is_cuda", "requires_grad", "layout", "is_quantized")
}
_SHAPES = {torch.Tensor.size, torch.Tensor.shape.__get__}  # type: ignore[attr-defined]
_HANDED_OUT = "numpy tolist item __array__ __bool__ __int__ __float__ __index__ __contains__"
_NUMBERS = {
    torch.numel, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.stride, torch.Tensor.__len__,
    torch.Tensor.nbytes.__get__,  # type: ignore[attr-defined]
}  # fmt: skip
"""Functions that tell a number in which that of the channels is hidden."""
_READS = {getattr(torch.Tensor, name) for name in _HANDED_OUT.split()}
"""Functions that hand values out of tensors."""
_LEAVING = {getattr(torch.Tensor, name) for name in ("numpy", "tolist", "__array__", "__dlpack__")}
"""Functions that hand whole tensors out of PyTorch, where nothing sees what is done with their channels."""
_BATCH_NORMS = {
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
}
"""Functions that normalise by the batch -> names of their first arguments."""
_PADS = {F.pad, getattr(torch._C._nn, "pad", F.pad)}
_GROUP_NORMS = {F.group_norm, torch.group_norm}
_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip


_CALL = nn.Module._call_impl.__code__
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm.forward.__code__
MOST_FUNCTIONS = 200
"""Reading more functions than this would take longer than a trial."""
_PACKAGE = f"{__name__.partition('.')[0]}."
_COUNTING = "reads an attribute that counts channels"
_NONE: dict[int, Labels] = {}
_INDEXING = torch.Tensor.__getitem__
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


class Watch(TorchFunctionMode):
    """Sees every torch function that the model's code calls, and remembers the first not known to be safe."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self._base = sys._getframe(1).f_code
        self._seen: dict[int, types.CodeType] = {}
        """By identity, as a hash of code takes long."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flow = self.flow
        if func in _READS:
            flow.by_value = True
            if flow.spared:
                raise ValueNeeded
        outer, flow.called = flow.called, func
        assumed = len(flow.sites)
        arguments, flow.arguments = flow.arguments, (args, *kwargs.values())
        asked, flow.asked = flow.asked, _NONE
        if func in VIEWS:
            flow.asked = _asked(args)
        elif func is _INDEXING:
            flow.asked = _bounding(args[1], args[0].ndim)
        try:
            out = self._normed(func, args, kwargs) if func in _BATCH_NORMS else func(*args, **kwargs)
        finally:
            flow.called, flow.arguments, flow.asked = outer, arguments, asked
        if flow.paused:
            return out
        if func in _NUMBERS:
            for labels in flow.axes(args[0]).values():
                flow.measure(labels).taken = True
        if func in _LEAVING:
            flow.operator = func.__name__
            flow.freeze_tensor(args[0], "is handed out of PyTorch")
        if flow.doubt is None:
            self.look_at_callers()
            if not self._safe(func, args, kwargs, out, len(flow.sites) > assumed):
                flow.doubt = flow.cause(f"{getattr(func, '__name__', func)} may depend on the number of channels")
        return _told(flow, args, kwargs, out, sys._getframe(1)) if func in _SHAPES else out

    def _normed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Normalise by the batch: without elements PyTorch multiplies all channels by the first one's scale alone."""
        flow = self.flow
        given = _bound(_BATCH_NORMS[func], args, kwargs)
        if flow.paused or given["input"].numel():
            return func(*args, **kwargs)
        flow.paused += 1
        try:
            out = func(*args, **kwargs)
        finally:
            flow.paused -= 1
        flow.operator = "aten.batch_norm.default"
        batch_norm(flow, tuple(given[name] for name in _BATCH_NORMS[torch.batch_norm]), {}, out)
        return out

    def look_at_callers(self, *, of_module: bool = False) -> None:
        """Doubt where a function at work reads an attribute that counts channels, in a class or out of one.

        Looks at the functions up to the module at work, whose own callers were looked at when it was entered: with
        ``of_module``.
        """
        if self.flow.doubt is not None or self.flow.paused:
            return
        seen, base = self._seen, self._base
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and (code := frame.f_code) is not base:
            if code is _CALL:
                if not of_module:
                    return
                of_module = False
            elif id(code) not in seen:
                seen[id(code)] = code
                if not code.co_filename.startswith(_TORCH) and _counts(code, type(frame.f_locals.get("self"))):
                    self.flow.doubt = Cause("", self.flow.module, shown(code.co_filename, frame.f_lineno), _COUNTING)
            frame = frame.f_back

    def _safe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, assumes: bool) -> bool:
        flow = self.flow
        if func in _TRUSTED:
            return func not in _CONVOLUTIONS or _owns_groups(flow.layer, args, kwargs)
        if func in VIEWS and isinstance(out, Tensor):
            shape = sizes_given(args)
            # Where channels lie, the size is left open, so the sizes written out are of other dimensions.
            return all(
                len(shape) == out.ndim and type(shape[dim]) is int and shape[dim] == -1 for dim in flow.axes(out)
            )
        if not assumes and not any(flow.axes(t) for t in tensors_in((*args, *kwargs.values()))):
            return True
        if func in _SHAPES:
            caller = sys._getframe(2)
            if caller.f_code is _INSTANCE_NORM:  # it compares with its own count, which a cut sees to
                return True
            dim = plain(args[1] if len(args) > 1 else kwargs.get("dim"))
            read = {dim % args[0].ndim} if isinstance(dim, int) else used(caller, args[0].ndim)
            return read.isdisjoint(flow.axes(args[0]))
        if func in _PADS and isinstance(out, Tensor):
            padded = _bound(("input", "pad"), args, kwargs)
            return out.ndim - len(padded["pad"]) // 2 > max(flow.axes(padded["input"]), default=-1)
        if func is _INDEXING:
            return _whole(args[1], args[0].ndim).issuperset(flow.axes(args[0]))
        if func in _GROUP_NORMS:
            return isinstance(flow.layer, nn.GroupNorm) and len(args) > 1 and args[1] is flow.layer.num_groups
        if func is F.layer_norm:
            sizes = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
            return isinstance(flow.layer, nn.LayerNorm) and sizes is flow.layer.normalized_shape
        return False


def _asked(args: tuple[Any, ...]) -> dict[int, Labels]:
    """Return for a view the dimensions of its result whose sizes are numbers of channels, and these channels."""
    return {dim: size.labels for dim, size in enumerate(sizes_given(args)) if isinstance(size, Counted)}


def _bounding(index: Any, ndim: int) -> dict[int, Labels]:
    """Return for an index the dimensions, of those that are left, whose bounds are numbers of channels, and these."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(isinstance(b, Counted) for part in parts if isinstance(part, slice) for b in (part.start, part.stop)):
        return _NONE
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        parts[place : place + 1] = [slice(None)] * (ndim - taken)
    found: dict[int, Labels] = {}
    dim = 0
    for part in parts:
        for bound in (part.start, part.stop) if isinstance(part, slice) else ():
            if isinstance(bound, Counted):
                found[dim] = bound.labels
        dim += not isinstance(part, int)
    return found


def _told(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Any, caller: types.FrameType) -> Any:
    """Return the sizes that the code reads of a shape, so that they know of which channels they are the numbers."""
    axes = flow.axes(args[0])
    if not axes:
        return sizes
    unseen = counts_unseen(caller.f_code) and caller.f_code is not _INSTANCE_NORM

    def told(size: int, dim: int) -> int:
        if dim not in axes:
            return size
        measure = flow.measure(axes[dim])
        measure.taken = measure.computed = unseen
        return counted(size, axes[dim], measure)

    if isinstance(sizes, int):
        return told(sizes, plain(args[1] if len(args) > 1 else kwargs["dim"]) % args[0].ndim)
    return torch.Size([told(size, dim) for dim, size in enumerate(sizes)])


def _bound(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's first arguments by name, given by place or by keyword; None where not given."""
    return dict.fromkeys(names) | kwargs | dict(zip(names, args, strict=False))


def _whole(index: Any, ndim: int) -> set[int]:
    """Return the dimensions that an index leaves whole; none where it holds more than numbers, slices and dots."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(type(part) not in (int, Counted, Named, slice, type(Ellipsis)) for part in parts):
        return set()
    place = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts = parts if Ellipsis in parts else [*parts, Ellipsis]
    parts[place : place + 1] = [slice(None)] * (ndim - len(parts) + 1)
    return {dim for dim, part in enumerate(parts) if part == slice(None)}


def _owns_groups(layer: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether the number of groups of a convolution is that of its layer, which a cut sees to."""
    groups = int.__int__(args[6] if len(args) > 6 else kwargs.get("groups", 1))
    return groups == 1 or (isinstance(layer, nn.modules.conv._ConvNd) and groups == layer.groups)


def counting(functions: Sequence[Reached]) -> Cause | None:
    """Return a doubt where one of the functions that a forward may run reads an attribute which a cut changes."""
    for number, (function, kind) in enumerate(functions):
        code = function.__code__
        read = code.co_filename.startswith(_TORCH) or not _counts(code, kind)
        if number == MOST_FUNCTIONS or not read:
            reason = "is more code than is read" if read else _COUNTING
            return Cause("", kind.__name__, shown(code.co_filename, code.co_firstlineno), reason)
    return None


def naming(model: nn.Module, functions: Sequence[Reached]) -> Cause | None:
    """Return a doubt where a function names a module of the network by a global variable: a copy's does, too."""
    own = {id(module) for module in modules_of(model).values()}
    for function, kind in functions:
        code, space = function.__code__, function.__globals__
        for name in names_in(code):
            if name in space and id(space[name]) in own and name in _global(code):
                place = shown(code.co_filename, code.co_firstlineno)
                return Cause("", kind.__name__, place, f"names a module of the network by the global variable {name}")
    return None


def _global(code: types.CodeType) -> set[str]:
    """Return the global variables that code reads."""
    inside = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    found = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*map(_global, inside))


class Executed:
    """Sees every function that Python runs, where so many may run that reading them all finds what none runs."""

    def __init__(self) -> None:
        self._kinds: dict[int, tuple[types.CodeType, type, str]] = {}

    @property
    def at_hand(self) -> bool:
        """Whether no profiler is at work, of which there can be one."""
        return sys.getprofile() is None

    def __enter__(self) -> Executed:
        self.go_on()
        return self

    def __exit__(self, *error: object) -> None:
        self.rest()

    def go_on(self) -> None:
        """See what Python runs from here on."""
        sys.setprofile(self._see)

    def rest(self) -> None:
        """See nothing for a while: what runs is not the user's, and to be told of each call takes longer than it."""
        sys.setprofile(None)

    def _see(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call" and id(code := frame.f_code) not in self._kinds:
            self._kinds[id(code)] = code, type(frame.f_locals.get("self")), frame.f_globals.get("__name__", "")

    def counting(self) -> Cause | None:
        """Return a doubt where a function of the user's that ran reads an attribute which a cut changes."""
        for code, kind, module in self._kinds.values():
            own = module.startswith(_PACKAGE) and not module.startswith(f"{_PACKAGE}models.")
            if not own and code.co_filename != "<string>" and is_users_module(module) and _counts(code, kind):
                return Cause("", kind.__name__, shown(code.co_filename, code.co_firstlineno), _COUNTING)
        return None


def knows_its_mode(model: nn.Module, functions: Sequence[Reached]) -> bool:
    """Tell whether the functions that a forward may run can run other layers in train mode than in eval mode."""
    told = {"training"}
    for kind in {type(module) for module in modules_of(model).values()}:
        for switch in (kind.train, kind.eval):
            if switch not in (nn.Module.train, nn.Module.eval):
                told.update(step.argval for step in dis.get_instructions(switch) if step.opname == "STORE_ATTR")
    return len(functions) > MOST_FUNCTIONS or any(
        not told.isdisjoint(names_in(f.__code__)) or computes_names(f.__code__) for f, _ in functions
    )


def _counts(code: types.CodeType, kind: type) -> bool:
    """Tell whether code that may run as a method of ``kind`` reads an attribute that a cut changes."""
    named = set(COUNTS & names_in(code))
    # What these two hand on to their function is looked at when it is called.
    named -= {"groups"} if issubclass(kind, nn.modules.conv._ConvNd) else set()
    named -= {"normalized_shape"} if issubclass(kind, nn.LayerNorm) else set()
    if not named or issubclass(kind, LAYERS):
        return bool(named)
    # A module that is no layer itself keeps numbers of its own, which a cut leaves alone.
    return any(name in named and holder != "self" for holder, name in _read(code))


def _read(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """Yield every attribute that code reads, and the variable that it reads it from (empty for an expression)."""
    holder = ""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield holder, str(step.argval)
        holder = str(step.argval) if step.opname in ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_DEREF") else ""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _read(constant)
