"""Runs of a changed copy of a network that skip what lies before the first change.

A module call of the network that has ended before the first changed module is called returns in the copy what it
returned in the network. The outermost such calls are skipped, so that a whole stage costs nothing. A module that is
called several times, returns anything but a plain tensor, or has hooks of its owner's is run as ever.

What a call returned is kept, and handed out, as a clone: code in place, in either network, then harms no other run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria import feature_maps
from secateur.criteria.feature_maps import Batch


@dataclass(frozen=True)
class Calls:
    """The calls of a network's modules in one run, as ticks of a clock that advances where a call starts or ends."""

    started: Mapping[str, int]
    """Module name -> start of its first call."""
    skippable: Mapping[str, tuple[int, int]]
    """Module name -> start and end of its only call, of the modules that a copy may skip."""

    def before(self, changed: Iterable[str]) -> Skip | None:
        """Return what a copy skips in which these modules are changed; None where there is nothing."""
        stop = min(((self.started[name], name) for name in changed if name in self.started), default=(0, ""))
        names, reached = [], -1
        for start, end, name in sorted((*ticks, name) for name, ticks in self.skippable.items()):
            if reached < start and end < stop[0]:
                names.append(name)
                reached = end
        return Skip(tuple(names), stop[1]) if names else None


@dataclass(frozen=True)
class Skip:
    """The outermost calls that end before the first changed module is called."""

    names: tuple[str, ...]
    stop: str
    """The module changed that is called first."""


class _Reached(BaseException):
    """All that is to be kept has been computed; what comes after it in the forward is not needed."""


def observe(model: nn.Module, batch: Batch) -> Calls:
    """Run a network once, and return its modules' calls."""
    started: dict[str, list[int]] = {}
    ended: dict[str, int] = {}
    clock = iter(range(2**62))
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            own = bool(module._forward_hooks or module._forward_pre_hooks)

            def start(_: nn.Module, __: Any, name: str = name) -> None:
                started.setdefault(name, []).append(next(clock))

            def end(_: nn.Module, __: Any, made: Any, name: str = name, own: bool = own) -> None:
                if type(made) is Tensor and not own:
                    ended[name] = next(clock)

            stack.callback(module.register_forward_pre_hook(start).remove)
            stack.callback(module.register_forward_hook(end).remove)
        feature_maps.forward(model, batch, 1)
    once = {name: (own[0], ended[name]) for name, own in started.items() if len(own) == 1 and name in ended}
    return Calls({name: own[0] for name, own in started.items()}, once)


def record(model: nn.Module, batch: Batch, number: int, skip: Skip) -> dict[str, Tensor]:
    """Run the unchanged network up to the first changed module; return what the calls to be skipped returned."""
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:

        def stop(_: nn.Module, __: Any) -> None:
            raise _Reached

        stack.callback(model.get_submodule(skip.stop).register_forward_pre_hook(stop).remove)
        for name in skip.names:

            def keep(_: nn.Module, __: Any, made: Tensor, name: str = name) -> None:
                kept[name] = made.clone()

            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        with suppress(_Reached):
            feature_maps.forward(model, batch, number)
    return kept


@contextmanager
def skipping(small: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Let modules of a changed copy return what was kept, each once; a second call fails."""
    left = dict(kept)
    with ExitStack() as stack:
        for name in kept:

            def given(*_: Any, name: str = name, **__: Any) -> Tensor:
                return left.pop(name).clone()

            module = small.get_submodule(name)
            own = vars(module).get("forward")  # some networks set a forward on an instance
            module.forward = given
            stack.callback(_restore, module, own)
        yield


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
