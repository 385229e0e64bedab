"""What training meets in a run: 33 faults, each one line that says where and what, and the run goes on once mended."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import secateur as sc
from secateur import checkpoint
from secateur.engine import RunDirectory, compress, resume
from secateur.errors import DataError, DivergedError, RunError, SecateurError, UsageError
from tests.engine.nets import Batches, Small, digits, trained

TRAIN, VALIDATION, TEST = digits(80)
QUICK: dict[str, Any] = {
    "optimise_epochs": 0, "finetune_epochs": 1, "lr": 0.02, "precision": "fp32", "channels_last": False,
    "device": "cpu", "max_rounds": 2, "target": sc.Target(macs=0.6),
}  # fmt: skip
ROUND = 2
"""The faults begin in the training of this round; the first is accepted before."""


class Fault:
    """Something that goes wrong from the second round's training on, until it is mended."""

    def __init__(self) -> None:
        self.on = False

    def __call__(self, event: Any) -> None:
        """Begin with the first batch of the second round."""
        if event.kind == "stage" and event.round == ROUND:
            self.on = True


Make = Callable[[Fault, dict[str, Any], pytest.MonkeyPatch], None]
"""Changes what a run is given, so that it fails where the fault is on."""
ROWS: list[Any] = []


def row(error: type[SecateurError], text: str) -> Callable[[Make], Make]:
    """Enter a fault with what its error is and says."""

    def enter(make: Make) -> Make:
        ROWS.append(pytest.param(make, error, text, id=make.__name__.replace("_", " ").strip()))
        return make

    return enter


class Changed(Batches):
    """Batches that a fault changes."""

    def __init__(self, fault: Fault, change: Callable[[Tensor, Tensor], Any], whole: Batches = TRAIN) -> None:
        super().__init__(whole.x, whole.y, whole.size, whole.shuffle)
        self.fault, self.change = fault, change

    def __iter__(self) -> Iterator[Any]:
        for x, y in super().__iter__():
            yield self.change(x, y) if self.fault.on else (x, y)


def data_of(change: Callable[[Tensor, Tensor], Any]) -> Make:
    return lambda fault, given, patch: given.update(train=Changed(fault, change))


def loss_of(change: Callable[[Tensor, Tensor], Any]) -> Make:
    def make(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        given["loss"] = lambda output, target: (change if fault.on else F.cross_entropy)(output, target)

    return make


def metric_of(change: Callable[[nn.Module], Any]) -> Make:
    def make(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        given["metric"] = lambda model, batches: change(model) if fault.on else 0.5

    return make


def raised(error: BaseException) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def named(make: Make, name: str, error: type[SecateurError], text: str) -> None:
    ROWS.append(pytest.param(make, error, text, id=name))


# The loss
named(
    loss_of(lambda o, y: F.cross_entropy(o, y) * math.nan),
    "a loss of NaN",
    DivergedError,
    "the training loss is nan; lower",
)
named(
    loss_of(lambda o, y: F.cross_entropy(o, y) + math.inf),
    "an infinite loss",
    DivergedError,
    "the training loss is inf; lower",
)
named(loss_of(lambda o, y: None), "a loss of nothing", UsageError, "loss: must return a scalar tensor, found NoneType")
named(loss_of(lambda o, y: 1.0), "a loss that is a float", UsageError, "loss: must return a scalar tensor, found float")
named(
    loss_of(lambda o, y: F.cross_entropy(o, y, reduction="none")), "a loss an example", UsageError, "found shape (40,)"
)
named(loss_of(lambda o, y: o.detach().sum()), "a loss without gradient", RunError, "the loss has no gradient")
named(
    loss_of(raised(ValueError("a loss of\nits own"))),
    "a loss that raises",
    UsageError,
    "no loss of what the network returns",
)
named(loss_of(lambda o, y: o["logits"]), "a loss of another output", UsageError, "no loss of what the network returns")
named(
    loss_of(raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))),
    "no memory for the loss",
    RunError,
    "memory",
)
named(loss_of(raised(MemoryError())), "no memory on the host", RunError, "memory")
# The data
named(data_of(lambda x, y: (x * math.nan, y)), "images of NaN", DivergedError, "the training loss is nan")
named(data_of(lambda x, y: (x, y + 5)), "labels out of range", UsageError, "out of bounds")
named(data_of(lambda x, y: (x, y - 200)), "labels below zero", UsageError, "out of bounds")
named(data_of(lambda x, y: (x, y[:3])), "fewer labels than images", UsageError, "no loss of what the network returns")
named(data_of(lambda x, y: (x, y.float())), "labels that are floats", UsageError, "no loss of what the network returns")
named(
    data_of(lambda x, y: (x.repeat(1, 3, 1, 1), y)),
    "images of other channels",
    DataError,
    "the network fails on inputs",
)
named(data_of(lambda x, y: (x[:, :, :4], y)), "images of another size", DataError, "the network fails on inputs")
named(data_of(lambda x, y: ((x * 8).byte(), y)), "images of bytes", DataError, "the network fails on inputs")
named(data_of(lambda x, y: (x[:0], y[:0])), "an empty batch", DataError, "the batch is empty")
named(data_of(lambda x, y: x), "a batch that is no pair", DataError, "a batch is a pair (inputs, target)")
named(data_of(lambda x, y: {"images": x, "classes": y}), "a mapping without labels", DataError, "found dict of 2")
named(data_of(raised(OSError(5, "Input/output error", "image-17.png"))), "data that raise", DataError, "image-17.png")
# The metric
named(metric_of(lambda m: None), "a metric of nothing", UsageError, "returns NoneType; it has to be one number")
named(metric_of(lambda m: math.nan), "a metric of NaN", DivergedError, "the metric is nan")
named(metric_of(lambda m: torch.ones(2)), "a metric of two numbers", UsageError, "has to be one number")
named(metric_of(lambda m: 1 / 0), "a metric that raises", UsageError, "fails: division by zero")


@row(DataError, "the training data is empty")
def _an_empty_loader(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    class Emptied(Changed):
        def __iter__(self) -> Iterator[Any]:
            return iter(()) if self.fault.on else super().__iter__()

    given["train"] = Emptied(fault, lambda x, y: (x, y))


class Images(Dataset[Any]):
    """Images one by one, of which one is at fault in a process that reads them."""

    def __init__(self, fault: Fault, wrong: Callable[[], Any]) -> None:
        self.fault, self.wrong = fault, wrong

    def __len__(self) -> int:
        return len(TRAIN.x)

    def __getitem__(self, index: int) -> Any:
        if self.fault.on and index == 7:
            self.wrong()
        return TRAIN.x[index], TRAIN.y[index]


@row(DataError, "image 7 is torn")
def _an_image_that_a_worker_can_not_read(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    given["train"] = DataLoader(Images(fault, raised(OSError("image 7 is torn"))), 40, num_workers=1)


@row(DataError, "DataLoader worker")
def _a_worker_that_is_killed(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    given["train"] = DataLoader(Images(fault, lambda: os.kill(os.getpid(), signal.SIGKILL)), 40, num_workers=1)


@row(DataError, "Batch norm needs more than one value a channel")
def _a_lone_example_before_a_batch_norm(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = Small(), nn.BatchNorm1d(10)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.inner(x))
            return out

    given.update(train=Changed(fault, lambda x, y: (x[:1], y[:1])), model=Normed())


@row(RunError, "the loss can't be differentiated")
def _a_step_that_is_written_over(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        y = output.sigmoid()
        y += 1
        return y.exp().sum()

    loss_of(loss)(fault, given, patch)


@row(RunError, "no kernel")
def _a_device_that_fails_in_the_backward_pass(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("CUDA error: no kernel image is available")

    loss_of(lambda o, y: F.cross_entropy(Failing.apply(o), y))(fault, given, patch)  # type: ignore[no-untyped-call]


@row(RunError, "the optimizer's step fails")
def _an_optimizer_that_fails(fault: Fault, given: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    whole = torch.optim.SGD.step

    def step(self: Any, *a: Any, **k: Any) -> Any:
        if fault.on:
            raise RuntimeError("no state for a parameter")
        return whole(self, *a, **k)

    patch.setattr(torch.optim.SGD, "step", step)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained(epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "error", "text"), ROWS)
def test_a_fault_of_training_is_one_line_and_the_run_goes_on_once_it_is_mended(
    network: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Make,
    error: type[SecateurError],
    text: str,
) -> None:
    fault = Fault()
    given: dict[str, Any] = {"model": network, "train": TRAIN, "validation": VALIDATION}
    make(fault, given, monkeypatch)
    model = given.pop("model")
    with pytest.raises(error) as caught:
        compress(model, "cfp", run_dir=tmp_path / "run", progress=fault, seed=3, **given, **QUICK)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    state, _ = RunDirectory(tmp_path / "run").restore()
    assert state.round == ROUND
    assert state.accepted_removed
    if isinstance(caught.value, RunError) and caught.value.result is not None:
        assert "ended" in caught.value.result.report
        checkpoint.load(type(model)(), tmp_path / "run" / "model.safetensors")
    fault.on = False
    result = resume(tmp_path / "run", type(model)(), **given)
    assert len(result.history) == 2
    assert all(bool(v.isfinite().all()) for v in result.model.state_dict().values())
