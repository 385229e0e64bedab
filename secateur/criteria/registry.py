"""The registry of criteria: a name, pure functions of tensors, what they need and what they return.

A criterion never sees the model or the graph. It names what it needs, and :func:`secateur.score` and
:func:`secateur.select` hand it exactly that, by keyword, for one channel group at a time. A criterion from outside the
package takes ten lines::

    import secateur as sc
    from secateur.criteria import criterion
    from torch import Tensor

    @criterion("linf", needs=["filters"], source="largest absolute weight of a filter")
    def linf(filters: Tensor) -> Tensor:
        return filters.abs().amax(1)

    scores = sc.score(model, graph, "linf")

A package that is installed makes its criteria known without being imported by the user: it names the module, or the
:class:`Criterion`, in the entry-point group ``secateur.criteria``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from secateur.errors import CriterionError, UsageError
from secateur.network.kinds import checked_class

ENTRY_POINT_GROUP = "secateur.criteria"


class Need(StrEnum):
    """What a criterion asks for. The value is the keyword argument under which it is passed."""

    FILTERS = "filters"
    """``(C, F)``: row ``c`` is the filter of channel ``c``, of all the group's producers side by side."""
    PRODUCERS = "producers"
    """Tuple with one ``(C, F_m)`` tensor a producer; a channel that a producer lacks has a row of zeros."""
    CONSUMERS = "consumers"
    """Tuple with one ``(C_out, C, K)`` tensor a consumer: the weights that read each channel, K positions apiece."""
    MOMENTS = "moments"
    """:class:`secateur.criteria.moments.Moments` of the feature maps at the inputs of the group's consumers."""
    MAPS = "maps"
    """Feature maps of one batch, ``(N, c, H, W)`` (any number of spatial dimensions, or none). Streamed: the function
    is called once a batch, returns ``(N, c)`` or ``(c,)``, and its results are averaged over the samples."""
    GRADIENTS = "gradients"
    """``(C, F)``: gradients of the loss by ``filters``, for one batch. Streamed and averaged as maps are."""
    POOLED = "pooled"
    """``(N, C)``: every sample's feature maps, averaged over positions; all samples at once."""
    LABELS = "labels"
    """``(N,)`` class indices, of the samples of ``pooled``."""
    GENERATOR = "generator"
    """A seeded ``torch.Generator``, on the CPU."""


STREAMED = frozenset({Need.MAPS, Need.GRADIENTS})


class NotDefinedError(CriterionError):
    """A criterion is not defined on one group's tensors, by their kind and not by their values; others are scored."""


class Returns(StrEnum):
    """What the function of a criterion returns."""

    SCORES = "scores"
    """Tensor ``(C,)``, higher = keep."""
    PAIRS = "pairs"
    """:class:`Selection` whose ``pairs`` name the survivor of each removed channel."""
    SELECTION = "selection"
    """:class:`Selection` of given size: which channels go depends on how many do."""


@dataclass(frozen=True)
class Pair:
    """Two channels of one group, of which one goes."""

    kept: int
    dropped: int
    strength: float
    """How alike they are, e.g. Pearson's ρ, signed."""


@dataclass(frozen=True, repr=False)
class Selection:
    """Channels of one group to remove, in the order in which the criterion picked them."""

    removed: tuple[int, ...]
    pairs: tuple[Pair, ...] = ()

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.removed[:8])) + (", ..." if len(self.removed) > 8 else "")
        return f"Selection({len(self.removed)} channels: {first})"


@checked_class
@dataclass(frozen=True)
class Criterion:
    """A way to tell which channels of a group matter least.

    ``function`` receives what ``needs`` names as keyword arguments, and the user's options as further keywords. It must
    not write into what it receives: filters may be the model's own weights. Where
    ``returns`` is not SCORES it also receives ``remove``, the number of channels to remove, and returns a
    :class:`Selection` of at most as many.

    A streamed criterion (one that needs MAPS or GRADIENTS) is called once a batch. If it has more to do after the
    stream, it has a second function: ``per_batch`` is then the one called for every batch, and ``function`` is called
    once, with the mean of its results as ``average``, shape ``(C,)``.
    """

    name: str
    function: Callable[..., Any]
    needs: frozenset[Need] = frozenset()
    returns: Returns = Returns.SCORES
    source: str = ""
    """The paper, or one line on what is measured."""
    per_batch: Callable[..., Any] | None = None
    scores: Callable[..., Any] | None = None
    """For a criterion that returns a selection: scores with the same needs, for planning under any target. Without
    it a channel's score is the fraction of the group removed before it when all but one go."""

    @property
    def streamed(self) -> bool:
        """Whether a function of this criterion is called once a batch."""
        return bool(self.needs & STREAMED)

    @property
    def needs_data(self) -> bool:
        """Whether the criterion can't be computed from the weights alone."""
        return bool(self.needs & {Need.MOMENTS, Need.MAPS, Need.GRADIENTS, Need.POOLED, Need.LABELS})

    def takes(self, selecting: bool) -> set[str]:
        """Return the names of the options that have a say in a selection, or in scores."""
        last = self.function if selecting or self.scores is None else self.scores
        functions = [f for f in (last, self.per_batch) if f is not None]
        return set().union(*(_option_names(f) for f in functions))

    def check(self, options: Mapping[str, Any], selecting: bool) -> None:
        """Refuse options that would have no say.

        Raises:
            UsageError: If an option is none of this criterion's, or decides a selection where scores are asked for.
        """
        here = self.takes(selecting)
        every = sorted(here | self.takes(True))
        for name in options:
            if name not in every:
                offered = f"It takes {', '.join(every)}." if every else "It takes none."
                raise UsageError(f"criterion {self.name}: unknown option {name!r}. {offered}")
            if name not in here:
                offered = f"Scores take {', '.join(sorted(here))}." if here else "Scores take none."
                raise UsageError(
                    f"criterion {self.name}: {name!r} is an option of a selection and changes no score. {offered}"
                )


def options_of(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given options that a function takes."""
    return {name: value for name, value in given.items() if name in _option_names(function)}


_RESERVED = frozenset(need.value for need in Need) | {"average", "remove"}


def _option_names(function: Callable[..., Any]) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name not in _RESERVED}


@dataclass
class _Registry:
    criteria: dict[str, Criterion] = field(default_factory=dict)
    pending: dict[str, EntryPoint] | None = None

    def entry_points(self) -> dict[str, EntryPoint]:
        if self.pending is None:
            self.pending = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
        return self.pending


_registry = _Registry()


def register(criterion: Criterion, *, replace: bool = False) -> Criterion:
    """Make a criterion known by its name, and return it.

    Raises:
        UsageError: If the name is taken (unless ``replace``), or the criterion contradicts itself.
    """
    where = f"criterion {criterion.name}"
    if criterion.name in _registry.criteria and not replace:
        raise UsageError(
            f"{where}: the name is taken by {_registry.criteria[criterion.name].source or 'another'}. Choose another."
        )
    if criterion.per_batch is not None and not criterion.streamed:
        raise UsageError(
            f"{where}: per_batch is called with maps or gradients, and it needs neither. Add one to needs."
        )
    if criterion.streamed and criterion.returns is not Returns.SCORES and criterion.per_batch is None:
        raise UsageError(
            f"{where}: a selection can't be averaged over batches. Give a per_batch function that scores a batch."
        )
    if criterion.needs >= STREAMED:
        raise UsageError(f"{where}: maps and gradients are streamed in passes of different kinds. Ask for one of them.")
    _registry.criteria[criterion.name] = criterion
    return criterion


def criterion(
    name: str,
    *,
    needs: Iterable[Need | str],
    returns: Returns | str = Returns.SCORES,
    source: str = "",
    per_batch: Callable[..., Any] | None = None,
    scores: Callable[..., Any] | None = None,
    replace: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as a criterion; the fields are those of :class:`Criterion`.

    Example:
        >>> from secateur.criteria import criterion, get, unregister
        >>> @criterion("doc_linf", needs=["filters"])
        ... def doc_linf(filters):
        ...     return filters.abs().amax(1)
        >>> get("doc_linf").needs_data
        False
        >>> unregister("doc_linf")

    Raises:
        UsageError: If the name is taken, or a need or kind of return is unknown.
    """
    try:
        wanted = frozenset(Need(need) for need in needs)
        kind = Returns(returns)
    except ValueError as error:
        raise UsageError(
            f"criterion {name}: {error}. Needs are {', '.join(Need)}; returns {', '.join(Returns)}."
        ) from None

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        made = Criterion(name, function, wanted, kind, source or _first_line(function), per_batch, scores)
        register(made, replace=replace)
        return function

    return decorate


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def get(name: str | Criterion | Callable[..., Any]) -> Criterion:
    """Return the criterion of that name; a callable of ``filters`` stands for itself.

    Raises:
        UsageError: If there is no such criterion.
        CriterionError: If an entry point of that name can't be loaded.
    """
    if isinstance(name, Criterion):
        return name
    if callable(name):
        return _of_callable(name)
    if not isinstance(name, str):
        raise UsageError(f"criterion: is a name, a Criterion or a function, found {type(name).__name__}.")
    if name in _registry.criteria:
        return _registry.criteria[name]
    points = _registry.entry_points()
    if name in points:
        return _load(points[name])
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UsageError(f"unknown criterion {name!r}. {hint}Known: {', '.join(names())}.")


def _load(point: EntryPoint) -> Criterion:
    try:
        loaded = point.load()
    except Exception as error:
        raise CriterionError(f"criterion {point.name}: entry point {point.value} can't be loaded: {error}") from error
    if isinstance(loaded, Criterion) and loaded.name not in _registry.criteria:
        register(loaded)
    if point.name not in _registry.criteria:
        raise CriterionError(
            f"criterion {point.name}: entry point {point.value} registers no criterion of that name. "
            "It must name a Criterion, or a module that registers one."
        )
    return _registry.criteria[point.name]


def _of_callable(function: Callable[..., Any]) -> Criterion:
    """Take the needs of an unregistered function from the names of its parameters."""
    for known in _registry.criteria.values():
        if known.function is function:
            return known
    parameters = set(inspect.signature(function).parameters)
    wanted = frozenset(need for need in Need if need.value in parameters)
    if not wanted:
        label = getattr(function, "__name__", repr(function))
        raise UsageError(
            f"criterion {label}: no parameter is named after a need ({', '.join(Need)}). Name what it reads."
        )
    returns = Returns.SELECTION if "remove" in parameters else Returns.SCORES
    return Criterion(getattr(function, "__name__", "callable"), function, wanted, returns)


def names() -> list[str]:
    """Return the names of all known criteria, sorted."""
    return sorted(set(_registry.criteria) | set(_registry.entry_points()))


def unregister(name: str) -> None:
    """Forget a criterion; unknown names are ignored."""
    _registry.criteria.pop(name, None)
