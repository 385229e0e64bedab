"""Training and evaluation on Accelerate: resumable by the epoch, and the same again for the same seed.

What an epoch sees is a function of ``(seed, stage, epoch)`` alone: the order of the examples, their augmentation,
dropout. A run that was killed and goes on from the last whole epoch therefore ends, on a CPU, in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.criteria.feature_maps import examples
from secateur.errors import DataError, DivergedError, RunError, UsageError
from secateur.network.isolation import set_modes
from secateur.training.arithmetic import Arithmetic, lay_back, lay_out
from secateur.training.passes import Batches, called, explained, kind_of, length_of, seeded, walk
from secateur.training.processes import equalise, require_launched, share, summed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(output, target)`` -> scalar."""

_MARKS = ("_is_accelerate_prepared", "_original_forward", "forward")
"""Attributes that Accelerate sets on a model that it prepares."""


@dataclass(frozen=True)
class TrainingSettings:
    """How weights are trained.

    ``schedule`` multiplies ``lr`` over the progress t in [0, 1] of the stage: ``constant``; ``linear``, 1 - t;
    ``cosine``, (1 + cos πt)/2. ``warmup`` is the share of the stage over which the rate first rises from 0.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """What updates the weights."""
    lr: float = 0.01
    """Learning rate, before the schedule."""
    momentum: float = 0.9
    """Momentum of ``sgd``."""
    nesterov: bool = False
    """Whether the momentum of ``sgd`` is Nesterov's."""
    weight_decay: float = 5e-4
    """Weight decay of every parameter."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate follows over the stage."""
    warmup: float = 0.0
    """Share of the stage over which the learning rate first rises from 0, in [0, 1)."""
    label_smoothing: float = 0.0
    """Share of the target that cross entropy spreads over all classes."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; longer gradients are scaled down to it."""

    def __post_init__(self) -> None:
        """Refuse values that can't be trained with."""
        if self.optimizer not in ("sgd", "adam", "adamw"):
            raise UsageError(f"optimizer: found {self.optimizer!r}; choose sgd, adam or adamw.")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UsageError(f"schedule: found {self.schedule!r}; choose constant, linear or cosine.")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise UsageError(f"lr: must be above 0, found {self.lr}.")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup: is a share of the stage in [0, 1), found {self.warmup}.")

    def rate(self, progress: float) -> float:
        """Learning rate at a progress in [0, 1]."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        t = (progress - self.warmup) / (1 - self.warmup)
        factor = {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[self.schedule]
        return self.lr * factor

    def build(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Make the optimizer of parameters that require a gradient."""
        trainable = [p for p in parameters if p.requires_grad]
        if not trainable:
            raise UsageError("training: no parameter of the model requires a gradient; unfreeze some.")
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                trainable, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
            )
        make = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return make(trainable, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Distillation:
    r"""Learn from the unpruned network too: Hinton, Vinyals, Dean 2015.

    The loss becomes :math:`(1-a)\,L + a\,T^2\,\mathrm{KL}(\mathrm{softmax}(z_t/T) \,\|\, \mathrm{softmax}(z/T))`.
    """

    weight: float = 0.5
    """a, in [0, 1]."""
    temperature: float = 4.0
    """T, above 0."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 <= self.weight <= 1 or not self.temperature > 0:
            raise UsageError(
                f"distillation: weight is in [0, 1], temperature above 0; found {self.weight} and {self.temperature}."
            )

    def __call__(self, loss: Tensor, output: Any, taught: Any) -> Tensor:
        """Blend the loss with the divergence from the teacher's output; classes are on dimension 1.

        Raises:
            UsageError: If the output is no tensor, as a detector's isn't.
        """
        if not isinstance(output, Tensor) or not isinstance(taught, Tensor):
            raise UsageError(
                f"distillation: learns from class scores, and the network returns {type(output).__name__}; leave it 0."
            )
        t = self.temperature
        student, teacher = F.log_softmax(output.float() / t, dim=1), F.log_softmax(taught.float() / t, dim=1)
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True) * (output.shape[1] / output.numel())
        return (1 - self.weight) * loss + self.weight * t * t * divergence


@dataclass(frozen=True)
class EpochRecord:
    """The result of one epoch of training."""

    loss: float
    """Mean training loss over the examples, over all processes, regulariser included."""
    images: int
    """Number of examples seen, over all processes."""
    stopped: bool = False
    """True where the stage's stop rule ended the epoch."""


def accelerator(device: str = "auto") -> Accelerator:
    """Make the Accelerate runtime that places models and batches; precision is each stage's own.

    Args:
        device: ``cpu``, or ``auto`` for the accelerator where there is one.

    Raises:
        UsageError: If it is neither, or the process already runs Accelerate in another precision.
    """
    from accelerate import Accelerator

    if device not in ("auto", "cpu"):
        raise UsageError(f"device: is auto or cpu, found {device!r}.")
    require_launched()
    try:
        # Networks change between stages, and a metric of one's own gets them as they are: nothing is compiled, whatever
        # stands in the environment, as transformers' arguments leave it there.
        return Accelerator(cpu=device == "cpu", mixed_precision="no", dynamo_backend="no")
    except (ValueError, ImportError) as error:
        raise UsageError(f"device {device}: {' '.join(str(error).split())}") from error


class Stage:
    """One stage of training: a model, its optimizer and how many epochs they go together.

    Epochs are run one at a time, so that whoever runs them can store :meth:`state` between them.

    Args:
        model: Trained in place; it is moved to the accelerator's device.
        settings: How.
        epochs: Number of epochs of the stage, for the schedule.
        seed: Seed of the run.
        number: Number of the stage within the run, so that no two stages see the same order.
        runtime: Accelerate runtime; a plain one when None.
        loss: ``loss(output, target)``; cross entropy when None.
        regulariser: Called once a step; its scalar is added to the loss.
        stop: Called after each step; True ends the stage.
        teacher: Unpruned network, for distillation.
        distillation: How to listen to it.
        arithmetic: In which precision and memory format to compute; fp32 and contiguous when None.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings | None = None,
        *,
        epochs: int,
        seed: int = 0,
        number: int = 0,
        runtime: Accelerator | None = None,
        loss: Loss | None = None,
        regulariser: Callable[[], Tensor] | None = None,
        stop: Callable[[], bool] | None = None,
        teacher: nn.Module | None = None,
        distillation: Distillation | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or TrainingSettings()
        self.epochs, self.seed, self.number = epochs, seed, number
        self.runtime = runtime or accelerator()
        smoothing = self.settings.label_smoothing
        self.loss: Loss = loss or (lambda output, target: F.cross_entropy(output, target, label_smoothing=smoothing))
        self.regulariser, self.stop = regulariser, stop
        self.teacher = None if teacher is None else teacher.to(self.runtime.device)
        self.distillation = distillation or Distillation()
        self.model.to(self.runtime.device)
        optimizer = self.settings.build(self.model.parameters())
        self.arithmetic = arithmetic or Arithmetic()
        listens = [] if self.teacher is None else [self.teacher]
        self._laid_out = lay_out(self.model, *listens, channels_last=self.arithmetic.channels_last)
        self._scaler = torch.amp.GradScaler(self.runtime.device.type) if self.arithmetic.precision == "fp16" else None
        self._marks = {name: value for name, value in vars(self.model).items() if name in _MARKS}
        self._prepared, self._optimizer = self.runtime.prepare(self.model, optimizer)

    def run_epoch(
        self, batches: Batches, epoch: int, on_batch: Callable[[int, int | None, float], None] | None = None
    ) -> EpochRecord:
        """Train for one epoch.

        Args:
            batches: Pairs ``(inputs, target)``.
            epoch: Number of the epoch within the stage, from 0.
            on_batch: Called with the number of batches done, how many there are (None if unknown), and the loss.

        Raises:
            RunError: If the loss is not finite.
            DataError: If there is no batch, or a batch is not a pair.
        """
        from accelerate.utils import send_to_device

        where = f"stage {self.number}, epoch {epoch + 1}"
        runtime, length = self.runtime, length_of(batches)
        modes = {module: module.training for module in self.model.modules()}
        self._prepared.train()
        if self.teacher is not None:
            self.teacher.eval()
        on_host = runtime.device.type == "cpu"
        total, seen, done, stopped = torch.zeros((), dtype=torch.float64, device=runtime.device), 0, 0, False
        with seeded(self.seed, self.number, epoch) as seed:
            length = None if length is None else length // runtime.num_processes
            for inputs, target in share(runtime, walk(batches, seed, where)):
                inputs, target = send_to_device((inputs, target), runtime.device)
                self._set_rate((epoch + done / (length or math.inf)) / self.epochs)
                loss = self._step(inputs, target, f"{where}, batch {done + 1}")
                count = examples(inputs) or 1
                # Reading the loss waits for the device, so on an accelerator it is read every 50 batches only.
                if on_host or done % 50 == 0:
                    # Every process sees a loss that is not finite, and ends at the same batch.
                    self._check(float(summed(runtime, loss)), f"{where}, batch {done + 1}")
                total += loss.double() * count
                seen, done = seen + count, done + 1
                if on_batch is not None:
                    on_batch(done, length, float(loss) if on_host else math.nan)
                if self.stop is not None and self.stop():
                    stopped = True
                    break
        set_modes(modes.items())
        if not seen:
            raise DataError(self._too_few(where))
        equalise(runtime, self.model)
        count = int(summed(runtime, torch.tensor(seen, device=runtime.device)))
        mean = float(summed(runtime, total)) / count
        self._check(mean, where)
        return EpochRecord(mean, count, stopped)

    def _too_few(self, where: str) -> str:
        number = self.runtime.num_processes
        if number > 1:
            return f"{where}: the training data hold no batch for each of {number} processes; take smaller batches."
        return f"{where}: the training data is empty; give at least one batch."

    def _step(self, inputs: Any, target: Any, where: str) -> Tensor:
        output = self._forward(self._prepared, inputs, where)
        what = f"no loss of what the network returns ({kind_of(output)}) and the target ({kind_of(target)})"
        with explained(UsageError, where, what, "Give loss=function(output, target)."):
            loss = self.loss(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"loss: must return a scalar tensor, found {found}; take the mean over the batch.")
        if not loss.requires_grad:
            raise RunError(
                f"{where}: the loss has no gradient; the network or the loss detaches its values, or runs without "
                "gradients. Training needs a network whose forward can be differentiated, and such a loss."
            )
        if self.teacher is not None:
            with torch.no_grad():
                taught = self._forward(self.teacher, inputs, where)
            loss = self.distillation(loss, output, taught)
        if self.regulariser is not None:
            loss = loss + self.regulariser()
        self._optimizer.zero_grad()
        self._descend(loss, where)
        return loss.detach()

    def _forward(self, model: nn.Module, inputs: Any, where: str) -> Any:
        with self.arithmetic.autocast(self.runtime.device):
            output = called(model, inputs, where)
        return self.arithmetic.widened(output)

    def _descend(self, loss: Tensor, where: str) -> None:
        scaler, optimizer = self._scaler, self._optimizer
        with explained(RunError, where, "the loss can't be differentiated", "Training needs a forward that can be."):
            # The gradients of fp16 would be rounded to zero unscaled.
            self.runtime.backward(loss if scaler is None else scaler.scale(loss))
        with explained(RunError, where, "the optimizer's step fails", "Another optimizer may do."):
            if scaler is not None:
                optimizer = self._optimizer.optimizer
                scaler.unscale_(optimizer)
            if self.settings.clip_norm is not None:
                self.runtime.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

    def _set_rate(self, progress: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate(min(progress, 1.0))

    def _check(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"{where}: the training loss is {loss}; lower the learning rate (now {self.settings.lr:g})."
            )

    def state(self) -> dict[str, Any]:
        """Return the optimizer's state dict: tensors and numbers that :meth:`restore` takes back."""
        state: dict[str, Any] = {"optimizer": self._optimizer.state_dict()}
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def close(self) -> nn.Module:
        """Take the model off the runtime again, as it was but for its weights, and return it."""
        self.model = self.runtime.unwrap_model(self._prepared, keep_fp32_wrapper=False)
        # If Accelerate's attributes were left on the model, the next stage would train it in full precision.
        for name in _MARKS:
            vars(self.model).pop(name, None)
        vars(self.model).update(self._marks)
        # Sums over weights are taken in memory's order: what is measured next must not depend on where training ended.
        lay_back(self._laid_out)
        # Accelerate keeps every prepared object alive until told.
        self.runtime.free_memory()
        return self.model


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    settings: TrainingSettings | None = None,
    seed: int = 0,
    stage: int = 0,
    on_epoch: Callable[[int, EpochRecord], None] | None = None,
    on_batch: Callable[[int, int | None, float], None] | None = None,
    **options: Any,
) -> list[EpochRecord]:
    """Train a model in place, for a number of epochs.

    Args:
        model: Trained in place; train or eval mode is left as found.
        batches: Pairs ``(inputs, target)``, walked through once an epoch.
        epochs: Number of epochs, at least 1.
        settings: Optimizer, rate, schedule.
        seed: Seed of the run.
        stage: Number of the stage within the run; the order of the examples follows ``(seed, stage, epoch)``.
        on_epoch: Called after each epoch with its number from 0 and its record.
        on_batch: Called after each batch; see :meth:`Stage.run_epoch`.
        options: ``runtime``, ``loss``, ``regulariser``, ``stop``, ``teacher``, ``distillation``, ``arithmetic`` of
            :class:`Stage`.

    Returns:
        One record an epoch; fewer than ``epochs`` where ``stop`` ended the training.

    Raises:
        RunError: If the loss is not finite.
        DataError: If there is no batch, or a batch is not a pair.
        UsageError: If ``epochs`` is below 1 or a setting is out of range.
    """
    if epochs < 1:
        raise UsageError(f"epochs: must be at least 1, found {epochs}.")
    training = Stage(model, settings, epochs=epochs, seed=seed, number=stage, **options)
    records = []
    try:
        for epoch in range(epochs):
            records.append(training.run_epoch(batches, epoch, on_batch))
            if on_epoch is not None:
                on_epoch(epoch, records[-1])
            if records[-1].stopped:
                break
    finally:
        training.close()
    return records
