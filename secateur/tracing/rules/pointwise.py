"""Rules for element-wise operators, and for norms that hold one value a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.network.named import tensors_in
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Axes
from secateur.tracing.rules.registry import rule


@rule(
    "aten::clone",
    "aten::detach",
    "aten::detach_",
    "aten::alias",
    "aten::contiguous",
    "aten::_to_copy",
    "aten::to",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::zeros_like",
    "aten::ones_like",
    "aten::full_like",
    "aten::empty_like",
    "aten::rand_like",
    "aten::randn_like",
    "aten::bernoulli",
    "aten::bernoulli_",
    "aten::native_dropout",
    "aten::feature_dropout",
    "aten::dropout",
    "aten::fill_",
    "aten::zero_",
    "aten::normal_",
    "aten::uniform_",
    "aten::random_",
    "aten::exponential_",
    "aten::masked_fill",
    "aten::masked_fill_",
    "aten::where",
    "aten::_prelu_kernel",
    "aten::prelu",
    "aten::rrelu_with_noise",
    "aten::rrelu_with_noise_functional",
    "aten::celu_",
    "aten::_fused_dropout",
    "aten::floor_divide",
    "aten::bitwise_and",
    "aten::isfinite",
    "aten::isnan",
    "aten::nan_to_num",
    "aten::hardswish_",
    "aten::hardswish",
    "aten::hardsigmoid_",
    "aten::hardtanh_",
    "aten::relu6_",
    "aten::leaky_relu_",
    "aten::elu_",
    "aten::silu_",
    "aten::mish_",
    "aten::gelu_",
    "aten::glu_jvp",
    "aten::log_sigmoid_forward",
    "aten::lerp_",
    "aten::addcmul_",
    "aten::addcdiv_",
    "aten::clamp_",
    "aten::floor_divide_",
    "aten::view_as_real_copy",
)
def pointwise(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Join the channels of all operands, index by index; the result carries them on."""
    operands = tensors_in((*args, *kwargs.values()))
    if not any(flow.axes(t) for t in operands):
        return
    results = tensors_in((out,))
    weight = all(flow.is_weight(t) or t.ndim == 0 for t in operands)
    for result in results:
        flow.set(result, flow.combine([t for t in operands if t.ndim <= result.ndim], result.shape), weight=weight)


@rule("aten::copy_")
def copy_(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Write one tensor into another: the written channels become the target's own."""
    target, source = args[:2]
    axes, own = flow.combine([source], target.shape), flow.axes(target)
    for dim, labels in axes.items():
        if dim in own:
            flow.store.join(own[dim], labels)
        elif target._base is not None or flow.name(target):
            flow.freeze(labels, "is written into a part of a tensor that has no known channels")
    for dim, labels in own.items():
        if (
            dim not in axes
            and source.ndim
            and source.shape[dim - target.ndim] > 1
            and source.ndim > target.ndim - 1 - dim
        ):
            flow.freeze(labels, "is overwritten by values that are no known channels")
    flow.set(out, own or axes)


@rule(
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_batch_norm_no_update",
    "aten::_batch_norm_with_update",
    "aten::_batch_norm_with_update_functional",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::batch_norm",
)
def batch_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Normalise each channel by its own mean and variance: weight, bias and statistics follow the channel."""
    x = args[0]
    axes = dict(flow.axes(x))
    for dim in [d for d in axes if d > 1]:
        if flow.is_weight(x):
            flow.mark_inexact(axes[dim], "standardises a weight over the channels that it reads")
        else:
            flow.freeze(axes.pop(dim), "is normalised over as if it were space")
    vectors = [t for t in args[1:5] if isinstance(t, Tensor)]
    for vector in vectors:
        own = flow.axes(vector).get(0)
        if 1 in axes and own is not None:
            flow.store.join(axes[1], own)
        elif 1 in axes and vector.shape[0] > 1:
            flow.freeze(axes[1], "takes one value a channel from a tensor that is no parameter")
        elif own is not None:
            flow.freeze(own, "normalises values that are no known channels")
    result = out[0] if isinstance(out, (tuple, list)) else out
    if isinstance(flow.layer, nn.modules.batchnorm._NormBase) and 1 in axes:
        # Instance norm folds the batch into the channels.
        labels = axes[1][: flow.layer.num_features]
        flow.follow("num_features", labels)
    flow.set(result, axes, weight=flow.is_weight(x))


@rule("aten::native_layer_norm", "aten::layer_norm", "aten::rms_norm", "aten::_fused_rms_norm")
def layer_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Normalise over the last dimensions: a channel among them takes part in every other's result."""
    x, shape = args[0], args[1]
    result = out[0] if isinstance(out, (tuple, list)) else out
    axes = flow.combine([x, *tensors_in(args[2:])], x.shape)
    for dim, labels in axes.items():
        if dim >= x.ndim - len(shape):
            flow.mark_inexact(labels, "normalises over the channels themselves")
            if len(shape) > 1:
                flow.freeze(labels, "is normalised together with space, over a shape that the layer fixes")
    if isinstance(flow.layer, (nn.LayerNorm, nn.RMSNorm)):
        _count(flow, "normalized_shape", axes, x.ndim - 1)
    flow.set(result, axes, weight=flow.is_weight(x))


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Normalise over blocks of channels: whole blocks can go exactly, where their number is the layer's to change."""
    x, weight, bias = args[:3]
    blocks = args[6] if len(args) > 6 else args[1]
    result = out[0] if isinstance(out, (tuple, list)) else out
    axes = dict(flow.axes(x))
    labels = axes.get(1)
    for dim in [d for d in axes if d > 1]:
        flow.freeze(axes.pop(dim), "is normalised over as if it were space")
    for vector in tensors_in([weight, bias]):
        own = flow.axes(vector).get(0)
        if labels is not None and own is not None:
            flow.store.join(labels, own)
        elif own is not None:
            flow.freeze(own, "normalises values that are no known channels")
    if labels is not None and blocks < x.shape[1]:
        if blocks == 1:
            flow.mark_inexact(labels, "normalises over the channels themselves")
        elif isinstance(flow.layer, nn.GroupNorm):
            flow.store.join(labels.reshape(blocks, -1)[:, :1], labels.reshape(blocks, -1))
            flow.follow("num_groups", labels.reshape(blocks, -1)[:, 0])
        else:
            flow.freeze(labels, "is normalised in blocks whose number the code fixes")
    elif labels is not None and isinstance(flow.layer, nn.GroupNorm):
        flow.follow("num_groups", labels)
    if isinstance(flow.layer, nn.GroupNorm):
        _count(flow, "num_channels", axes, 1)
    flow.set(result, axes)


def _count(flow: Flow, name: str, axes: Axes, dim: int) -> None:
    """Note that an attribute of the layer at work counts its channels."""
    labels = axes.get(dim)
    if labels is not None and hasattr(flow.layer, name):
        flow.follow(name, labels)


def is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Tell whether torch declares an operator as element-wise."""
    return torch.Tag.pointwise in func.tags
