"""The operator call at work, as its rule sees it: the labels of what it reads, and where to note what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.tracing.assumptions import FREEZE, Assumption, Assumptions, Cause
from secateur.tracing.findings import Attribute, Findings, LayerCall, Moved, Share
from secateur.tracing.labels import Axes, Labels
from secateur.tracing.numbers import VIEWS, names_of, plain, sizes_given
from secateur.tracing.source_lines import source_line
from secateur.tracing.tensor_labels import Grid, TensorLabels


class Call:
    """One operator call after another of one run: what runs where, and what its rule may ask and note."""

    def __init__(self, labels: TensorLabels, found: Findings, assumptions: Assumptions) -> None:
        self.labels, self.found, self.assumptions = labels, found, assumptions
        self.operator = ""
        self.ordinal = 0
        """Number of the call in the run, the same in every run of the network."""
        self.operands: Sequence[Tensor] = ()
        """The tensors that the operator reads."""
        self.out: Any = None
        """What the operator has made."""
        self.grid: Grid | None = None
        """Set by a view that cuts channels into rows: the two dimensions that it makes."""
        self.grids = False
        """Whether any view of the run has done so."""
        self.shape_before: tuple[int, ...] = ()
        self.stride_before: tuple[int, ...] = ()
        """Of the first operand, where the operator changes it in place."""
        self.module = ""
        """Path of the module whose forward is running."""
        self.layer: nn.Module | None = None
        """That module itself."""
        self.registered = True
        """Whether that module is part of the network: one made in the forward can't be changed with it."""
        self.function: Callable[..., Any] | None = None
        """The torch function that the network's code has called."""
        self.given: tuple[Any, ...] = ()
        """What that function was given."""
        self.asked: Mapping[int, Labels] = {}
        """Dimensions of what is made -> the channels whose number the code gives as the size."""

    # Labels

    def axes(self, tensor: Tensor) -> Axes:
        """Return the labelled dimensions of a tensor; empty where it carries no labels."""
        return self.labels.axes(tensor)

    def is_weight(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was computed from parameters and buffers alone."""
        return self.labels.is_weight(tensor)

    def join(self, left: Labels, right: Labels) -> None:
        """Let every label of ``left`` go together with its counterpart in ``right``, broadcasting."""
        read = self.operands
        mixed = len(read) > 0 and all(self.is_weight(tensor) or not self.axes(tensor) for tensor in read)
        self.labels.store.join(left, right, mixed=mixed)

    def join_rows(self, rows: Labels) -> Labels:
        """Let the labels of every row go together; return one label a row."""
        self.join(rows[:, :1], rows)
        return rows[:, 0].copy()

    def fresh(self, size: int) -> Labels:
        """Return new labels, joined to nothing."""
        return self.labels.store.fresh(size)

    def fixed(self, size: int, reason: str) -> Labels:
        """Return new labels that never go: positions that the code writes or that nothing is known of."""
        labels = self.fresh(size)
        self.freeze(labels, reason)
        return labels

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
                self.join(known, labels)
        for tensor in tensors if result else ():
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

    def give(self, tensor: Tensor, axes: Axes, *, weight: bool = False) -> None:
        """Give a tensor its labels. A parameter or buffer that is written in place joins its own with them."""
        if not self.labels.name(tensor):
            self.labels.put(tensor, axes, weight=weight)
            return
        own = self.axes(tensor)
        for dim, labels in axes.items():
            if dim in own:
                self.join(own[dim], labels)
            else:
                self.freeze(labels, "is written into a tensor of the model")

    # Findings

    def cause(self, reason: str) -> Cause:
        """Return the present call as the cause of something."""
        return Cause(self.operator, self.module, source_line(), reason)

    def freeze(self, labels: Labels, reason: str) -> None:
        """Keep every channel of these labels."""
        self.found.freeze(labels, self.cause(reason))

    def freeze_tensor(self, tensor: Tensor, reason: str, dims: Iterable[int] | None = None) -> None:
        """Keep every channel of a tensor, or those along some of its dimensions."""
        axes = self.axes(tensor)
        for dim in axes if dims is None else dims:
            if dim in axes:
                self.freeze(axes[dim], reason)

    def mark_inexact(self, labels: Labels, reason: str) -> None:
        """Let these channels be pruned only when asked: removing them can't equal zeroing them."""
        self.found.inexact.append((labels.reshape(-1), self.cause(reason)))

    def share(self, blocks: Sequence[Labels], reason: str) -> None:
        """Let all blocks lose the same fraction of their channels."""
        if len(blocks) > 1:
            self.found.shares.append(Share(self.cause(reason), tuple(blocks)))

    def uses(self, kind: str, inputs: Labels | None, outputs: Labels | None, **more: Any) -> None:
        """Note that a layer of some kind reads and makes channels; ``more`` are fields of :class:`LayerCall`."""
        self.found.layers.append(LayerCall(self.module, kind, inputs=inputs, outputs=outputs, **more))

    def registered_layer(self, inputs: Labels | None, outputs: Labels | None) -> None:
        """Note what a registered layer reads and makes, so that a plan tells it what it keeps of both."""
        given, made = (labels.size if labels is not None else 0 for labels in (inputs, outputs))
        self.uses("registered", inputs, outputs, weight="", owned=True, in_channels=given, out_channels=made)

    # Assumptions

    def assume(
        self,
        labels: Labels,
        reason: str,
        *options: str,
        blocks: Sequence[Labels] = (),
        along: Mapping[int, Labels] | None = None,
    ) -> str:
        """Return what to assume of the user's code at this call, and remember it to be tested.

        ``"freeze"`` is always the last resort; the labels are frozen here when it is reached, and where a tensor has no
        elements: no trial would tell.

        Args:
            labels: The channels that it is about.
            reason: Why they may have to stay.
            *options: What may be assumed, the likeliest first.
            blocks: Where the code cuts a vector: its parts.
            along: Dimension of the result -> the labels that lie along it.
        """
        every = (*options, FREEZE)
        key = (self.ordinal, "call")
        choice = self.assumptions.choice(key, every)
        if any(tensor.numel() == 0 for tensor in self.operands):
            choice, reason = len(every) - 1, f"{reason}, and comes without elements: give examples that reach it"
        asked = tuple((own, self.asked[dim]) for dim, own in (along or {}).items() if dim in self.asked)
        made = Assumption(key, self.cause(reason), labels.reshape(-1), every, choice, tuple(blocks), asked)
        self.found.assumptions.append(made)
        if made.option == FREEZE:
            self.freeze(labels, reason)
        return made.option

    def assume_rows(self, labels: Labels) -> Assumption:
        """Return whether rows that a vector is cut into, to be shuffled, go together or apart.

        At first the channels at one place of every row go together, and what is left keeps its order. Apart, rows lose
        any channels, equally many, and what is left lies in another order than in the unpruned network.
        """
        key, options = (self.ordinal, "rows"), ("together", "apart")
        choice = self.assumptions.choice(key, options)
        self.found.assumptions.append(Assumption(key, self.cause(""), labels.reshape(-1), options, choice))
        return self.found.assumptions[-1]

    def move(self, source: Labels, rows: int) -> Labels:
        """Interleave the rows of a vector, each of which loses as many channels, whichever they are."""
        self.share(list(source.reshape(rows, -1)), "is shuffled in rows of equal length")
        labels = self.fresh(source.size)
        self.labels.store.join(labels, source.reshape(rows, -1).T.reshape(-1), moved=True)
        self.found.moved.append(Moved(labels, source, rows, self.cause("")))
        return labels

    # Numbers that the code gives

    def counts(self, *values: int, at: int | None = None) -> list[str]:
        """Return the attributes of the module at work that hold one of these numbers, and that the call was given.

        An element of a list or tuple is given as ``name[index]``. ``at`` asks for the size of one dimension of a view
        alone.
        """
        asked: Any = self.given
        if at is not None and self.given and self.function in VIEWS:
            asked = sizes_given(self.given[0])[at : at + 1]
        return [
            name.attribute
            for name in dict.fromkeys(names_of((asked,)))
            if name.run is self.labels.token
            and name.module == self.module
            and name.value in values
            and (name.module, name.attribute) not in self.found.widths
        ]

    def follow(self, name: str, labels: Labels, *, guessed: bool = False) -> None:
        """Let an attribute of the module at work be the number of these channels that are left."""
        if self.registered:
            self.found.attributes.append(Attribute(self.module, name, labels, labels.size, guessed))

    def follow_unread(self, labels: Labels) -> None:
        """Let attributes of the module at work follow that hold the number of these channels, and that nothing read.

        Its code has just cut channels into parts of that width; where it cuts them in another forward, as for an
        export, it gives such an attribute in place of the number of parts.
        """
        for name, value in vars(self.layer).items() if self.layer is not None else ():
            known = self.found.numbers.get((self.module, name))
            if known is not None and not known.taken and type(plain(value)) is int and plain(value) == labels.size:
                self.follow(name, labels)

    def count(self, name: str, labels: Labels) -> None:
        """Let an attribute of the module at work follow the number of these channels.

        Whatever else it counts has to lose as many: one number can't follow two.
        """
        known = [a.labels for a in self.found.attributes if a.guessed and (a.module, a.name) == (self.module, name)]
        self.follow(name, labels, guessed=True)
        if known and known[0] is not labels and known[0].size == labels.size:
            self.share([known[0], labels], f"{name} is the number of both")
