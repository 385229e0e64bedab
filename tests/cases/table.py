"""What a case is, and the parts that the cases are built of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A network written as one function over named parts, so that a pattern stands in a few lines."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on this network's parts."""
        return self.body(self, *args, **kwargs)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Case:
    """One small network and what a competent engine finds in it.

    Whatever an engine finds beyond ``prunable`` is welcome, as long as it is exact: the oracle decides that.
    """

    name: str
    pattern: str
    """The pattern in words."""
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    """Example inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    prunable: dict[str, int] = field(default_factory=dict)
    """Producer (module, or the name of a raw parameter) -> least number of its filters that can be removed."""
    inexact: tuple[str, ...] = ()
    """Producers whose removal can't equal zeroing: their groups have to be marked so, if there are any."""
    refused: dict[str, str] = field(default_factory=dict)
    """Producer none of whose filters may be offered -> a fragment of the refusal that has to be listed for it."""
    outputs: tuple[str, ...] = ("head",)
    """Layers that give the network's output: their filters may not be removed."""
    modes: tuple[str, ...] = ("eval",)
    """Modes in which the pruned network has to equal the masked original."""
    normalising: bool = False
    """Something is normalised over the channels themselves, so that no selection can equal zeroing."""

    @property
    def expectation(self) -> str:
        """``exact``, ``inexact``, ``refused``, or ``open`` where anything but a wrong answer will do."""
        if self.prunable:
            return "inexact" if self.inexact else "exact"
        return "inexact" if self.inexact else "refused" if self.refused else "open"


CASES: dict[str, Case] = {}


def image(channels: int = 3, height: int = 8, width: int = 6, batch: int = 2) -> Callable[[], Tensor]:
    """Return a maker of a random image batch; its sides differ so that no two dimensions are mistaken."""
    return lambda: torch.randn(batch, channels, height, width)


def case(
    inputs: Callable[[], Any] | None = None,
    prunable: dict[str, int] | None = None,
    inexact: tuple[str, ...] = (),
    refused: dict[str, str] | None = None,
    outputs: tuple[str, ...] = ("head",),
    modes: tuple[str, ...] = ("eval",),
    normalising: bool = False,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put the decorated builder into the table under its own name."""

    def enter(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = build.__name__
        if name in CASES:
            raise ValueError(f"two cases are named {name}")
        CASES[name] = Case(
            name=name,
            pattern=(build.__doc__ or "").strip(),
            build=build,
            inputs=inputs or image(),
            prunable=prunable or {},
            inexact=inexact,
            refused=refused or {},
            outputs=outputs,
            modes=modes,
            normalising=normalising or bool(inexact),
        )
        return build

    return enter


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Return a 2-d convolution that keeps the map's size."""
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU())


def pooled(x: Tensor) -> Tensor:
    """Average over the map: ``(N, C, H, W)`` to ``(N, C)``."""
    return x.mean((2, 3))
