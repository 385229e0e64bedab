"""The model card of a pruned network: what was removed, what it was before and is after, how it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import nn

from secateur.engine.result import CompressResult, PruneResult
from secateur.graph.plan import PruningPlan
from secateur.network.named import tensors_named

Figures = Mapping[str, tuple[float | None, float | None]]
"""Name of a figure -> before, after."""


def figures_of(model: nn.Module | PruneResult | CompressResult) -> dict[str, tuple[float | None, float | None]]:
    """Return what a result knows of both networks: MACs, and what its metric was on test data."""
    if isinstance(model, nn.Module):
        return {}
    ends = ("baseline", "final") if isinstance(model, CompressResult) else ("before", "after")
    first, last = (model.report[end] for end in ends)
    found = {"MACs": (first["macs"], last["macs"])}
    if first.get("test") is not None and last.get("test") is not None:
        found[str(model.report["metric"])] = (first["test"], last["test"])
    return found


def card(
    title: str,
    network: nn.Module,
    library: str | None,
    plans: Sequence[PruningPlan],
    figures: Figures,
    result: nn.Module | PruneResult | CompressResult,
) -> str:
    """Return a model card as Markdown, with the front matter that hubs read.

    Args:
        title: Of the card.
        network: The pruned network.
        library: Whose class it is: ``timm``, ``transformers``; None for any other.
        plans: That made it.
        figures: Rows of the table beside those of the network's size.
        result: What was pushed; a result of ``prune`` or ``compress`` tells how the cut was verified.
    """
    kind = type(network).__qualname__
    front: dict[str, Any] = {"library_name": "secateur", "tags": ["pruning", *([library] if library else [])]}
    measured = {"accuracy", *figures_of(result)} - {"MACs"}
    metrics = [name for name in figures if name in measured]
    if metrics:
        front["metrics"] = metrics
    rows = [_row(name, *values) for name, values in {**_sizes(network, plans), **figures}.items()]
    removed = sum(len(channels) for plan in plans for channels in plan.removed.values())
    load = "secateur.pull(folder)" if library else f"secateur.pull(folder, model={kind}(...))"
    whose = f"`{kind}` of {library}" if library else f"`{kind}`"
    own = "" if library else f"\n`{kind}` is the class of the unpruned network, built as it was before.\n"
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {title}

{whose} without {removed:,} of its channels, which Secateur removed.

| | before | after | change |
|---|---:|---:|---:|
{chr(10).join(rows)}

{_exactness(result)} `plan.json` names every channel that is kept.

## Load

```python
import secateur

folder = "."  # this repository, downloaded
model = {load}
```
{own}
`config.json` describes the unpruned network, and `model.safetensors` holds the weights of the pruned one:
a library that reads both without the plan finds tensors of other shapes than it expects.
"""


def _sizes(network: nn.Module, plans: Sequence[PruningPlan]) -> dict[str, tuple[float, float]]:
    """Return parameters and bytes of all tensors, before the first plan and now."""
    first: dict[str, tuple[int, ...]] = {}
    for plan in reversed(plans):
        first |= plan.shapes
    stored = network.state_dict().keys()
    tensors = {name: value for name, value in tensors_named(network).items() if name in stored}

    def total(shapes: Mapping[str, tuple[int, ...]], *, in_bytes: bool) -> int:
        sized = [(name, value) for name, value in tensors.items() if in_bytes or isinstance(value, nn.Parameter)]
        return sum(
            math.prod(shapes.get(name, value.shape)) * (value.element_size() if in_bytes else 1)
            for name, value in sized
        )

    return {
        "parameters": (total(first, in_bytes=False), total({}, in_bytes=False)),
        "weights in MB": (total(first, in_bytes=True) / 1e6, total({}, in_bytes=True) / 1e6),
    }


def _row(name: str, before: float | None, after: float | None) -> str:
    change = ""
    if before and after is not None:
        change = (
            f"{100 * (after - before) / before:+.1f}%" if max(abs(before), abs(after)) > 1 else f"{after - before:+.4g}"
        )
    return f"| {name} | {_shown(before)} | {_shown(after)} | {change} |"


def _shown(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _exactness(result: Any) -> str:
    verification = getattr(result, "report", {}).get("verification")
    rule = "computes what the original computes with the removed channels set to zero where they are read"
    if verification is None:
        return (
            f"A cut is exact if the cut network {rule}; `secateur.verify` compares the two. What was trained or "
            "adjusted afterwards differs on purpose."
        )
    if verification["exact"]:
        return (
            f"The cut was verified: before anything was trained or adjusted, the cut network {rule} (largest "
            f"difference {verification['max_error']:.1e} of the output)."
        )
    return (
        "The cut is not exact: channels went that a norm, softmax or sum runs over. The largest difference from the "
        f"original with these channels set to zero is {verification['max_error']:.1e} of the output."
    )
