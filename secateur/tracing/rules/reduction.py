"""Rules for pooling, resizing, sums and softmax: they work along some dimensions and leave the others alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateur.network.named import tensors_in
from secateur.tracing.flow import Flow
from secateur.tracing.labels import Axes
from secateur.tracing.rules.registry import rule


def _results(out: Any) -> list[Tensor]:
    return tensors_in((out,))


def _spatial(count: int) -> Any:
    """Return the rule of an operator over the last ``count`` dimensions as space."""

    def spatial(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Keep the channels; a channel dimension among the spatial ones is frozen."""
        x = args[0]
        flow.freeze_tensor(x, "is pooled or resized as if it were space", range(x.ndim - count, x.ndim))
        axes = {d: labels for d, labels in flow.axes(x).items() if d < x.ndim - count}
        for result in _results(out):
            flow.set(result, axes)

    return spatial


rule(
    "aten::max_pool1d",
    "aten::avg_pool1d",
    "aten::adaptive_avg_pool1d",
    "aten::adaptive_max_pool1d",
    "aten::upsample_nearest1d",
    "aten::_upsample_nearest_exact1d",
    "aten::upsample_linear1d",
    "aten::reflection_pad1d",
    "aten::replication_pad1d",
)(_spatial(1))
rule(
    "aten::max_pool2d",
    "aten::max_pool2d_with_indices",
    "aten::mkldnn_max_pool2d",
    "aten::avg_pool2d",
    "aten::adaptive_avg_pool2d",
    "aten::_adaptive_avg_pool2d",
    "aten::mkldnn_adaptive_avg_pool2d",
    "aten::adaptive_max_pool2d",
    "aten::fractional_max_pool2d",
    "aten::upsample_nearest2d",
    "aten::_upsample_nearest_exact2d",
    "aten::upsample_bilinear2d",
    "aten::_upsample_bilinear2d_aa",
    "aten::upsample_bicubic2d",
    "aten::_upsample_bicubic2d_aa",
    "aten::reflection_pad2d",
    "aten::replication_pad2d",
    "aten::grid_sampler_2d",
)(_spatial(2))
rule(
    "aten::max_pool3d",
    "aten::max_pool3d_with_indices",
    "aten::avg_pool3d",
    "aten::adaptive_avg_pool3d",
    "aten::_adaptive_avg_pool3d",
    "aten::adaptive_max_pool3d",
    "aten::upsample_nearest3d",
    "aten::_upsample_nearest_exact3d",
    "aten::upsample_trilinear3d",
    "aten::replication_pad3d",
    "aten::reflection_pad3d",
    "aten::grid_sampler_3d",
)(_spatial(3))


@rule("aten::max_unpool2d", "aten::max_unpool3d")
def max_unpool(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Put values back where pooling took them from: channels join with those of the indices."""
    x, indices = args[:2]
    space = range(2, x.ndim)
    flow.freeze_tensor(x, "is unpooled as if it were space", space)
    axes = flow.combine([x, indices], x.shape)
    flow.set(out, {d: labels for d, labels in axes.items() if d < 2})


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Pool regions of a feature map: the channels stay."""
    x, boxes = args[:2]
    flow.freeze_tensor(x, "is pooled over regions as if it were space", [0, 2, 3])
    flow.freeze_tensor(boxes, "gives regions")
    axes = flow.axes(x)
    for result in _results(out):
        flow.set(result, {1: axes[1]} if 1 in axes else {})


def _dims(value: Any, ndim: int) -> list[int]:
    if value is None or value == []:
        return list(range(ndim))
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v % ndim if ndim else 0 for v in values]


def reduced(flow: Flow, x: Tensor, dims: list[int], results: list[Tensor], what: str) -> None:
    """Take ``dims`` out of the axes of ``x``, whether or not the results keep them with size 1."""
    left = flow.without(flow.axes(x), dims, what)
    for result in results:
        kept = result.ndim == x.ndim
        axes: Axes = {d if kept else d - sum(g < d for g in dims): labels for d, labels in left.items()}
        flow.set(result, axes, weight=flow.is_weight(x))


@rule("aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::prod", "aten::logsumexp", "aten::any", "aten::all",
      "aten::var", "aten::std", "aten::var_mean", "aten::std_mean", "aten::max", "aten::min", "aten::nansum",
      "aten::count_nonzero", "aten::aminmax")  # fmt: skip
def reduction(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Keep the channels of the dimensions that stay; mixing the channels themselves is inexact."""
    x = args[0]
    if not flow.axes(x):
        return
    second = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(second, Tensor):
        flow.set(out, flow.combine([x, second], out.shape))
        return
    if isinstance(second, bool):
        second = None
    reduced(flow, x, _dims(second, x.ndim), _results(out), "reduces")


@rule("aten::linalg_vector_norm", "aten::norm")
def vector_norm(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Keep the channels of the dimensions that stay; a norm over the channels themselves is inexact."""
    x = args[0]
    reduced(flow, x, _dims(args[2] if len(args) > 2 else None, x.ndim), [out], "takes a norm")


@rule("aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::log_softmax", "aten::_safe_softmax")
def softmax(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Keep the channels; a softmax over the channels themselves is inexact."""
    x = args[0]
    dim = args[1] % max(x.ndim, 1)
    axes = flow.axes(x)
    if dim in axes:
        flow.mark_inexact(axes[dim], "takes a softmax over the channels themselves")
    flow.set(out, axes)


def _ordered(position: int, default: int | None) -> Any:
    """Return the rule of an operator along one dimension, given as argument ``position``."""

    def ordered(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Keep the channels of the other dimensions; along its own, where order and count matter, freeze them."""
        x = args[0]
        if not flow.axes(x):
            return
        dim = args[position] if len(args) > position else kwargs.get("dim", default)
        dims = _dims(dim, x.ndim)
        flow.freeze_tensor(x, "is ordered or accumulated along the channels themselves", dims)
        left = {d: labels for d, labels in flow.axes(x).items() if d not in dims}
        for result in _results(out):
            kept = result.ndim == x.ndim
            flow.set(result, {d if kept else d - sum(g < d for g in dims): labels for d, labels in left.items()})

    return ordered


rule("aten::cumsum", "aten::cumprod", "aten::cumsum_", "aten::cummax", "aten::cummin", "aten::logcumsumexp")(
    _ordered(1, -1)
)
rule("aten::argmax", "aten::argmin", "aten::median", "aten::nanmedian")(_ordered(1, None))
rule("aten::sort", "aten::argsort", "aten::mode")(_ordered(1, -1))
rule("aten::topk", "aten::kthvalue")(_ordered(2, -1))
