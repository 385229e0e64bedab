"""Attributes that did not follow a cut, although they equalled a width that it changed."""

from __future__ import annotations

from torch import nn

from secateur.network.named import modules_of

_WIDTHS = ("out_channels", "out_features", "in_channels", "in_features", "num_features")


def leftovers(model: nn.Module, small: nn.Module) -> tuple[str, ...]:
    """List whole numbers that modules keep, and that equalled the width of a layer inside, which is another now.

    The forward that was traced does not count with them, or they would have followed; another one may, as an export's,
    or code that merges layers. PyTorch's own modules are left out: their attributes follow their weights.
    """
    modules, cut = modules_of(model), modules_of(small)
    changed: dict[str, list[tuple[int, str]]] = {}
    for name, layer in modules.items():
        pairs = [(getattr(layer, a, None), getattr(cut.get(name), a, None)) for a in _WIDTHS]
        widths = {old for old, new in pairs if type(old) is int and type(new) is int and old != new}
        parts = name.split(".")
        for depth in range(len(parts) if widths else 0):
            inside = ".".join(parts[depth:])
            changed.setdefault(".".join(parts[:depth]), []).extend((width, inside) for width in widths)
    found = []
    for path, counts in changed.items():
        if type(modules[path]).__module__.startswith("torch."):
            continue
        of = dict(reversed(counts))
        found += [
            f"{path or 'the network'}: keeps {name} = {value}, which equalled the width of {of[value]}"
            for name, value in vars(modules[path]).items()
            if type(value) is int and value > 1 and value in of and vars(cut[path]).get(name) == value
        ]
    return tuple(found)
