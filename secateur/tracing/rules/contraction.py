"""Rules for convolution and matrix products: channels are read, and new ones made."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.graph.channels import Magnitude
from secateur.tracing.findings import Call
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Axes, Labels
from secateur.tracing.rules.registry import rule

_UNKNOWN = "is read together with values that are no known channels"


def _read(flow: Flow, given: Labels | None, wanted: Labels | None) -> None:
    """Join the channels that a layer is given with those that its weight reads."""
    if wanted is None:
        if given is not None:
            flow.freeze(given, _UNKNOWN)
        return
    flow.consumed.append(wanted)
    if given is None:
        flow.freeze(wanted, _UNKNOWN)
    else:
        flow.store.join(given, wanted)


def _make(flow: Flow, made: Labels | None, bias: Tensor | None) -> None:
    """Note that a layer makes channels, one for each label, and adds its bias to them."""
    if made is None:
        return
    flow.produced.append(made)
    _follow(flow, made, bias)


def _follow(flow: Flow, made: Labels, vector: Tensor | None) -> None:
    """Join the labels of a one-dimensional tensor, one value a channel."""
    if vector is None:
        return
    own = flow.axes(vector).get(0)
    if own is not None:
        flow.store.join(made, own)
    elif vector.shape[0] > 1:
        flow.freeze(made, "takes one value a channel from a tensor that is no parameter")


@rule("aten::convolution", "aten::_convolution")
def convolution(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Read the input's channels along the weight's second dimension, make one for each of its first.

    Transposed, the two dimensions change places. A grouped convolution reads and makes its channels in blocks, which
    must all keep the same number; a depthwise one has a channel a block, and passes each on.
    """
    x, weight, bias = args[:3]
    transposed, groups = args[6], args[8]
    inputs = flow.axes(x)
    flow.freeze_tensor(x, "is convolved over as if it were space", range(2, x.ndim))
    given = inputs.get(1)
    passed = {0: inputs[0]} if 0 in inputs else {}
    if not flow.is_weight(weight):
        flow.freeze_tensor(x, "is convolved with a computed kernel", [1])
        flow.freeze_tensor(weight, "is a computed kernel")
        flow.set(out, passed)
        return
    own = flow.axes(weight)
    made = own.get(1 if transposed else 0)
    wanted = own.get(0 if transposed else 1)
    in_channels, out_channels = x.shape[1], out.shape[1]
    if groups == 1:
        _read(flow, given, wanted)
        _make(flow, made, bias)
    elif groups == in_channels and (not transposed or groups == out_channels):
        made = own.get(0)
        if made is not None and given is not None:
            flow.store.join(given[:, None], made.reshape(groups, -1))
        elif made is not None:
            flow.produced.append(made)
            flow.freeze(made, _UNKNOWN)
        if made is not None:
            _follow(flow, made, bias)
        if given is not None and not isinstance(flow.layer, nn.modules.conv._ConvNd):
            for name in flow.counts(groups):
                flow.count(name, given)
    else:
        given, made = _grouped(flow, weight, given, out_channels, in_channels, groups, transposed)
        _make(flow, made, bias)
    flow.calls.append(
        Call(
            flow.module,
            "conv_transposed" if transposed else "conv",
            weight_name(flow, weight),
            _owns(flow, weight, nn.modules.conv._ConvNd),
            given,
            made,
            in_channels,
            out_channels,
            groups,
            kernel=prod(weight.shape[2:]),
            positions=prod((x if transposed else out).shape[2:]) * out.shape[0],
            batch=out.shape[0],
            parts=_parts(flow, weight, nn.modules.conv._ConvNd),
        )
    )
    flow.set(out, passed | ({1: made} if made is not None else {}))


@rule("aten::_weight_norm_interface")
def weight_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: tuple[Tensor, Tensor]) -> None:
    """Make the weight g·v/‖v‖, one norm for each index of a dimension: its channels are those of v.

    Where channels go along the other dimensions, ‖v‖ changes and the weight with it, unless g follows.
    """
    v, g = args[:2]
    dim = args[2] if len(args) > 2 else 0
    axes = flow.combine([v, g], v.shape)
    if flow.name(v) and flow.name(g):
        flow.magnitudes[Magnitude(flow.name(g), flow.name(v), dim)] = None
    else:
        flow.without(axes, set(axes) - {dim}, "takes a norm")
    computed = flow.is_weight(v) and flow.is_weight(g)
    flow.set(out[0], axes, weight=computed)
    flow.set(out[1], {d: labels for d, labels in axes.items() if d == dim}, weight=computed)


def _grouped(
    flow: Flow,
    weight: Tensor,
    given: Labels | None,
    out_channels: int,
    in_channels: int,
    groups: int,
    transposed: bool,
) -> tuple[Labels | None, Labels | None]:
    """Join the channels of a grouped convolution; its blocks may lose different indices, but equally many."""
    own = flow.axes(weight)
    full = own.get(0)
    half = flow.virtual(weight, out_channels if transposed else in_channels, groups)
    if half is None:
        local = own.get(1)
        size = weight.shape[1]
        one = local if local is not None else flow.fixed(size, _UNKNOWN)
        half = np.tile(one, groups)
    wanted, made = (full, half) if transposed else (half, full)
    _read(flow, given, wanted)
    for labels in (wanted, made):
        if labels is not None:
            flow.share(np.split(labels, groups), f"a convolution in {groups} groups keeps as many channels in each")
    return given, made


@rule("aten::addmm")
def addmm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Apply the rule of ``mm``; the first argument is the bias."""
    _product(flow, args[1], args[2], args[0], out)


@rule("aten::mm", "aten::bmm", "aten::mv", "aten::dot")
def mm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Read the channels along the contracted dimension, make one for each column of the weight."""
    _product(flow, args[0], args[1], None, out)


@rule("aten::baddbmm", "aten::addbmm", "aten::addmv")
def baddbmm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Multiply, then add the first argument element by element."""
    if args[1].ndim == 3 and out.ndim == 2:
        flow.freeze_tensor(args[1], "is summed over a batch of products")
        flow.freeze_tensor(args[2], "is summed over a batch of products")
    else:
        _product(flow, args[1], args[2], None, out)
    flow.set(out, flow.combine([args[0], out], out.shape))


@rule("aten::linear")
def linear(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Read the channels of the last dimension, make one for each row of the weight."""
    x, weight = args[:2]
    axes = flow.axes(weight)
    bias = args[2] if len(args) > 2 else None
    _weighted(flow, x, x.ndim - 1, weight, axes.get(1), axes.get(0), bias, out, out.ndim - 1)


def _product(flow: Flow, left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> None:
    inner_left, inner_right = left.ndim - 1, max(right.ndim - 2, 0)
    outer = max(left.ndim - 2, 0)
    a, b = flow.axes(left), flow.axes(right)
    if not a and not b:
        return
    if flow.is_weight(right) and not flow.is_weight(left):
        made = b.get(right.ndim - 1) if right.ndim > 1 else None
        _weighted(flow, left, inner_left, right, b.get(inner_right), made, bias, out, out.ndim - 1)
    elif flow.is_weight(left) and not flow.is_weight(right):
        made = a.get(outer) if left.ndim > 1 else None
        _weighted(flow, right, inner_right, left, a.get(inner_left), made, bias, out, left.ndim - 2)
    else:
        flow.set(out, product_axes(flow, left, right, out.ndim), weight=flow.is_weight(left))
        if bias is not None:
            flow.set(out, flow.combine([bias, out], out.shape))


def _weighted(
    flow: Flow,
    x: Tensor,
    inner: int,
    weight: Tensor,
    wanted: Labels | None,
    made: Labels | None,
    bias: Tensor | None,
    out: Tensor,
    outer: int,
) -> None:
    """Multiply an activation with a weight: contract ``inner`` of ``x``, make dimension ``outer`` of ``out``."""
    axes = flow.axes(x)
    given = axes.get(inner)
    if given is not None or wanted is not None:
        _read(flow, given, wanted)
    result = {dim: labels for dim, labels in axes.items() if dim != inner}
    if weight.ndim == 3:
        batch = flow.axes(weight).get(0)
        if 0 in axes and batch is not None:
            flow.store.join(axes[0], batch)
        elif 0 in axes or batch is not None:
            for tensor in (x, weight):
                flow.freeze_tensor(tensor, _UNKNOWN, [0])
    if made is not None:
        flow.produced.append(made)
        result[outer] = made
        if bias is not None:
            own = flow.axes(bias).get(bias.ndim - 1)
            if own is not None and bias.shape[-1] == made.size:
                flow.store.join(made, own)
            elif bias.shape[-1] > 1:
                flow.freeze(made, "takes one value a channel from a tensor that is no parameter")
    positions = out.numel() // out.shape[outer] if out.ndim else 1
    flow.calls.append(
        Call(
            flow.module,
            "linear",
            weight_name(flow, weight),
            _owns(flow, weight, nn.Linear),
            given,
            made,
            x.shape[inner],
            out.shape[outer] if out.ndim else 1,
            positions=positions,
            batch=positions,
            parts=_parts(flow, weight, nn.Linear),
        )
    )
    flow.set(out, result)


@rule("aten::mkldnn_rnn_layer")
def recurrent_layer(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Sequence[Tensor]) -> None:
    """Read the features of every step; the layer's state is kept whole, and so are the steps."""
    x, inner, outer = args[:3]
    axes, weight = flow.axes(x), flow.axes(inner)
    given, wanted = axes.get(x.ndim - 1), weight.get(1)
    if given is not None or wanted is not None:
        _read(flow, given, wanted)
    flow.freeze_tensor(x, "are the steps of a recurrent layer", range(x.ndim - 1))
    flow.freeze_tensor(inner, "counts the state of a recurrent layer", [0])
    for tensor in args[2:7]:
        flow.freeze_tensor(tensor, "counts the state of a recurrent layer")
    positions = x.numel() // x.shape[-1]
    for tensor, labels in ((inner, given), (outer, None)):
        rows, columns = tensor.shape
        name = weight_name(flow, tensor)
        made = flow.axes(tensor).get(0)
        if made is not None:
            flow.produced.append(made)
        flow.calls.append(
            Call(flow.module, "linear", name, False, labels, made, columns, rows, positions=positions, batch=positions)
        )
    for tensor in out:
        flow.set(tensor, {})


def _owns(flow: Flow, weight: Tensor, kind: type[nn.Module]) -> bool:
    """Tell whether a weight is that of the layer at work, so that what the layer is given is what the weight reads."""
    name = flow.name(weight)
    return isinstance(flow.layer, kind) and name in ("", f"{flow.module}.weight".lstrip("."))


def _parts(flow: Flow, weight: Tensor, kind: type[nn.Module]) -> tuple[str, ...]:
    """Return what a weight is computed from, where code calls the function without a layer of its own."""
    axes = list(flow.axes(weight).values())
    if not axes or _owns(flow, weight, kind):
        return ()
    found = flow.store.homes_of(axes, mixed=True)
    return tuple(dict.fromkeys(home.tensor for home in found))


def weight_name(flow: Flow, weight: Tensor) -> str:
    """Return the name of the parameter that a weight is, or is a view of."""
    name = flow.name(weight)
    if name:
        return name
    for labels in flow.axes(weight).values():
        home = flow.store.home(int(labels[0]))
        if home is not None:
            return home.tensor
    return ""


def product_axes(flow: Flow, left: Tensor, right: Tensor, ndim: int) -> Axes:
    """Multiply two activations: batch dimensions join, the contracted one is kept whole."""
    a, b = flow.axes(left), flow.axes(right)
    inner_left, inner_right = left.ndim - 1, max(right.ndim - 2, 0)
    reason = "is contracted with another activation"
    if inner_left in a:
        flow.freeze(a[inner_left], reason)
    if inner_right in b:
        flow.freeze(b[inner_right], reason)
    result: Axes = {}
    for dim in range(ndim - 2):
        result |= join_dim(flow, a.get(dim), b.get(dim), left.shape[dim], right.shape[dim], dim)
    if left.ndim > 1 and left.ndim - 2 in a and ndim >= left.ndim - 1:
        result[left.ndim - 2] = a[left.ndim - 2]
    if right.ndim > 1 and right.ndim - 1 in b:
        result[ndim - 1] = b[right.ndim - 1]
    return result


def join_dim(flow: Flow, a: Labels | None, b: Labels | None, size_a: int, size_b: int, dim: int) -> Axes:
    """Join the labels of one dimension that two tensors share, by broadcasting."""
    if a is not None and b is not None:
        flow.store.join(a, b)
        return {dim: a}
    one, other = (a, size_b) if a is not None else (b, size_a)
    if one is None:
        return {}
    if other > 1:
        flow.freeze(one, _UNKNOWN)
    return {dim: one}


@rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::scaled_dot_product_attention",
)
def attention(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Join the heads of query, key and value; keep the head's own dimension and the tokens whole."""
    result = out[0] if isinstance(out, (tuple, list)) else out
    query, key, value = args[:3]
    for tensor in (query, key):
        flow.freeze_tensor(tensor, "is contracted between query and key", [tensor.ndim - 1])
    for tensor in (key, value):
        flow.freeze_tensor(tensor, "is attended over", [tensor.ndim - 2])
    axes: Axes = {}
    for dim in range(query.ndim - 2):
        size = query.shape[dim]
        joined: Axes = join_dim(flow, flow.axes(query).get(dim), flow.axes(key).get(dim), size, key.shape[dim], dim)
        axes |= join_dim(flow, joined.get(dim), flow.axes(value).get(dim), size, value.shape[dim], dim)
    tokens = flow.axes(query).get(query.ndim - 2)
    if tokens is not None:
        axes[query.ndim - 2] = tokens
    made = flow.axes(value).get(value.ndim - 1)
    if made is not None:
        axes[value.ndim - 1] = made
    flow.set(result, axes)
    if isinstance(out, (tuple, list)) and len(out) > 1 and out[1].shape == result.shape[:-1]:
        # The logarithm of the sum over what is attended to, one for each query.
        flow.set(out[1], {dim: labels for dim, labels in axes.items() if dim < result.ndim - 1})


@rule("aten::embedding")
def embedding(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Make one channel for each column of the table; its rows are kept."""
    weight, indices = args[:2]
    flow.freeze_tensor(weight, "is looked up by index", [0])
    flow.freeze_tensor(indices, "is used as an index")
    made = flow.axes(weight).get(1)
    if made is not None:
        flow.produced.append(made)
        flow.set(out, {out.ndim - 1: made})


@rule("torchvision::deform_conv2d")
def deform_conv2d(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Read and make channels as a convolution does; offsets and masks are counted by kernel position, and kept."""
    x, weight, offset, mask, bias = args[:5]
    groups, offset_groups = args[11:13]
    flow.freeze_tensor(offset, "gives the positions of a kernel")
    flow.freeze_tensor(mask, "weighs the positions of a kernel")
    own = flow.axes(weight)
    if groups != 1 or offset_groups != 1 or not flow.is_weight(weight):
        for tensor in (x, weight):
            flow.freeze_tensor(tensor, "is convolved in groups at deformed positions")
        return
    flow.freeze_tensor(x, "is convolved over as if it were space", [2, 3])
    made = own.get(0)
    _read(flow, flow.axes(x).get(1), own.get(1))
    _make(flow, made, bias)
    flow.calls.append(
        Call(
            flow.module,
            "conv",
            weight_name(flow, weight),
            False,
            flow.axes(x).get(1),
            made,
            x.shape[1],
            out.shape[1],
            kernel=prod(weight.shape[2:]),
            positions=prod(out.shape[2:]) * out.shape[0],
            batch=out.shape[0],
        )
    )
    if made is not None:
        flow.set(out, {1: made})
