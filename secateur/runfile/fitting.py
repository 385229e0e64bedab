"""A model and the data that it is to run on: what each says of the other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from secateur.criteria.feature_maps import first_line
from secateur.errors import DataError, SecateurError, UsageError
from secateur.network.isolation import left_as_found
from secateur.pruning.comparison import outputs

if TYPE_CHECKING:
    from secateur.data import DataBundle


def options(spec: str, bundle: DataBundle) -> dict[str, Any]:
    """Return options that fit a known network to a data set: number of classes, image channels, image size."""
    kind = spec.partition(":")[0]
    channels, side = bundle.input_shape[0], bundle.input_shape[-1]
    classes = len(bundle.classes)
    scored = {"num_classes": classes} if classes else {}  # data without labels leave that open
    if kind == "timm":
        return {**scored, "in_chans": channels}
    from secateur.models import MODELS
    from secateur.models.detectors import DETECTORS

    if kind == "torchvision" or spec in DETECTORS:
        # Detectors count the background as a class.
        return {"num_classes": classes + (bundle.task == "detection")} if classes else {}
    wanted = {**scored, "in_channels": channels, "in_size": side}
    known = inspect.signature(MODELS[spec]).parameters if spec in MODELS else {}
    return {key: value for key, value in wanted.items() if key in known}


def in_channels(network: nn.Module, model: str, example: Tensor, bundle: DataBundle) -> DataBundle:
    """Return the data with as many channels as the first layer that runs takes, where they leave that open."""
    from secateur.data.imagefolder import MODES

    if bundle.with_channels is None:
        return bundle
    name, taken = _first_convolution(network, example)
    if taken in (None, bundle.input_shape[0]):
        return bundle
    if taken not in MODES:
        raise UsageError(
            f"{model}: {name} takes {taken} channels, and {bundle.name} reads images of 1, 3 or 4; give data of "
            "your own, --data path/to/file.py:FUNCTION."
        )
    return bundle.with_channels(taken)


def _first_convolution(network: nn.Module, images: Tensor) -> tuple[str, int | None]:
    """Return the name and the input channels of the first convolution that runs; None where none does."""
    names = {layer: name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    reached: list[nn.Conv2d] = []

    def stop(layer: nn.Module, _: Any) -> None:
        reached.append(cast(nn.Conv2d, layer))
        raise RuntimeError("the first layer is reached")

    # What goes on before that layer is the user's own code, and may refuse a number of channels by any error.
    with left_as_found(network), ExitStack() as hooks, suppress(Exception):
        for layer in names:
            hooks.callback(layer.register_forward_pre_hook(stop).remove)
        network.eval()(images)
    return (names[reached[0]], reached[0].in_channels) if reached else ("", None)


def require_taken(network: nn.Module, model: str, example: Tensor, bundle: DataBundle) -> None:
    """Refuse data of a shape that the network fails on, before any work is done for them.

    Raises:
        UsageError: If it does.
    """
    try:
        outputs(network, example)
    except SecateurError:
        raise
    except Exception as error:
        raise UsageError(
            f"{model}: fails on inputs of shape {tuple(example.shape)}, of DataBundle.input_shape of "
            f"{bundle.name}: {first_line(error).rstrip('.')}. Build it for that shape (--model-option), or give data "
            "of the shape that it takes."
        ) from error


def require_shape(part: Any, where: str, bundle: DataBundle) -> None:
    """Refuse data of another shape than they are said to be; photographs with boxes are of any size.

    Raises:
        DataError: If the first example is no pair where there are classes, or of another shape.
    """
    first = part[0]
    if isinstance(first, Mapping):  # of keyword arguments
        return
    if isinstance(first, Tensor) and not bundle.classes:  # no labels
        first = (first, None)
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        raise DataError(f"{where}: expected pairs (input, target); the first example is a {type(first).__name__}.")
    if isinstance(first[0], Tensor) and bundle.task != "detection" and first[0].shape != tuple(bundle.input_shape):
        raise DataError(
            f"{where}: the first input is of shape {tuple(first[0].shape)}, and DataBundle.input_shape says "
            f"{tuple(bundle.input_shape)}; make them agree."
        )
