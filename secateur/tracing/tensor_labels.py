"""The labels of every tensor of one run: of parameters, buffers, and whatever operators make of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.tracing.assumptions import Assumption
from secateur.tracing.labels import Axes, Labels, LabelStore

_ATTRIBUTE = "_secateur_labels"
_NOTHING: Axes = {}


@dataclass(frozen=True, eq=False)
class Grid:
    """Two dimensions of a tensor that one vector of channels was cut into, until they are merged again."""

    row: int
    """The dimension that counts the rows."""
    column: int
    labels: Labels
    """Shape ``(rows, columns)``."""
    assumption: Assumption
    """Whether the rows lose the same indices, or any."""

    @property
    def is_apart(self) -> bool:
        """Whether the rows may lose different indices."""
        return self.assumption.option == "apart"


class _Labelled:
    """The labels of one tensor, and whether it was computed from parameters and buffers alone."""

    __slots__ = ("axes", "grid", "owner", "weight")

    def __init__(self, owner: object, axes: Axes, weight: bool, grid: Grid | None = None) -> None:
        self.owner, self.axes, self.weight, self.grid = owner, axes, weight, grid


class TensorLabels:
    """The labels of the tensors of one run.

    Args:
        named: Every parameter and buffer of the network.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.named = named
        self.store = LabelStore()
        # Labels outlive the run on tensors that the network keeps; a token tells whose they are and holds nothing.
        self.token = object()
        self._names: dict[int, str] = {}
        for name, tensor in named.items():
            self._names.setdefault(id(tensor), name)
        self._leaves: dict[int, _Labelled] = {}
        self._blocked: dict[tuple[str, int], Labels] = {}

    def _known(self, tensor: Tensor) -> _Labelled | None:
        known: _Labelled | None = getattr(tensor, _ATTRIBUTE, None)
        if known is not None and known.owner is self.token:
            return known
        key = id(tensor)
        if key not in self._names:
            return None
        if key not in self._leaves:
            # The kernel positions of a convolution's weight are never channels.
            kernel = tensor.ndim > 2 and tensor.shape[0] > 1
            dims = [d for d, size in enumerate(tensor.shape) if size > 1 and not (kernel and d > 1)]
            axes = {d: self.store.fresh_for(self._names[key], d, tensor.shape[d]) for d in dims}
            self._leaves[key] = _Labelled(self.token, axes, weight=True)
        return self._leaves[key]

    def axes(self, tensor: Tensor) -> Axes:
        """Return the labelled dimensions of a tensor; empty where it carries no labels."""
        known = self._known(tensor)
        return known.axes if known is not None else _NOTHING

    def grid(self, tensor: Tensor) -> Grid | None:
        """Return the two dimensions of a tensor that one vector of channels was cut into."""
        known = self._known(tensor)
        return known.grid if known is not None else None

    def is_weight(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was computed from parameters and buffers alone."""
        known = self._known(tensor)
        return known is not None and known.weight

    def took_part(self, tensor: Tensor) -> bool:
        """Tell whether a parameter or buffer was read in the run."""
        return id(tensor) in self._leaves

    def name(self, tensor: Tensor) -> str:
        """Return the qualified name of a parameter or buffer; empty for any other tensor."""
        return self._names.get(id(tensor), "")

    def put(self, tensor: Tensor, axes: Axes, *, weight: bool = False, grid: Grid | None = None) -> None:
        """Give labels to a tensor that an operator made."""
        if axes or weight or grid is not None or getattr(tensor, _ATTRIBUTE, None) is not None:
            setattr(tensor, _ATTRIBUTE, _Labelled(self.token, axes, weight, grid))

    def put_grid(self, tensor: Tensor, grid: Grid) -> None:
        """Let a tensor carry, beside its labels, two dimensions that one vector of channels was cut into."""
        self.put(tensor, self.axes(tensor), weight=self.is_weight(tensor), grid=grid)

    def all_blocks(self, weight: Tensor, size: int, blocks: int) -> Labels | None:
        """Return labels for all the channels of which a grouped convolution's weight holds one block on dimension 1.

        None where the weight is computed: then every block has to lose the same indices.
        """
        name = self.name(weight)
        if not name:
            return None
        key = (name, size)
        if key not in self._blocked:
            self._blocked[key] = self.store.fresh_for(name, 1, size, blocks)
        return self._blocked[key]

    def source_of(self, weight: Tensor) -> str:
        """Return the name of the parameter that a weight is, or is a view of."""
        name = self.name(weight)
        if name:
            return name
        for labels in self.axes(weight).values():
            home = self.store.home(int(labels[0]))
            if home is not None:
                return home.tensor
        return ""
