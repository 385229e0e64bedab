r"""Least squares: the layers that read a pruned group are refitted to give what they gave before.

A few hundred unlabelled images are run through the original and the pruned network in step. Each reading layer gets

.. math:: W' = \arg\min \lVert Y - W' Z \rVert^2 + \lambda \lVert W' - W_{keep} \rVert^2

with Y the layer's outputs in the original network, Z its unfolded input in the pruned one, and λ a fraction of the
mean diagonal of :math:`Z Z^T`. Layers are solved first to last, each against what the layers before it, already
refitted, feed to it. Everything is accumulated as second moments in fp64.

Departures from the plain ridge: the penalty pulls towards the weights that plain dropping leaves, not towards zero. So
the error on the data is never above that of plain dropping, and with fewer observations than inputs the undetermined
part of the weights stays as it was. A layer with a bias is also refitted in its bias, without penalty; one without, in
the running mean of the batch norm behind it. Where a layer's output is added to another branch, Y and what it is
compared with are the sums, see :mod:`secateur.compensation.following`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.compensation.following import Following, Sums, observing, sums_of
from secateur.compensation.report import LayerCompensation
from secateur.compensation.unfolding import Draw, extent_of, outputs_of, unfold
from secateur.criteria import feature_maps, moments, weights
from secateur.errors import CriterionError, PlanError, UsageError
from secateur.graph.plan import PruningPlan

RIDGE = 1e-2
POSITIONS = 128
"""Output positions read of each image, unless stated otherwise: neighbours tell much the same."""


class _Reached(BaseException):
    """The layer has run; what comes after it in the forward is not needed."""


class _Unlike(Exception):
    """A layer's outputs have lost indices of other dimensions, so those of the two networks can't be compared."""


@dataclass
class NormalEquations:
    """Second moments of a layer's inputs and of the error of its outputs, block by block. All sums in fp64."""

    inputs: Tensor
    r""":math:`\sum z z^T`, shape ``(blocks, D, D)``."""
    errors: Tensor
    r""":math:`\sum z r^T`, shape ``(blocks, D, C_out / blocks)``; r is the output wanted less the output given."""
    error_power: Tensor
    r""":math:`\sum r^2`, a scalar."""
    output_power: Tensor
    """Summed square of the outputs wanted, a scalar."""
    count: Tensor
    """Number of observations."""
    unlike: Tensor
    """Number of outputs that were left out, since those of the two networks can't be compared."""

    @classmethod
    def empty(cls, blocks: int, width: int, outputs: int, device: torch.device) -> NormalEquations:
        """Return the moments of no observation."""
        shapes: list[tuple[int, ...]] = [(blocks, width, width), (blocks, width, outputs // blocks), (), (), (), ()]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def update(self, rows: Tensor, wanted: Tensor, given: Tensor) -> None:
        """Add observations: inputs ``(blocks, n, D)``, outputs wanted and given ``(n, C_out)``."""
        z, y = rows.to(self.inputs), wanted.to(self.inputs)
        r = y - given.to(self.inputs)
        self.inputs.baddbmm_(z.mT, z)
        self.errors.baddbmm_(z.mT, r.reshape(len(r), len(z), -1).movedim(1, 0))
        self.error_power += r.square().sum()
        self.output_power += y.square().sum()
        self.count += len(r)

    def all_reduce(self) -> None:
        """Add the observations of all processes, when there are several."""
        moments.all_reduce(self.inputs, self.errors, self.error_power, self.output_power, self.count, self.unlike)

    def solve(self, ridge: float, bias: bool) -> tuple[Tensor, float]:
        """Solve for the change of the weights.

        Args:
            ridge: λ, as a fraction of the mean diagonal.
            bias: Whether the last input is the constant 1, which bears no penalty.

        Returns:
            Change, shape ``(blocks, D, C_out / blocks)``, and the summed square of the error that remains.
        """
        diagonal = self.inputs.diagonal(dim1=1, dim2=2)
        weighed = diagonal[:, :-1] if bias else diagonal
        penalty = (ridge * weighed.mean(1, keepdim=True)).expand_as(diagonal).clone()
        # Inputs that never fire leave their weights undetermined; the floor keeps these as they are.
        penalty += 1e-12 * diagonal.mean(1, keepdim=True).clamp(min=1e-300)
        if bias:
            penalty[:, -1] = 1e-12 * diagonal[:, -1]
        penalised = self.inputs + torch.diag_embed(penalty)
        factor, failed = torch.linalg.cholesky_ex(penalised)
        if bool(failed.any()):  # numerically singular, which a ridge of zero permits
            change = torch.linalg.solve(penalised, self.errors)
        else:
            change = torch.cholesky_solve(self.errors, factor)
        after = self.error_power - 2 * (change * self.errors).sum() + (change * (self.inputs @ change)).sum()
        return change, float(after.clamp(min=0))


def shrunk(original: nn.Module, pruned: nn.Module, plan: PruningPlan) -> list[str]:
    """Names of the layers that lost inputs."""
    names = []
    for name, kept in plan.kept_inputs.items():
        try:
            before, after = original.get_submodule(name), pruned.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"{name}: the plan names a layer that the model lacks. Pass the model it was made for."
            ) from error
        width = getattr(before, "in_features", getattr(before, "in_channels", None))
        if before is after or width is None:
            raise PlanError(f"{name}: compensation needs the original and the pruned network, as two models.")
        if len(kept) < width:
            names.append(name)
    return names


def by_weight(model: nn.Module) -> dict[int, list[str]]:
    """Return the modules that hold each weight, by the weight's identity: several where it is shared."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            found.setdefault(id(module.weight), []).append(name)
    return found


def refusal(name: str, layer: nn.Module, tied: Mapping[int, list[str]], memory: int) -> str:
    """Why a layer can't be refitted; empty when it can."""
    if not isinstance(layer, (*weights.CONVOLUTIONS, nn.Linear)):
        return f"least squares is not defined for {type(layer).__name__}"
    if not isinstance(layer, nn.Linear) and layer.groups > 1 and layer.weight.shape[1] == 1:
        return "depthwise: every output reads one channel, so none can stand in for another"
    if not type(layer).forward.__module__.startswith("torch.nn."):
        return f"{type(layer).__name__} has a forward of its own, in which its weight may be a part only"
    if weights.is_computed(layer):
        return "its weight is computed at each forward, by a parametrization or under a mask"
    others = [other for other in tied[id(layer.weight)] if other != name]
    if others:
        return f"its weight is shared with {', '.join(others)}"
    blocks = getattr(layer, "groups", 1)
    width = layer.weight[0].numel() + (layer.bias is not None)
    need = 8 * blocks * width * (width + layer.weight.shape[0] // blocks)
    if need > memory:
        return (
            f"{blocks}×{width} unfolded inputs need {need / 2**20:.0f} MiB of moments, more than {memory / 2**20:.0f}"
        )
    return ""


def refit(
    original: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    data: Iterable[Any],
    *,
    ridge: float = RIDGE,
    positions: int = POSITIONS,
    exact: bool = False,
    seed: int = 0,
    memory: int = feature_maps.MEMORY,
    everywhere: bool = False,
) -> list[LayerCompensation]:
    """Refit the layers that read pruned groups, in place.

    The data are read once a layer, up to the layer, and by the original as seldom as memory allows. Convolutions
    (grouped ones block by block) and linear layers are refitted; a layer called several times is fitted to all its
    calls.

    Args:
        original: The network before pruning.
        pruned: The pruned network; weights and biases of the reading layers are replaced.
        plan: What was pruned.
        data: Batches, see :func:`secateur.criteria.feature_maps.batches`. Labels are not read.
        ridge: λ, as a fraction of the mean diagonal of the inputs' second moments.
        positions: Output positions read of each image, drawn at random where a map has more.
        exact: Read every position.
        seed: Seed of the draw.
        memory: Bytes of moments that a layer may need; a layer that needs more is left alone. As many again hold
            outputs of the original.
        everywhere: Refit also the layers after the first pruned group whose own inputs are complete, since what is
            fed to them has changed too.

    Returns:
        One entry a layer, in execution order.

    Raises:
        DataError: If the data are empty, don't fit, or can be read only once.
        CriterionError: If a layer's inputs or outputs hold NaN or infinity.
        PlanError: If the plan names layers that the models lack.
        UsageError: If an option is out of range.
    """
    if ridge < 0 or positions < 1:
        raise UsageError(f"least squares: ridge {ridge} and positions {positions} must be at least 0 and 1.")
    lost = shrunk(original, pruned, plan)
    device = feature_maps.device_of(pruned)
    calls, after = _calls(pruned, data, device)
    ordered = [name for name in calls if name in lost]
    report = [LayerCompensation("least_squares", name, False, "it does not run") for name in lost if name not in calls]
    if everywhere and ordered:
        names = list(calls)
        ordered = names[names.index(ordered[0]) :]
    tied = by_weight(pruned)
    refusals = {name: refusal(name, pruned.get_submodule(name), tied, memory) for name in ordered}
    feature_maps.require_passes(data, 1 + sum(not reason for reason in refusals.values()))
    draw = Draw(None if exact else positions, seed)
    fitted = [name for name in ordered if not refusals[name]]
    whole, small = sums_of(original, pruned, after, fitted, plan)
    wanted = _Wanted(whole, plan, calls, fitted, data, draw, memory)
    for name in ordered:
        if refusals[name]:
            report.append(LayerCompensation("least_squares", name, False, refusals[name]))
            continue
        try:
            norm = after[name].norm if name in after else ""
            equations = _accumulate(small, name, wanted, data, draw, norm)
        except _Unlike:
            why = "removed channels lie along other dimensions of its outputs, so they can't be compared"
            report.append(LayerCompensation("least_squares", name, False, why))
            continue
        report.append(_replace(name, pruned, equations, ridge, norm))
    return report


def _calls(model: nn.Module, data: Iterable[Any], device: torch.device) -> tuple[dict[str, int], dict[str, Following]]:
    """Return the calls of every convolution and linear layer on the first batch, by first call, and what follows."""
    calls: dict[str, int] = {}
    after: dict[str, Following] = {}
    with feature_maps.evaluating(model), torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, weights.READERS):

                def count(_: nn.Module, __: Any, ___: Any, name: str = name) -> None:
                    calls[name] = calls.get(name, 0) + 1

                stack.callback(module.register_forward_hook(count).remove)
        samples = 0
        for batch in feature_maps.batches(data, device):
            with observing(model) as after:
                feature_maps.forward(model, batch, 1)
            samples = batch.size
            break
    feature_maps.require_samples(samples, device)
    if moments.several_processes():  # one without data has to solve the same layers as the others
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (calls, after))
        calls, after = next(each for each in found if each[0])
    return calls, after


_Output = tuple[tuple[int, ...], Tensor]
"""Sizes of a layer's outputs but for the channels, and outputs at the positions drawn, ``(n, C_out)``."""


class _Wanted:
    """What the layers gave in the original network.

    The original never changes, so the outputs of as many layers as memory allows are kept from one pass over the data.
    A layer whose outputs don't fit is run again beside the pruned network; so is every layer where the data turn out
    to differ from one pass to the next, as those of a loader that shuffles do.
    """

    def __init__(
        self,
        sums: Sums,
        plan: PruningPlan,
        calls: Mapping[str, int],
        names: Sequence[str],
        data: Iterable[Any],
        draw: Draw,
        memory: int,
    ) -> None:
        self.sums, self.original = sums, sums.model
        self.calls, self.data, self.draw, self.memory = calls, data, draw, memory
        self.waiting = list(names)
        self.channels = {
            name: torch.tensor(plan.kept_outputs[name], dtype=torch.long) if name in plan.kept_outputs else None
            for name in names
        }
        self.kept: dict[str, list[list[_Output]]] = {}
        self.marks: list[Any] = []

    def start(self, name: str) -> None:
        """Have a layer's outputs at hand, where they can be kept."""
        if name not in self.kept and self.memory > 0:
            self._record()
        self.waiting.remove(name)

    def end(self, name: str) -> None:
        """Let go of a layer's outputs."""
        self.kept.pop(name, None)

    def outputs(self, name: str, batch: feature_maps.Batch, number: int) -> list[_Output] | None:
        """Return the outputs kept of a batch, one a call of the layer; None where the layer has to be run."""
        if name not in self.kept:
            return None
        if number > len(self.marks) or self.marks[number - 1] != _mark(batch):
            raise _Changed
        return self.kept[name][number - 1]

    def run(self, name: str, batch: feature_maps.Batch, number: int, at: Sequence[Tensor | None]) -> list[_Output]:
        """Run the original up to a layer."""
        layer = self.original.get_submodule(name)
        made = _run_to(self.sums, name, batch, number, self.calls[name])
        return [
            (extent_of(layer, y), outputs_of(layer, y, places, self.channels[name]))
            for (_, y), places in zip(made, at, strict=True)
        ]

    def distrust(self) -> None:
        """Keep nothing from here on: the data are not the same in every pass."""
        self.kept.clear()
        self.memory = 0

    def _record(self) -> None:
        """Run the original once over the data, and keep what the next layers give until the memory is full."""
        names = list(self.waiting)
        kept: dict[str, list[list[_Output]]] = {name: [] for name in names}
        generators = {name: self.draw.generator() for name in names}
        held = dict.fromkeys(names, 0)
        current: dict[str, list[_Output]] = {}
        self.marks = []
        with feature_maps.evaluating(self.original), torch.no_grad(), ExitStack() as stack:
            for name in names:
                layer = self.original.get_submodule(name)

                def see(layer: nn.Module, _: Any, y: Tensor, name: str = name) -> None:
                    if name not in kept or len(current.setdefault(name, [])) == self.calls[name]:
                        return
                    at, own = self.draw(layer, y, generators[name]), current[name]

                    def keep(made: Tensor) -> None:
                        own.append((extent_of(layer, made), outputs_of(layer, made, at, self.channels[name]).clone()))

                    self.sums.take(name, y, keep)

                stack.callback(layer.register_forward_hook(see).remove)
            for number, batch in enumerate(
                feature_maps.batches(self.data, feature_maps.device_of(self.original)), start=1
            ):
                current.clear()
                with self.sums.watched():
                    feature_maps.forward(self.original, batch, number)
                self.marks.append(_mark(batch))
                for name in kept:
                    kept[name].append(current.get(name, []))
                    held[name] += sum(y.numel() * y.element_size() for _, y in kept[name][-1])
                while kept and sum(held[name] for name in kept) > self.memory:
                    kept.pop(next(reversed(kept)))
                if not kept:
                    break
        self.kept.update(kept)


class _Changed(Exception):
    """A batch is not the one that was kept."""


def _mark(batch: feature_maps.Batch) -> list[tuple[tuple[int, ...], int]]:
    """Tell one batch from another by the shapes and checksums of its tensors."""
    tensors = [leaf for leaf in tree_leaves((batch.args, batch.kwargs)) if isinstance(leaf, Tensor)]
    return [(tuple(t.shape), zlib.crc32(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)) for t in tensors]


def _accumulate(sums: Sums, name: str, wanted: _Wanted, data: Iterable[Any], draw: Draw, norm: str) -> NormalEquations:
    wanted.start(name)
    try:
        equations = _equations(sums, name, wanted, data, draw, norm)
    except _Changed:
        wanted.distrust()
        equations = _equations(sums, name, wanted, data, draw, norm)
    wanted.end(name)
    equations.all_reduce()
    if equations.unlike:
        raise _Unlike
    return equations


def _equations(sums: Sums, name: str, wanted: _Wanted, data: Iterable[Any], draw: Draw, norm: str) -> NormalEquations:
    pruned = sums.model
    layer = pruned.get_submodule(name)
    assert isinstance(layer, (*weights.CONVOLUTIONS, nn.Linear))
    blocks, bias = getattr(layer, "groups", 1), layer.bias is not None or bool(norm)
    device, generator = feature_maps.device_of(pruned), draw.generator()
    sums_on = torch.device("cpu") if device.type == "mps" else device
    equations = NormalEquations.empty(blocks, layer.weight[0].numel() + bias, len(layer.weight), sums_on)
    with feature_maps.evaluating(wanted.original), feature_maps.evaluating(pruned), torch.no_grad():
        for number, batch in enumerate(feature_maps.batches(data, device), start=1):
            targets = wanted.outputs(name, batch, number)
            given = _run_to(sums, name, batch, number, wanted.calls[name])
            at = [draw(layer, made, generator) for _, made in given]
            if targets is None:
                targets = wanted.run(name, batch, number, at)
            for (extent, target), (x, made), places in zip(targets, given, at, strict=True):
                if extent != extent_of(layer, made):
                    equations.unlike += 1
                    continue
                rows = unfold(layer, x, places)
                if bias:
                    rows = torch.cat((rows, rows.new_ones(*rows.shape[:2], 1)), 2)
                equations.update(rows, target, outputs_of(layer, made, places, None))
            if not bool(torch.isfinite(equations.error_power)):
                raise CriterionError(
                    f"{name}: NaN or infinity in its outputs at batch {number}. Check weights and inputs."
                )
    return equations


def _run_to(sums: Sums, name: str, batch: feature_maps.Batch, number: int, calls: int) -> list[tuple[Tensor, Tensor]]:
    """Run the model until the layer has been called so often; return its inputs and outputs, or the outputs' sums."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # Clones, since what follows in the forward may write into either.
        x = (args[0] if args else kwargs["input"]).clone()

        def keep(made: Tensor) -> None:
            seen.append((x, made))
            if len(seen) == calls:
                raise _Reached

        sums.take(name, output, keep)

    with ExitStack() as stack:
        stack.enter_context(suppress(_Reached))
        stack.callback(sums.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(sums.watched())
        feature_maps.forward(sums.model, batch, number)
    return seen


def _replace(name: str, model: nn.Module, equations: NormalEquations, ridge: float, norm: str) -> LayerCompensation:
    layer: Any = model.get_submodule(name)
    bias = layer.bias is not None or bool(norm)
    change, after = equations.solve(ridge, bias)
    weight, shift = (change[:, :-1], change[:, -1].flatten()) if bias else (change, None)
    with torch.no_grad():
        layer.weight += weight.mT.reshape(layer.weight.shape).to(layer.weight)
        if shift is not None and layer.bias is not None:
            layer.bias += shift.to(layer.bias)
        elif shift is not None:
            mean: Any = model.get_submodule(norm).running_mean
            mean -= shift.to(mean)
    power = float(equations.output_power) or 1.0
    few = float(equations.count) < equations.inputs.shape[1]
    reason = (
        f"{int(equations.count)} observations of {equations.inputs.shape[1]} inputs: partly as dropped" if few else ""
    )
    return LayerCompensation("least_squares", name, True, reason, float(equations.error_power) / power, after / power)
