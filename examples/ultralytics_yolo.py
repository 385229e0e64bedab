"""Train, prune, fine-tune and export a YOLO detector of ultralytics, with its own trainer and its own export.

    python examples/ultralytics_yolo.py coco8.yaml --model yolov8n.pt --macs 0.4 --epochs 10

ultralytics is licensed under the AGPL-3.0, which reaches what is built on it; Secateur does not depend on it. Install
it yourself: ``pip install ultralytics onnx onnxruntime``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import secateur as sc


def trainer_of(network: nn.Module) -> type[DetectionTrainer]:
    """Return ultralytics' trainer, for this very network: its own builds an unpruned one from the YAML file anew."""

    class Trainer(DetectionTrainer):  # type: ignore[misc]
        def get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            return network

    return Trainer


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the four steps, and return the folder that the files are in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data set, as ultralytics describes it in YAML")
    parser.add_argument("--model", default="yolov8n.pt", help="weights (.pt), or .yaml to train from scratch")
    parser.add_argument("--macs", type=float, default=0.4, help="fraction of the MACs to remove")
    parser.add_argument("--epochs", type=int, default=10, help="epochs before pruning, and again after")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the images, in pixels")
    parser.add_argument("--out", type=Path, default=Path("runs/yolo"), help="folder for all files")
    given = parser.parse_args(arguments)
    out = given.out.resolve()  # ultralytics puts a relative folder under one of its own
    # amp: its check would download another model. plots: they would download a font.
    training = {
        "data": given.data, "epochs": given.epochs, "imgsz": given.imgsz, "amp": False, "plots": False,
        "project": str(out), "exist_ok": True,
    }  # fmt: skip

    detector = YOLO(given.model)
    detector.train(name="whole", **training)

    network = detector.model.float().cpu().eval().requires_grad_(True)
    result = sc.prune(network, torch.rand(1, 3, given.imgsz, given.imgsz), sc.Target(macs=given.macs))
    before, after = (result.report[when]["macs"] for when in ("before", "after"))
    print(f"MACs {before:,} -> {after:,}, exact: {result.check.exact}")

    detector.train(trainer=trainer_of(result.model), name="pruned", **training)

    small = detector.model.float().cpu().eval()
    sc.save(small, path=out / "small.safetensors")
    exported = Path(detector.export(format="onnx", imgsz=given.imgsz, simplify=False))
    exported.rename(out / "small.onnx")
    print(f"{out / 'small.safetensors'}, {out / 'small.onnx'}")
    return out


if __name__ == "__main__":
    main()
