"""Tiny networks and data sets that train in a fraction of a second."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.training.stages import TrainingSettings, fit


class Small(nn.Module):
    """Two convolutions with batch norm and dropout, on 8×8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.fc1 = nn.Linear(12 * 4, 16)
        self.drop = nn.Dropout(0.1)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(self.conv2(x), 2)
        out: Tensor = self.fc2(self.drop(F.relu(self.fc1(x.flatten(1)))))
        return out


class Residual(nn.Module):
    """A stream of two producers, an inner layer of one, and a depthwise layer on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.outer = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.depth(F.relu(self.inner(x))))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Batches:
    """Tensors cut into batches; shuffled anew each epoch from the generator."""

    def __init__(self, x: Tensor, y: Tensor, size: int, shuffle: bool = False) -> None:
        self.x, self.y, self.size, self.shuffle = x, y, size, shuffle
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.x)
        order = torch.randperm(n, generator=self.generator) if self.shuffle else torch.arange(n)
        for index in order.split(self.size):
            yield self.x[index], self.y[index]


def digits(train: int = 400) -> tuple[Batches, Batches, Batches]:
    """Return training, validation and test batches of scikit-learn's digits."""
    data = load_digits()
    x = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (
        Batches(x[:train], y[:train], 40, shuffle=True),
        Batches(x[1000:1200], y[1000:1200], 200),
        Batches(x[1200:1400], y[1200:1400], 200),
    )


def trained(seed: int = 0, epochs: int = 8, net: type[nn.Module] = Small) -> nn.Module:
    """Return a network trained on the digits."""
    torch.manual_seed(seed)
    model = net()
    fit(model, digits()[0], epochs=epochs, settings=TrainingSettings(lr=0.05), seed=seed)
    return model
