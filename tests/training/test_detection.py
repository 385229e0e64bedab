"""Detectors: batches, loss and metric re-derived by hand, then the loop, in the program and from Python."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.cli.commands import main
from secateur.data import Batches, DetectionBatches, load
from secateur.deploy import program
from secateur.errors import DataError, UsageError
from secateur.models import lenet5
from secateur.network import inputs
from secateur.runfile import config, sources
from secateur.training import evaluation, passes, stages, tasks
from secateur.training.detection import DetectionLoss, MeanAveragePrecision
from tests import detectors
from tests.data.test_boxes import write_coco
from tests.data.test_sets import SHARED, needs_shared, write_voc
from tests.detectors import MAKES, Squares

# Batches


def test_batches_give_a_detector_its_arguments_and_the_metric_its_targets() -> None:
    data = Squares(5)
    found = list(DetectionBatches(data, 2))
    assert [len(b["images"]) for b in found] == [2, 2, 1]
    for number, batch in enumerate(found):
        assert set(batch) == {"images", "targets", "labels"}
        assert batch["labels"] is batch["targets"]
        for place, (image, target) in enumerate(zip(batch["images"], batch["targets"], strict=True)):
            expected, wanted = data[2 * number + place]
            assert torch.equal(image, expected)
            assert torch.equal(target["boxes"], wanted["boxes"])
    assert {tuple(i.shape) for b in found for i in b["images"]} == {(3, 40, 56), (3, 48, 64)}
    ((first,),) = DetectionBatches(data, 2).example_inputs
    assert torch.equal(first, data[0][0])


def test_batches_are_those_of_their_class(tmp_path: Path) -> None:
    """Order and augmentation are a function of seed and epoch, as of any batches."""
    data = load("voc", root=write_voc(tmp_path / "v")).train
    plain, found = (kind(data, 2, shuffle=True, augment=True, seed=3) for kind in (Batches, DetectionBatches))
    for epoch in range(3):
        plain.set_epoch(epoch)
        found.set_epoch(epoch)
        for (images, targets), batch in zip(plain, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(images, batch["images"], strict=True))
            assert [t["image_id"] for t in targets] == [t["image_id"] for t in batch["labels"]]


def boxed(boxes: Any, labels: Any) -> Any:
    return torch.zeros(3, 4, 4), {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}


@pytest.mark.parametrize("name", MAKES)
def test_a_label_that_the_detector_has_no_class_for_is_one_line(name: str) -> None:
    batches = DetectionBatches([boxed([[0.0, 0, 3, 3]], [7])], 1)
    with pytest.raises(
        DataError, match=r"stage 0, epoch 1, batch 1: the network fails .*(out of bounds|range|index)"
    ) as e:
        stages.fit(MAKES[name]().train(), batches, epochs=1, loss=DetectionLoss())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (torch.zeros(3, 4, 4), "expected a data set of pairs"),
        ((torch.zeros(4, 4), {}), "an element is an image"),
        ((torch.zeros(3, 4, 4), 7), "an element is an image"),
        ((torch.zeros(3, 4, 4), {"boxes": torch.zeros(0, 4)}), "this target has boxes"),
        (boxed([], [1]), r"a target has boxes \(n, 4\), also where n is 0, and n labels; found \(0,\) and \(1,\)"),
        (boxed([[0.0, 0, 2, 2]], [1, 2]), r"and n labels; found \(1, 4\) and \(2,\)"),
        (boxed([[0.0, 0, 2, 2], [1, 1, 1, 3]], [1, 2]), r"a box is x1 < x2 .* found \[1.0, 1.0, 1.0, 3.0\]. Leave"),
        (boxed([[0, 0, 2, float("nan")]], [1]), "a box is x1 < x2"),
        (boxed([[0.0, 0, 2, 2]], [0]), "labels of boxes are whole numbers from 1, as 0 is the background; found 0"),
    ],
)
def test_elements_that_are_no_images_with_boxes_are_refused(element: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(DetectionBatches([element], 1))


def test_a_lone_last_image_is_left_out_of_training() -> None:
    def sizes(count: int, size: int) -> list[int]:
        return [len(b["images"]) for b in tasks.training_batches(detectors.bundle(count), size, 0)]

    assert sizes(5, 2) == [2, 2]
    assert sizes(6, 4) == [4, 2]
    assert sizes(3, 1) == [1, 1, 1]
    assert sizes(1, 4) == [1]
    assert sum(len(b["images"]) for b in tasks.evaluation_batches(detectors.bundle(6, 9), "validation")) == 9


# Loss


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("boxes", [True, False])
def test_the_loss_is_the_sum_of_the_detectors_own(name: str, boxes: bool) -> None:
    torch.manual_seed(0)
    model = MAKES[name]().train()
    batch = next(iter(DetectionBatches(Squares(3, boxes), 3)))
    torch.manual_seed(1)
    losses = copy.deepcopy(model)(batch["images"], batch["targets"])
    torch.manual_seed(1)
    found = DetectionLoss()(passes.forward(model, {k: batch[k] for k in ("images", "targets")}), batch["labels"])
    assert len(losses) > 1
    assert found.item() == pytest.approx(sum(loss.item() for loss in losses.values()))
    found.backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_what_is_no_mapping_of_losses_is_refused() -> None:
    for output in ([], {}, torch.zeros(3)):
        with pytest.raises(DataError, match="in place of a mapping of losses"):
            DetectionLoss()(output, None)


def test_training_counts_images() -> None:
    torch.manual_seed(0)
    (record,) = stages.fit(MAKES["ssd"](), detectors.batches()["train"], epochs=1, loss=DetectionLoss())
    assert record.images == 6


def test_taylor_is_the_squared_gradient_of_the_losses_with_norms_at_rest() -> None:
    torch.manual_seed(0)
    model = MAKES["ssd"]().eval()
    with torch.no_grad():  # as after training: away from 0 and 1
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = list(DetectionBatches(Squares(5), 2))
    graph = sc.trace(model, DetectionBatches(Squares(1), 1).example_inputs)
    found = sc.score(model, graph, "taylor", data=data, loss=DetectionLoss(), groups=["backbone.0"])["backbone.0"]
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())

    # Norms replaced by the affine maps that they are in eval mode, so that train mode changes nothing but the output.
    plain = copy.deepcopy(model).double()
    for place, norm in [(i, m) for i, m in enumerate(plain.backbone) if isinstance(m, nn.BatchNorm2d)]:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        affine = nn.Conv2d(len(scale), len(scale), 1, groups=len(scale)).double()
        affine.weight = nn.Parameter(scale.detach()[:, None, None, None])
        affine.bias = nn.Parameter((norm.bias - norm.running_mean * scale).detach())
        plain.backbone[place] = affine
    plain.train()
    total, seen = torch.zeros(8, dtype=torch.float64), 0
    for batch in data:
        images = [image.double() for image in batch["images"]]
        targets = [{**target, "boxes": target["boxes"].double()} for target in batch["targets"]]
        plain.zero_grad()
        sum(plain(images, targets).values()).backward()
        weight = plain.backbone[0].weight
        for c in range(8):
            total[c] += len(images) * (weight[c] * weight.grad[c]).sum().detach() ** 2
        seen += len(images)
    torch.testing.assert_close(found, total / seen, rtol=1e-4, atol=1e-12)


# Metric


def overlap(a: list[float], b: list[float]) -> float:
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    shared = max(0.0, width) * max(0.0, height)
    return shared / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - shared)


def average_precision(found: list[Any], wanted: list[Any], label: int, least: float) -> float:
    """Area under precision against recall, at 101 recalls, for one class and one least overlap."""
    number = sum(int((w["labels"] == label).sum()) for w in wanted)
    ranked = []
    for image, (f, w) in enumerate(zip(found, wanted, strict=True)):
        free = [box for box, its in zip(w["boxes"].tolist(), w["labels"].tolist(), strict=True) if its == label]
        own = [(s, b) for s, b, its in zip(f["scores"], f["boxes"], f["labels"], strict=True) if its == label]
        for score, box in sorted(own, key=lambda pair: -float(pair[0])):
            best = max(free, key=lambda other: overlap(box.tolist(), other), default=None)
            hit = best is not None and overlap(box.tolist(), best) >= least
            if hit:
                free.remove(best)
            ranked.append((float(score), image, hit))
    hits, points = 0, []
    for place, (_, _, hit) in enumerate(sorted(ranked, key=lambda entry: -entry[0]), start=1):
        hits += hit
        points.append((hits / number, hits / place))
    return sum(max((p for r, p in points if r >= k / 100 - 1e-12), default=0.0) for k in range(101)) / 101


def drawn(seed: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Boxes to find in four images, and boxes found: some of them shifted, some of nothing."""
    generator = torch.Generator().manual_seed(seed)
    found, wanted = [], []
    for image in range(4):
        corners = 40.0 * torch.arange(3)[:, None] * torch.ones(1, 2) + 5 * torch.rand(3, 2, generator=generator)
        boxes = torch.cat([corners, corners + 10 + 20 * torch.rand(3, 2, generator=generator)], 1)
        labels = torch.tensor([1, 2, 1])
        shifted = boxes + 4 * torch.rand(3, 4, generator=generator)
        count = 3 - (image == 1)
        more = torch.tensor([[200.0, 200.0, 230.0, 220.0]])
        wanted.append({"boxes": boxes[:count], "labels": labels[:count]})
        found.append({
            "boxes": torch.cat([shifted, more]), "labels": torch.cat([labels, torch.tensor([1 + image % 2])]),
            "scores": torch.rand(4, generator=generator),
        })  # fmt: skip
    return found, wanted


@pytest.mark.parametrize("seed", range(4))
def test_mean_average_precision_is_the_area_under_precision_against_recall(seed: int) -> None:
    found, wanted = drawn(seed)
    metric = MeanAveragePrecision()
    metric.update(found[:3], wanted[:3])
    metric.update(found[3:], wanted[3:])
    levels = [0.5 + 0.05 * k for k in range(10)]
    each = [[average_precision(found, wanted, label, least) for label in (1, 2)] for least in levels]
    expected = sum(sum(pair) for pair in each) / 20
    assert 0 < expected < 1
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)
    assert metric.details["AP50"] == pytest.approx(sum(each[0]) / 2, abs=1e-6)


def test_mean_average_precision_by_hand() -> None:
    """One box that overlaps by 0.82 is found at 7 of the 10 levels; a class that is never found halves that."""
    box, other = [0.0, 0.0, 10.0, 100.0], [50.0, 50.0, 60.0, 60.0]
    found = [{"boxes": torch.tensor([[0.0, 0.0, 10.0, 82.0]]), "scores": torch.ones(1), "labels": torch.tensor([1])}]
    metric = MeanAveragePrecision()
    metric.update(found, [{"boxes": torch.tensor([box]), "labels": torch.tensor([1])}])
    assert float(metric.compute()) == pytest.approx(0.7)
    metric.reset()
    both = {"boxes": torch.tensor([box, other]), "labels": torch.tensor([1, 2])}
    metric.update(found, [both])
    assert float(metric.compute()) == pytest.approx(0.35)
    assert metric.details["AP50"] == pytest.approx(0.5)
    assert metric.details["classes"] == {
        "1": {"AP": pytest.approx(0.7), "AP50": pytest.approx(1)}, "2": {"AP": 0.0, "AP50": 0.0},
    }  # fmt: skip
    metric.reset()
    metric.update(found, [{**both, "iscrowd": torch.tensor([0, 1])}])
    assert float(metric.compute()) == pytest.approx(0.7), "a crowd counts neither way"
    metric.reset()
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    metric.update([nothing], [both])
    assert float(metric.compute()) == 0
    assert evaluation.metric_name(metric) == "mAP"


@pytest.mark.parametrize("seed", range(3))
def test_each_class_has_the_area_of_its_own(seed: int) -> None:
    found, wanted = drawn(seed)
    found[2]["labels"][0] = 4  # a class that nothing is of
    metric = MeanAveragePrecision(("dark", "light", "dim", "none"))
    metric.update(found, wanted)
    metric.compute()
    levels = [0.5 + 0.05 * k for k in range(10)]
    expected = {}
    for label, name in ((1, "dark"), (2, "light")):
        own = [average_precision(found, wanted, label, least) for least in levels]
        expected[name] = {"AP": pytest.approx(sum(own) / 10, abs=1e-9), "AP50": pytest.approx(own[0], abs=1e-9)}
    assert metric.details["classes"] == {**expected, "none": {"AP": None, "AP50": None}}


NUMBERS = ("AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@pytest.mark.parametrize("seed", range(2))
def test_cocos_twelve_numbers_are_those_of_its_own_code(seed: int, tmp_path: Path) -> None:
    """A file of instances read by pycocotools, and by this package, with the same boxes found in its images."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = random.Random(seed)
    # Of all sizes, on whole pixels, so that nothing is rounded; some reach beyond their image.
    boxes = [
        {"category_id": rng.choice([1, 3, 4]), "bbox": [rng.randrange(9), rng.randrange(9), side, side + k],
         "area": 0.75 * side * (side + k), "iscrowd": int(k == 2)}
        for k, side in enumerate([4, 10, 20, 24, 28, 5, 9, 16])
    ]  # fmt: skip
    root = write_coco(tmp_path, {"train": 2, "val": 14}, boxes, scale=8)
    bundle = load("coco", root=root)
    metric = MeanAveragePrecision(bundle.classes)
    truth = COCO(str(root / "annotations" / "instances_val.json"))
    keys, results = sorted(truth.imgs), []
    for index, key in enumerate(keys):
        _, target = bundle.test[index]
        found: dict[str, Any] = {"boxes": [], "scores": [], "labels": []}
        for box, label in [*zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)] * 2 + [
            ([0.0, 0.0, 30.0, 30.0], 3), ([5.0, 9.0, 99.0, 110.0], 1), ([8.0, 8.0, 200.0, 200.0], 2),
        ]:  # fmt: skip
            moved = [edge + rng.randrange(-6, 7) for edge in box[:2]] + [
                edge + rng.randrange(7, 14) for edge in box[2:]
            ]
            score = rng.randrange(1, 1 << 20) / (1 << 20)
            found["boxes"].append(moved)
            found["scores"].append(score)
            found["labels"].append(label if rng.random() < 0.9 else 4)
            x1, y1, x2, y2 = moved
            results.append({"image_id": key, "category_id": found["labels"][-1], "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "score": score})  # fmt: skip
        metric.update([{name: torch.tensor(value) for name, value in found.items()}], [target])
    theirs = COCOeval(truth, truth.loadRes(results), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    value = float(metric.compute())
    assert [value, *(metric.details[name] for name in NUMBERS)] == pytest.approx(list(theirs.stats), abs=1e-6)
    assert all(0 < number < 1 for number in theirs.stats), theirs.stats
    each = theirs.eval["precision"][:, :, :, 0, 2].mean((0, 1))
    names = [category["name"] for category in truth.loadCats(theirs.params.catIds)]
    assert [metric.details["classes"][name]["AP"] for name in names] == pytest.approx(each.tolist(), abs=1e-9)


def test_nothing_to_find_is_an_error_and_not_a_number() -> None:
    model, data = MAKES["ssd"](), DetectionBatches(Squares(3, boxes=False), 2)
    with pytest.raises(DataError, match="not one box in the images measured"):
        evaluation.evaluate(model, data, MeanAveragePrecision())


def test_a_missing_pycocotools_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                           tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UsageError, match=r"^mAP: pycocotools is not installed; pip install '\.\[detection\]'"):
        MeanAveragePrecision()
    root = write_voc(tmp_path / "v")
    model = "torchvision:ssdlite320_mobilenet_v3_large"
    assert main(["compress", model, "--data", f"voc:{root}", "--run-dir", str(tmp_path / "run")]) == 2
    assert "'.[detection]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "found out before any work is done"


# What goes together


def test_model_and_data_are_of_one_task() -> None:
    boxes, digits = detectors.bundle(), load("digits")
    tasks.require_fit(MAKES["ssd"](), "ssd", boxes)
    tasks.require_fit(lenet5(), "lenet5", digits)
    with pytest.raises(UsageError, match=r"^lenet5: is no detector.* squares holds boxes; give a detector"):
        tasks.require_fit(lenet5(), "lenet5", boxes)
    with pytest.raises(UsageError, match=r"^ssd: is a detector, and digits holds no boxes"):
        tasks.require_fit(MAKES["ssd"](), "ssd", digits)
    with pytest.raises(UsageError, match=r"^mask: is trained on masks, which squares doesn't hold"):
        tasks.require_fit(detectors.mask_rcnn(), "mask", boxes)
    compiled = nn.ReLU()
    compiled.forward = max  # type: ignore[method-assign, assignment]
    assert not tasks.is_detector(compiled), "a forward without a signature"


def test_what_needs_classes_is_refused_for_boxes() -> None:
    boxes = detectors.bundle()
    tasks.require_classes(boxes, "corrnet", distillation=0.0)
    tasks.require_classes(load("digits"), "corrnet_su", distillation=0.5)
    with pytest.raises(UsageError, match=r"^method: corrnet_su needs one class an image, and squares holds boxes"):
        tasks.require_classes(boxes, "corrnet_su")
    with pytest.raises(UsageError, match=r"^distillation: is about class scores, and squares holds boxes"):
        tasks.require_classes(boxes, "cfp", distillation=0.5)
    with pytest.raises(UsageError, match=r"^distillation: learns from class scores, and the network returns dict"):
        compressed("ssd", distillation=0.5, finetune_epochs=1)


# The loop


def compressed(name: str, method: str = "l1", **settings: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {"target": sc.Target(macs=0.2), "fraction": 0.25, "lr": 1e-3, "finetune_epochs": 1}
    return sc.compress(
        MAKES[name](), method, **detectors.batches(), loss=DetectionLoss(), metric=MeanAveragePrecision(),
        **given | settings,
    )  # fmt: skip


CASES = [("ssd", "corrnet"), ("faster_rcnn", "cfp")]
MORE = [(name, method) for name in MAKES for method in ("cfp", "taylor", "hrank", "chip", "cshe", "corrnet", "l1")]


@pytest.mark.parametrize(
    ("name", "method"), CASES + [pytest.param(*c, marks=pytest.mark.slow) for c in MORE if c not in CASES]
)
def test_detectors_are_compressed_by_any_criterion(name: str, method: str, tmp_path: Path) -> None:
    result = compressed(name, method, run_dir=tmp_path / "run")
    before, after = result.report["baseline"], result.report["final"]
    assert result.report["metric"] == "mAP"
    assert result.report["verification"]["exact"]
    assert after["macs"] <= 0.8 * before["macs"]
    assert 0 <= after["validation"] <= 1
    assert result.report["images"] == 6 * len(result.history) * (2 if method == "cfp" else 1)
    again = sc.load(MAKES[name](), tmp_path / "run" / "model.safetensors").eval()
    image = [Squares(2)[1][0]]
    with torch.no_grad():
        for ours, theirs in zip(again(image), result.model.eval()(image), strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("moves", [("merge", "least_squares"), ("bn",)])
def test_what_detectors_know_is_moved(moves: tuple[str, ...]) -> None:
    result = compressed("ssd", "cfp", compensate=moves, finetune_epochs=0)
    assert set(result.history[0]["compensated"]) == set(moves)


def test_images_and_not_their_channels_make_up_a_batch() -> None:
    images = [torch.rand(3, 4, 5), torch.rand(3, 6, 7)]
    call = ((images,), {})
    assert program.batch_of(call) == inputs.batch_size((images,)) == inputs.batch_size({"images": images}) == 2
    for size in (1, 2, 3):
        ((found,), _) = program.resized(call, 2, size)
        assert [tuple(image.shape) for image in found] == [(3, 4, 5), (3, 6, 7), (3, 4, 5)][:size]


# The program

NETWORK = """
import torch
from tests import detectors

def build():
    torch.manual_seed(0)
    return detectors.ssd()
"""


def run_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_detector_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    write_voc(tmp_path / "v", [(5, 6, 20, 30), (0, 0, 40, 32)])
    both = ["network.py:build", "--data", "voc:v"]
    quick = ["--set", "fraction=0.25", "--set", "finetune_epochs=1", "--baseline", "epochs=1", "--macs", "0.2"]
    run = run_json(["compress", *both, *quick, "--run-dir", "run"], capsys)
    assert run["metric"] == "mAP"
    assert config.load(tmp_path / "run" / "run.yaml").batch_size == 8
    weights = ["--weights", "run/model.safetensors"]
    found = run_json(["evaluate", *both, *weights], capsys)
    assert found["mAP"] == run["final"]["test"]
    assert found["examples"] == 1
    assert 0 <= found["mAP"] <= found["AP50"] <= 1
    details = run["final"]["details"]
    assert details == {name: found[name] for name in (*NUMBERS, "classes")}
    assert set(details["classes"]) == {"blob", "cell"}
    assert details["classes"]["cell"] == {"AP": None, "AP50": None}, "difficult, so that it counts neither way"
    assert main(["evaluate", *both, *weights]) == 0
    shown = capsys.readouterr().out
    assert "none to find" in shown
    assert f"AP {details['classes']['blob']['AP']:.2%}, AP50" in shown
    assert "accuracy" not in found
    assert run_json(["resume", "run", "--trust"], capsys)["final"]["test"] == found["mAP"]

    pruned = run_json(["prune", *both, *weights, "--method", "taylor", "--macs", "0.2"], capsys)
    assert pruned["metric"] == "mAP"
    assert pruned["before"]["test"] == found["mAP"]
    assert 0 <= pruned["after"]["test"] <= 1
    assert pruned["verification"]["exact"]

    for words in (["prune", *both, *weights, "--macs", "0.2"], ["report", "run"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "mAP, test set" in shown
        assert "accuracy" not in shown
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Test mAP" in page
    assert "mAP in detail" in page
    numbers = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["runs"][0]["details"]
    assert ["blob", "AP"] in [row[:2] for row in numbers["rows"]]

    (tmp_path / "run.yaml").write_text("model: network.py:build\ndata: voc:v\nmethod: corrnet_su\n")
    for words, message in (
        (["compress", "--config", "run.yaml", "--trust"], "corrnet_su needs one class an image"),
        (["prune", *both, "--method", "corrnet_su", "--macs", "0.2"], "corrnet_su needs one class an image"),
        (["compress", "lenet5", "--data", "voc:v"], "lenet5: is no detector"),
        (["evaluate", "network.py:build", "--data", "digits"], "is a detector, and digits holds no boxes"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@needs_shared
@pytest.mark.slow
def test_torchvisions_detector_on_real_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = SHARED / "data" / "BCCD", tmp_path / "cells"
    for part, count in (("train", 8), ("val", 3), ("test", 3)):
        names = (source / "ImageSets" / "Main" / f"{part}.txt").read_text().split()[:count]
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
            (root / kind).mkdir(parents=True, exist_ok=True)
            for name in names:
                (root / kind / f"{name}.{suffix}").symlink_to(source / kind / f"{name}.{suffix}")
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names))
    both = ["torchvision:ssdlite320_mobilenet_v3_large", "--data", f"voc:{root}"]
    more = ["--set", "fraction=0.5", "--set", "finetune_epochs=1", "--baseline", "epochs=1", "--batch-size", "4"]
    run = run_json(["compress", *both, *more, "--macs", "0.3", "--run-dir", str(tmp_path / "run")], capsys)
    assert run["verification"]["exact"]
    assert run["final"]["macs"] <= 0.7 * run["baseline"]["macs"]
    found = run_json(["evaluate", *both, "--weights", str(tmp_path / "run" / "model.safetensors")], capsys)
    assert found["mAP"] == run["final"]["test"]
    assert main(["report", str(tmp_path / "run"), "--measure"]) == 0
    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rows"]
    assert {1, 2} <= {row["batch_size"] for row in rows}, "images, not their channels, make up a batch"


def test_a_detector_is_built_for_its_data() -> None:
    found = sources.open_model("torchvision:ssdlite320_mobilenet_v3_large", bundle=detectors.bundle())
    ((image,),) = found.inputs
    assert image.shape == (3, 48, 64)
    # The background is a class of its own.
    assert found.model.head.classification_head.num_columns == 3  # type: ignore[union-attr]
