"""transformers: a callback of its ``Trainer`` that prunes on a schedule, and models built anew from their config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback

from secateur.errors import CheckpointError, UsageError
from secateur.graph.structure import parsed, shown
from secateur.integrations.in_place import Schedule
from secateur.pruning.target import Target

_CODE = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Keys of a configuration by which code from elsewhere can be asked for: of the folder, or as a kernel of a hub."""


class ScheduledPruning(TrainerCallback, ExportableState):
    """Prune the model of a ``Trainer`` at the beginning of given epochs, and let the training go on.

    Model and optimizer stay the objects that they are; the optimizer's state loses what the parameters lose, and the
    scheduler knows it still. The plans stand in every checkpoint's ``trainer_state.json``: :meth:`restore` prunes a
    freshly built model as it says, and ``trainer.train(resume_from_checkpoint=…)`` goes on.

    Args:
        schedule: Epoch, counted from 0 -> what is removed at its beginning. A fraction counts from the network as it is
            at that moment.
        example_inputs: Inputs of the model, such as ``{"pixel_values": torch.randn(1, 3, 224, 224)}``.
        **options: Further arguments of :func:`secateur.prune`: ``data``, ``method``, ``compensate``, ``skip`` …

    Raises:
        UsageError: If an epoch is no whole number, a target no target; later, if several processes train the model.
    """

    def __init__(self, schedule: Mapping[int, Target], example_inputs: Any, **options: Any) -> None:
        self.schedule = Schedule(schedule, example_inputs, options)
        self._model: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what can't be pruned in place."""
        if args.world_size > 1 or args.torch_compile:
            why = "is compiled" if args.torch_compile else f"is trained by {args.world_size} processes"
            raise UsageError(f"ScheduledPruning: the model {why}, for the parameters that were there first. "
                             "Prune before train, or in one process and as it is written.")  # fmt: skip
        self._model = kwargs["model"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune if the schedule says so."""
        self.schedule.prune(int((state.epoch or 0) + 1e-6), kwargs["model"], [kwargs["optimizer"]])

    def state(self) -> dict[str, Any]:
        """Return what ``Trainer`` writes into ``trainer_state.json``."""
        return {"args": {}, "attributes": self.schedule.state(self._model)}

    def restore(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Prune a freshly built model in place as that of a checkpoint was; its weights are loaded by ``train``.

        Args:
            model: The model, before it is given to the ``Trainer`` or after.
            checkpoint: Folder ``checkpoint-N`` that ``Trainer`` wrote.

        Raises:
            CheckpointError: If the folder holds no state of this callback, or the model was pruned otherwise.
        """
        file = Path(checkpoint) / "trainer_state.json"
        try:
            held = parsed(file.read_bytes())["stateful_callbacks"][type(self).__name__]
            state = (held[0] if isinstance(held, list) else held)["attributes"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{file}: holds no state of a {type(self).__name__} ({error}).") from error
        self.schedule.restore(state, model, where=str(file))


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return the content of ``config.json``: the configuration that the unpruned model was built from."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    return {**config, "architectures": [type(model).__name__]}


def build(config: Mapping[str, Any], where: str) -> nn.Module:
    """Build the unpruned model that a configuration names, with fresh weights.

    The class is one of transformers, and of the kind that the configuration is of. Nothing is downloaded, and no code
    but that of transformers runs, or timm's for its networks in transformers.

    Args:
        config: Content of ``config.json``.
        where: The file, for errors.

    Raises:
        CheckpointError: If the configuration names something else, or can't be built from.
    """
    _require_data(config, where)
    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{where}: model_type {shown(kind)} is none of transformers {transformers.__version__}.")
    name = named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else None
    found = getattr(transformers, name, None) if name else None
    if not (
        isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is CONFIG_MAPPING[kind]
    ):
        raise CheckpointError(f"{where}: architectures {shown(named)} is no one {kind} model of transformers.")
    try:
        return found(CONFIG_MAPPING[kind].from_dict(dict(config)))
    except Exception as error:  # values of a file make any code fail in any way
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{where}: no {name} can be built from it: {text}") from error


def _require_data(value: Any, where: str) -> None:
    """Refuse a configuration that names code, files or repositories."""
    if isinstance(value, list):
        for item in value:
            _require_data(item, where)
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        if key in _CODE and item is not None:
            raise CheckpointError(f"{where}: {key} can name code from elsewhere, which is never run; leave it out.")
        if key in ("backbone", "architecture") and item is not None and value.get("model_type") not in _OF_TIMM:
            raise CheckpointError(f"{where}: {key} {shown(item)} names a network elsewhere; give its configuration.")
        _require_data(item, where)
    if value.get("model_type") in _OF_TIMM:
        from secateur.integrations.timm import require_plain

        named = value.get("backbone") or value.get("architecture")
        require_plain(named, value.get("model_args") or value.get("backbone_kwargs") or {}, where)


_OF_TIMM = ("timm_backbone", "timm_wrapper")
"""Kinds of models that timm builds."""
