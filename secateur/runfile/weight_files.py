"""The weights that a run names: a pruned network's own file, or a plain state dict, read into a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur import checkpoint
from secateur.errors import CheckpointError, UsageError
from secateur.graph.plan import PruningPlan
from secateur.network.inputs import shapes_of

PREFIXES = ("model.", "net.")
"""What trainers that hold the network as an attribute put before every key of a state dict."""

LARGEST = 300_000_000
"""Values of the largest input that a file can ask for: 100,000,000 pixels in colour."""

_INPUT = "input"
"""Key under which a file says what its network takes."""

_ORIGIN = "origin"
"""Key under which a file says how its network was built."""


def origin(name: str, options: Mapping[str, Any], example_inputs: Any) -> dict[str, Any]:
    """Return what a file keeps of a model: name and options, which an error at loading names, and what it takes."""
    return {_ORIGIN: {"model": name, "model_options": dict(options)}, _INPUT: shapes_of(example_inputs)}


def shapes(path: str) -> list[str]:
    """Return the shapes of the inputs that a file's network was pruned on, as ``--input`` takes them, where it says.

    Raises:
        CheckpointError: If one is of more than :data:`LARGEST` values.
    """
    kept = checkpoint.read_header(path).extra.get(_INPUT) if checkpoint.is_checkpoint(path) else None
    found = [text for text in kept if isinstance(text, str)] if isinstance(kept, list) else []
    for text in found:
        sizes = re.findall(r"\d+", text.partition("=")[2] or text)
        if len(text) > 100 or math.prod(map(int, sizes)) > LARGEST:
            raise CheckpointError(
                f"{path}: says that the network takes {text[:100]}, which is too large; give --input."
            )
    return found


def filled(
    model: nn.Module, name: str, options: Mapping[str, Any], path: str
) -> tuple[nn.Module, tuple[PruningPlan, ...]]:
    """Return a model with a file's weights, pruned if the file holds a pruned network, and the plans of that network.

    Args:
        model: Freshly built.
        name: What the model was named, for messages.
        options: What it was built with, for messages.
        path: File that :func:`secateur.save` wrote, or that :func:`load_weights` reads.

    Raises:
        UsageError: If there is no such file, or it holds another model's weights.
        CheckpointError: If the file is damaged, or holds no state dict.
    """
    if not checkpoint.is_checkpoint(path):
        load_weights(model, path)
        return model, ()
    header = checkpoint.read_header(path)
    try:
        return checkpoint.load(model, path), header.plans
    except CheckpointError as error:
        saved = _saved(path, header.extra)
        if saved is None or saved == (name, dict(options)):
            raise
        raise UsageError(
            f"{path}: was saved of {_words(*saved)}, and the model given is {_words(name, options)}; "
            "give the same model and options."
        ) from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill ``model`` with a plain state dict; see :func:`secateur.checkpoint.load_weights` for what is read.

    A prefix that a trainer's own module put before every key (:data:`PREFIXES`) is taken off.

    Raises:
        UsageError: If there is no such file, or it holds another model's weights; the model is then left as it was.
        CheckpointError: If the file is damaged, or holds no state dict.
    """
    own = model.state_dict()
    state = checkpoint.load_weights(path)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    for wrapper in ("module.", "_orig_mod."):
        # checkpoint.load_weights takes a wrapper's prefix off, and this model's own keys begin with one.
        if all(key.startswith(wrapper) for key in own) and not any(key.startswith(wrapper) for key in state):
            state = {wrapper + key: value for key, value in state.items()}
    # Files from before PyTorch 0.4.1 have no counters of batches; torch's own strict loading allows that too.
    state = {key: own[key] for key in own if key.endswith("num_batches_tracked")} | state
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise UsageError(
            f"{path}: not the weights of this {type(model).__name__}: "
            f"{_count(missing, 'missing')}, {_count(unexpected, 'unexpected')}."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UsageError(
                f"{path}: {key} has shape {tuple(value.shape)} in the file and {tuple(own[key].shape)} in "
                f"{type(model).__name__}; give the file of this very model, or build the model with --model-option."
            )
        if value.is_complex() and not own[key].is_complex():
            raise UsageError(f"{path}: {key} holds complex numbers, and that of {type(model).__name__} real ones.")
    model.load_state_dict(state)


def _saved(path: str, extra: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Find out how a file's network was built, from the file itself or from the run whose folder the file is in."""
    from secateur.runfile import config

    saved = extra.get(_ORIGIN)
    if isinstance(saved, dict) and isinstance(saved.get("model_options"), dict):
        return str(saved.get("model")), saved["model_options"]
    beside = Path(path).with_name(config.FILE)
    if not beside.is_file():
        return None
    try:
        run = config.load(beside)
    except UsageError:
        return None  # the checkpoint's own error says what is wrong
    return run.model, run.model_options


def _words(name: str, options: Mapping[str, Any]) -> str:
    given = [
        f"--model-option {key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in options.items()
    ]
    return " ".join((name, *given))


def _count(keys: list[str], word: str) -> str:
    return f"{len(keys)} {word}" + (f" ({keys[0]}{', …' if len(keys) > 1 else ''})" if keys else "")
