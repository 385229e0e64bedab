"""The examples of ``examples/``, in miniature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import secateur as sc


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_yolo_is_trained_pruned_trained_on_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CONFIG_DIR": str(tmp_path), "OFFLINE": "true", "AUTOINSTALL": "false"}.items():
        monkeypatch.setenv(f"YOLO_{name}", value)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("ultralytics", exc_type=ImportError)
    onnxruntime = pytest.importorskip("onnxruntime")
    from ultralytics.nn.tasks import DetectionModel

    from examples.ultralytics_yolo import main

    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for number in range(4):
        Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
            tmp_path / f"data/images/{number}.png"
        )
        (tmp_path / f"data/labels/{number}.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path / 'data'}\ntrain: images\nval: images\nnames: [square, circle]\n")

    words = [str(data), "--model", "yolov8n.yaml", "--imgsz", "64", "--epochs", "1", "--macs", "0.4"]
    out = main([*words, "--out", str(tmp_path / "out")])
    built = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    again = sc.load(built, out / "small.safetensors").eval()
    whole, small = (sum(p.numel() for p in network.parameters()) for network in (built, again))
    assert small < 0.9 * whole
    x = torch.rand(1, 3, 64, 64)
    session = onnxruntime.InferenceSession(out / "small.onnx", providers=["CPUExecutionProvider"])
    (found, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), again(x)[0], rtol=1e-3, atol=1e-3)
    trained = torch.load(out / "pruned/weights/best.pt", weights_only=False)["model"].float()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trained.state_dict().items())
