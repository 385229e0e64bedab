"""Training of the network that a run begins with: taken up again after any epoch, and shared by runs that ask alike."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur import checkpoint
from secateur.checkpoint.digest import digest
from secateur.checkpoint.records import before, flatten, newest, read_record, restore, write_record
from secateur.errors import CheckpointError, UsageError
from secateur.training.passes import Batches
from secateur.training.processes import say_if_other
from secateur.training.stages import Stage, TrainingSettings

FORMAT_VERSION = 3
"""Version of the layout of the file of a training under way."""

_KEY = "secateur-training"


@dataclass(frozen=True)
class Halfway:
    """Where a training stands between two epochs.

    No state of a random generator is among it: what an epoch draws follows from the seed and its number alone.
    """

    epochs: list[dict[str, Any]]
    """A record of each epoch done: ``epoch``, from 1, ``loss``, ``images``, ``seconds``."""
    model: dict[str, Tensor]
    stage: dict[str, Any]
    """See :meth:`secateur.training.stages.Stage.state`."""
    processes: int
    """In how many it was trained last."""


def fingerprint(model: nn.Module) -> str:
    """Return a digest of all weights and buffers: two networks with the same one begin alike."""
    return digest("", {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def file_name(request: Mapping[str, Any]) -> str:
    """Return the name under which runs with the same request find a trained network."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"))
    kind = "".join(c if c.isalnum() else "-" for c in Path(str(request["model"]).rpartition(":")[2]).name)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def read(file: Path, request: Mapping[str, Any]) -> Halfway | None:
    """Return where a training stands; None where none has finished an epoch.

    Raises:
        CheckpointError: If the file is damaged.
        UsageError: If it is the training of another request.
    """
    if not (file.is_file() or before(file).is_file()):
        return None
    return newest(file, lambda place: _read(place, request))


def _read(file: Path, request: Mapping[str, Any]) -> Halfway:
    record, tensors = read_record(file, _KEY, FORMAT_VERSION, "a training under way")
    try:
        stored = record["request"]
        found = Halfway(
            record["epochs"],
            {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")},
            restore(record["stage"], tensors),
            int(record["processes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged, or written by another release: {error}.") from error
    wanted = json.loads(json.dumps(request))
    other = next((k for k in {**stored, **wanted} if stored.get(k) != wanted.get(k)), None)
    if other is not None:
        raise UsageError(
            f"{file}: a baseline is under way here with {other} {stored.get(other)!r}, and {wanted.get(other)!r} is "
            "asked for; choose another run directory, or remove the file."
        )
    return found


def train(
    model: nn.Module,
    batches: Batches,
    file: Path,
    request: Mapping[str, Any],
    *,
    epochs: int,
    settings: TrainingSettings,
    seed: int,
    write: bool = True,
    on_epoch: Callable[[int, Mapping[str, Any] | None], None] = lambda done, record: None,
    on_batch: Callable[[int, int | None, float], None] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train a network as :func:`secateur.training.stages.fit` does, storing after every epoch where it stands.

    A killed call is made again with the same arguments, and ends, on a CPU with as many threads, in the same bits; in
    another number of processes it ends in other ones, and says so.

    Args:
        model: Trained in place, as it was at the very first call.
        batches: As in ``fit``.
        file: Of the training under way; beside it, under the suffix ``.jsonl``, stands a line an epoch.
        request: JSON values that tell this training from others.
        epochs: As in ``fit``.
        settings: As in ``fit``.
        seed: As in ``fit``.
        write: False for all but the main one of several processes.
        on_epoch: Called with the number of epochs done and the record of the last: without one before the first batch,
            and after every epoch.
        on_batch: As in ``fit``.
        options: As in ``fit``.

    Returns:
        A record of each epoch, those of earlier calls too; see :class:`Halfway`.

    Raises:
        CheckpointError: If the file is damaged.
        UsageError: If it is the training of another request.
        RunError: If the loss is not finite, or the disk is full.
        DataError: If there is no batch, or a batch is not a pair.
    """
    begun = read(file, request)
    records = [] if begun is None else begun.epochs
    if begun is not None:
        model.load_state_dict(begun.model)
        if write:  # it may have been killed before the line of its last epoch was written
            _write_lines(file, records)
    stage = Stage(model, settings, epochs=epochs, seed=seed, **options)
    try:
        if begun is not None:
            stage.restore(begun.stage)
            say_if_other(f"baseline: {file}", begun.processes, stage.runtime.num_processes)
        on_epoch(len(records), None)
        for epoch in range(len(records), epochs):
            started = time.perf_counter()
            done = stage.run_epoch(batches, epoch, on_batch)
            seconds = round(time.perf_counter() - started, 1)
            records.append({"epoch": epoch + 1, "loss": done.loss, "images": done.images, "seconds": seconds})
            if write:
                _write(file, request, records, model, stage)
            on_epoch(len(records), records[-1])
    finally:
        stage.close()
    return records


def _write(
    file: Path, request: Mapping[str, Any], records: list[dict[str, Any]], model: nn.Module, stage: Stage
) -> None:
    tensors = {f"model/{k}": v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    state = flatten(stage.state(), "stage", tensors)
    number = stage.runtime.num_processes
    whole = {"request": request, "epochs": records, "stage": state, "processes": number}
    write_record(file, _KEY, FORMAT_VERSION, whole, tensors)
    _write_lines(file, records)


def _write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    checkpoint.write_atomic(file.with_suffix(".jsonl"), lines.encode())


def clear(file: Path) -> None:
    """Remove the files of a training that is over."""
    for each in (file, before(file)):
        each.unlink(missing_ok=True)


def keep(model: nn.Module, file: Path, request: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    """Write a trained network for other runs with the same request; see :func:`kept`."""
    checkpoint.save(model, (), file, extra={"request": request, "epochs": records})


def kept(model: nn.Module, file: Path, request: Mapping[str, Any]) -> nn.Module | None:
    """Return the trained network that a run with the same request has kept; None where none has.

    Raises:
        CheckpointError: If the file is damaged, or holds something else.
    """
    if not file.is_file():
        return None
    if checkpoint.read_header(file).extra.get("request") != json.loads(json.dumps(request)):
        raise CheckpointError(f"{file}: holds no network trained as this run asks; remove the file.")
    return checkpoint.load(model, file)
