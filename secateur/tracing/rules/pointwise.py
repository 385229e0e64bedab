"""Rules for element-wise operators, and for norms that hold one value a channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.network.named import tensors_in
from secateur.tracing.call import Call
from secateur.tracing.labels import Axes, Labels
from secateur.tracing.rules.registry import Rule, rule

_AS_SPACE = "is normalised over as if it were space"


def _join_operands(call: Call, *_: Any, **__: Any) -> Axes | list[Axes]:
    """Join the channels of all operands, index by index; the result carries them on."""
    if not any(call.axes(t) for t in call.operands):
        return {}
    results = tensors_in((call.out,))
    return [call.combine([t for t in call.operands if t.ndim <= out.ndim], out.shape) for out in results]


POINTWISE = Rule(_join_operands, keeps_weights=True)
"""The rule of every operator that PyTorch declares as element-wise."""
rule(
    "aten::clone", "aten::detach", "aten::detach_", "aten::alias", "aten::contiguous", "aten::_to_copy", "aten::to",
    "aten::lift_fresh", "aten::lift_fresh_copy", "aten::zeros_like", "aten::ones_like", "aten::full_like",
    "aten::empty_like", "aten::rand_like", "aten::randn_like", "aten::bernoulli", "aten::bernoulli_",
    "aten::native_dropout", "aten::feature_dropout", "aten::dropout", "aten::fill_", "aten::zero_", "aten::normal_",
    "aten::uniform_", "aten::random_", "aten::exponential_", "aten::masked_fill", "aten::masked_fill_", "aten::where",
    "aten::_prelu_kernel", "aten::prelu", "aten::rrelu_with_noise", "aten::rrelu_with_noise_functional", "aten::celu_",
    "aten::_fused_dropout", "aten::floor_divide", "aten::bitwise_and", "aten::isfinite", "aten::isnan",
    "aten::nan_to_num", "aten::hardswish_", "aten::hardswish", "aten::hardsigmoid_", "aten::hardtanh_",
    "aten::relu6_", "aten::leaky_relu_", "aten::elu_", "aten::silu_", "aten::mish_", "aten::gelu_", "aten::glu_jvp",
    "aten::log_sigmoid_forward", "aten::lerp_", "aten::addcmul_", "aten::addcdiv_", "aten::clamp_",
    "aten::floor_divide_", "aten::view_as_real_copy",
    keeps_weights=True,
)(_join_operands)  # fmt: skip


def is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Tell whether PyTorch declares an operator as element-wise."""
    return torch.Tag.pointwise in func.tags


@rule("aten::copy_")
def copy_(call: Call, target: Tensor, source: Tensor, *_: Any) -> Axes:
    """Write one tensor into another: the written channels become the target's own."""
    axes, own = call.combine([source], target.shape), call.axes(target)
    for dim, labels in axes.items():
        if dim in own:
            call.join(own[dim], labels)
        elif target._base is not None or call.labels.name(target):
            call.freeze(labels, "is written into a part of a tensor that has no known channels")
    for dim, labels in own.items():
        given = source.ndim > target.ndim - 1 - dim and source.shape[dim - target.ndim] > 1
        if dim not in axes and given:
            call.freeze(labels, "is overwritten by values that are no known channels")
    return own or axes


def _without_space(call: Call, x: Tensor) -> Axes:
    """Return the axes of batch and channels; what lies along space is kept."""
    call.freeze_tensor(x, _AS_SPACE, range(2, x.ndim))
    return {d: labels for d, labels in call.axes(x).items() if d < 2}


def _follow(call: Call, labels: Labels | None, vectors: Sequence[Tensor]) -> None:
    """Join channels with the parameters and buffers that hold one value for each."""
    for vector in vectors:
        own = call.axes(vector).get(0)
        if labels is not None and own is not None:
            call.join(labels, own)
        elif labels is not None and vector.shape[0] > 1:
            call.freeze(labels, "takes one value a channel from a tensor that is no parameter")
        elif own is not None:
            call.freeze(own, "normalises values that are no known channels")


def _count(call: Call, name: str, labels: Labels | None) -> None:
    """Let an attribute of the layer at work follow the number of its channels."""
    if labels is not None and hasattr(call.layer, name):
        call.follow(name, labels)


@rule(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_no_training",
    "aten::_batch_norm_no_update", "aten::_batch_norm_with_update", "aten::_batch_norm_with_update_functional",
    "aten::cudnn_batch_norm", "aten::miopen_batch_norm", "aten::batch_norm",
    keeps_weights=True,
)  # fmt: skip
def batch_norm(call: Call, x: Tensor, *vectors: Any) -> list[Axes]:
    """Normalise each channel by its own mean and variance: weight, bias and statistics follow the channel."""
    axes = dict(call.axes(x))
    for dim in [d for d in axes if d > 1]:
        if call.is_weight(x):
            call.mark_inexact(axes[dim], "standardises a weight over the channels that it reads")
        else:
            call.freeze(axes.pop(dim), _AS_SPACE)
    _follow(call, axes.get(1), tensors_in(vectors[:4]))
    if isinstance(call.layer, nn.modules.batchnorm._NormBase) and 1 in axes:
        # Instance norm folds the batch into the channels.
        call.follow("num_features", axes[1][: call.layer.num_features])
    # Beside the result some devices return the statistics of every channel, others nothing.
    others = tensors_in((call.out,))[1:]
    return [axes, *({0: axes[1]} if 1 in axes and t.shape == axes[1].shape else {} for t in others)]


@rule("aten::native_layer_norm", "aten::layer_norm", "aten::rms_norm", "aten::_fused_rms_norm", keeps_weights=True)
def layer_norm(call: Call, x: Tensor, shape: Sequence[int], *vectors: Any) -> list[Axes]:
    """Normalise over the last dimensions: a channel among them takes part in every other's result."""
    axes = call.combine([x, *tensors_in(vectors)], x.shape)
    for dim, labels in axes.items():
        if dim >= x.ndim - len(shape):
            call.mark_inexact(labels, "normalises over the channels themselves")
            if len(shape) > 1:
                call.freeze(labels, "is normalised together with space, over a shape that the layer fixes")
    if isinstance(call.layer, (nn.LayerNorm, nn.RMSNorm)):
        _count(call, "normalized_shape", axes.get(x.ndim - 1))
    return [axes]


@rule("aten::native_group_norm")
def native_group_norm(
    call: Call, x: Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, blocks: int, *_: Any
) -> Any:
    """Normalise over blocks of channels."""
    return group_norm(call, x, blocks, weight, bias)


@rule("aten::group_norm")
def group_norm(call: Call, x: Tensor, blocks: int, weight: Any = None, bias: Any = None, *_: Any) -> list[Axes]:
    """Normalise over blocks of channels: whole blocks can go exactly, where their number is the layer's to change."""
    axes = _without_space(call, x)
    labels = axes.get(1)
    _follow(call, labels, tensors_in([weight, bias]))
    layer = call.layer if isinstance(call.layer, nn.GroupNorm) else None
    if labels is not None:
        rows = labels.reshape(blocks, -1)
        if blocks == 1 < x.shape[1]:
            call.mark_inexact(labels, "normalises over the channels themselves")
        elif layer is not None:
            call.join_rows(rows)
            call.follow("num_groups", rows[:, 0])
        elif blocks < x.shape[1]:
            call.freeze(labels, "is normalised in blocks whose number the code fixes")
    if layer is not None:
        _count(call, "num_channels", labels)
    return [axes]
