"""A real run of LeNet-5 on scikit-learn's digits, some seconds long, for testing what reads run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from secateur import compress
from secateur.models import lenet5

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
