"""Detectors on pruned classifiers: what torchvision builds, where it builds any, and the paper's sizes elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models import vgg16 as imagenet_vgg16
from torchvision.models.detection import fasterrcnn_resnet50_fpn, ssd300_vgg16
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import VGG, make_layers

import secateur as sc
from secateur.data import DetectionBatches
from secateur.deploy.export import export
from secateur.errors import CheckpointError, ExportError, PlanError, UsageError
from secateur.models import lenet5, resnet20, vgg16
from secateur.models.detectors import DETECTORS, KINDS, from_backbone
from secateur.pruning.applied import plans_of
from secateur.runfile import sources
from secateur.training.detection import DetectionLoss
from tests import detectors
from tests.detectors import Squares

IMAGE = torch.rand(3, 70, 60, generator=torch.Generator().manual_seed(0))
FEW: Any = {"min_size": 64, "max_size": 80, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 20}


def narrow_vgg(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return awake(vgg16(widths=(8,) * 10 + (9, 10, 12), hidden=8))


def plain_vgg() -> nn.Module:
    """torchvision's VGG-16, narrow, without norms and with biases."""
    torch.manual_seed(0)
    widths = [w if w == "M" else 6 for w in [6, 6, "M", 6, 6, "M", 6, 6, 6, "M", 6, 6, 6, "M", 6, 6, 6, "M"]]
    net = VGG(make_layers(widths), num_classes=5)
    net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)
    return awake(net)


def narrow_resnet(block: Any = Bottleneck) -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(block, [2, 1, 1, 2], num_classes=5, **({"width_per_group": 8} if block is Bottleneck else {}))
    return awake(net)


def awake(net: nn.Module) -> nn.Module:
    """Give norms the moments and factors of a network that was trained."""
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    return net.eval()


def pruned(net: nn.Module, share: float = 0.25, seed: int = 0) -> nn.Module:
    """Prune every group, residual streams too, of channels drawn at random."""
    graph = sc.trace(net, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    torch.manual_seed(seed)
    scores = {group.name: torch.rand(group.size) for group in graph.groups}
    return sc.apply(net, sc.plan(graph, scores, ratios={group.name: share for group in graph.groups}))


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return [*ours] == [*theirs] and all(torch.equal(ours[name], theirs[name]) for name in ours)


def called(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.eval()([IMAGE])[0]  # type: ignore[no-any-return]


# What torchvision builds


@pytest.mark.slow
def test_ssd300_on_a_whole_vgg_is_torchvisions():
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=5)
    means = {"image_mean": [0.48235, 0.45882, 0.40784], "image_std": [1 / 255] * 3}
    ours = from_backbone(imagenet_vgg16(num_classes=2), "ssd300", 5, **means)
    ours.load_state_dict(theirs.state_dict())
    for key, value in called(theirs).items():
        assert torch.equal(called(ours)[key], value)


@pytest.mark.slow
def test_faster_rcnn_on_a_whole_resnet_is_torchvisions():
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5, **FEW)
    ours = from_backbone(resnet50(num_classes=2), "faster_rcnn", 5, freeze_norms=False, **FEW)
    ours.load_state_dict(theirs.state_dict())
    for key, value in called(theirs).items():
        assert torch.equal(called(ours)[key], value)


# What the papers state


@pytest.mark.slow
def test_ssd512_has_the_papers_size_and_boxes():
    """98.7 MB in Singh et al. 2020 for GTSDB's three classes and the background; 24564 boxes in Liu et al. 2016."""
    detector = from_backbone(imagenet_vgg16(num_classes=2), "ssd512", 4)
    assert round(4 * sum(p.numel() for p in detector.parameters()) / 1e6, 1) == 98.7
    assert detector.backbone.out_channels == [512, 1024, 512, 256, 256, 256, 256]


@pytest.mark.slow
def test_ssd512_has_the_papers_boxes():
    detector = from_backbone(narrow_vgg(), "ssd512", 4).eval()
    seen: dict[str, Any] = {}
    detector.backbone.register_forward_hook(lambda _m, _i, out: seen.update(out))
    detector.anchor_generator.register_forward_hook(lambda _m, _i, out: seen.update(boxes=out[0]))
    detector.head.register_forward_hook(lambda _m, _i, out: seen.update(out))
    called(detector)
    boxes = seen.pop("boxes")
    assert [tuple(seen[str(i)].shape[2:]) for i in range(7)] == [(n, n) for n in (64, 32, 16, 8, 4, 2, 1)]
    assert boxes.shape == (24564, 4)
    assert seen["cls_logits"].shape == (1, 24564, 4)
    # The middle of the first position, and the two squares there: sides s and √(s·s').
    first, second = boxes[:2]
    assert [float(first[0] + first[2]) / 2, float(first[1] + first[3]) / 2] == pytest.approx([4, 4], abs=1e-4)
    assert float(first[2] - first[0]) == pytest.approx(0.07 * 512, rel=1e-5)
    assert float(second[2] - second[0]) == pytest.approx((0.07 * 0.15) ** 0.5 * 512, rel=1e-5)
    assert float(boxes[-4][2] - boxes[-4][0]) == pytest.approx(0.9 * 512, rel=1e-5)


# Pruned bases


@pytest.mark.slow
@pytest.mark.parametrize(("make", "last"), [(narrow_vgg, "conv4_3"), (plain_vgg, "conv9_2"), (narrow_vgg, None)])
def test_ssd512_on_a_pruned_vgg(make: Any, last: str | None, tmp_path: Path) -> None:
    whole = make()
    small = pruned(whole)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    detector = from_backbone(small, "ssd512", 3, last=last, score_thresh=0.0)
    kept = [m.out_channels for m in small.features if isinstance(m, nn.Conv2d)]
    assert kept[9] < 8
    wide = [kept[9], 1024, 512, 256, 256, 256, 256]
    assert detector.backbone.out_channels == wide[: KINDS["ssd512"].index(last or "conv12_2") + 1]

    image = torch.randn(1, 3, 64, 64)
    cut = [i for i, m in enumerate(small.features) if isinstance(m, nn.MaxPool2d)][3]
    detector.eval()
    assert torch.equal(detector.backbone.features(image), small.features[:cut](image)), "the base is the classifier's"
    assert len(called(detector)["boxes"])

    (batch,) = DetectionBatches(Squares(3), 3)
    DetectionLoss()(detector.train()(batch["images"], batch["targets"]), None).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert all(bool(m.weight.grad.any()) for m in detector.backbone.features if isinstance(m, nn.Conv2d))
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items()), "left as it was"

    sc.save(detector, path=tmp_path / "detector.safetensors")
    original = from_backbone(whole, "ssd512", 3, last=last, score_thresh=0.0)
    loaded = sc.load(original, tmp_path / "detector.safetensors")
    assert same(loaded, detector)
    for key, value in called(detector).items():
        assert torch.equal(called(loaded)[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("block", [Bottleneck, BasicBlock])
@pytest.mark.parametrize("last", ["layer4", "layer2"])
def test_faster_rcnn_on_a_pruned_resnet(block: Any, last: str, tmp_path: Path) -> None:
    whole = narrow_resnet(block)
    small = pruned(whole)
    detector = from_backbone(small, "faster_rcnn", 3, last=last, **FEW)
    count = int(last[-1])
    streams = [_stream(small, stage) for stage in (1, 2, 3, 4)]
    assert [b[0].in_channels for b in detector.backbone.fpn.inner_blocks] == streams[:count]
    assert streams[0] < 64 * block.expansion

    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = small.layer1(small.maxpool(small.relu(small.bn1(small.conv1(image)))))
        torch.testing.assert_close(detector.backbone.body(image)["0"], x)  # frozen norms round in another order
    (batch,) = DetectionBatches(Squares(3), 3)
    DetectionLoss()(detector(batch["images"], batch["targets"]), None).backward()
    assert all(bool(m.weight.grad.isfinite().all()) for m in detector.backbone.modules() if isinstance(m, nn.Conv2d))

    sc.save(detector, path=tmp_path / "detector.safetensors")
    original = from_backbone(whole, "faster_rcnn", 3, last=last, **FEW)
    assert same(sc.load(original, tmp_path / "detector.safetensors"), detector)
    # The plan that the detector knows is an exact one of the whole detector: what reads the base loses the same.
    (plan,) = plans_of(detector)
    check = sc.verify(original, sc.apply(original, plan), plan, ([IMAGE],))
    assert check.exact, check


def _stream(net: nn.Module, stage: int) -> int:
    last = [m for m in net.get_submodule(f"layer{stage}").modules() if isinstance(m, nn.Conv2d)][-1]
    return last.out_channels


@pytest.mark.slow
def test_norms_of_the_base_are_frozen_on_request_alone() -> None:
    def norms(model: nn.Module) -> set[str]:
        return {type(m).__name__ for m in model.backbone.modules() if "BatchNorm" in type(m).__name__}  # type: ignore[union-attr]

    assert norms(from_backbone(narrow_resnet(), "faster_rcnn", 2)) == {"FrozenBatchNorm2d"}
    assert norms(from_backbone(narrow_vgg(), "ssd300", 2)) == {"BatchNorm2d"}
    frozen = from_backbone(pruned(narrow_vgg()), "ssd300", 2, last="conv4_3", freeze_norms=True)
    assert norms(frozen) == {"FrozenBatchNorm2d"}
    assert "num_features" not in str(plans_of(frozen)[0].attributes)


def test_a_network_pruned_twice_knows_both_plans_as_a_base(tmp_path: Path) -> None:
    whole = narrow_vgg()
    small = pruned(pruned(whole), seed=1)
    detector = from_backbone(small, "ssd300", 2, last="conv4_3")
    assert len(plans_of(detector)) == 2
    sc.save(detector, path=tmp_path / "twice.safetensors")
    assert same(sc.load(from_backbone(whole, "ssd300", 2, last="conv4_3"), tmp_path / "twice.safetensors"), detector)


@pytest.mark.slow
def test_a_base_comes_from_a_file(tmp_path: Path) -> None:
    small = pruned(narrow_vgg())
    sc.save(small, path=tmp_path / "small.safetensors")
    torch.manual_seed(3)
    one = from_backbone(small, "ssd300", 2, last="conv4_3")
    torch.manual_seed(3)
    other = from_backbone(narrow_vgg(seed=1), "ssd300", 2, weights=tmp_path / "small.safetensors", last="conv4_3")
    assert same(one.backbone, other.backbone)  # type: ignore[arg-type]
    torch.save(narrow_vgg().state_dict(), tmp_path / "plain.pt")
    plain = from_backbone(narrow_vgg(seed=1), "ssd300", 2, weights=tmp_path / "plain.pt", last="conv4_3")
    assert torch.equal(plain.backbone.features[0].weight, narrow_vgg().features[0].weight)  # type: ignore[index, union-attr]


@pytest.mark.slow
def test_a_detector_on_a_pruned_base_is_pruned_once_more(tmp_path: Path) -> None:
    whole = narrow_vgg()
    detector = from_backbone(pruned(whole), "ssd300", 3, last="conv4_3").eval()
    graph = sc.trace(detector, ([IMAGE],))
    again = sc.plan(graph, sc.score(detector, graph, "l2"), sc.Target(macs=0.3), allocation="uniform")
    small = sc.apply(detector, again)
    assert sc.verify(detector, small, again, ([IMAGE],)).exact
    sc.save(small, path=tmp_path / "again.safetensors")
    assert same(sc.load(from_backbone(whole, "ssd300", 3, last="conv4_3"), tmp_path / "again.safetensors"), small)


# What is refused


@pytest.mark.parametrize(
    ("make", "kind", "options", "message"),
    [
        (narrow_vgg, "ssd51", {}, "ssd51: no such kind of detector; did you mean ssd512?"),
        (narrow_vgg, "ssd512", {"last": "conv4_2"}, "last: ssd512 has no source 'conv4_2'"),
        (narrow_vgg, "ssd512", {"num_classes": 1}, "num_classes: counts the background"),
        (narrow_vgg, "faster_rcnn", {}, "CifarVGG has no layer1"),
        (lenet5, "ssd300", {}, "ssd: the base is a VGG"),
        (narrow_resnet, "ssd300", {}, "ssd: the base is a VGG"),
        (resnet20, "faster_rcnn", {}, "CifarResNet has no layer4"),
        (resnet20, "faster_rcnn", {"last": "layer3"}, "CifarResNet computes more than its layers one after another"),
        (nn.Sequential, "ssd300", {}, "ssd: a VGG has five poolings, found 0"),
        (narrow_vgg, "ssd300", {"weights": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_what_is_no_base_is_refused_in_one_line(make: Any, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as found:
        from_backbone(make(), kind, **{"num_classes": 3, **options})
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_another_layer_in_a_vgg_is_named() -> None:
    net = narrow_vgg()
    net.features[2] = nn.GELU()  # type: ignore[index, operator]
    with pytest.raises(UsageError, match=r"features\.2 is a GELU"):
        from_backbone(net, "ssd300", 3)


@pytest.mark.slow
def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    sc.save(pruned(plain_vgg()), path=tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="build the class that was pruned"):
        from_backbone(narrow_vgg(), "ssd300", 3, weights=tmp_path / "other.safetensors")
    small = pruned(narrow_vgg())
    small.features[0].out_channels = 3  # type: ignore[index, union-attr, assignment]
    with pytest.raises(PlanError, match=r"backbone\.features\.0: outputs: the plan leaves 6, and the network has 3"):
        from_backbone(small, "ssd300", 3)


# By name


@pytest.mark.slow
def test_detectors_have_names(tmp_path: Path) -> None:
    small = pruned(narrow_vgg())
    sc.save(small, path=tmp_path / "small.safetensors")
    base = {"base": "vgg16", "base_options": {"widths": [8] * 10 + [9, 10, 12], "hidden": 8}}
    options = {**base, "base_weights": str(tmp_path / "small.safetensors"), "last": "conv4_3"}
    found = sources.open_model("ssd512", options, bundle=detectors.bundle())
    assert found.model.head.classification_head.num_columns == 3  # type: ignore[union-attr]
    assert torch.equal(found.model.backbone.features[0].weight, small.features[0].weight)  # type: ignore[index, union-attr]
    ((image,),) = sources.model("ssd300", {"last": "conv4_3"}).inputs
    assert image.shape == (3, 300, 300)
    assert {*DETECTORS} == {*KINDS}
    assert sources.model("faster_rcnn", {"base": "torchvision:resnet18", "last": "layer1"}).name == "faster_rcnn"


def test_a_base_that_does_not_exist_is_one_line() -> None:
    for options, message in (
        ({"base": "vgg61"}, "base: no network vgg61; did you mean vgg16?"),
        ({"base": "torchvision:vgg61"}, "base: no network torchvision:vgg61; did you mean vgg"),
        ({"base": "timm:vgg16"}, "base: no network timm:vgg16"),
        ({"base": "vgg16", "base_options": {"depth": 3}}, "base: vgg16 can't be built with base_options"),
    ):
        with pytest.raises(UsageError, match=message.replace("?", r"\?")):
            DETECTORS["ssd300"](3, **options)


# A classifier's file in a detector that is there


def torchvisions(block: Any = Bottleneck) -> nn.Module:
    """torchvision's detector on its own narrow ResNet, whose norms are frozen."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(5)
    base = ResNet(block, [2, 1, 1, 2], width_per_group=8, norm_layer=FrozenBatchNorm2d)
    return FasterRCNN(_resnet_fpn_extractor(base, 5), 3, **FEW).eval()


@pytest.mark.slow
def test_a_classifiers_file_loads_into_torchvisions_detector(tmp_path: Path) -> None:
    """torchvision's pyramid takes its widths from `inplanes`, which pruned stages don't keep to."""
    whole, detector = narrow_resnet(), torchvisions()
    small = pruned(whole)
    sc.save(small, path=tmp_path / "small.safetensors")
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(UsageError, match=r"what reads backbone.body is found by a trace; pass example_inputs="):
        sc.load(detector, tmp_path / "small.safetensors", prefix="backbone.body")
    loaded = sc.load(detector, tmp_path / "small.safetensors", prefix="backbone.body", example_inputs=([IMAGE],))
    body, theirs = loaded.backbone.body.state_dict(), small.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, theirs[name]) for name, value in body.items())
    (plan,) = plans_of(loaded)
    for level in range(4):
        name = f"backbone.fpn.inner_blocks.{level}.0"
        kept = plans_of(small)[0].kept_outputs[f"layer{level + 1}.{len(getattr(small, f'layer{level + 1}')) - 1}.conv3"]
        assert plan.kept_inputs[name] == kept
        assert torch.equal(loaded.get_submodule(name).weight, before[f"{name}.weight"][:, kept])
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items()), "left as it was"
    assert len(called(loaded)["boxes"])

    applied = sc.apply(detector, plans_of(small)[0], prefix="backbone.body", example_inputs=([IMAGE],))
    assert plans_of(applied) == plans_of(loaded)
    assert sc.verify(detector, applied, plan, ([IMAGE],)).exact
    sc.save(loaded, path=tmp_path / "detector.safetensors")
    assert same(sc.load(torchvisions(), tmp_path / "detector.safetensors"), loaded)


# ONNX


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ssd512_on_a_pruned_base_becomes_onnx_as_torchvisions_detectors_do(tmp_path: Path) -> None:
    """By TorchScript, at the size of the example: torch.export can't follow how boxes are thresholded."""
    runtime = pytest.importorskip("onnxruntime")
    detector = from_backbone(pruned(narrow_vgg()), "ssd512", 3, last="conv4_3").eval()
    with torch.no_grad():
        detector.backbone.scale_weight.fill_(2.0)  # type: ignore[union-attr]
    coarse = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    image = nn.functional.interpolate(coarse, (512, 512), mode="bicubic")[0]
    path = str(tmp_path / "detector.onnx")
    torch.onnx.export(detector, ([image],), path, opset_version=17, dynamo=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(a) for a in session.run(None, {session.get_inputs()[0].name: image.numpy()})]
    with torch.no_grad():
        expected = detector([image])[0]
    assert len(expected["scores"].unique()) > 20
    torch.testing.assert_close(found[1], expected["scores"], rtol=1e-3, atol=1e-4)
    # Scores that are nearly equal may change places, and the last of them fall out.
    near = (found[0][:, None] - expected["boxes"]).abs().amax(-1) < 0.1
    assert (near & (found[2][:, None] == expected["labels"])).any(1).float().mean() > 0.95
    with pytest.raises(ExportError, match=r"aten\.item can't be exported"):
        export(detector, tmp_path / "detector.pt2", ([image],), dynamic_batch=False)
