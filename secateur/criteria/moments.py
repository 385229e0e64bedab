r"""Sums over examples that give means, covariances and correlations: fp64, O(C²) memory, and they add up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    r"""Sums over observations of ``C`` channels, from which all first and second moments follow.

    An observation is one position of one image. All sums are in fp64. Moments of disjoint data :meth:`merge` into
    those of all data, in any order and grouping.

    Not every observation has to see every channel. Two channels that were seen in the very same observations have
    their second moment; all others count as never seen together, with 0. So the channels fall into sets of which each
    has moments of one set of observations, and all second moments are positive semi-definite. Means over whichever
    observations two channels happen to share would not be.
    """

    count: Tensor
    """How many observations saw both channels, shape ``(C, C)``."""
    total: Tensor
    r""":math:`\sum x_i`, shape ``(C,)``."""
    cross: Tensor
    r""":math:`\sum x_i x_j`, shape ``(C, C)``."""

    @classmethod
    def empty(cls, size: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no observation of ``size`` channels."""
        return cls(
            *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((size, size), size, (size, size)))
        )

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.total)

    def update(self, rows: Tensor, channels: Tensor | None = None) -> None:
        """Add observations.

        Args:
            rows: Shape ``(n, c)``.
            channels: Which channels the columns are, shape ``(c,)``; all of them, in order, by default.
        """
        rows = rows.detach().to(self.cross)
        if channels is None:
            self.count += len(rows)
            self.total += rows.sum(0)
            self.cross.addmm_(rows.mT, rows)
        else:
            at = (channels[:, None], channels[None, :])
            self.count[at] += len(rows)
            self.total[channels] += rows.sum(0)
            self.cross[at] += rows.mT @ rows

    def merge(self, other: Moments) -> None:
        """Add the observations of ``other``."""
        self.count += other.count
        self.total += other.total
        self.cross += other.cross

    def all_reduce(self) -> None:
        """Add the observations of all processes, when there are several."""
        all_reduce(self.count, self.total, self.cross)

    @property
    def together(self) -> Tensor:
        """Which pairs of channels were seen in the same observations, shape ``(C, C)``."""
        own = self.count.diagonal()
        return (self.count == own[:, None]) & (self.count == own[None, :])

    @property
    def mean(self) -> Tensor:
        r""":math:`E[x_i]`, shape ``(C,)``."""
        return self.total / self.count.diagonal().clamp(min=1)

    @property
    def second(self) -> Tensor:
        r""":math:`E[x_i x_j]`, shape ``(C, C)``; 0 for channels never seen together."""
        return torch.where(self.together, self.cross / self.count.clamp(min=1), 0.0)

    @property
    def covariance(self) -> Tensor:
        r""":math:`E[x_i x_j] - E[x_i] E[x_j]`, shape ``(C, C)``; 0 for channels never seen together."""
        mean = self.mean
        return torch.where(self.together, self.second - torch.outer(mean, mean), 0.0)

    @property
    def constant(self) -> Tensor:
        """Which channels never change (within 1e-12 of their second moment), shape ``(C,)``."""
        return self.covariance.diagonal() <= 1e-12 * self.second.diagonal()

    @property
    def correlation(self) -> Tensor:
        r"""Pearson's :math:`\rho`, shape ``(C, C)``, in [-1, 1]; a constant channel has 0 off the diagonal."""
        covariance, constant = self.covariance, self.constant
        scale = covariance.diagonal().clamp(min=0).sqrt().masked_fill(constant, 1.0)
        rho = (covariance / torch.outer(scale, scale)).clamp(-1.0, 1.0)
        rho = (rho + rho.mT) / 2  # sums of products of another order differ by rounding
        rho[constant] = 0.0
        rho[:, constant] = 0.0
        return rho.fill_diagonal_(1.0)


@dataclass
class Average:
    """A running mean of one value a channel, over samples."""

    total: Tensor
    count: Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device | str = "cpu") -> Average:
        """Return the average of nothing."""
        return cls(
            torch.zeros(size, dtype=torch.float64, device=device), torch.zeros(size, dtype=torch.float64, device=device)
        )

    def update(self, values: Tensor, channels: Tensor | None = None, weight: int = 1) -> None:
        """Add ``(N, c)`` values of N samples, or ``(c,)`` mean values of ``weight`` samples."""
        values = values.detach().to(self.total)
        index = slice(None) if channels is None else channels
        self.total[index] += values.sum(0) if values.dim() == 2 else values * weight
        self.count[index] += len(values) if values.dim() == 2 else weight

    def all_reduce(self) -> None:
        """Add the samples of all processes, when there are several."""
        all_reduce(self.total, self.count)

    @property
    def mean(self) -> Tensor:
        """Mean over samples, shape ``(C,)``; 0 where none was seen."""
        return self.total / self.count.clamp(min=1)


def several_processes() -> bool:
    """Whether a process group of more than one process is running."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return available and torch.distributed.get_world_size() > 1


def all_reduce(*tensors: Tensor) -> None:
    """Sum tensors over all processes, in place; nothing happens where there is one."""
    if several_processes():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
