"""LeNet-5 as Caffe ships it, the network of CFP's experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class LeNet5(nn.Module):
    r"""Two 5×5 convolutions, each followed by 2×2 max pooling, and two linear layers.

    The variant that pruning papers call LeNet-5 (20-50-800-500): Caffe's ``lenet.prototxt``, after LeCun et al. 1998.
    There is no activation after the convolutions but the pooling; one ReLU stands between the linear layers.
    At the default widths it takes 2,293,000 MACs for an image of 28×28 (CFP eqs. 1-3; the paper prints 4.40e6) and
    holds 431,080 parameters. Departures: none.

    Args:
        widths: Filters of ``conv1`` and ``conv2``.
        hidden: Outputs of ``fc1``.
        num_classes: Outputs of ``fc2``.
        in_channels: Channels of the image.
        in_size: Height and width of the image, in pixels; at least 16.

    Shapes:
        input ``(N, in_channels, in_size, in_size)``, output (logits) ``(N, num_classes)``.

    Raises:
        UsageError: If a width is below 1, ``widths`` isn't a pair, or the image is too small for two rounds of
            convolution and pooling.
    """

    def __init__(
        self,
        widths: Sequence[int] = (20, 50),
        hidden: int = 500,
        num_classes: int = 10,
        in_channels: int = 1,
        in_size: int = 28,
    ) -> None:
        super().__init__()
        if len(widths) != 2 or min(*widths, hidden, num_classes, in_channels) < 1:
            raise UsageError(
                f"lenet5: expected two widths and a hidden size, each at least 1, found widths={tuple(widths)}, "
                f"hidden={hidden}, num_classes={num_classes}, in_channels={in_channels}"
            )
        if in_size < 16:
            raise UsageError(f"lenet5: two 5x5 convolutions with pooling need an image of 16x16, found {in_size}")
        first, second = widths
        side = ((in_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * side * side, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            # Caffe's "xavier" filler, U(±sqrt(3 / fan_in)), is Kaiming's uniform with gain 1.
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc2(x)
        return logits


def lenet5(
    widths: Sequence[int] = (20, 50),
    hidden: int = 500,
    num_classes: int = 10,
    in_channels: int = 1,
    in_size: int = 28,
) -> LeNet5:
    """Build a :class:`LeNet5` with fresh weights; arguments and errors are the class's."""
    return LeNet5(widths, hidden, num_classes, in_channels, in_size)
