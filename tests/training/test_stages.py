"""Training and evaluation: the same again for the same seed, interrupted or not, and nothing left behind."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateur.checkpoint.records import flatten, restore
from secateur.errors import DataError, RunError, SecateurError, UsageError
from secateur.training import passes, stages
from secateur.training.arithmetic import Arithmetic
from secateur.training.evaluation import evaluate
from secateur.training.stages import Distillation, Stage, TrainingSettings, fit
from tests.engine.nets import Small, digits


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small()


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("settings", [
    TrainingSettings(nesterov=True, schedule="cosine"),
    TrainingSettings(optimizer="adam", lr=1e-3, clip_norm=1.0),
    TrainingSettings(optimizer="adamw", lr=1e-3, schedule="linear", warmup=0.3, label_smoothing=0.1),
])  # fmt: skip
def test_an_interrupted_stage_ends_in_the_same_bits(settings: TrainingSettings) -> None:
    train = digits()[0]
    whole = model_of()
    fit(whole, train, epochs=4, settings=settings, seed=3, stage=2)
    part = model_of()
    first = Stage(part, settings, epochs=4, seed=3, number=2)
    for epoch in range(2):
        first.run_epoch(train, epoch)
    stored, optimizer = copy.deepcopy(part.state_dict()), copy.deepcopy(first.state())
    first.close()
    torch.rand(7)  # whatever else the process draws
    random.random()
    other = model_of(99)
    other.load_state_dict(stored)
    second = Stage(other, settings, epochs=4, seed=3, number=2)
    second.restore(optimizer)
    for epoch in range(2, 4):
        second.run_epoch(train, epoch)
    second.close()
    assert equal(whole, other)


def test_seed_stage_and_epoch_each_change_the_order() -> None:
    train = digits()[0]
    results = []
    for seed, stage in ((0, 0), (1, 0), (0, 1)):
        model = model_of()
        fit(model, train, epochs=1, seed=seed, stage=stage)
        results.append(model)
    assert not any(equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    seeds = {passes.derived_seed(s, n, e) for s in range(4) for n in range(4) for e in range(4)}
    assert len(seeds) == 64


class Noisy(TensorDataset):
    """Augments from all three generators that transforms draw from."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(1) + random.random() + float(np.random.rand()), y  # noqa: NPY002


@pytest.mark.parametrize("own_generator", [False, True])
def test_data_loaders_repeat_order_and_augmentation(own_generator: bool) -> None:
    batches = digits()[0]
    generator = torch.Generator() if own_generator else None
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        loader = DataLoader(Noisy(batches.x, batches.y), batch_size=50, shuffle=True, generator=generator)
        model = model_of()
        fit(model, loader, epochs=2, seed=5)
        results.append(model)
    assert equal(*results)


def test_the_callers_generators_and_modes_are_left_alone() -> None:
    train, validation, _ = digits()
    model = model_of()
    model.get_submodule("bn1").eval()
    modes = {name: m.training for name, m in model.named_modules()}
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fit(model, train, epochs=1)
    evaluate(model, validation)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert type(model.forward).__name__ == "method"


def slow_sgd(model: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float, momentum: float, decay: float) -> None:
    """SGD with momentum, in its textbook form."""
    speed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.train()
    for x, y in batches:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                speed[name] = momentum * speed[name] + g + decay * p
                p -= lr * speed[name]


def test_fit_is_sgd() -> None:
    x, y = digits()[0].x[:120], digits()[0].y[:120]
    batches = [(x[i : i + 30], y[i : i + 30]) for i in range(0, 120, 30)]
    ours, theirs = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    batches = [(a.double(), b) for a, b in batches]
    fit(ours, batches, epochs=2, settings=TrainingSettings(lr=0.1, momentum=0.8, weight_decay=0.01))
    slow_sgd(theirs, batches * 2, 0.1, 0.8, 0.01)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_schedules() -> None:
    linear, cosine = (
        TrainingSettings(lr=2.0, schedule="linear", warmup=0.5),
        TrainingSettings(lr=2.0, schedule="cosine"),
    )
    assert [linear.rate(t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 1, 2, 1, 0]
    assert [round(cosine.rate(t), 12) for t in (0, 0.5, 1)] == [2, 1, 0]
    assert cosine.rate(0.25) == pytest.approx(1 + math.sqrt(0.5))


def test_regulariser_and_stop_are_used() -> None:
    norms = []
    for strength in (0.0, 0.1):
        model = model_of()
        weight = model.get_parameter("fc2.weight")
        calls: list[int] = []

        def pull(weight: Tensor = weight, calls: list[int] = calls, strength: float = strength) -> Tensor:
            calls.append(1)
            return strength * weight.square().sum()

        records = fit(model, digits()[0], epochs=5, regulariser=pull, stop=lambda calls=calls: len(calls) == 13)  # type: ignore[misc]
        assert [(r.images, r.stopped) for r in records] == [(400, False), (3 * 40, True)]
        norms.append(float(weight.detach().norm()))
    assert norms[1] < 0.95 * norms[0]


def test_distillation_is_the_equation() -> None:
    z, t = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    total = 0.0
    for i in range(6):
        p = [math.exp(float(v) / 3) for v in t[i]]
        q = [math.exp(float(v) / 3) for v in z[i]]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
    loss = F.cross_entropy(z, y)
    assert float(Distillation(0.3, 3.0)(loss, z, t)) == pytest.approx(0.7 * float(loss) + 0.3 * 9 * total, rel=1e-5)


def test_a_teacher_is_followed_and_unchanged() -> None:
    teacher, model = model_of(1), model_of(2)
    before = copy.deepcopy(teacher.state_dict())
    x = digits()[0].x[:40]
    teacher.eval()
    model.eval()

    def gap() -> float:
        with torch.no_grad():
            return float(F.mse_loss(model(x).softmax(1), teacher(x).softmax(1)))

    first = gap()
    fit(model, digits()[0], epochs=3, teacher=teacher, distillation=Distillation(1.0, 2.0))
    model.eval()
    assert gap() < first
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("size", [7, 64, 200])
def test_accuracy_is_a_count(size: int) -> None:
    model, (_, validation, _) = model_of(), digits()
    validation.size = size
    model.eval()
    with torch.no_grad():
        right = sum(int(model(x[None]).argmax() == y) for x, y in zip(validation.x, validation.y, strict=True))
    model.train()
    assert evaluate(model, validation) == pytest.approx(right / 200, abs=1e-6)
    assert model.training


def test_top_5_is_counted_beside_top_1_where_there_are_many_classes() -> None:
    from secateur.training.evaluation import Accuracy, details

    torch.manual_seed(0)
    scores, labels = torch.randn(60, 20), torch.randint(0, 20, (60,))
    batches = [(scores[i : i + 25], labels[i : i + 25]) for i in (0, 25, 50)]
    metric = Accuracy()
    found = evaluate(nn.Identity(), batches, metric)
    order = scores.argsort(1, descending=True)
    assert found == pytest.approx(sum(int(o[0] == y) for o, y in zip(order, labels, strict=True)) / 60)
    top5 = sum(int(y in o[:5].tolist()) for o, y in zip(order, labels.tolist(), strict=True)) / 60
    assert details(metric) == {"top-5": pytest.approx(top5)}
    assert top5 > found
    evaluate(nn.Identity(), [(scores[:, :10], labels % 10)], metric)
    assert details(metric) is None, "of 10 classes, and nothing is left of what was measured before"


def test_own_metrics() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    model, (_, validation, _) = model_of(), digits()
    top3 = evaluate(model, validation, MulticlassAccuracy(num_classes=10, top_k=3, average="micro"))
    assert evaluate(model, validation) <= top3 <= 1
    assert evaluate(model, validation, lambda net, data: 0.25 if not net.training else 0.0) == 0.25


def test_inputs_as_tuples_mappings_and_labelled_mappings() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.fc((a + b).flatten(1))
            return out

    x, y = digits()[0].x[:40], digits()[0].y[:40]
    forms: list[list[Any]] = [
        [((x, x), y)], [({"a": x, "b": x}, y)], [{"a": x, "b": x, "labels": y}],
    ]  # fmt: skip
    torch.manual_seed(0)
    start = Two()
    results = []
    for form in forms:
        model = copy.deepcopy(start)
        assert fit(model, form, epochs=1)[0].images == 40
        results.append((model.fc.weight, evaluate(model, form)))
    assert all(torch.equal(results[0][0], w) and results[0][1] == a for w, a in results)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, d: fit(m, d, epochs=0), UsageError, "epochs: must be at least 1"),
        (lambda m, d: fit(m, [], epochs=1), DataError, "training data is empty"),
        (lambda m, d: fit(m, [torch.ones(2)], epochs=1), DataError, "a batch is a pair .* found Tensor"),
        (lambda m, d: evaluate(m, []), DataError, "data is empty"),
        (lambda m, d: evaluate(m, d, lambda n, b: math.nan), RunError, "metric is nan"),
        (lambda m, d: evaluate(m, d, "accuracy"), UsageError, "metric: is a torchmetrics.Metric or a function"),
        (lambda m, d: evaluate(m, [(x, y.float()) for x, y in d]), DataError, "accuracy needs .* and torch.float32 of"),
        (lambda m, d: evaluate(m, [(x, y[:, None]) for x, y in d]), DataError, "accuracy needs .* give a metric"),
        (lambda m, d: evaluate(m, [(x, y[:-1]) for x, y in d]), DataError, "accuracy needs"),
        (lambda m, d: fit(m, d, epochs=1, loss=lambda o, y: o.sum(1)), UsageError, "must return a scalar .* shape"),
        (lambda m, d: fit(m, d, epochs=1, loss=lambda o, y: 3.0), UsageError, "must return a scalar .* float"),
        (lambda m, d: fit(m.requires_grad_(False), d, epochs=1), UsageError, "no parameter"),
        (lambda m, d: TrainingSettings(lr=0), UsageError, "lr: must be above 0"),
        (lambda m, d: TrainingSettings(schedule="step"), UsageError, "choose constant"),
        (lambda m, d: TrainingSettings(warmup=1.0), UsageError, "share of the stage"),
        (lambda m, d: Distillation(2.0), UsageError, "weight is in"),
        (lambda m, d: stages.accelerator("tpu"), UsageError, "device: is auto or cpu"),
    ],
)
def test_bad_requests_are_one_clear_line(
    call: Callable[[nn.Module, Any], Any], error: type[SecateurError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call(model_of(), digits()[1])
    assert "\n" not in str(caught.value)


def test_a_diverging_loss_stops_the_run() -> None:
    with pytest.raises(RunError, match=r"stage 0, epoch 1.*loss is (nan|inf); lower the learning rate \(now 1e\+25\)"):
        fit(model_of(), digits()[0], epochs=3, settings=TrainingSettings(lr=1e25))


def test_stages_of_one_process_compute_each_in_its_own_precision() -> None:
    model, seen = model_of(), []
    before = set(vars(model))
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for number, name in enumerate(("bf16", "bf16", "fp32", "fp16")):
        fit(model, digits(80)[0], epochs=1, stage=number, arithmetic=Arithmetic(name))
        assert set(seen) == {getattr(torch, {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}[name])}
        assert set(vars(model)) == before
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        seen.clear()
    evaluate(model, digits()[1])
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_fp32_does(precision: str) -> None:
    losses = [
        fit(model_of(), digits()[0], epochs=4, arithmetic=Arithmetic(name))[-1].loss for name in ("fp32", precision)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_interrupted_stage_with_its_channels_last_ends_in_the_same_bits(precision: str) -> None:
    train, way = digits()[0], Arithmetic(precision, channels_last=True)
    settings = TrainingSettings(clip_norm=1.0)
    whole, part, other = model_of(), model_of(), model_of(99)
    fit(whole, train, epochs=4, settings=settings, arithmetic=way)
    first = Stage(part, settings, epochs=4, arithmetic=way)
    for epoch in range(2):
        first.run_epoch(train, epoch)
    other.load_state_dict({k: v.clone(memory_format=torch.contiguous_format) for k, v in part.state_dict().items()})
    second = Stage(other, settings, epochs=4, arithmetic=way)
    tensors: dict[str, Tensor] = {}
    plain = flatten(first.state(), "stage", tensors)
    second.restore(restore(plain, {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}))
    for epoch in range(2, 4):
        second.run_epoch(train, epoch)
    second.close()
    assert equal(whole, other)
    assert other.get_submodule("conv2").get_parameter("weight").is_contiguous()


def test_a_teacher_lies_as_it_did_after_training() -> None:
    teacher, model = model_of(1), model_of(2)
    fit(model, digits(80)[0], epochs=1, teacher=teacher, arithmetic=Arithmetic(channels_last=True))
    assert all(p.is_contiguous() for net in (teacher, model) for p in net.parameters())


# What the user's own code raises


def small(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


class Changed(nn.Module):
    """A network with something done to what it returns."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = small(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner, x)


def written_over(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).sigmoid()
    y += 1
    return y.exp()


@torch.no_grad()
def without_gradients(model: nn.Module, x: Tensor) -> Any:
    return model(x)


@torch.inference_mode()
def in_inference_mode(model: nn.Module, x: Tensor) -> Any:
    return model(x)


IMAGES, LABELS = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5


@pytest.mark.parametrize(
    ("model", "batch", "loss", "error", "text"),
    [
        (Changed(written_over), None, None, RunError, "the loss can't be differentiated: one of the variables needed"),
        (Changed(without_gradients), None, None, RunError, "the loss has no gradient; the network or the loss"),
        (Changed(in_inference_mode), None, None, RunError, "the loss has no gradient; the network or the loss"),
        (small(), None, lambda y, _: y.detach().sum(), RunError, "the loss has no gradient"),
        (Changed(lambda m, x: (m(x), x)), None, None, UsageError, "no loss of what the network returns (tuple) and"),
        (small(), None, lambda y, _: y["logits"], UsageError, "no loss of what the network returns (torch.float32 of"),
        (small(), (IMAGES, LABELS + 3), None, UsageError, "Target 5 is out of bounds. Give loss=function("),
        (small(), (IMAGES, LABELS[:2]), None, UsageError, "the target (torch.int64 of shape (2,)): Expected"),
        (small(), (IMAGES[:0], LABELS[:0]), None, DataError, "the batch is empty, its inputs of shape [(0, 1, 8, 8)]"),
        (small(), (IMAGES[:, :, 0], LABELS), None, DataError, "the network fails on inputs of shape [(6, 1, 8)]"),
        (
            small(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)), (IMAGES[:1], LABELS[:1]), None, DataError,
            "Batch norm needs more than one value a channel: leave such a batch out (drop_last)",
        ),
    ],
)  # fmt: skip
def test_what_training_meets_in_the_users_code_is_one_line(
    model: nn.Module, batch: Any, loss: Any, error: type[SecateurError], text: str
) -> None:
    with pytest.raises(error) as caught:
        fit(model, [batch or (IMAGES, LABELS)], epochs=1, loss=loss)
    assert str(caught.value).startswith("stage 0, epoch 1, batch 1: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def failing(_model: nn.Module, _batches: Any) -> float:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("batch", "metric", "error", "text"),
    [
        (None, lambda _model, _batches: None, UsageError, "metric <lambda>: returns NoneType; it has to be one number"),
        (
            None,
            lambda _model, _batches: torch.ones(2),
            UsageError,
            "metric <lambda>: returns torch.float32 of shape (2,)",
        ),
        (None, lambda _model, _batches: math.nan, RunError, "evaluation: the metric is nan"),
        (None, failing, UsageError, "metric failing: fails: division by zero. It is called as metric(model, batches)"),
        ((IMAGES, LABELS + 3), None, DataError, "batch 1: labels run from 3 to 7, and the network scores 5 classes"),
        ((IMAGES, LABELS - 1), None, DataError, "batch 1: labels run from -1 to 3, and the network scores 5 classes"),
        ((IMAGES[:0], LABELS[:0]), None, DataError, "evaluation, batch 1: the batch is empty"),
        ((IMAGES[:, :, 0], LABELS), None, DataError, "evaluation, batch 1: the network fails on inputs of shape"),
    ],
)
def test_what_evaluation_meets_in_the_users_code_is_one_line(
    batch: Any, metric: Any, error: type[SecateurError], text: str
) -> None:
    with pytest.raises(error) as caught:
        evaluate(small(), [batch or (IMAGES, LABELS)], metric)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_metric_that_takes_no_such_output_is_named() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    with pytest.raises(UsageError, match=r"evaluation, batch 1: metric MulticlassAccuracy takes no tuple and"):
        evaluate(Changed(lambda m, x: (m(x), x)), [(IMAGES, LABELS)], MulticlassAccuracy(num_classes=5))


def test_examples_are_counted_in_any_nesting() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, batch: Any) -> Any:
            return self.inner(batch["views"]["left"][0])

    batch = (({"names": ["a", "b"], "views": {"left": [IMAGES]}},), LABELS)
    (record,) = fit(Deep(), [batch], epochs=1)
    assert record.images == len(IMAGES)


def test_nothing_is_compiled_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    layer = nn.Linear(2, 2)
    assert stages.accelerator("cpu").prepare_model(layer) is layer
