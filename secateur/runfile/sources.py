"""Find the model, the weights and the data that a run names in one word: ``torchvision:resnet18``, ``net.py:build``."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from secateur import criteria
from secateur.criteria import Criterion
from secateur.errors import DataError, UsageError, install
from secateur.network.isolation import left_as_found
from secateur.runfile import fitting, user_code, weight_files

if TYPE_CHECKING:
    from secateur.data import DataBundle
    from secateur.graph.plan import PruningPlan

_LOG = logging.getLogger(__name__)

PRETRAINED = "pretrained"
"""Stands for the weights that torchvision or timm publish; ``pretrained:VERSION`` for one of torchvision's versions."""

CIFAR_SIDE = 32
"""Height and width of the images that a network of :data:`secateur.models.MODELS` takes unless it names another."""

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
DTYPES = {"float": torch.float32, "long": torch.int64, "int": torch.int32, "bool": torch.bool, "uint8": torch.uint8}


@dataclass(frozen=True)
class SourceModel:
    """A model, and the inputs to run it on where its source knows them."""

    model: nn.Module
    example_inputs: Any | None
    name: str
    plans: tuple[PruningPlan, ...] = ()
    """Plans applied already, where the weights are a pruned network's; a file saved of the model holds them all."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments that the model was built with."""
    data: DataBundle | None = None
    """The data that it was opened for, with as many channels as it takes."""

    @property
    def origin(self) -> dict[str, Any]:
        """The model's name and options and what it takes, stored beside its weights for commands that read the file."""
        return weight_files.origin(self.name, self.options, self.example_inputs)

    @property
    def inputs(self) -> Any:
        """Example inputs; where nothing tells them, a guess that the first layer's weights allow and that runs.

        Raises:
            UsageError: If neither is to be had.
        """
        if self.example_inputs is None and (guess := _guessed(self.model)) is not None:
            known = (
                "channels as its first layer has them, height and width guessed"
                if guess.dim() == 4
                else ("as many values as its first layer has")
            )
            shape = "x".join(map(str, guess.shape))
            _LOG.warning("%s: run on %s: %s; give --input SHAPE for another.", self.name, shape, known)
            return guess
        if self.example_inputs is None:
            raise UsageError(f"{self.name}: what it takes is not known; give --input SHAPE, e.g. --input 1x3x224x224.")
        return self.example_inputs


def version(weights: str | None) -> str | None:
    """Return the version of published weights that a run names: ``""`` for the newest; None for other weights.

    Example:
        >>> version("pretrained"), version("pretrained:IMAGENET1K_V1"), version("trained.pth")
        ('', 'IMAGENET1K_V1', None)
    """
    kind, _, name = (weights or "").partition(":")
    return name if kind == PRETRAINED else None


def model(spec: str, options: Mapping[str, Any] | None = None, *, pretrained: str | None = None) -> SourceModel:
    """Build the model that ``spec`` names.

    Args:
        spec: ``lenet5`` or another of :data:`secateur.models.MODELS`; ``ssd512`` or another of
            :data:`secateur.models.detectors.DETECTORS`; ``torchvision:NAME``; ``timm:NAME``;
            ``path/to/file.py:FUNCTION``; ``package.module:FUNCTION``. A function (or class) is called with
            ``options`` and returns the model, or the model and its example inputs.
        options: Keyword arguments of the function, e.g. ``{"num_classes": 10}``.
        pretrained: Take the weights that torchvision or timm publish, of this version; ``""`` for the newest; may
            download.

    Returns:
        The model in train mode as its source left it, with example inputs where the source tells them.

    Raises:
        UsageError: If there is no such source, or it fails, or it returns no model.
    """
    options = dict(options or {})
    kind, _, name = spec.partition(":")
    if kind == "torchvision":
        return _torchvision(name, options, pretrained)
    if kind == "timm":
        return _timm(name, options, pretrained)
    if pretrained is not None:
        raise UsageError(f"--weights pretrained: {spec} has no published weights; name a file instead.")
    if ":" in spec:
        built = user_code.call(spec, options, "model")
        if isinstance(built, tuple) and len(built) == 2:
            built, inputs = built
        else:
            inputs = None
        if not isinstance(built, nn.Module):
            raise UsageError(
                f"{spec}: returned {type(built).__name__}; a model source returns a torch.nn.Module, "
                "or a pair of it and its example inputs."
            )
        return SourceModel(built, inputs, spec)
    from secateur.models import MODELS
    from secateur.models.detectors import DETECTORS

    if spec in DETECTORS:
        detector = user_code.guard(spec, DETECTORS[spec], options, "model")
        return SourceModel(detector, ([_noise((3, *detector.transform.min_size[:1] * 2))],), spec)
    if spec not in MODELS:
        known = sorted((*MODELS, *DETECTORS))
        raise UsageError(
            f"{spec}: no such model{user_code.suggest(spec, known)} Known are {', '.join(known)}; "
            "others are named torchvision:NAME, timm:NAME, path/to/file.py:FUNCTION or package.module:FUNCTION."
        )
    factory = MODELS[spec]
    built = user_code.guard(spec, factory, options, "model")
    sizes = {name: p.default for name, p in inspect.signature(factory).parameters.items()} | options
    side = sizes.get("in_size", CIFAR_SIDE)
    return SourceModel(built, _noise((1, sizes["in_channels"], side, side)), spec)


def open_model(
    spec: str,
    options: Mapping[str, Any] | None = None,
    weights: str | None = None,
    shapes: Iterable[str] = (),
    bundle: DataBundle | None = None,
) -> SourceModel:
    """Build a model, fitted to its data, and fill it with its weights.

    Args:
        spec: As in :func:`model`.
        options: As in :func:`model`; what they leave open of classes, channels and image size follows ``bundle``.
        weights: File, see :func:`secateur.runfile.weight_files.filled`; ``pretrained``, ``pretrained:VERSION``; or
            None for fresh ones.
        shapes: As in :func:`inputs`; without any, example inputs come from the data, else from what a file that
            Secateur saved says, else from the model's source.
        bundle: The data that the model is to run on.

    Returns:
        The model, in eval mode, pruned if the file holds a pruned one, its example inputs, and the data.

    Raises:
        UsageError: If model, weights, data and inputs can't be found, or don't fit each other.
        CheckpointError: If the file is Secateur's, and damaged or another model's.
    """
    options = dict(options or {})
    if bundle is not None:
        options = {**fitting.options(spec, bundle), **options}
    found = model(spec, options, pretrained=version(weights))
    if bundle is not None:
        from secateur.training.tasks import require_fit

        require_fit(found.model, found.name, bundle)
        bundle = fitting.in_channels(found.model, found.name, _noise((1, *bundle.input_shape)), bundle)
    shapes = list(shapes)
    example = found.example_inputs
    if shapes:
        example = inputs(shapes)
    elif bundle is not None and bundle.task == "detection":
        # Detectors take a list of images, one positional argument.
        example = ([_noise(bundle.input_shape)],)
    elif bundle is not None:
        example = _noise((1, *bundle.input_shape))
        fitting.require_taken(found.model, found.name, example, bundle)
    elif weights is not None and version(weights) is None and (kept := weight_files.shapes(weights)):
        example = inputs(kept)
    built, plans = found.model, found.plans
    if weights is not None and version(weights) is None:
        built, plans = weight_files.filled(built, found.name, options, weights)
    return SourceModel(built.eval(), example, found.name, plans, options, bundle)


def data(spec: str, options: Mapping[str, Any] | None = None) -> DataBundle:
    """Load the data sets that ``spec`` names.

    Args:
        spec: ``digits``; ``mnist:ROOT``, ``cifar10:ROOT``, ``cifar100:ROOT``, ``imagefolder:ROOT``; ``masks:ROOT``;
            ``voc:ROOT``, ``coco:ROOT`` or ``gtsdb:ROOT``; or ``path/to/file.py:FUNCTION`` or
            ``package.module:FUNCTION``, which is called with ``options`` and returns a
            :class:`secateur.data.DataBundle`.
        options: Keyword arguments of the loader, e.g. ``{"image_size": 224}``.

    Raises:
        UsageError: If there is no such source, or the function fails or returns something else.
        DataError: If the data is missing or unreadable.
    """
    from secateur.data import DATASETS, DataBundle, load

    options = dict(options or {})
    kind = spec.partition(":")[0]
    if kind in DATASETS:
        bundle = user_code.guard(spec, load, {"name": spec, **options}, "data")
    elif ":" in spec:
        bundle = user_code.call(spec, options, "data")
    else:
        raise UsageError(
            f"{spec}: no such data{user_code.suggest(kind, DATASETS)} Known are {', '.join(sorted(DATASETS))}; "
            "others are named path/to/file.py:FUNCTION or package.module:FUNCTION."
        )
    if not isinstance(bundle, DataBundle):
        raise UsageError(f"{spec}: returned {type(bundle).__name__}; a data source returns a secateur.data.DataBundle.")
    for part in ("train", "validation", "test"):
        if len(getattr(bundle, part)) == 0:
            raise DataError(f"{spec}: the {part} set is empty; nothing can be measured on it.")
        if kind not in DATASETS:
            fitting.require_shape(getattr(bundle, part), f"{spec}: {part}", bundle)
        boxes = getattr(getattr(bundle, part), "boxes", None)
        if boxes == 0:
            raise DataError(
                f"{spec}: not one box to find in the {len(getattr(bundle, part))} photographs of the {part} set; "
                "split it otherwise, or give more of them."
            )
    return bundle


def method(spec: str) -> str | Criterion:
    """Find the method or criterion that ``--method`` names.

    Args:
        spec: The name of a method or criterion, which is returned as it is; or ``path/to/file.py:FUNCTION``,
            ``package.module:FUNCTION``, where the function is registered as a criterion or its parameters are named
            after what it reads.

    Raises:
        UsageError: If there is no such file, module or function, or the function is no criterion.
    """
    return criteria.get(user_code.imported(spec, "method")) if ":" in spec else spec


def inputs(shapes: Iterable[str]) -> Any:
    """Make example inputs of the shapes that ``--input`` gives.

    One shape gives a tensor, several a tuple of positional arguments, named ones a dict of keyword arguments.

    Args:
        shapes: Texts such as ``1x3x224x224``, ``ids=1x16:long``; the type is ``float`` unless given.

    Raises:
        UsageError: If a text is no shape, or only some of several are named.

    Example:
        >>> inputs(["1x3x8x8"]).shape
        torch.Size([1, 3, 8, 8])
        >>> sorted(inputs(["image=2x1x8x8", "mask=2x8:bool"]))
        ['image', 'mask']
    """
    shapes = list(shapes)
    made: list[tuple[str | None, Tensor]] = []
    for text in shapes:
        match = _SHAPE.fullmatch(text)
        dtype = match and DTYPES.get(match["dtype"] or "float")
        size = [int(n) for n in match["shape"].split("x")] if match else []
        if not match or dtype is None or 0 in size:
            raise UsageError(
                f"--input {text}: not a shape; write 1x3x224x224, NAME=1x3x224x224 or NAME=1x16:long "
                f"(types: {', '.join(DTYPES)})."
            )
        made.append((match["name"], _noise(size, dtype)))
    names = [name for name, _ in made]
    if any(names) and not all(names):
        raise UsageError(f"--input {' --input '.join(shapes)}: name all inputs or none.")
    if any(names):
        return {cast(str, name): value for name, value in made}
    return made[0][1] if len(made) == 1 else tuple(value for _, value in made)


def seed(value: int) -> None:
    """Seed the generator that fresh weights are drawn from."""
    torch.manual_seed(value)


def writable(path: Path) -> None:
    """Refuse a place that can't be written to, before any work is done for it.

    Raises:
        UsageError: If ``path`` is a folder, or in one that can't be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file in it.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: can't be written: {folder} is no folder that you may write to.")


def absolute(spec: str) -> str:
    """Make the path inside a model, weights or data spec absolute, so that it holds from any folder.

    Example:
        >>> absolute("torchvision:resnet18")
        'torchvision:resnet18'
        >>> absolute("mnist:data") == f"mnist:{Path('data').absolute()}"
        True
    """
    from secateur.data import DATASETS

    head, colon, tail = spec.partition(":")
    if head in DATASETS and tail:
        return f"{head}:{Path(tail).expanduser().absolute()}"
    if head.endswith(".py"):
        return f"{Path(head).expanduser().absolute()}{colon}{tail}"
    return spec


def _torchvision(name: str, options: dict[str, Any], pretrained: str | None) -> SourceModel:
    import torchvision

    registry = torchvision.models
    if name not in registry.list_models():
        raise UsageError(f"torchvision:{name}: no such model{user_code.suggest(name, registry.list_models())}")
    builder = registry.get_model_builder(name)
    # A detector or segmenter would otherwise download weights for its backbone.
    if "weights_backbone" in inspect.signature(builder).parameters:
        options.setdefault("weights_backbone", None)
    built = user_code.guard(f"torchvision:{name}", builder, {"weights": None, **options}, "model")
    if pretrained is not None:
        entry = _published(name, pretrained)
        try:
            state = torch.hub.load_state_dict_from_url(
                entry.url, map_location="cpu", check_hash=True, weights_only=True, progress=sys.stderr.isatty()
            )
        except OSError as error:
            raise UsageError(
                f"torchvision:{name}: the published weights can't be fetched: {user_code.one_line(error)}"
            ) from error
        try:
            built.load_state_dict(state)
        except RuntimeError as error:
            raise UsageError(
                f"torchvision:{name}: the published weights don't fit the model that --model-option makes: "
                f"{user_code.one_line(error)}"
            ) from error
    module = builder.__module__
    shape: tuple[int, ...] = (1, 3, 224, 224)
    if ".video" in module:
        shape = (1, 3, 16, 224, 224) if "mvit" in name or "swin" in name else (1, 3, 16, 112, 112)
    elif name == "inception_v3":
        shape = (1, 3, 299, 299)
    if ".detection" in module:
        # Detectors take a list of images, one positional argument.
        return SourceModel(built, ([_noise((3, 320, 320))],), f"torchvision:{name}")
    return SourceModel(built, _noise(shape), f"torchvision:{name}")


def _published(name: str, version: str) -> Any:
    """Return torchvision's entry of published weights: of a version, or the newest for ``""``."""
    import torchvision

    published = torchvision.models.get_model_weights(name).__members__
    if not published:
        raise UsageError(f"torchvision:{name}: no weights are published for this model.")
    known = [key for key in published if key != "DEFAULT"]
    if version and version not in known:
        raise UsageError(
            f"--weights {PRETRAINED}:{version}: torchvision publishes {name} as {', '.join(known)}; name one of these."
        )
    return published[version or "DEFAULT"]


def pinned(spec: str, weights: str | None) -> str | None:
    """Return what a run's weights are with the version named that ``pretrained`` alone takes of torchvision today.

    Example:
        >>> pinned("torchvision:resnet50", "pretrained")
        'pretrained:IMAGENET1K_V2'
    """
    import torchvision

    kind, _, name = spec.partition(":")
    if weights != PRETRAINED or kind != "torchvision" or name not in torchvision.models.list_models():
        return weights
    return f"{PRETRAINED}:{_published(name, '').name}"


def _timm(name: str, options: dict[str, Any], pretrained: str | None) -> SourceModel:
    try:
        import timm
    except ImportError:
        raise UsageError(f"timm:{name}: timm is not installed; {install('timm')}.") from None
    if pretrained:
        raise UsageError(f"--weights {PRETRAINED}:{pretrained}: timm names versions in the model, timm:NAME.TAG.")
    if not timm.is_model(name):
        raise UsageError(f"timm:{name}: no such model{user_code.suggest(name, timm.list_models())}")
    given = {"model_name": name, "pretrained": pretrained is not None, **options}
    built = user_code.guard(f"timm:{name}", timm.create_model, given, "model")
    shape = built.default_cfg["input_size"]
    return SourceModel(built, _noise((1, *shape)), f"timm:{name}")


_SIDES = (224, 32, 28)
"""Heights and widths of images that are tried where a network doesn't tell what it takes."""


def _guessed(network: nn.Module) -> Tensor | None:
    """Return an input that the first layer's weights allow, and that the network runs on; None where there is none."""
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if first is None:
        return None
    channels = first.in_channels if isinstance(first, nn.Conv2d) else first.in_features
    image = isinstance(first, nn.Conv2d)
    for size in [(1, channels, side, side) for side in _SIDES] if image else [(1, channels)]:
        made = _noise(size)
        with left_as_found(network):
            try:
                network.eval()(made)
            except Exception:  # noqa: BLE001 - the user's own code may refuse a shape by any error
                continue
        return made
    return None


def _noise(shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded noise, so that two runs trace and verify on the same input; the global generator stays untouched."""
    shape = tuple(shape)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=dtype)
    return torch.zeros(shape, dtype=dtype)
