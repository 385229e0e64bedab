"""A callback of Lightning that prunes on a schedule, and keeps checkpoints loadable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from secateur.errors import UsageError
from secateur.integrations.in_place import Schedule
from secateur.pruning.target import Target


class ScheduledPruning(Callback):
    """Prune a part of a ``LightningModule`` at the beginning of given epochs, and let the training go on.

    The module stays the object that it is; so do its optimizers, whose state loses what the parameters lose, and the
    schedulers, which know them. An average of the weights that Lightning's ``WeightAveraging`` keeps is cut, too.

    ``fit``, ``validate``, ``test`` and ``predict`` with ``ckpt_path`` prune a freshly built module as the checkpoint
    was before its weights are loaded, if the trainer has this callback. ``load_from_checkpoint`` knows no callbacks and
    fits unpruned checkpoints alone: keep the pruned part by :func:`secateur.save`. Checkpoints of weights alone
    (``save_weights_only=True``) hold no plans.

    Args:
        schedule: Epoch, counted from 0 -> what is removed at its beginning. A fraction counts from the network as it is
            at that moment.
        example_inputs: Inputs of the part, as :func:`secateur.prune` takes them.
        part: Name of the attribute that holds the network, such as ``model`` or ``net.backbone``.
        **options: Further arguments of :func:`secateur.prune`: ``data``, ``method``, ``compensate``, ``skip`` …

    Raises:
        UsageError: If an epoch is no whole number, a target no target; later, if the module has no such part, or
            several processes train it.
    """

    def __init__(
        self, schedule: Mapping[int, Target], example_inputs: Any, part: str = "model", **options: Any
    ) -> None:
        self.schedule, self.part = Schedule(schedule, example_inputs, options), part
        self._network: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the network, and see to it that it is pruned before a checkpoint's weights are loaded."""
        if trainer.world_size > 1:
            raise UsageError(
                f"ScheduledPruning: {trainer.world_size} processes train the module, and their gradients are summed "
                "for the parameters that were there first. Prune before fit, or in one process."
            )
        self._network = self._of(pl_module)
        own = type(pl_module).on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            state = (checkpoint.get("callbacks") or {}).get(self.state_key)
            if state is not None:
                self.schedule.restore(state, self._of(pl_module), self._averages(trainer))
            own(pl_module, checkpoint)

        # A callback's own hook comes after the weights are loaded; the module's comes before.
        pl_module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own hook back."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if the schedule says so."""
        self.schedule.prune(trainer.current_epoch, self._of(pl_module), trainer.optimizers, self._averages(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the plans, which Lightning writes into its checkpoints."""
        return self.schedule.state(self._network)

    def _of(self, pl_module: nn.Module) -> nn.Module:
        try:
            return pl_module.get_submodule(self.part)
        except AttributeError as error:
            raise UsageError(
                f"ScheduledPruning: the {type(pl_module).__name__} has no part {self.part!r}; pass part=, the name of "
                "the attribute that holds the network."
            ) from error

    def _averages(self, trainer: Trainer) -> list[nn.Module]:
        averaging = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        return [self._of(c._average_model.module) for c in averaging if c._average_model is not None]
