"""What has to stay, as it turns out at the end of a run: what is returned, what was counted, what read nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateur.tracing.assumptions import Cause
from secateur.tracing.call import Call
from secateur.tracing.findings import Findings
from secateur.tracing.labels import Labels
from secateur.tracing.numbers import Counted
from secateur.tracing.source_lines import shown
from secateur.tracing.tensor_labels import TensorLabels


def keep_returned(call: Call, returned: list[Any]) -> None:
    """Keep the channels of what a model returns, and those whose number it returns; all where it returns no tensor."""

    def keep(labels: Labels, reason: str) -> None:
        call.found.freeze(labels, Cause("model output", "", "", reason))

    for leaf in returned:
        if isinstance(leaf, Counted):
            keep(leaf.labels, "are counted, and their number is returned")
        if not isinstance(leaf, Tensor):
            continue
        grid = call.labels.grid(leaf)
        for labels in (*call.axes(leaf).values(), *([grid.labels] if grid is not None and grid.is_apart else [])):
            keep(labels, "is returned by the model")
    if not any(isinstance(leaf, Tensor) for leaf in returned):
        for labels in call.found.produced:
            keep(labels, "no tensor is returned that would tell what is made")


def keep_numbers(labels: TensorLabels, found: Findings) -> None:
    """Keep what the code found out about numbers of channels: that two differ, and what remains of a division.

    Those that are more than other channels all stay, as the others may lose some, or none; of those that are more than
    a given number, one more than that stays.
    """
    for channels, measure in found.counted:
        if measure.met is not None:
            reason = "is compared with the smaller number of other channels, which theirs must not come to equal"
            found.freeze(channels, Cause("comparison", "", shown(*measure.met), reason))
        elif measure.above > 1:
            found.staying.append((channels, measure.above + 1))
    followed = [(a.labels, found.numbers.get((a.module, a.name))) for a in found.attributes]
    followed += [(own, width) for key, width in found.widths.items() for own in _counted_by(labels, found, *key)]
    for channels, number in [*found.counted, *followed]:
        if number is not None and number.divisor > 1:
            found.multiples.append((channels, number.divisor))


def _counted_by(labels: TensorLabels, found: Findings, path: str, attribute: str) -> list[Labels]:
    """Return the channels that an attribute of a layer counts."""
    if attribute.startswith(("in_", "out_")):
        side = "inputs" if attribute.startswith("in_") else "outputs"
        counted = [getattr(layer, side) for layer in found.layers if layer.module == path]
    else:
        weight = labels.named.get(f"{path}.weight".lstrip("."))
        counted = [labels.axes(weight).get(int(attribute == "embedding_dim")) if weight is not None else None]
    return [own.reshape(-1) for own in counted if own is not None]


def without_elements(labels: TensorLabels, found: Findings) -> list[str]:
    """Keep what layers make out of nothing for code that may loop over no element; return notes on those layers."""
    calls = [layer for layer in found.layers if layer.kind != "registered" and layer.positions == 0]
    if not calls:
        return []
    classes = labels.store.classes()
    read = {int(c) for own in found.consumed for c in classes[own.reshape(-1)]}
    for layer in calls:
        if layer.outputs is not None and read.isdisjoint(classes[layer.outputs.reshape(-1)].tolist()):
            reason = "is made without elements, and read by no layer: give examples that reach it"
            found.freeze(layer.outputs, Cause(layer.kind, layer.module, "", reason))
    seeing = {layer.module for layer in found.layers if layer.positions}
    return [
        f"{name}: reads tensors without elements on the example inputs, so its channels go by the rules alone"
        for name in dict.fromkeys(layer.module for layer in calls)
        if name not in seeing
    ]
