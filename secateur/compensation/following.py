"""What follows a layer, so that its refit can make good more than its own error.

A batch norm that is fed a layer's output takes up a shift of it in its running mean: the layer gets a bias, though it
has none. And where the output, normed or not, is added to another branch, what the sum lacks is made good if

.. math:: y + b / s

is fitted in place of the layer's output y: b is the other branch, and s the factor of the norm, γ / σ. It holds for the
layer that runs last before the sum. Later errors of a residual network's stream thus don't pile up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from secateur.criteria import weights
from secateur.graph.plan import PruningPlan
from secateur.network.modes import OperatorMode

_ADDITIONS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})
_FAINT = 0.05
"""A channel whose factor is below this share of the mean would need huge weights to mend a sum; it is left as it is."""


@dataclass
class Following:
    """What follows a layer that is called once."""

    norm: str = ""
    """The batch norm, called once, that is fed the layer's output."""
    added: bool = False
    """Whether norm's output, or the layer's where there is no norm, is added to another branch before another layer
    runs."""


class _Additions(OperatorMode):  # type: ignore[no-untyped-call]
    """Tells of the other operand where a tensor is added to one of the same shape, before the addition is done.

    The other operand is not made of the tensor: a refit of its layer would change both.
    """

    def __init__(self, met: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.own: Tensor | None = None
        """The tensor that is followed."""
        self.made: dict[int, Tensor] = {}
        """What is made of it, by identity."""
        self.met = met

    def follow(self, tensor: Tensor | None) -> None:
        """Follow another tensor, or none."""
        self.own, self.made = tensor, {} if tensor is None else {id(tensor): tensor}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.own is None:
            return func(*args, **(kwargs or {}))
        if func in _ADDITIONS and not kwargs:
            other = args[1] if args[0] is self.own else args[0] if args[1] is self.own else None
            if isinstance(other, Tensor) and id(other) not in self.made and other.shape == self.own.shape:
                self.follow(None)
                self.met(other)
        made = func(*args, **(kwargs or {}))
        if any(id(leaf) in self.made for leaf in tree_leaves((args, kwargs))):
            self.made |= {id(leaf): leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)}
        return made


@contextmanager
def observing(model: nn.Module) -> Iterator[dict[str, Following]]:
    """Yield what follows each layer in the one run that is made inside, complete at the end."""
    found: dict[str, Following] = {}
    calls: dict[str, int] = {}
    current = ""

    def met(_: Tensor) -> None:
        found[current].added = True

    additions = _Additions(met)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, weights.READERS):

                def start(_: nn.Module, __: Any) -> None:
                    additions.follow(None)

                def end(_: nn.Module, __: Any, made: Tensor, name: str = name) -> None:
                    nonlocal current
                    current = name
                    additions.follow(made)
                    calls[name] = calls.get(name, 0) + 1
                    found[name] = Following()

                stack.callback(module.register_forward_pre_hook(start).remove)
                stack.callback(module.register_forward_hook(end).remove)
            elif isinstance(module, _BatchNorm) and module.running_mean is not None:

                def normed(_: nn.Module, args: Any, made: Tensor, name: str = name) -> None:
                    calls[name] = calls.get(name, 0) + 1
                    # A norm's channels are dimension 1; those of a linear layer's output are its last.
                    plain = not isinstance(model.get_submodule(current), nn.Linear) or made.dim() == 2
                    if args and args[0] is additions.own and not found[current].norm and plain:
                        found[current].norm, additions.own = name, made

                stack.callback(module.register_forward_hook(normed).remove)
        stack.enter_context(additions)
        yield found
    for name in [name for name, own in found.items() if calls[name] > 1 or calls.get(own.norm, 1) > 1]:
        del found[name]


def sums_of(
    original: nn.Module, pruned: nn.Module, following: Mapping[str, Following], names: Iterable[str], plan: PruningPlan
) -> tuple[Sums, Sums]:
    """Return the sums that layers end in, of both networks, to be compared."""
    whole: dict[str, Tensor] = {}
    small: dict[str, Tensor] = {}
    for name in names:
        own = following.get(name, Following())
        if own.added and own.norm:
            before, after = (_factors(network.get_submodule(own.norm)) for network in (original, pruned))
            strong = before.abs() > _FAINT * before.abs().mean()
            kept = strong[plan.kept_outputs[name]] if name in plan.kept_outputs else strong
            weight: Any = pruned.get_submodule(name).weight
            places = [1] * (weight.dim() - 2)  # a map's channels stand before its places
            whole[name] = torch.where(strong, 1 / before, 0.0).reshape(-1, *places)
            small[name] = torch.where(kept, 1 / after, 0.0).reshape(-1, *places)
        elif own.added:
            whole[name] = small[name] = torch.ones(())
    return Sums(original, following, whole), Sums(pruned, following, small)


def _factors(norm: Any) -> Tensor:
    factors: Tensor = (norm.running_var + norm.eps).rsqrt()
    return factors if norm.weight is None else factors * norm.weight.detach()


class Sums:
    """Hands on what layers make, and with it what is added to it."""

    def __init__(self, model: nn.Module, following: Mapping[str, Following], share: Mapping[str, Tensor]) -> None:
        """Follow layers of a model.

        Args:
            model: The network that is run.
            following: What follows each layer.
            share: 1 / s of each channel of a layer's sum, of the layers whose sums are to be handed on.
        """
        self.model, self.following, self.share = model, following, share
        self.additions = _Additions(self._met)
        self.waiting: tuple[Tensor, Tensor, Callable[[Tensor], None]] | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow what is made inside."""
        norms = [self.following[name].norm for name in self.share if self.following[name].norm]
        with ExitStack() as stack:
            for norm in norms:

                def normed(_: nn.Module, args: Any, made: Tensor) -> None:
                    if args and args[0] is self.additions.own:
                        self.additions.own = made

                stack.callback(self.model.get_submodule(norm).register_forward_hook(normed).remove)
            if self.share:
                stack.enter_context(self.additions)
            yield
            self._flush()

    def take(self, name: str, made: Tensor, done: Callable[[Tensor], None]) -> None:
        """Call ``done`` with what a layer has made, at once; or later, with the other branch's part of the sum."""
        self._flush()
        if name not in self.share:
            done(made.clone())
            return
        self.additions.follow(made)
        self.waiting = (made.clone(), self.share[name].to(made), done)

    def _met(self, other: Tensor) -> None:
        if self.waiting is not None:
            (made, share, done), self.waiting = self.waiting, None
            done(made + share * other)

    def _flush(self) -> None:
        """Hand on what was never added, as it is: this run went another way."""
        self.additions.follow(None)
        if self.waiting is not None:
            (made, _, done), self.waiting = self.waiting, None
            done(made)
