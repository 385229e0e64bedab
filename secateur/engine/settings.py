"""The settings of a compression run, beside the model and the data: plain values that go into ``config.json``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from secateur.compensation import parse
from secateur.compensation.least_squares import refit
from secateur.criteria.papers.singh2020cfp import Form, Order
from secateur.errors import UsageError
from secateur.network.kinds import checked_class
from secateur.pruning.options import OptionKeywords, Options
from secateur.training.arithmetic import PRECISIONS
from secateur.training.stages import Distillation, TrainingSettings

Share = Literal["mean", "macs", "first"]
"""How the producers of a coupled group share in the score of its pairs."""


@checked_class
@dataclass(frozen=True)
class Settings:
    """Settings of :func:`secateur.compress`; every field is a keyword of it and a key of ``settings:`` in a run file.

    The defaults are the method of Singh et al. 2020 as far as the paper states it; see
    :mod:`secateur.criteria.papers.singh2020cfp` for what it leaves open.
    """

    # Channels that one episode removes
    fraction: float = 1 / 16
    """p: share of a group's *original* width that one episode removes; for a criterion, of all channels; for ``auto``
    under a tolerance, of the MACs, where a round that is reverted is tried again with half of it, twice at most."""
    pairs: str | int | tuple[int, ...] | dict[str, int] = "width"
    """Filters a group and episode: ``width``, max(1, round(p·c)); ``macs``, shared out by MACs; one number for every
    group; a tuple with one number for each distinct original width, ascending ((1, 2, 4) for ResNet-56); or a mapping
    from the start of a module name to a number; the longest start counts, and a group without one loses nothing."""
    phase2_pairs: int | None = None
    """The same in phase 2; as in phase 1 when None."""
    share: Share = "mean"
    """Score of a coupled group: ``mean`` over its producers, ``macs``-weighted mean, or the ``first`` only."""
    signed: bool = False
    """Pair by ρ instead of |ρ|: a negative pair can't be merged through a ReLU."""
    order: Order = "correlation"
    """Which pairs go first: ``correlation``, those of the largest |ρ|, as in the paper; ``residual``, those of the
    smallest residual, ‖w_p‖²(1 - ρ²) (see :func:`secateur.criteria.papers.singh2020cfp.residual`)."""
    internal_only: bool = False
    """Leave alone the groups that several layers produce together, the residual streams."""
    linear: bool | None = None
    """Prune the outputs of linear layers too; None: not by ``cfp``, by other methods yes."""

    # Where the run ends
    widths: tuple[dict[str, int], ...] = ()
    """Final widths by module name, a chain of mappings: ``({"conv1": 4, "conv2": 5}, {"conv1": 3, "conv2": 5})``.
    Takes the place of a target."""
    rounds: tuple[int, ...] = ()
    """Number of rounds to each of ``widths``, or to the target of a method other than ``cfp``, spread by ``pace``. When
    empty: by ``pairs`` or ``fraction``; ``auto`` goes to its target in one round, from 60% of the MACs on in two, from
    80% in three."""
    pace: Literal["geometric", "linear"] = "geometric"
    """With several rounds: the same share, or the same number, of what is left goes in each."""
    max_rounds: int | None = None
    """Episodes after which the run ends whatever was reached."""
    phases: tuple[int, ...] = (1, 2)
    """1: all groups at once; 2: group after group, first to last. With a target or widths only 1 is used."""

    # Optimisation of the pairs
    optimise: Literal["correlation", "none"] = "correlation"
    """``correlation``: train the pairs towards |ρ| = 1 before one filter of each goes. ``none``: plain training on the
    same number of images, the ablation of table 5."""
    form: Form = "pair"
    """Form of the regulariser, see :func:`secateur.criteria.papers.singh2020cfp.regulariser`."""
    strength: float = 1.0
    """λ, the weight of the regulariser."""
    optimise_epochs: int = 1
    """Most epochs of optimisation in an episode; 0 drops at once."""
    correlation_target: float | None = 0.99
    """min |ρ| over the episode's pairs at which the optimisation ends early; None runs all epochs, so that runs with
    and without optimisation see the same number of images."""
    optimise_lr: float | None = None
    """Learning rate of the optimisation; ``lr`` when None."""
    merge: bool = False
    """Fold each dropped filter into its partner's consumers. Through a ReLU only a positive pair can be folded: set
    ``signed`` with it, or the others are dropped plainly."""

    # Compensation, after filters are removed
    compensate: tuple[str, ...] | None = None
    """Methods that adjust the kept filters before any fine-tuning, in order: ``merge``, ``least_squares``, ``bn``.
    ``merge`` folds the pairs of ``cfp``, and each filter that another criterion drops into the one most like it. None
    is ``least_squares`` everywhere for ``auto``, and nothing for other methods."""
    compensate_options: dict[str, Any] = field(default_factory=dict)
    """Options of ``least_squares``, such as ``everywhere: true``."""

    # Training
    finetune_epochs: int = 2
    """Epochs of fine-tuning in each round; the last round of ``auto`` with a target has the final epochs instead."""
    final_epochs: int | None = None
    """Epochs of fine-tuning beside those of the episode, where a target or widths are reached, and at the end. None is
    8 for ``auto`` with a target, in place of its last round's own, and 0 otherwise."""
    final_lr: float | None = None
    """Peak learning rate of the final epochs, which follow a cosine to 0; ``lr`` when None."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """What updates the weights."""
    lr: float = 0.01
    """Learning rate, before the schedule."""
    momentum: float = 0.9
    """Momentum of ``sgd``."""
    nesterov: bool = False
    """Whether the momentum of ``sgd`` is Nesterov's."""
    weight_decay: float = 5e-4
    """Weight decay of every parameter."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """What the learning rate follows over a stage; None is ``cosine`` for ``auto``, else ``constant``."""
    warmup: float = 0.0
    """Share of a stage over which the learning rate first rises from 0, in [0, 1)."""
    label_smoothing: float = 0.0
    """Share of the target that cross entropy spreads over all classes."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; longer gradients are scaled down to it."""
    distillation: float | None = None
    """Weight of the unpruned network's teaching in the loss, in [0, 1]; None is 0.9 for ``auto`` where the outputs are
    class scores, and 0 otherwise."""
    temperature: float = 4.0
    """T of the distillation, by which both networks' outputs are divided before the softmax."""

    # How it is computed
    device: str = "auto"
    """``cpu``, or ``auto`` for the accelerator where there is one."""
    precision: str = "auto"
    """What convolutions and matrix products compute in while training; evaluation stays in fp32. ``auto`` takes bf16
    where the machine gains by it, see :func:`secateur.training.arithmetic.decide`; a run keeps to what it began in."""
    channels_last: bool | Literal["auto"] = "auto"
    """Whether convolutions' weights lie in memory with the channels last while training; ``auto`` as above."""
    criterion: dict[str, Any] = field(default_factory=dict)
    """Options of the criterion, for methods other than ``cfp``. With one that decides a selection and no score, such
    as ``threshold`` of ``corrnet`` or ``budget`` of ``cshe``, the criterion selects by itself, at most as many channels
    as the round allows; where it selects none, the run ends, short of a target if there is one."""
    criterion_batches: int = 8
    """Batches of the training data that a criterion sees, and compensation."""

    def __post_init__(self) -> None:
        """Refuse values out of range, each in one line."""
        _require(0 < self.fraction < 1, "fraction", "is in (0, 1)", self.fraction)
        if isinstance(self.pairs, str):
            _require(
                self.pairs in ("width", "macs"), "pairs", "is width, macs, a number, a list or a mapping", self.pairs
            )
        counts = [self.pairs] if isinstance(self.pairs, int) else self.pairs
        counts = list(counts.values()) if isinstance(counts, dict) else counts
        _require(isinstance(counts, str) or all(n >= 0 for n in counts), "pairs", "are not negative", self.pairs)
        _choice("share", self.share, get_args(Share))
        _choice("form", self.form, get_args(Form))
        _choice("order", self.order, get_args(Order))
        _choice("optimise", self.optimise, ("correlation", "none"))
        _choice("precision", self.precision, ("auto", *PRECISIONS))
        _require(
            self.channels_last in (True, False, "auto"), "channels_last", "is true, false or auto", self.channels_last
        )
        _choice("pace", self.pace, ("geometric", "linear"))
        for name in ("optimise_epochs", "finetune_epochs", "final_epochs", "criterion_batches"):
            _require((getattr(self, name) or 0) >= 0, name, "is not negative", getattr(self, name))
        _require(self.strength >= 0, "strength", "is not negative", self.strength)
        target = self.correlation_target
        _require(target is None or 0 < target <= 1, "correlation_target", "is in (0, 1]", target)
        _require(set(self.phases) <= {1, 2} and bool(self.phases), "phases", "are of 1 and 2", self.phases)
        _require(all(r >= 1 for r in self.rounds), "rounds", "are at least 1 each", self.rounds)
        goals = max(1, len(self.widths))
        _require(len(self.rounds) in (0, goals), "rounds", f"needs {goals} numbers", self.rounds)
        _check_compensation(self.compensate or (), self.compensate_options)
        self.training()
        Distillation(self.distillation or 0.0, self.temperature)

    def training(self, lr: float | None = None, schedule: Literal["cosine"] | None = None) -> TrainingSettings:
        """Return how the weights of a stage are trained."""
        return TrainingSettings(
            self.optimizer, lr or self.lr, self.momentum, self.nesterov, self.weight_decay,
            schedule or self.schedule or "constant",
            self.warmup, self.label_smoothing, self.clip_norm,
        )  # fmt: skip

    def resolved(self, *, auto: bool, bounded: bool, teaches: bool) -> Settings:
        """Return the settings with what the method leaves open filled in.

        Args:
            auto: Whether the method is ``auto``.
            bounded: Whether the tolerance decides when to stop.
            teaches: Whether the unpruned network's outputs are class scores.
        """
        own: dict[str, Any] = {
            "schedule": "cosine" if auto else "constant",
            "final_epochs": 8 if auto and not bounded else 0,
            "distillation": 0.9 if auto and teaches else 0.0,
            "compensate": ("least_squares",) if auto else (),
        }
        found = {name: value for name, value in own.items() if getattr(self, name) is None}
        if "compensate" in found and auto and not self.compensate_options:
            found["compensate_options"] = {"everywhere": True}
        return replace(self, **found)

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON values, which :meth:`of` takes back."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Make settings of plain values, as YAML or JSON gives them.

        Raises:
            UsageError: If a key is unknown or a value is out of range or of the wrong kind.
        """
        for name in values:
            if name not in {f.name for f in fields(cls)}:
                raise UsageError(f"{name}: no such setting; {meant(name)}")
        ready = {name: _plain_to_setting(name, value) for name, value in values.items()}
        try:
            return cls(**ready)
        except TypeError as error:
            raise UsageError(f"{_ill_typed(ready)}: the value is of the wrong kind: {error}.") from error


def parted(given: Mapping[str, Any]) -> tuple[Options, Settings]:
    """Part keywords into options of a plan and settings.

    Raises:
        UsageError: As :meth:`Options.of` and :meth:`Settings.of`.
    """
    planning = {name for name in given if name in OptionKeywords.__annotations__}
    return (
        Options.of({name: given[name] for name in given if name in planning}),
        Settings.of({name: given[name] for name in given if name not in planning}),
    )


def meant(name: str) -> str:
    """Say what is meant, perhaps, by a word that is no setting."""
    known = [f.name for f in fields(Settings)]
    planning = list(OptionKeywords.__annotations__)
    if name == "min_width":
        return "it is min_channels (--min-channels) now, an option of every method."
    if name in planning:
        option = {"ratios": "ratio"}.get(name, name).replace("_", "-")
        return f"it is an option of every method: --{option}, or {name}: at the top of the run's file."
    close = difflib.get_close_matches(name, [*known, *planning], n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."


def _plain_to_setting(name: str, value: Any) -> Any:
    """Turn a list into the tuple that a frozen setting holds, and a lone mapping or number into a chain of one."""
    if name == "widths" and isinstance(value, Mapping):
        value = [value]
    if name in ("rounds", "phases") and isinstance(value, int):
        value = [value]
    if name == "compensate" and isinstance(value, str):
        value = parse(value)
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _ill_typed(values: Mapping[str, Any]) -> str:
    """Name the value that can't be compared with what it ought to be."""
    for name, value in values.items():
        try:
            Settings(**{name: value})
        except TypeError:
            return f"{name}: found {value!r}"
        except UsageError:
            continue
    return "settings"


def _check_compensation(methods: Sequence[str], options: Mapping[str, Any]) -> None:
    try:
        names = parse(methods)
    except UsageError as error:
        raise UsageError(f"compensate: {error}") from None
    known = set(inspect.signature(refit).parameters) - {"original", "pruned", "plan", "data"}
    for name in options:
        _require("least_squares" in names, "compensate_options", "are those of least_squares, not asked for", name)
        _require(name in known, "compensate_options", f"are {', '.join(sorted(known))}", name)


def _require(holds: bool, name: str, rule: str, found: object) -> None:
    if not holds:
        raise UsageError(f"{name}: {rule}, found {found!r}.")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, f"is one of {', '.join(choices)}", value)
