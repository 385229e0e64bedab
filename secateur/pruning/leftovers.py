"""Attributes that do not follow a cut, although they equal a width that it changes.

The forward that was traced does not count with them, or they would follow; another one may, as an export's, or code
that merges layers. PyTorch's own modules are left out: their attributes follow their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from secateur.graph.channels import ChannelGraph
from secateur.network.named import modules_of

_WIDTHS = ("out_channels", "out_features", "in_channels", "in_features", "num_features")


def leftovers(model: nn.Module, small: nn.Module) -> tuple[str, ...]:
    """List whole numbers that modules of a cut network kept, and that equalled the width of a layer inside."""
    modules, cut = modules_of(model), modules_of(small)
    changed = []
    for name, layer in modules.items():
        pairs = [(getattr(layer, a, None), getattr(cut.get(name), a, None)) for a in _WIDTHS]
        changed += [(name, old) for old, new in pairs if type(old) is int and type(new) is int and old != new]
    return tuple(
        f"{path or 'the network'}: keeps {name} = {value}, which equalled the width of {layer}"
        for path, name, value, layer in _equal(modules, changed)
        if vars(cut[path]).get(name) == value
    )


def unfollowed(model: nn.Module, graph: ChannelGraph) -> tuple[str, ...]:
    """List whole numbers that modules would keep in any cut, and that equal a width inside which may change.

    Modules of one class are listed together.
    """
    modules = modules_of(model)
    prunable = []
    for port in graph.layers:
        sides = ((port.in_group, port.in_channels), (port.out_group, port.out_channels))
        prunable += [(port.module, width) for of, width in sides if of is not None and port.owned]
    following = {(rule.module, rule.name) for rule in graph.attributes}
    found: dict[tuple[str, str], list[str]] = {}
    for path, name, value, layer in _equal(modules, prunable):
        if (path, name) not in following:
            text = f"{path or 'the network'} keeps {name} = {value}, which equals the width of {layer}"
            found.setdefault((type(modules[path]).__name__, name), []).append(text)
    return tuple(
        f"{texts[0]}{f' (and {len(texts) - 1} more of class {kind})' if len(texts) > 1 else ''}; the traced forward "
        "does not count with it, another may"
        for (kind, _), texts in found.items()
    )


def _equal(modules: Mapping[str, nn.Module], widths: Iterable[tuple[str, int]]) -> Iterator[tuple[str, str, int, str]]:
    """Yield whole numbers of modules that equal one of these widths of a layer inside: path, name, value and layer."""
    inside: dict[str, dict[int, str]] = {}
    for layer, width in widths:
        parts = layer.split(".") if layer else []
        for depth in range(len(parts)):
            inside.setdefault(".".join(parts[:depth]), {}).setdefault(width, ".".join(parts[depth:]))
    for path, of in inside.items():
        if path in modules and not type(modules[path]).__module__.startswith("torch."):
            for name, value in vars(modules[path]).items():
                if type(value) is int and value > 1 and value in of:
                    yield path, name, value, of[value]
