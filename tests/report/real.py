"""Real runs, some seconds long, for testing what reads run directories: LeNet-5 on digits, ResNet-20 on CIFAR-10."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from secateur import compress
from secateur.deploy.timing import benchmark
from secateur.models import lenet5, resnet20

SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).resolve().parents[3] / "shared"))

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def digits() -> tuple[Batches, Batches, Batches]:
    """Training, validation and test batches, 8×8 digits enlarged to 16×16."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=16)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))

    def batches(which: torch.Tensor) -> Batches:
        return [(images[i], labels[i]) for i in which.split(64)]

    return batches(order[:1200]), batches(order[1200:1450]), batches(order[1450:])


def trained_lenet5(train: Batches, epochs: int = 12, seed: int = 0) -> nn.Module:
    """LeNet-5 of the paper's widths, trained for a few seconds."""
    torch.manual_seed(seed)
    model = lenet5(hidden=120, in_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def lenet5_run(run_dir: Path, method: str = "cfp", seed: int = 0, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Compress it into ``run_dir``; returns the original and the pruned network."""
    train, validation, test = digits()
    model = trained_lenet5(train, seed=seed)
    result = compress(
        model,
        method,
        train=train,
        validation=validation,
        test=test,
        run_dir=run_dir,
        seed=seed,
        describe={"model": "LeNet-5", "data": "digits, 16×16"},
        **settings,
    )
    return model, result.model


def resnet20_run(run_dir: Path, images: int = 256, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Compress the published ResNet-20 on a little of CIFAR-10 into ``run_dir``."""
    model = resnet20()
    model.load_state_dict(load_file(SHARED / "weights" / "cifar10-resnet20.safetensors"))
    result = compress(
        model.eval(),
        "cfp",
        train=_cifar10("train-00000", 0, images),
        validation=_cifar10("train-00001", 0, 128),
        test=_cifar10("test", 0, 128),
        run_dir=run_dir,
        describe={"model": "ResNet-20", "data": f"CIFAR-10, {images} images"},
        **settings,
    )
    return model, result.model


def _cifar10(part: str, start: int, count: int) -> Batches:
    from pyarrow import parquet

    (file,) = (SHARED / "data" / "cifar10").rglob(f"{part}*.parquet")
    rows = parquet.read_table(file).slice(start, count).to_pylist()
    pixels = np.stack([np.array(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([row["label"] for row in rows])
    return list(zip(images.split(64), labels.split(64), strict=True))


def measure(run_dir: Path, original: nn.Module, pruned: nn.Module, shape: tuple[int, ...]) -> None:
    """Write ``benchmark.json`` for a report."""
    result = benchmark(
        pruned,
        original,
        example_inputs=torch.randn(1, *shape),
        batch_sizes=(1, 8, 64),
        backends=("eager", "onnxruntime"),
        names=("pruned", "original"),
        rounds=3,
        min_seconds=0.005,
    )
    (run_dir / "benchmark.json").write_text(json.dumps(result.to_dict()))
