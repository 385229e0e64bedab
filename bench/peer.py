"""Torch-Pruning, driven as its documentation says: magnitude importance, one ratio, output layers ignored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def _forward(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def _leaves(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]


def prune(model: nn.Module, inputs: Any, outputs: Sequence[str], ratio: float = 0.5) -> nn.Module:
    """Prune a model in place with Torch-Pruning.

    Args:
        model: The network; it is changed.
        inputs: Example inputs.
        outputs: Names of the layers that give the network's output, to be ignored.
        ratio: Fraction of the channels to remove from every group.

    Returns:
        The same model.
    """
    import torch_pruning as tp

    ignored = [model.get_submodule(name) for name in outputs]
    heads = {
        m.qkv: m.num_heads
        for m in model.modules()
        if isinstance(getattr(m, "qkv", None), nn.Linear) and isinstance(getattr(m, "num_heads", None), int)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads=heads,
            forward_fn=_forward,
            output_transform=_leaves,
        )
        pruner.step()
    for m in model.modules():
        if getattr(m, "qkv", None) in heads and m.qkv in pruner.num_heads:
            m.num_heads = pruner.num_heads[m.qkv]
            if hasattr(m, "head_dim"):
                m.head_dim = m.qkv.out_features // (3 * m.num_heads)
            if hasattr(m, "attn_dim"):
                m.attn_dim = m.qkv.out_features // 3
    return model
