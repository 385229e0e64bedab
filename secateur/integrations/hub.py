"""A pruned network as a folder in the layout of a model hub: configuration, weights, plan and model card.

The folder is local. What moves it to a hub and back is the hub's own client.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from secateur.checkpoint import load, save, write_atomic
from secateur.checkpoint.digest import digest
from secateur.checkpoint.pruned import Header, read_header
from secateur.engine.result import CompressResult, PruneResult
from secateur.errors import CheckpointError, PlanError, UsageError, install
from secateur.graph.plan import PruningPlan
from secateur.graph.structure import parsed, shown
from secateur.integrations.card import card, figures_of
from secateur.network.inputs import unwrapped

CONFIG, WEIGHTS, PLAN, CARD = "config.json", "model.safetensors", "plan.json", "README.md"
"""The files of a folder."""


def push(
    model: nn.Module | PruneResult | CompressResult,
    folder: str | os.PathLike[str],
    figures: Mapping[str, tuple[float | None, float | None]] | None = None,
    name: str | None = None,
) -> None:
    """Write a pruned network into a folder, from which :func:`secateur.pull` builds it again.

    ============================ ======================================================================================
    file                         content
    ============================ ======================================================================================
    ``config.json``              what the **unpruned** network is built from: timm's own form for a model of timm, that
                                 of transformers for one of its models, otherwise the name of the class alone
    ``model.safetensors``        what :func:`secateur.save` writes: the pruned weights and the plans
    ``plan.json``                the plans once more, a list of :meth:`secateur.PruningPlan.to_dict`, for people and
                                 other programs
    ``README.md``                the model card: what was removed, before and after, how to load it
    ============================ ======================================================================================

    A model of timm or transformers is built anew from the folder and compared before this function returns, so that
    what could not be pulled is not pushed. Other files of the folder, such as a processor's, are left alone. To upload
    it, use the hub's client, for instance ``huggingface_hub.upload_folder(folder_path=…, repo_id=…)``.

    Args:
        model: The pruned network, which knows its plans; or what :func:`secateur.prune` or :func:`secateur.compress`
            returned, whose figures and verification go into the card.
        folder: Where to; it is made if need be.
        figures: Further rows of the card's table: name -> value before, value after; None where one is not known.
        name: Title of the card; the folder's name by default.

    Raises:
        UsageError: If timm or transformers can't describe the network, or the folder can't be written to.
        CheckpointError: If the network can't be stored, or can't be built again from its configuration.
        PlanError: If the network is not what its plans made.
        RunError: If the disk fails or is full.
    """
    network = unwrapped(model if isinstance(model, nn.Module) else model.model)
    library = _library(network)
    own = {"library_name": "secateur", "model": type(network).__qualname__}
    config = own if library is None else _of(library).config_of(network)
    target = Path(folder)
    with TemporaryDirectory() as temporary:
        weights = Path(temporary) / WEIGHTS
        save(network, path=weights, extra={CONFIG: _digest(config)})
        header = read_header(weights)
        texts = {
            CONFIG: _json(config),
            PLAN: _json([plan.to_dict() for plan in header.plans]),
            CARD: card(
                name or target.resolve().name, network, library, header.plans,
                {**figures_of(model), **(figures or {})}, model,
            ),
        }  # fmt: skip
        if library is not None:
            load(_of(library).build(parsed(texts[CONFIG]), str(target / CONFIG)), weights)
        content = weights.read_bytes()
    for file, text in texts.items():
        write_atomic(target / file, text.encode())
    write_atomic(target / WEIGHTS, content)


def pull(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Build the network that :func:`secateur.push` wrote.

    Only classes of timm and transformers are built by what the folder says; no code of the folder runs, and nothing is
    downloaded or unpickled.

    Args:
        folder: The folder, or a copy of it, as ``huggingface_hub.snapshot_download("name/of-the-repository")`` makes.
        model: For a network of a class of your own: the unpruned network, freshly built.

    Returns:
        The pruned network, in eval mode, on the CPU or the given model's device.

    Raises:
        UsageError: If a file is missing, or the folder doesn't tell how the network is built.
        CheckpointError: If a file is damaged, names what must not be built, or is another network's.
    """
    source = Path(folder)
    header = read_header(source / WEIGHTS)
    _require_same_plans(source / PLAN, header)
    config = _read(source / CONFIG)
    if _digest(config) != header.extra.get(CONFIG):
        raise CheckpointError(
            f"{source / CONFIG}: is not the one that {WEIGHTS} was pushed with; copy the folder again, or push again."
        )
    if model is None:
        model = _rebuilt(config, source / CONFIG, header)
    return load(model, source / WEIGHTS).eval()


def _library(model: nn.Module) -> str | None:
    """Return which library's configuration can build a network, without importing any."""
    library = type(model).__module__.partition(".")[0]
    return library if library in ("timm", "transformers") and library in sys.modules else None


def _of(library: str) -> Any:
    try:
        return import_module(f"secateur.integrations.{library}")
    except ModuleNotFoundError as error:
        raise UsageError(f"a network of {library} needs {error.name}; {install('integrations')}.") from error


def _digest(config: Any) -> str:
    """Return what tells one configuration from another; it stands in the header of the weights."""
    return digest(json.dumps(config, sort_keys=True), {})


def _rebuilt(config: Any, file: Path, header: Header) -> nn.Module:
    keys = (("transformers", "model_type"), ("timm", "architecture"))
    library = next((own for own, key in keys if isinstance(config, dict) and key in config), None)
    if library is None:
        raise UsageError(
            f"{file}: tells no class of timm or transformers; pass model=, a freshly built, unpruned {header.model}."
        )
    built: nn.Module = _of(library).build(config, str(file))
    return built


def _require_same_plans(file: Path, header: Header) -> None:
    given = _read(file)
    try:
        plans = [PruningPlan.from_dict(plan) for plan in given] if isinstance(given, list) else None
    except PlanError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if plans != list(header.plans):
        raise CheckpointError(f"{file}: holds other plans than {WEIGHTS}; copy the folder again.")


def _read(file: Path) -> Any:
    try:
        return parsed(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file}: can't be read: {error.strerror}; {shown(file.parent.name)} is no whole folder of "
                         "secateur.push.") from error  # fmt: skip
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; copy the folder again.") from error


def _json(value: Any) -> str:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n"
