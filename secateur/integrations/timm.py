"""timm: the configuration that it writes of a model, and the model built anew from that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from torch import nn

from secateur.errors import CheckpointError, UsageError
from secateur.graph.structure import parsed, shown

_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
"""Keys of a ``pretrained_cfg`` that say where weights are from."""


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the content of ``config.json`` as timm itself writes it: architecture, arguments, preprocessing.

    Raises:
        UsageError: If timm can't describe the model.
    """
    from timm.models._hub import save_config_for_hf

    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        try:
            save_config_for_hf(model, str(file))
        except Exception as error:  # a model that timm did not make lacks any of what is read
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"{type(model).__name__}: timm can't describe it ({text}); prune what timm.create_model returned."
            ) from error
        found: dict[str, Any] = parsed(file.read_bytes())
    return found


def build(config: Mapping[str, Any], where: str) -> nn.Module:
    """Build the unpruned model that a configuration names, with fresh weights; nothing is downloaded or read.

    Args:
        config: Content of ``config.json``, as timm writes it.
        where: The file, for errors.

    Raises:
        CheckpointError: If the configuration names something else, or can't be built from.
    """
    name, options, described = (config.get(key) for key in ("architecture", "model_args", "pretrained_cfg"))
    options = dict(options) if isinstance(options, Mapping) else {}
    require_plain(name, options, where)
    described = described if isinstance(described, Mapping) else {}
    # timm's own descriptions hold tuples, of which JSON makes lists.
    described = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items() if k not in _SOURCES}
    labels = {k: config[k] for k in ("num_classes", "label_names", "label_descriptions") if k in config}
    try:
        return timm.create_model(str(name), pretrained_cfg={**described, **labels}, **options)
    except Exception as error:  # values of a file make any code fail in any way
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{where}: no {name} can be built from it: {text}") from error


def require_plain(name: Any, options: Any, where: str) -> None:
    """Refuse a name that is none of timm's registry, and options by which timm reads files or downloads.

    Raises:
        CheckpointError: If one is given.
    """
    # A name with a source, as "local-dir:", is looked up elsewhere; a tag chooses among published weights alone.
    if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]) or set(name) & set(":/\\"):
        raise CheckpointError(f"{where}: {shown(name)} is no architecture of timm {timm.__version__}.")
    reading = {*inspect.signature(timm.create_model).parameters} - {"kwargs"}
    found = sorted(key for key in options if key in reading or key.startswith("pretrained"))
    if found:
        raise CheckpointError(f"{where}: {found[0]} is no argument of an architecture; leave it out.")
