"""Which functions a forward may run: each way in which user's code calls a method, and what no forward calls."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.tracing.code.reachable import computes_names, reachable


class Base(nn.Module):
    """A layer, and a method that looks at its width; what calls it is up to the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def wide(self) -> bool:
        """Look at the width."""
        return self.conv.out_channels > 2

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        out: Tensor = self.conv(x)
        return out


class Called(Base):
    """Calls it."""

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return super().forward(x) if self.wide() else x


class CalledOfAnother(nn.Module):
    """Calls it on a module it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Base()

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self.inner.wide() else -x


class OfProperty(Base):
    """Reads it through a property."""

    @property
    def width(self) -> bool:
        """Pass it on."""
        return self.wide()

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self.width else -x


class OfPassing(Base):
    """Calls it in a chain of methods."""

    def first(self) -> bool:
        """Pass on."""
        return self.second()

    def second(self) -> bool:
        """Pass on."""
        return self.wide()

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self.first() else -x


class OfSaidName(Base):
    """Looks it up by a name that is said."""

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if getattr(self, "wide")() else -x  # noqa: B009 - that it is said so is the point


class OfComputedName(Base):
    """Looks it up by a name that is put together."""

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if getattr(self, "wi" + str(x.dtype)[:2])() else -x


class OfAlias(Base):
    """Holds the bound method under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = self.wide

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self.ask() else -x


class OfTable(Base):
    """Holds it in a dict, as a partial."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"wide": [functools.partial(self.wide)]}

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if next(iter(self.table.values()))[0]() else -x


class OfOverride(nn.Conv2d):
    """Overrides a method that PyTorch's own forward calls."""

    def wide(self) -> bool:
        """Look at the width."""
        return self.out_channels > 2

    def _conv_forward(self, *args: Any) -> Tensor:
        return super()._conv_forward(*args) if self.wide() else args[0]


class OfSpecial(Base):
    """Looks at it where Python asks for its truth."""

    def __bool__(self) -> bool:
        return self.wide()

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self else -x


def through(module: Base) -> bool:
    """Pass it on, outside any class."""
    return module.wide()


class OfFunction(Base):
    """Calls a function that calls it."""

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if through(self) else -x


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function, hiding its name."""

    def inner(*args: Any) -> Tensor:
        return function(*args)

    return inner


class OfDecorator(Base):
    """Its forward is wrapped."""

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self.wide() else -x


class Helper:
    """A plain object that looks at a module."""

    def __init__(self, module: Base) -> None:
        self.module = [module]

    def wide(self) -> bool:
        """Look at the width."""
        return self.module[0].conv.out_channels > 2


class OfHelper(nn.Module):
    """Asks an object that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Base()
        self.helper = Helper(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self.helper.wide() else -x


class OfHelpers(nn.Module):
    """Asks one of several objects that it holds in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Base()
        self.helpers = [Helper(self.base)]

    def forward(self, x: Tensor) -> Tensor:
        """Branch."""
        return x if self.helpers[0].wide() else -x


def patched() -> nn.Module:
    """Give an instance a forward of its own."""
    model = Base()
    model.forward = types.MethodType(lambda self, x: x if self.wide() else -x, model)  # type: ignore[method-assign]
    return model


def hooked() -> nn.Module:
    """Ask in a hook."""
    model = Base()
    model.register_forward_hook(lambda module, args, out: out if module.wide() else -out)
    return model


ASKING = {
    "called": Called,
    "called on another module": CalledOfAnother,
    "property": OfProperty,
    "chain": OfPassing,
    "said name": OfSaidName,
    "computed name": OfComputedName,
    "alias": OfAlias,
    "table": OfTable,
    "override": OfOverride,
    "special method": OfSpecial,
    "function": OfFunction,
    "decorator": OfDecorator,
    "helper": OfHelper,
    "helpers": OfHelpers,
    "patched": patched,
    "hook": hooked,
}


def names(model: nn.Module) -> set[str]:
    """Name the functions that are found."""
    return {function.__name__ for function, _ in reachable(model)}


@pytest.mark.parametrize("name", ASKING)
def test_what_a_forward_runs_is_found(name: str) -> None:
    model = ASKING[name](3, 3, 1) if name == "override" else ASKING[name]()  # type: ignore[call-arg]
    assert "wide" in names(model)


class Unasked(Base):
    """Looks at widths, but in no forward."""

    def reset_classifier(self) -> bool:
        """Look."""
        return self.wide()

    def train(self, mode: bool = True) -> Unasked:
        """Look when the mode changes."""
        self.wide()
        return super().train(mode)

    def __repr__(self) -> str:
        return str(self.wide())


def test_what_no_forward_runs_is_not_found() -> None:
    assert names(Base()) == {"forward"}
    assert names(Unasked()) == {"forward"}
    assert names(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())) == set()


def test_nothing_of_torch_is_read() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.normalize(torch.relu(x))

    assert {f.__qualname__.rpartition(".")[2] for f, _ in reachable(Model())} == {"forward"}


LOOKUPS: dict[str, tuple[Callable[..., Any], bool]] = {
    "said": (lambda m: getattr(m, "wide"), False),  # noqa: B009
    "said, with a default": (lambda m: getattr(m, "wide", None), False),
    "said, with a variable's default": (lambda m, d: getattr(m, "wide", d), False),
    "of an expression": (lambda m: getattr(m.inner[0], "wide"), False),  # noqa: B009
    "handed in": (lambda m, name: getattr(m, name), True),
    "formatted": (lambda m, k: getattr(m, f"layer{k}"), True),
    "formatted, with a default": (lambda m, k: getattr(m, f"layer{k}", None), True),
    "in a loop inside": (lambda m: [getattr(m, n) for n in ("a", "b")], True),
    "handed on": (lambda m: map(getattr, [m], ["a"]), True),
    "evaluated": (lambda m: eval("m.wide"), True),  # noqa: S307
    "mode, not evaluation": (lambda m: m.eval(), False),
    "none": (lambda m: m.wide, False),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKUPS)
def test_names_that_are_not_said(name: str) -> None:
    function, computed = LOOKUPS[name]
    assert computes_names(function.__code__) is computed
