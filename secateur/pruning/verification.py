"""The law of exactness: the pruned network equals the original with the removed channels zeroed where they are read.

Both networks run on the same inputs. In the original, every layer that the plan names has its removed input channels
set to zero just before it reads them; parameters that the code reads channels with directly, or computes such a kernel
from, have their columns zeroed. The outputs then have to agree; so does what every one of those layers reads, channel
by channel, which tells a wrong channel from a right one even where the outputs happen to agree.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import UsageError
from secateur.network.copies import replica
from secateur.network.inputs import arguments, leaves_of, mapped, tensors_of, unwrapped, varied
from secateur.network.isolation import left_as_found
from secateur.network.named import modules_of
from secateur.pruning.masking import zeroed

if TYPE_CHECKING:
    from secateur.graph.plan import PruningPlan

_READERS = (nn.modules.conv._ConvNd, nn.Linear)
_PART = 1 << 18
"""So many values are compared at once."""
_WHOLE: list[int] = []
"""In place of the channels that a layer keeps: it reads what it did."""
Readings = dict[str, list[tuple[Tensor, int]]]
"""Layer -> for every call, sums of what it reads of each channel, and over how many values."""


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify` found."""

    exact: bool
    """Whether everything compared agrees to the tolerance, and nothing was left unchecked."""
    max_error: float
    """Largest absolute difference of an output, over the largest absolute value of that output."""
    tolerance: float
    dtype: str
    """Precision of the comparison."""
    compared: int
    """Number of output tensors compared."""
    mismatched: tuple[str, ...] = ()
    """Layers that read something else than in the original, in execution order."""
    refused: tuple[str, ...] = ()
    """What could not be checked, and why."""
    training_failure: str = ""
    """How the pruned network fails in train mode, where the original does not."""

    @property
    def trains(self) -> bool:
        """Whether the pruned network runs in train mode, if the original does."""
        return not self.training_failure


@dataclass(eq=False)
class Difference:
    """How a pruned network differs from its masked original on one input."""

    error: float = 0.0
    wanted: list[Tensor] = field(default_factory=list)
    """What the original returns."""
    gaps: list[float] = field(default_factory=list)
    """For each output of as many, the difference over its largest value; infinite where shapes differ."""
    compared: int = 0
    mismatched: dict[str, list[int]] = field(default_factory=dict)
    """Layer -> input channels of the original that it reads differently."""
    notes: list[str] = field(default_factory=list)


def channel_dim(layer: nn.Module, x: Tensor) -> int:
    """Return the dimension of a layer's input that counts its channels."""
    if isinstance(layer, nn.Linear):
        return x.ndim - 1
    weight = getattr(layer, "weight", None)
    return 1 if not isinstance(weight, Tensor) or x.ndim == weight.ndim else 0


def _sums(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """Return two sums for every channel, enough to tell channels apart: of its values, and weighted at random."""
    x, dim = _whole(x.detach(), dim)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    before, size, after = math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
    weights = _weights(before * after).to(x)
    if after == 1:
        sums = x.reshape(before, size).t() @ weights
    else:  # a product for each of the dimensions before, so that the tensor need not be laid out anew
        sums = (x.reshape(before, size, after) @ weights.view(before, after, 2)).sum(0)
    return sums, before * after


def _whole(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """Return a tensor as it is outside torch's maps and gradients, which nothing that is kept may come from."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        mapped_over = torch._C._functorch.maybe_get_bdim(x) if torch._C._functorch.is_batchedtensor(x) else -1
        x = torch._C._functorch.get_unwrapped(x)
        if mapped_over >= 0:
            x, dim = x.movedim(mapped_over, 0), dim + 1
    return x, dim


@functools.lru_cache(maxsize=8)
def _weights(count: int) -> Tensor:
    """Return one column of equal weights and one of random weights in [-1.5, 1.5], the same in every run.

    NumPy draws them: inside a map of torch's, torch draws none.
    """
    drawn = np.random.default_rng(count).random(count)
    return torch.from_numpy(np.stack([np.ones(count), 3 * drawn - 1.5], 1) / max(count, 1))


def _masking(name: str, kept: list[int], readings: Readings) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        dim = channel_dim(layer, x)
        index = torch.tensor(kept, device=x.device)
        sums, count = _sums(x, dim)
        readings[name].append((sums.index_select(0, index), count))
        gone = torch.ones(x.shape[dim], dtype=torch.bool, device=x.device).index_fill(0, index, False)
        masked = x.index_fill(dim, gone.nonzero().flatten(), 0)
        return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, "input": masked})

    return hook


def _reading(name: str, readings: Readings) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        readings[name].append(_sums(x, channel_dim(layer, x)))

    return hook


@contextmanager
def _held(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for as long as the context lasts, and take them away."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def masked(model: nn.Module, plan: PruningPlan, readings: Readings) -> Iterator[None]:
    """Have removed channels zeroed where the original reads them, for as long as the context lasts.

    Layers read through a hook, which is taken away again. Where code uses a weight without a layer of its own, that
    weight, or what it is computed from, is read with its removed columns zeroed.
    """
    modules = modules_of(model)
    hooks = [
        modules[name].register_forward_pre_hook(_masking(name, kept, readings), with_kwargs=True)
        for name, kept in plan.kept_inputs.items()
    ]
    with _held(hooks), zeroed(model, plan):
        yield


@contextmanager
def _watched(network: nn.Module, names: Iterable[str], readings: Readings) -> Iterator[None]:
    """Note what layers read, for as long as the context lasts."""
    modules = modules_of(network)
    with _held([modules[n].register_forward_pre_hook(_reading(n, readings), with_kwargs=True) for n in names]):
        yield


def doubled(network: nn.Module) -> nn.Module:
    """Return a copy in fp64; no copy in the network's own precision is made on the way."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            value = tensor.detach().double()
            value = value.clone() if value is tensor else value
            kept = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if kept else value
    copied: nn.Module = replica(network, memo)
    return copied.double()


def outputs(network: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Run a network in eval mode, with the same random numbers every time, and return its output tensors."""
    with left_as_found(network):
        torch.manual_seed(0)
        if any(module.training for module in modules_of(network).values()):  # setting modes takes long
            network.eval()
        positional, keyword = arguments(mapped(example_inputs, lambda t: t.clone()))
        returned = leaves_of(network(*positional, **keyword), {})
        return [leaf.detach() for leaf in returned if isinstance(leaf, Tensor)]


def compare(model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, tolerance: float) -> Difference:
    """Run the pruned network and the masked original on the same inputs, in eval mode, and compare.

    Raises:
        Exception: Whatever the pruned network's own forward raises.
    """
    difference = Difference()
    original: Readings = defaultdict(list)
    pruned: Readings = defaultdict(list)
    readers = [name for name, m in modules_of(small).items() if isinstance(m, _READERS)]
    others = [name for name in readers if name not in plan.kept_inputs]
    with _watched(small, [*plan.kept_inputs, *others], pruned):
        found_outputs = outputs(small, example_inputs)
    with masked(model, plan, original), _watched(model, others, original):
        wanted_outputs = outputs(model, example_inputs)
    _compare_outputs(wanted_outputs, found_outputs, difference)
    for name, kept in (plan.kept_inputs | dict.fromkeys(others, _WHOLE)).items():
        if len(original[name]) != len(pruned[name]):
            difference.mismatched[name] = kept
            continue
        if kept is _WHOLE and not original[name]:
            continue
        if not original[name]:
            difference.notes.append(f"{name}: never runs in eval mode")
        elif not any(rows for _, rows in original[name]):
            difference.notes.append(f"{name}: reads tensors without elements on these inputs, so nothing was compared")
        for (want, want_rows), (found, found_rows) in zip(original[name], pruned[name], strict=True):
            if want_rows != found_rows and want.shape == found.shape:
                # Channels of another group lie along the other dimensions, and some of those are gone.
                continue
            scale = max(float(want.abs().max()), 1e-12) if want.numel() else 1.0
            wrong = ((want - found).abs() > tolerance * scale).any(1) if want.shape == found.shape else None
            if wrong is None:
                if kept is not _WHOLE:  # others may lose channels of groups that no layer reads
                    difference.mismatched[name] = kept
            elif bool(wrong.any()):
                places = wrong.nonzero().flatten().tolist()
                channels = places if kept is _WHOLE else [kept[i] for i in places]
                difference.mismatched.setdefault(name, []).extend(channels)
    return difference


def _compare_outputs(want: list[Tensor], found: list[Tensor], difference: Difference) -> None:
    difference.wanted = want
    if len(want) != len(found):
        difference.error = float("inf")
        difference.notes.append(f"outputs: the original returns {len(want)} tensors, the pruned network {len(found)}")
        return
    for index, (a, b) in enumerate(zip(want, found, strict=True)):
        error = float("inf")
        if a.shape == b.shape:
            difference.compared += 1
            error = _gap(a, b) if a.numel() else 0.0
        else:
            difference.notes.append(f"output {index}: shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        difference.gaps.append(error if error == error else float("inf"))
    difference.error = max(difference.gaps, default=0.0)


def _gap(want: Tensor, found: Tensor) -> float:
    """Return the largest absolute difference over the largest finite value; equal infinities do not differ.

    Part by part: in fp64, a whole output would take many times its own memory.
    """
    kind = torch.complex128 if want.is_complex() else torch.float64
    gaps, sizes = [], []
    parts = (torch.split(tensor.flatten(), _PART) for tensor in (want, found))
    for a, b in zip(*parts, strict=True):
        left, right = a.to(kind), b.to(kind)
        size = left.abs()
        gaps.append(torch.where(left == right, 0.0, (left - right).abs()).max())
        sizes.append(torch.where(torch.isfinite(size), size, 0.0).max())
    return float(torch.stack(gaps).max()) / max(float(torch.stack(sizes).max()), 1e-30)


def jumps(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, found: Difference, tolerance: float
) -> bool:
    """Tell whether outputs differ only because the original's own outputs jump: a sort, a threshold, NMS of near-ties.

    They do where a change by no more than rounding of the inputs, and of what layers make, changes the original's
    outputs beyond the tolerance, and about as much. Inputs alone do not show it all: where scores tie, as where a deep
    layer makes the same everywhere, the order of the layers' own sums decides which comes first. Such outputs tell
    nothing of a pruned network; what every layer of the plan makes is compared in their stead.

    Args:
        model: The original.
        small: The pruned network.
        plan: The plan applied.
        example_inputs: Example inputs, in the precision that the networks run in.
        found: How the networks differ on them: only in what they return.
        tolerance: Largest difference allowed, relative to the largest value.

    Returns:
        True where every output that differs jumps, and every layer of the plan makes what it makes in the original.
    """
    differing = {index: gap for index, gap in enumerate(found.gaps) if gap > tolerance}
    with masked(model, plan, defaultdict(list)):
        for seed in range(_NUDGES if differing else 0):
            generator = torch.Generator().manual_seed(seed)
            nudged = Difference()
            with _rounding(model, generator):
                _compare_outputs(found.wanted, outputs(model, _nudged(example_inputs, generator)), nudged)
            for index, gap in enumerate(nudged.gaps):
                other = differing.get(index, 0.0)
                if gap > tolerance and (gap > other / _ABOUT or math.isinf(other)):
                    differing.pop(index, None)
            if not differing:
                break
        if differing or not found.gaps:
            return False
        original = _made_by(model, plan, example_inputs, plan.kept_outputs)
    pruned = _made_by(small, plan, example_inputs, {})
    if pruned.keys() != original.keys():
        return False
    same = Difference()
    for name in pruned:
        _compare_outputs([s for s, _ in original[name]], [s for s, _ in pruned[name]], same)
    return all(gap <= tolerance for gap in same.gaps) and not same.notes


_NUDGES = 3
"""Number of times that the original is run with slight changes, at most."""
_ABOUT = 10
"""A jump accounts for a difference of so many times its size."""
_ROUNDING = {torch.float64: 1e-12}
"""By precision, the relative change that stands for rounding in sums of many terms; 1e-6 where not given."""


def _nudged(values: Any, generator: torch.Generator) -> Any:
    """Change every floating-point number of some tensors as rounding might."""

    def nudge(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return tensor * (1 + _ROUNDING.get(tensor.dtype, 1e-6) * (2 * noise - 1))

    return mapped(values, nudge)


@contextmanager
def _rounding(network: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Have every convolution and linear layer make what another order of its sums might, while the context lasts."""
    layers = [m for m in modules_of(network).values() if isinstance(m, _READERS)]
    with _held([layer.register_forward_hook(lambda _, args, out: _nudged(out, generator)) for layer in layers]):
        yield


def _made_by(network: nn.Module, plan: PruningPlan, example_inputs: Any, kept: Mapping[str, list[int]]) -> Readings:
    """Run a network, and return sums of what every layer of the plan makes of each channel, of those kept."""
    made: Readings = defaultdict(list)

    def reading(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, out: Any) -> None:
            if not isinstance(out, Tensor):  # a layer of the user's own, which returns more than it makes
                return
            dim = channel_dim(layer, out)
            sums, count = _sums(out, dim)
            made[name].append((sums[kept[name]] if name in kept else sums, count))

        return hook

    modules = modules_of(network)
    hooks = [modules[n].register_forward_hook(reading(n)) for n in plan.kept_inputs.keys() | plan.kept_outputs.keys()]
    with _held(hooks):
        outputs(network, example_inputs)
    return made


def _repeats(model: nn.Module, example_inputs: Any) -> bool:
    """Tell whether a network gives the same outputs when it is run again."""
    try:
        first, second = (outputs(model, example_inputs) for _ in range(2))
    except Exception:  # noqa: BLE001 - a network that fails has been reported already
        return True
    return len(first) == len(second) and all(
        a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
        for a, b in zip(first, second, strict=True)
    )


def _failure_in_training(model: nn.Module, small: nn.Module, example_inputs: Any) -> str:
    """Return how a pruned network fails in train mode where the original runs, and an empty text where it does not.

    Its numbers are no matter here: there the networks draw other random numbers. Both may be left changed.
    """
    for network in (model, small):
        with left_as_found(network):
            network.train()
            positional, keyword = arguments(mapped(example_inputs, lambda t: t.clone()))
            try:
                network(*positional, **keyword)
            except Exception as error:  # noqa: BLE001 - whatever the model's own code raises; it is the finding
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                return text if network is small else ""
    return ""


def verify(
    model: nn.Module, small: nn.Module, plan: PruningPlan, example_inputs: Any, *, tolerance: float | None = None
) -> VerificationReport:
    """Check that a pruned network computes what the original does with the removed channels zeroed where they are read.

    Both run in eval mode on the example inputs, in fp64 where the model and its inputs allow it; there, the pruned
    network has to run in train mode, too, if the original does. The check is of structure: run it before fine-tuning
    or compensation, which change what is computed on purpose.

    Args:
        model: The original; left as found.
        small: What :func:`secateur.apply` made of it; left as found.
        plan: The plan applied.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments. Random values take the
            place of those that are all the same.
        tolerance: Largest difference allowed, relative to the largest value of each output and of what each layer
            reads; by default 1e-9 in fp64 (1e-6 where weight norm's magnitudes follow) and 1e-3 in fp32.

    Returns:
        The report: ``exact``, ``max_error``, the layers that read something else, and what could not be checked.

    Raises:
        UsageError: If a tensor is on the meta device.
    """
    model, small = unwrapped(model), unwrapped(small)
    if any(t.is_meta for t in (*model.parameters(), *small.parameters(), *tensors_of(example_inputs))):
        raise UsageError("verify: tensors on the meta device have no values to compare. Give the model its weights.")
    example_inputs = varied(example_inputs)
    refused: list[str] = []
    result: Difference | None = None
    limit = 0.0
    failure = ""
    dtype = "float64"
    try:
        # The magnitudes of weight norm were computed anew, and rounded to the model's own precision.
        limit = tolerance if tolerance is not None else 1e-6 if plan.magnitudes else 1e-9
        whole, left = doubled(model), doubled(small)
        inputs = mapped(example_inputs, lambda t: t.double() if t.is_floating_point() else t)
        result = compare(whole, left, plan, inputs, limit)
        wrong = result.error > limit and not result.mismatched
        if wrong and jumps(whole, left, plan, inputs, result, limit):
            result.error = 0.0
            refused.append(
                "outputs: the original's own jump where its inputs, or what its layers make, change by rounding (a "
                "sort, a threshold, non-maximum suppression); what the plan's layers make was compared in their stead"
            )
        failure = _failure_in_training(whole, left, inputs)
    except Exception as error:  # noqa: BLE001 - whatever the model's own code raises in fp64; it is reported
        dtype, limit = "float32", 1e-3 if tolerance is None else tolerance
        try:
            result = compare(model, small, plan, example_inputs, limit)
        except Exception as second:  # noqa: BLE001 - as above
            text = str(second).splitlines()[0] if str(second) else type(second).__name__
            return VerificationReport(False, float("inf"), limit, dtype, 0, (), (f"the pruned network fails: {text}",))
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        refused.append(f"fp64: the model does not run in it ({text}); compared in fp32")
    agrees = result.error <= limit and not result.mismatched and result.compared > 0
    if not result.compared:
        refused.append("outputs: the model returns no tensor that could be compared")
    if failure:
        refused.append(f"train mode: the pruned network fails, and the original does not: {failure}")
    if not agrees and not _repeats(model, example_inputs):
        refused.append(
            "outputs: the original's own differ from run to run, as where a network keeps state between runs"
        )
    notes = [n for n in result.notes if n not in refused]
    return VerificationReport(
        agrees and not failure,
        result.error,
        limit,
        dtype,
        result.compared,
        tuple(result.mismatched),
        (*refused, *notes),
        failure,
    )
