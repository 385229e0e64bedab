"""The callback of transformers, in trainings by its own ``Trainer``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur as sc
from secateur.errors import CheckpointError, UsageError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")

GENERATOR = torch.Generator().manual_seed(0)
DATA = [
    {"pixel_values": torch.randn(3, 32, 32, generator=GENERATOR), "labels": torch.tensor(number % 3)}
    for number in range(16)
]
INPUTS = {"pixel_values": torch.stack([one["pixel_values"] for one in DATA[:2]])}


@pytest.fixture(autouse=True)
def _environment_is_put_back() -> Iterator[None]:
    """Put back what the arguments of a training leave for Accelerate in the environment and in its own state."""
    from accelerate.state import AcceleratorState

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state()


def build() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config)


def pruning() -> Any:
    from secateur.integrations.transformers import ScheduledPruning

    return ScheduledPruning(
        {1: sc.Target(channels=0.3), 2: sc.Target(channels=0.2)}, INPUTS, method="l1", allocation="uniform"
    )


def trainer(folder: Path, model: Any, callback: Any, **options: Any) -> Any:
    given = transformers.TrainingArguments(
        folder, num_train_epochs=3, per_device_train_batch_size=8, save_strategy="epoch", logging_strategy="no",
        report_to=[], use_cpu=True, learning_rate=0.01, disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return transformers.Trainer(model, given, train_dataset=DATA, callbacks=[callback])


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_training_goes_on_over_the_cuts_and_from_a_checkpoint(tmp_path: Path) -> None:
    model = build()
    whole = trainer(tmp_path / "whole", model, pruning())
    whole.train()
    first = model.resnet.embedder.embedder.convolution
    assert whole.model is model
    assert first.out_channels < 7
    state = whole.optimizer.state
    assert set(state) == set(model.parameters())
    assert all(state[p]["exp_avg"].shape == p.shape and state[p]["step"] == 6 for p in model.parameters())
    assert whole.lr_scheduler.get_last_lr() == [0.0] * len(whole.optimizer.param_groups)

    # From the end of the second epoch on, once more, with a fresh model.
    checkpoint = tmp_path / "whole/checkpoint-4"
    callback, fresh = pruning(), build()
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer(tmp_path / "fails", build(), pruning()).train(resume_from_checkpoint=str(checkpoint))
    callback.restore(fresh, checkpoint)
    assert callback.schedule.done == [1]
    trainer(tmp_path / "again", fresh, callback).train(resume_from_checkpoint=str(checkpoint))
    assert same(fresh.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="otherwise, or further"):
        pruning().restore(fresh, checkpoint)
    with pytest.raises(CheckpointError, match="holds no state of a ScheduledPruning"):
        pruning().restore(build(), tmp_path)

    sc.push(model, tmp_path / "hub")
    again = sc.pull(tmp_path / "hub")
    assert same(again.state_dict(), model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(**INPUTS).logits, model.eval()(**INPUTS).logits)


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is compiled"):
        trainer(tmp_path, build(), pruning(), torch_compile=True).train()
