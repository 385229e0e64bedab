"""What a compensation did to each layer, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerCompensation:
    """What one method did to one layer (``merge``: to the layers that read one group)."""

    method: str
    module: str
    applied: bool
    reason: str = ""
    """Why nothing was done, or what was left out."""
    before: float | None = None
    """Least squares: squared error of the layer's outputs without compensation, as a fraction of their power."""
    after: float | None = None
    """Least squares: the same with compensation, on the same data."""


@dataclass
class CompensationReport:
    """What was done, in the order in which it was done."""

    layers: list[LayerCompensation] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerCompensation]:
        return iter(self.layers)

    @property
    def skipped(self) -> list[LayerCompensation]:
        """The layers that were left alone, each with its reason."""
        return [layer for layer in self.layers if not layer.applied]

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            line = f"{layer.method:<14} {layer.module:<32} {'done' if layer.applied else 'skipped'}"
            if layer.before is not None and layer.after is not None:
                line += f"  error {layer.before:.3%} -> {layer.after:.3%}"
            lines.append(f"{line}  {layer.reason}".rstrip())
        return "\n".join(lines)
