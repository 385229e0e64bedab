"""What a rule works with: the labels of the tensors of one run, and what the run has found so far."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.channels import Magnitude
from secateur.tracing.findings import Attribute, Call, Cause, Grid, Share, Shuffled, Site
from secateur.tracing.labels import Axes, Labels, LabelStore
from secateur.tracing.numbers import Measure, counts_unseen, names_of
from secateur.tracing.source_lines import shown, sizes_given, source_line, user_frames

COUNTS = {
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels",
    "normalized_shape", "num_parameters", "num_embeddings", "embedding_dim",
}  # fmt: skip
"""Attributes of layers that a cut changes; code that reads them may do something else afterwards."""
LAYERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU,
    nn.Embedding,
)  # fmt: skip
"""Layers whose attributes follow their weights, whatever else they are equal to."""


WIDTHS = tuple(sorted(COUNTS - {"groups", "normalized_shape"}))
"""Those of them that count channels, and that no forward of PyTorch's own reads."""


class ValueNeeded(BaseException):
    """The code reads a value where there are none; no ``Exception``, which the code itself may catch."""


class Labelled:
    """The labels of one tensor, and whether it was computed from parameters and buffers alone."""

    __slots__ = ("axes", "grid", "owner", "weight")

    def __init__(self, owner: object, axes: Axes, weight: bool, grid: Grid | None = None) -> None:
        self.owner = owner
        self.axes = axes
        self.weight = weight
        self.grid = grid


VIEWS = {torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand}
"""Functions that are given the sizes of what they make, in order."""
_ATTRIBUTE = "_secateur_labels"
_NOTHING: Axes = {}


@dataclass(eq=False)
class Flow:
    """The labels of every tensor of one traced run, and the joins, freezes and assumptions found on the way."""

    named: dict[str, Tensor]
    """Every parameter and buffer of the model."""
    decisions: Mapping[int, int] = field(default_factory=dict)
    """For sites whose first option was seen not to hold: key -> index of the option to take."""
    kernels: Set[str] = frozenset()
    """Names of the weights of convolution and linear layers."""
    loose: Set[int] = frozenset()
    """Ordinals of the operator calls that shuffle channels whose rows may lose different indices; see ``Shuffled``."""

    def __post_init__(self) -> None:
        # Each other's own, they would be kept, with every tensor of a cut network, until the collector comes by.
        among_weights = weakref.WeakMethod(self.among_weights)
        self.store = LabelStore(lambda: bool((ask := among_weights()) and ask()))
        # Labels outlive the run on tensors that the model keeps; a token tells whose they are and holds nothing.
        self.token = object()
        self.frozen: list[tuple[Labels, Cause]] = []
        self.inexact: list[tuple[Labels, Cause]] = []
        self.sites: list[Site] = []
        self.shares: list[Share] = []
        self.calls: list[Call] = []
        self.attributes: list[Attribute] = []
        self.magnitudes: dict[Magnitude, None] = {}
        self.staying: list[tuple[Labels, int]] = []
        """Dimensions of channels and how many have to stay: two, where code would drop a dimension of one index."""
        self.multiples: list[tuple[Labels, int]] = []
        """Dimensions of channels and by what the code divides their number and asks for the remainder."""
        self.produced: list[Labels] = []
        self.consumed: list[Labels] = []
        self.module = ""
        self.layer: nn.Module | None = None
        self.foreign = False
        """Whether that module is registered nowhere in the model."""
        self.operator = ""
        self.shuffled: list[Shuffled] = []
        self.moved_at: list[Cause] = []
        """For every vector that the store holds as moved, the call that moves it."""
        self.futile: set[int] = set()
        """Of what is shuffled strictly, the ordinals of those calls whose rows no later operator lays in columns."""
        self.copies: list[tuple[int, int]] = []
        """Ranges of labels of equal copies, which an expansion makes: any of them may go for any other."""
        self.paused = 0
        """Depth of layers whose operators are not looked at, because a registered rule speaks for them."""
        self.called: object = None
        """The torch function that the model's code has called; None where code in no Python called the operator."""
        self.numbers: dict[tuple[str, str], Measure] = {}
        """Module and attribute -> whether the code compares that number, or counts with it."""
        self.widths: dict[tuple[str, str], Measure] = {}
        """The same of layers, whose numbers of channels follow by rules."""
        self.measures: list[tuple[Labels, Measure]] = []
        """Channels whose number the code was told, and whether it went on to count with it."""
        self.by_value = False
        """Whether the code read a tensor's values, on which what it does next may depend."""
        self.spared = False
        """Whether products are without values now, so that none may be read."""
        self.doubt: Cause | None = None
        """The first call that may depend on the number of channels in a way that labels don't show."""
        self.ordinal = 0
        self.operands: Sequence[Tensor] = ()
        """What the operator at work reads."""
        self.arguments: tuple[Any, ...] = ()
        """What the torch function that the model's code has called was given."""
        self.asked: Mapping[int, Labels] = {}
        """Dimensions of a view being made -> the channels whose number the code gives as the size."""
        self.shape_before: tuple[int, ...] = ()
        self.stride_before: tuple[int, ...] = ()
        self._names: dict[int, str] = {}
        for name, tensor in self.named.items():
            self._names.setdefault(id(tensor), name)
        self._leaves: dict[int, Labelled] = {}
        self._virtual: dict[tuple[str, int], Labels] = {}
        self._counted: dict[tuple[str, str], Labels] = {}

    @property
    def certain(self) -> bool:
        """Whether what was found holds by the rules alone, whatever number of channels goes."""
        follows = all(site.options[site.choice] in ("follow", "freeze") for site in self.sites)
        guessed = any(attribute.guessed for attribute in self.attributes) or bool(self.store.moves)
        return self.doubt is None and follows and not guessed

    # Labels of tensors

    def labelled(self, tensor: Tensor) -> Labelled | None:
        """Return what is known of a tensor, or None."""
        known: Labelled | None = getattr(tensor, _ATTRIBUTE, None)
        if known is not None and known.owner is self.token:
            return known
        key = id(tensor)
        if key not in self._names:
            return None
        if key not in self._leaves:
            self._leaves[key] = self._label_leaf(self._names[key], tensor)
        return self._leaves[key]

    def _label_leaf(self, name: str, tensor: Tensor) -> Labelled:
        # The kernel positions of a convolution's weight are never channels.
        kernel = tensor.ndim > 2 and tensor.shape[0] > 1
        dims = [d for d, size in enumerate(tensor.shape) if size > 1 and not (kernel and d > 1)]
        axes = {d: self.store.fresh_for(name, d, tensor.shape[d]) for d in dims}
        return Labelled(self.token, axes, weight=True)

    def axes(self, tensor: Tensor) -> Axes:
        """Return the labelled dimensions of a tensor; empty where it carries no labels."""
        known = self.labelled(tensor)
        return known.axes if known is not None else _NOTHING

    def is_weight(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was computed from parameters and buffers alone."""
        known = self.labelled(tensor)
        return known is not None and known.weight

    def among_weights(self) -> bool:
        """Tell whether the operator at work reads parameters and buffers alone, and what was computed from them."""
        read = self.operands
        return len(read) > 0 and all(self.is_weight(tensor) or not self.axes(tensor) for tensor in read)

    def took_part(self, tensor: Tensor) -> bool:
        """Tell whether a parameter or buffer was read in the run."""
        return id(tensor) in self._leaves

    def name(self, tensor: Tensor) -> str:
        """Return the qualified name of a parameter or buffer; empty for any other tensor."""
        return self._names.get(id(tensor), "")

    def set(self, tensor: Tensor, axes: Axes, *, weight: bool = False) -> None:
        """Give a tensor its labels. A parameter or buffer that is written in place joins its own with them."""
        if id(tensor) in self._names:
            own = self.axes(tensor)
            for dim, labels in axes.items():
                if dim in own:
                    self.store.join(own[dim], labels)
                else:
                    self.freeze(labels, "is written into a tensor of the model")
        elif axes or weight or getattr(tensor, _ATTRIBUTE, None) is not None:
            setattr(tensor, _ATTRIBUTE, Labelled(self.token, axes, weight))

    def set_grid(self, tensor: Tensor, grid: Grid) -> None:
        """Let a tensor carry, beside its labels, two dimensions that one vector of channels was cut into."""
        known = self.labelled(tensor)
        axes, weight = (known.axes, known.weight) if known is not None else ({}, False)
        setattr(tensor, _ATTRIBUTE, Labelled(self.token, axes, weight, grid))

    def grid(self, tensor: Tensor) -> Grid | None:
        """Return the two dimensions of a tensor that one vector of channels was cut into."""
        known = self.labelled(tensor)
        return known.grid if known is not None else None

    def virtual(self, weight: Tensor, size: int, blocks: int) -> Labels | None:
        """Return labels for all the channels of which a grouped convolution's weight holds one block on dimension 1.

        None where the weight is computed: then every block has to lose the same indices.
        """
        name = self.name(weight)
        if not name:
            return None
        key = (name, size)
        if key not in self._virtual:
            self._virtual[key] = self.store.fresh_for(name, 1, size, blocks)
        return self._virtual[key]

    def ban(self, banned: Mapping[tuple[str, int], Cause]) -> None:
        """Keep every channel along these dimensions of parameters, for the reasons given before all others."""
        found = [
            (leaf.axes[d], cause)
            for key, leaf in self._leaves.items()
            for (name, d), cause in banned.items()
            if self._names[key] == name and d in leaf.axes
        ]
        found += [(labels, banned[name, 1]) for (name, _), labels in self._virtual.items() if (name, 1) in banned]
        self.frozen[:0] = found

    # What a rule may find

    def cause(self, reason: str) -> Cause:
        """Return the present operator call as the cause of something."""
        return Cause(self.operator, self.module, source_line(), reason)

    def freeze(self, labels: Labels, reason: str) -> None:
        """Keep every channel of these labels."""
        self.freeze_for(labels, self.cause(reason))

    def freeze_for(self, labels: Labels, cause: Cause) -> None:
        """Keep every channel of these labels, for a cause found at another call."""
        self.frozen.append((labels.reshape(-1), cause))

    def freeze_tensor(self, tensor: Tensor, reason: str, dims: Iterable[int] | None = None) -> None:
        """Keep every channel of a tensor, or those along some of its dimensions."""
        axes = self.axes(tensor)
        for dim in axes if dims is None else dims:
            if dim in axes:
                self.freeze(axes[dim], reason)

    def mark_inexact(self, labels: Labels, reason: str) -> None:
        """Let these channels be pruned only when asked: removing them can't equal zeroing them."""
        self.inexact.append((labels.reshape(-1), self.cause(reason)))

    def fixed(self, size: int, reason: str) -> Labels:
        """Return new labels that never go: positions that the user's code writes or that nothing is known of."""
        labels = self.store.fresh(size)
        self.freeze(labels, reason)
        return labels

    def are_copies(self, labels: Labels) -> bool:
        """Tell whether the labels are of equal copies that an expansion made."""
        first = int(labels[0])
        return any(start <= first < stop for start, stop in self.copies)

    def assume(
        self,
        labels: Labels,
        reason: str,
        *options: str,
        blocks: Sequence[Labels] = (),
        along: Mapping[int, Labels] | None = None,
    ) -> str:
        """Return what to assume of the user's code at this call, and remember it to be tested.

        ``along`` tells which labels lie along which dimension of the result.

        ``"freeze"`` is always the last resort; the labels are frozen here when it is reached, and where a tensor has no
        elements: no trial would tell.
        """
        every = (*options, "freeze")
        choice = min(self.decisions.get(self.ordinal, 0), len(every) - 1)
        if any(tensor.numel() == 0 for tensor in self.operands):
            choice, reason = len(every) - 1, f"{reason}, and comes without elements: give examples that reach it"
        asked = tuple((own, self.asked[dim]) for dim, own in (along or {}).items() if dim in self.asked)
        site = Site(self.ordinal, self.cause(reason), labels.reshape(-1), every, choice, tuple(blocks), asked)
        self.sites.append(site)
        if every[choice] == "freeze":
            self.freeze(labels, reason)
        return every[choice]

    def measure(self, labels: Labels) -> Measure:
        """Return where to note that the code counts with the number of these channels."""
        self.measures.append((labels, Measure()))
        return self.measures[-1][1]

    def keep_numbers(self) -> None:
        """Keep what the code found out about numbers of channels: that two differ, and what remains of a division.

        Those that are more than other channels all stay, as the others may lose some, or none; of those that are more
        than a given number, one more than that stays.
        """
        for labels, measure in self.measures:
            if measure.met is not None:
                reason = "is compared with the smaller number of other channels, which theirs must not come to equal"
                self.freeze_for(labels, Cause("comparison", "", shown(*measure.met), reason))
            elif measure.above > 1:
                self.staying.append((labels, measure.above + 1))
        followed = [(a.labels, self.numbers.get((a.module, a.name))) for a in self.attributes]
        followed += [(labels, width) for key, width in self.widths.items() for labels in self._counted_by(*key)]
        for labels, number in [*self.measures, *followed]:
            if number is not None and number.divisor > 1:
                self.multiples.append((labels, number.divisor))

    def _counted_by(self, path: str, attribute: str) -> list[Labels]:
        """Return the channels that an attribute of a layer counts."""
        calls = [call for call in self.calls if call.module == path]
        if attribute.startswith(("in_", "out_")):
            found = [call.inputs if attribute.startswith("in_") else call.outputs for call in calls]
        else:
            weight = self.named.get(f"{path}.weight".lstrip("."))
            found = [self.axes(weight).get(int(attribute == "embedding_dim")) if weight is not None else None]
        return [labels.reshape(-1) for labels in found if labels is not None]

    def give_up(self, site: Site) -> None:
        """Keep the channels of a site whose assumption does not hold."""
        site.choice = len(site.options) - 1
        self.freeze_for(site.labels, site.cause)

    def counts(self, *values: int, at: int | None = None) -> list[str]:
        """Return the attributes of the module at work that hold one of these numbers, and that the call was given.

        An element of a list or tuple is given as ``name[index]``. ``at`` asks for the size of one dimension of a view
        alone.
        """
        asked: Any = self.arguments
        if at is not None and self.arguments and self.called in VIEWS:
            asked = sizes_given(self.arguments[0])[at : at + 1]
        return [
            name.attribute
            for name in dict.fromkeys(names_of((asked,)))
            if name.run is self.token
            and name.module == self.module
            and name.value in values
            and (name.module, name.attribute) not in self.widths
        ]

    def follow(self, name: str, labels: Labels, *, guessed: bool = False) -> None:
        """Let an attribute of the module at work be the number of these channels that are left.

        A module that is no part of the model can't be changed with it: it may have been made for this call, or not.
        """
        if self.foreign:
            self.doubt = self.doubt or self.cause("is run by a module that is not registered in the model")
        else:
            self.attributes.append(Attribute(self.module, name, labels, labels.size, guessed))
            number = self.numbers.get((self.module, name)) if guessed else None
            if number is not None and any(counts_unseen(frame.f_code) for frame in islice(user_frames(), 1)):
                number.taken = number.computed = True

    def count(self, name: str, labels: Labels) -> None:
        """Let an attribute of the module at work follow the number of these channels.

        Whatever else it counts has to lose as many: one number can't follow two.
        """
        self.follow(name, labels, guessed=True)
        first = self._counted.setdefault((self.module, name), labels)
        if first is not labels and first.size == labels.size:
            self.share([first, labels], f"{name} is the number of both")

    def call(self, layer: nn.Module, inputs: Labels | None, outputs: Labels | None) -> None:
        """Note what a registered layer reads and makes, so that a plan tells it what it keeps of both."""
        given, made = (labels.size if labels is not None else 0 for labels in (inputs, outputs))
        self.calls.append(Call(self.module, "registered", "", True, inputs, outputs, given, made))

    def share(self, blocks: Sequence[Labels], reason: str) -> None:
        """Let all blocks lose the same fraction of their channels."""
        if len(blocks) > 1:
            self.shares.append(Share(self.cause(reason), tuple(blocks)))

    def combine(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> Axes:
        """Return the axes of an element-wise combination, joining the labels that meet.

        A label that meets an index without one is frozen: the two would no longer have the same number.
        """
        ndim = len(shape)
        result: Axes = {}
        for tensor in tensors:
            offset = ndim - tensor.ndim
            for dim, labels in self.axes(tensor).items():
                known = result.setdefault(dim + offset, labels)
                if known.size != labels.size:
                    raise AssertionError(f"{self.operator}: {known.size} and {labels.size} labels meet")
                self.store.join(known, labels)
        if result:
            for tensor in tensors:
                offset = ndim - tensor.ndim
                own = self.axes(tensor)
                for dim, labels in result.items():
                    if dim >= offset and tensor.shape[dim - offset] > 1 and dim - offset not in own:
                        self.freeze(
                            labels, "meets a tensor without prunable channels there (the model's input, or a constant)"
                        )
        return result

    def without(self, axes: Axes, dims: Iterable[int], what: str) -> Axes:
        """Return the axes less ``dims``, whose labels become inexact: an operator mixes the channels themselves."""
        gone = set(dims)
        for dim in gone & axes.keys():
            self.mark_inexact(axes[dim], f"{what} over the channels themselves")
        return {d: labels for d, labels in axes.items() if d not in gone}
