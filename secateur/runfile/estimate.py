"""How long a run will take on this machine, told from its own first steps, and what bounds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.criteria.feature_maps import examples
from secateur.criteria.papers import singh2020cfp as cfp
from secateur.network.copies import replica
from secateur.pruning.options import AUTO
from secateur.runfile import sources
from secateur.training import evaluation, stages, tasks
from secateur.training.arithmetic import decide
from secateur.training.passes import called
from secateur.training.stages import TrainingSettings

if TYPE_CHECKING:
    from secateur.data import DataBundle
    from secateur.engine.events import Steps
    from secateur.runfile.config import RunConfig

SECONDS = 5.0
"""How long each of the three speeds is measured: at least one batch, whatever that takes."""


@dataclass(frozen=True)
class Estimate:
    """Speeds of the unpruned network in images a second, and what they make of the whole schedule.

    The pruned network is as fast or faster, so that hours are at most as many, but for what chooses the channels.
    """

    device: str
    arithmetic: str
    workers: int
    """Processes that read images."""
    reading: float
    """Training images that are read, decoded and augmented a second."""
    training: float
    """Images trained on a second, with a batch at hand."""
    measuring: float
    """Images measured a second, with a batch at hand."""
    bound: str
    """``reading`` or ``computing``: which of both the training waits for."""
    rounds: int | None
    """Rounds to the target or the widths; None where the tolerance decides."""
    training_images: int
    """Images trained on in all; without rounds, of the baseline, one round and the final epochs."""
    measured_images: int
    """Images measured in all, likewise."""
    hours: float

    def plain(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        whole = "in all" if self.rounds is not None else "with one round, and the tolerance decides how many there are"
        by = "its own process" if not self.workers else f"{self.workers} process{'es' * (self.workers > 1)}"
        read = f"{_rate(self.reading)} read by {by}"
        time_taken = f"{60 * self.hours:.0f} minutes" if self.hours < 2 else f"{self.hours:.1f} hours"
        return (
            f"about {time_taken} at most: {self.training_images:,} training images and {self.measured_images:,} "
            f"measured {whole}; on {self.device} ({self.arithmetic}) {_rate(self.training)} trained on and "
            f"{_rate(self.measuring)} measured a second, {read} a second; {self.bound} is what bounds it"
        )


def _rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 10 else f"{images:.2g}"


def estimate(run: RunConfig, steps: Steps) -> Estimate:
    """Time the first steps of a run, with fresh weights, and write nothing.

    Args:
        run: The run.
        steps: Where to show progress.

    Raises:
        UsageError: If the request can't be met.
        DataError: If the data is missing or does not fit.
    """
    with steps.step("loading the data"):
        bundle = sources.data(run.data, run.data_options)
    with steps.step("building the model"):
        sources.seed(run.seed)
        found = sources.open_model(run.model, run.model_options, None, run.input, bundle)
        bundle = found.data or bundle
    rounds = rounds_of(run, found.model)
    trained, measured = schedule(run, bundle, rounds or 1)
    batches = tasks.training_batches(bundle, run.batch_size, run.seed, run.workers)
    with steps.step("reading"):
        reading, batch = _reading(batches)
    with steps.step("training"):
        runtime = stages.accelerator(run.settings.device)
        model = found.model.to(runtime.device)
        chosen = run.settings
        way = decide(model, found.inputs, runtime.device, chosen.precision, chosen.channels_last)
        teacher = replica(model) if _teaches(run, bundle) else None
        settings = TrainingSettings(**{f.name: getattr(run.baseline, f.name) for f in fields(TrainingSettings)})
        stage = stages.Stage(
            model, settings, epochs=10**6, runtime=runtime, loss=tasks.loss(bundle), arithmetic=way, teacher=teacher
        )
        try:
            training = _speed(lambda: stage.run_epoch([batch], 0).images)
        finally:
            stage.close()
    with steps.step("evaluating"):
        first = next(iter(tasks.evaluation_batches(bundle, "validation", 0)))
        count = examples(_inputs(first)) or 1

        def measure() -> int:
            evaluation.evaluate(model, [first], _forward_alone, runtime=runtime)
            return count

        measuring = _speed(measure)
    seconds = trained / min(reading, training) + measured / min(reading, measuring)
    return Estimate(
        _device(runtime.device),
        f"{way.precision}{', channels-last' if way.channels_last else ''}",
        batches.workers,
        reading,
        training,
        measuring,
        "reading" if reading < training else "computing",
        rounds,
        trained,
        measured,
        seconds / 3600,
    )


def _forward_alone(model: nn.Module, batches: Iterable[Any]) -> float:
    """Run a network as a metric does, and count nothing."""
    from accelerate.utils import send_to_device

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in batches:
        called(model, send_to_device(_inputs(batch), device), "estimate")
    return 0.0


def _inputs(batch: Any) -> Any:
    """Return what a network is called on, of a pair or of a detector's mapping."""
    return (batch["images"],) if isinstance(batch, dict) else batch[0]


def _teaches(run: RunConfig, bundle: DataBundle) -> bool:
    wanted = run.settings.distillation
    return bool(wanted) or (wanted is None and run.method == AUTO and bundle.task == "classification")


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _reading(batches: Any) -> tuple[float, Any]:
    """Return how many images a second come, once the processes have started, and the first batch."""
    stream: Iterator[Any] = iter(batches)
    first = next(stream)
    # What the processes have read ahead is no speed.
    ahead = 2 * batches.workers
    for _ in islice(stream, ahead):
        pass
    seen, started = 0, time.perf_counter()
    for batch in stream:
        seen += examples(_inputs(batch)) or 1
        if time.perf_counter() - started > SECONDS:
            break
    if not seen:  # few batches: the first is read once more
        started = time.perf_counter()
        again = next(iter(batches))
        seen = examples(_inputs(again)) or 1
    return seen / max(time.perf_counter() - started, 1e-9), first


def _speed(step: Callable[[], int]) -> float:
    """Return images a second of a step that returns its number of images, after one to warm up."""
    step()
    _wait()
    seen, started = 0, time.perf_counter()
    while True:
        seen += step()
        _wait()
        if time.perf_counter() - started > SECONDS:
            return seen / (time.perf_counter() - started)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def schedule(run: RunConfig, bundle: DataBundle, rounds: int) -> tuple[int, int]:
    """Return how many images a run trains on and how many it measures, of a number of rounds."""
    chosen, count = run.settings, len(bundle.train)  # type: ignore[arg-type]
    held, tested = len(bundle.validation), len(bundle.test)  # type: ignore[arg-type]
    auto = run.method == AUTO
    optimises = chosen.optimise_epochs if run.method == "cfp" or chosen.optimise == "none" else 0
    bounded = run.target is None and not chosen.widths
    final = (8 if auto and not bounded else 0) if chosen.final_epochs is None else chosen.final_epochs
    tuned = rounds - 1 if auto and not bounded and final else rounds
    goals = max(1, len(chosen.widths))
    epochs = (run.baseline.epochs if run.weights is None else 0) + rounds * optimises + tuned * chosen.finetune_epochs
    return (epochs + goals * final) * count, (2 * rounds + goals + 1) * held + (goals + 1) * tested


def rounds_of(run: RunConfig, model: nn.Module) -> int | None:
    """Return how many rounds a run takes; None where its tolerance decides.

    To a target, as if every layer lost the same share, which removes ``1 - (1 - s)²`` of MACs and parameters.
    """
    chosen = run.settings
    if chosen.rounds:
        return sum(chosen.rounds)
    if chosen.widths:
        return sum(_to_widths(run, model))
    if run.target is None:
        return chosen.max_rounds
    amount = run.target.model_dump()
    share = next(amount[k] for k in ("macs", "params", "channels", "memory", "latency") if amount.get(k) is not None)
    if run.method == AUTO:
        return 1 if share < 0.6 else 2 if share < 0.8 else 3
    linear = any(amount.get(k) is not None for k in ("channels", "memory"))
    return math.ceil((share if linear else 1 - math.sqrt(1 - share)) / chosen.fraction - 1e-9)


def _to_widths(run: RunConfig, model: nn.Module) -> Iterator[int]:
    """Yield the rounds to each goal of a chain of widths."""
    chosen = run.settings
    now = {name: int(m.weight.shape[0]) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    first = dict(now)
    named = sorted({first[name] for goal in chosen.widths for name in goal if name in first})
    rule = chosen.pairs if run.method == "cfp" else "width"
    for goal in chosen.widths:
        needed = 1
        for name, width in goal.items():
            size = first.get(name, width)
            each = cfp.pairs_by_width(size, chosen.fraction)
            if isinstance(rule, int):
                each = rule
            elif isinstance(rule, tuple) and len(rule) == len(named):
                each = rule[named.index(size)]
            needed = max(needed, math.ceil((now.get(name, width) - width) / max(1, each)))
            now[name] = width
        yield needed
