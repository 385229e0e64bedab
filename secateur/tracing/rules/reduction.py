"""Rules for pooling, resizing, sums and softmax: they work along some dimensions and leave the others alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from secateur.network.named import tensors_in
from secateur.tracing.call import Call
from secateur.tracing.labels import Axes
from secateur.tracing.rules.registry import Flow, rule


def _spatial(count: int) -> Flow:
    """Return the rule of an operator over the last ``count`` dimensions as space."""

    def spatial(call: Call, x: Tensor, *_: Any, **__: Any) -> Axes:
        """Keep the channels; a channel dimension among the spatial ones is frozen."""
        call.freeze_tensor(x, "is pooled or resized as if it were space", range(x.ndim - count, x.ndim))
        return {d: labels for d, labels in call.axes(x).items() if d < x.ndim - count}

    return spatial


_OVER_SPACE = {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d _upsample_nearest_exact1d "
    "upsample_linear1d reflection_pad1d replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices mkldnn_max_pool2d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d "
    "mkldnn_adaptive_avg_pool2d adaptive_max_pool2d fractional_max_pool2d upsample_nearest2d "
    "_upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa "
    "reflection_pad2d replication_pad2d grid_sampler_2d",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
    "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d replication_pad3d reflection_pad3d "
    "grid_sampler_3d",
}
"""Number of spatial dimensions -> operators that work along them."""
for _count, _names in _OVER_SPACE.items():
    rule(*(f"aten::{name}" for name in _names.split()))(_spatial(_count))


@rule("aten::max_unpool2d", "aten::max_unpool3d")
def max_unpool(call: Call, x: Tensor, indices: Tensor, *_: Any) -> Axes:
    """Put values back where pooling took them from: channels join with those of the indices."""
    call.freeze_tensor(x, "is unpooled as if it were space", range(2, x.ndim))
    return {d: labels for d, labels in call.combine([x, indices], x.shape).items() if d < 2}


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(call: Call, x: Tensor, boxes: Tensor, *_: Any) -> Axes:
    """Pool regions of a feature map: the channels stay."""
    call.freeze_tensor(x, "is pooled over regions as if it were space", [0, 2, 3])
    call.freeze_tensor(boxes, "gives regions")
    return {d: labels for d, labels in call.axes(x).items() if d == 1}


def _dims(value: Any, ndim: int) -> set[int]:
    if value is None or value == []:
        return set(range(ndim))
    return {v % ndim if ndim else 0 for v in (value if isinstance(value, (list, tuple)) else [value])}


def _left(call: Call, x: Tensor, axes: Axes, dims: Iterable[int]) -> list[Axes]:
    """Return where axes lie in the results of taking ``dims`` out, whether or not the results keep them with size 1."""
    return [
        {d if out.ndim == x.ndim else d - sum(g < d for g in dims): labels for d, labels in axes.items()}
        for out in tensors_in((call.out,))
    ]


@rule("aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::prod", "aten::logsumexp", "aten::any", "aten::all",
      "aten::var", "aten::std", "aten::var_mean", "aten::std_mean", "aten::max", "aten::min", "aten::nansum",
      "aten::count_nonzero", "aten::aminmax", keeps_weights=True)  # fmt: skip
def reduction(call: Call, x: Tensor, dim: Any = None, *_: Any, **__: Any) -> Axes | list[Axes]:
    """Keep the channels of the dimensions that stay; mixing the channels themselves is inexact."""
    if isinstance(dim, Tensor):  # the larger of two, element by element
        return call.combine([x, dim], call.out.shape)
    dims = _dims(None if isinstance(dim, bool) else dim, x.ndim)
    return _left(call, x, call.without(call.axes(x), dims, "reduces"), dims)


@rule("aten::linalg_vector_norm", "aten::norm", keeps_weights=True)
def vector_norm(call: Call, x: Tensor, order: Any = 2, dim: Any = None, *_: Any, **__: Any) -> list[Axes]:
    """Keep the channels of the dimensions that stay; a norm over the channels themselves is inexact."""
    dims = _dims(dim, x.ndim)
    return _left(call, x, call.without(call.axes(x), dims, "takes a norm"), dims)


@rule("aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::log_softmax", "aten::_safe_softmax")
def softmax(call: Call, x: Tensor, dim: int, *_: Any, **__: Any) -> Axes:
    """Keep the channels; a softmax over the channels themselves is inexact."""
    axes = call.axes(x)
    call.without(axes, {dim % max(x.ndim, 1)}, "takes a softmax")
    return axes


def _ordered(position: int, default: int | None) -> Flow:
    """Return the rule of an operator along one dimension, given as argument ``position`` behind the tensor."""

    def ordered(call: Call, x: Tensor, *args: Any, **kwargs: Any) -> list[Axes]:
        """Keep the channels of the other dimensions; along its own, where order and count matter, freeze them."""
        dims = _dims(args[position] if len(args) > position else kwargs.get("dim", default), x.ndim)
        call.freeze_tensor(x, "is ordered or accumulated along the channels themselves", dims)
        return _left(call, x, {d: labels for d, labels in call.axes(x).items() if d not in dims}, dims)

    return ordered


rule("aten::cumsum", "aten::cumprod", "aten::cumsum_", "aten::cummax", "aten::cummin", "aten::logcumsumexp")(
    _ordered(0, -1)
)
rule("aten::argmax", "aten::argmin", "aten::median", "aten::nanmedian")(_ordered(0, None))
rule("aten::sort", "aten::argsort", "aten::mode")(_ordered(0, -1))
rule("aten::topk", "aten::kthvalue")(_ordered(1, -1))
