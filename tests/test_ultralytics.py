"""YOLO networks of ultralytics: pruned, saved, trained on, used and exported by their own library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import secateur as sc
from secateur.criteria import names

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's settings in a folder of the test, and let it install nothing."""
    for name, value in {"CONFIG_DIR": str(tmp_path), "OFFLINE": "true", "AUTOINSTALL": "false"}.items():
        monkeypatch.setenv(f"YOLO_{name}", value)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("ultralytics", exc_type=ImportError)


def squares(output: Any, _: Any) -> torch.Tensor:
    """Return a loss that reads all that a detector makes."""
    made = [t.float() for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.stack([t.square().mean() for t in made]).sum()


def halved(name: str) -> tuple[Any, torch.nn.Module, sc.PruningPlan]:
    """Return ultralytics' own wrapper of a network, the network, and a plan that removes half of its MACs."""
    from ultralytics import RTDETR, YOLO

    torch.manual_seed(0)
    whole = (RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml")
    model = whole.model.eval()
    graph = sc.trace(model, X)
    exact = {group.name for group in graph.groups if group.exact}
    labelled = [(X, torch.tensor([0, 1]))]  # corrnet_su reads the labels, taylor the loss
    for criterion in names():
        scores = sc.score(model, graph, criterion, labelled, loss=squares)
        assert scores.keys() == exact, criterion
        assert all(bool(values.isfinite().all()) for values in scores.values()), criterion
    return whole, model, sc.plan(graph, sc.score(model, graph, "l2"), sc.Target(macs=0.5))


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolov10n"])
def test_a_pruned_detector_is_saved_trained_used_and_exported(name: str, tmp_path: Path) -> None:
    from ultralytics.cfg import get_cfg

    whole, model, plan = halved(name)
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, X).exact
    sc.save(small, path=tmp_path / "small.safetensors")
    again: Any = sc.load(model, tmp_path / "small.safetensors")

    again.args = get_cfg()
    for parameter in again.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-3)
    again.train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):  # an epoch of random images, with three random boxes each
        images = torch.rand(*X.shape, generator=generator)
        boxes = {"bboxes": torch.rand(6, 4, generator=generator), "cls": torch.zeros(6, 1)}
        loss, _ = again.loss({"img": images, "batch_idx": torch.arange(6.0) // 3, **boxes})
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        assert bool(loss.isfinite().all())
    again.args = model.args  # a dict, which its export reads
    sc.save(again.eval(), path=tmp_path / "trained.safetensors")

    whole.model = again
    image = (X[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    assert len(whole.predict(image, imgsz=64, verbose=False)) == 1
    onnxruntime = pytest.importorskip("onnxruntime")
    whole.model = copy.deepcopy(again)
    file = whole.export(format="onnx", imgsz=64, simplify=False, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found, *_) = session.run(None, {session.get_inputs()[0].name: X[:1].numpy()})
    with torch.no_grad():
        expected = again(X[:1])
    expected = expected[0] if isinstance(expected, (tuple, list)) else expected
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
