"""What to keep of a network, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from secateur.errors import PlanError
from secateur.graph.channels import ChannelGraph
from secateur.graph.structure import Index, Indices, Record, checked, parsed

FORMAT_VERSION = 1
"""Version of the plan's JSON form; raised when an older reader could misread a newer plan."""

_MOST_GROUPS = 20

Selection = dict[str, list[int]]
"""Group name -> channels of the group that are removed."""


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """What to keep of a network, as plain data: names and integers.

    Kept indices ascend, with one exception: behind a shuffle of blocks that lose different indices they stand in the
    order in which the pruned network holds them.

    A plan needs nothing but a freshly built original model to be applied: no graph, no trace, no data.
    """

    kept_outputs: dict[str, list[int]] = field(default_factory=dict)
    """Module name -> kept output channels of every convolution and linear layer the plan touches."""
    kept_inputs: dict[str, list[int]] = field(default_factory=dict)
    """Module name -> kept input channels of every convolution and linear layer the plan touches."""
    kept_tensors: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    """Name of every other parameter or buffer -> dimension -> kept indices."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Name of a grouped convolution's weight in ``kept_tensors`` -> the blocks that its dimension 1 stands for."""
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Module name -> attribute -> new value, for attributes that count channels (``num_features``, ``num_heads``)."""
    magnitudes: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Name of the g of a weight g·v/‖v‖ -> name of the v, dimension of its norms, where v loses a part of each norm."""
    reads: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    """Name of a parameter or buffer that code reads channels with outside a layer of its own, or computes such a kernel
    from -> dimension -> kept indices; it is for ``verify``, which zeroes the others."""
    removed: Selection = field(default_factory=dict)
    """Group name -> removed channels of that group; for people and reports, not read by ``apply``."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape in the original model of every tensor that the plan touches, to refuse another model."""
    version: int = FORMAT_VERSION

    def __repr__(self) -> str:
        channels = sum(map(len, self.removed.values()))
        return f"PruningPlan({channels} channels of {len(self.removed)} groups removed)"

    def __str__(self) -> str:
        """Return how many channels each group loses; of many groups, those that lose most."""
        most = sorted(self.removed, key=lambda name: -len(self.removed[name]))[:_MOST_GROUPS]
        width = max((len(name) for name in most), default=0)
        lines = [f"{sum(map(len, self.removed.values()))} channels of {len(self.removed)} groups go"]
        lines += [f"  {name:<{width}}  {len(self.removed[name])}" for name in self.removed if name in most]
        if len(most) < len(self.removed):
            lines.append(f"  ... and fewer of {len(self.removed) - len(most)} more in plan.removed")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data; integer keys become strings."""
        data = asdict(self)
        for key in ("kept_tensors", "reads"):
            data[key] = {name: {str(d): v for d, v in dims.items()} for name, dims in data[key].items()}
        data["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        return data

    def to_json(self) -> str:
        """Return the plan as a line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Any) -> PruningPlan:
        """Read a plan from JSON data.

        Raises:
            PlanError: If the data is no plan, or one of a newer format version.
        """
        if not isinstance(data, dict) or type(data.get("version")) is not int:
            raise PlanError("plan: this is no pruning plan: it has no format version.")
        if data["version"] > FORMAT_VERSION:
            raise PlanError(
                f"plan: format version {data['version']} is newer than {FORMAT_VERSION}, the newest read here. "
                "Update secateur."
            )
        try:
            form = checked(_Form, data)
        except ValueError as error:
            raise PlanError(f"plan: damaged: {error}.") from error
        return cls(**{f.name: getattr(form, f.name) for f in fields(cls)})

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan from a line of JSON.

        Raises:
            PlanError: If the text is no plan, or one of a newer format version.
        """
        try:
            data = parsed(text)
        except ValueError as error:
            raise PlanError(f"plan: {error}.") from error
        return cls.from_dict(data)


_Dim = Annotated[int, Field(strict=False, ge=0, lt=64)]  # a key of JSON is a string
_Cuts = dict[str, dict[_Dim, Indices]]
_Pair = Annotated[tuple[str, _Dim], Field(strict=False)]  # JSON has lists alone
_Shape = Annotated[tuple[Index, ...], Field(strict=False)]


class _Form(Record):
    """A plan's JSON form."""

    kept_outputs: dict[str, Indices] = Field(default_factory=dict)
    kept_inputs: dict[str, Indices] = Field(default_factory=dict)
    kept_tensors: _Cuts = Field(default_factory=dict)
    blocks: dict[str, Index] = Field(default_factory=dict)
    attributes: dict[str, dict[str, Index]] = Field(default_factory=dict)
    magnitudes: dict[str, _Pair] = Field(default_factory=dict)
    reads: _Cuts = Field(default_factory=dict)
    removed: dict[str, Indices] = Field(default_factory=dict)
    shapes: dict[str, _Shape] = Field(default_factory=dict)
    version: Index


def masks(graph: ChannelGraph, removed: Mapping[str, list[int]]) -> list[np.ndarray]:
    """Return the mask of every group of the graph: which of its channels are removed."""
    result = []
    for group in graph.groups:
        mask = np.zeros(group.size, dtype=bool)
        mask[removed.get(group.name, [])] = True
        result.append(mask)
    return result
