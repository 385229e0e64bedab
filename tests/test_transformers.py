"""Vision architectures of transformers, which keeps books about its models: traced as made, and after a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import secateur as sc

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
HIERARCHY = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SEGFORMER = {**HIERARCHY, "decoder_hidden_size": 16, "num_attention_heads": [1, 2, 2, 4], "num_labels": 3}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
MODELS: dict[str, tuple[str, Mapping[str, Any], int]] = {
    "Segformer": ("ForSemanticSegmentation", SEGFORMER, 64),
    "ViT": ("ForImageClassification", VIT, 32),
    "DeiT": ("ForImageClassification", VIT, 32),
    "Beit": ("ForImageClassification", VIT, 32),
    "Dinov2": ("ForImageClassification", VIT, 32),
    "ConvNext": ("ForImageClassification", HIERARCHY, 64),
    "ResNet": ("ForImageClassification", STAGES, 64),
    "RegNet": ("ForImageClassification", {**STAGES, "groups_width": 8}, 64),
    "Swin": ("ForImageClassification", SWIN, 32),
    "PoolFormer": ("ForImageClassification", HIERARCHY, 64),
}
"""Architecture -> what it is made for, its configuration, the images' size."""
ASKED = ({}, {"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True})


def kinds(model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run a network: what it returns under each name, as the number of its states, or how wide its output is."""
    with torch.no_grad():
        found = model(**inputs)
    return {name: len(v) if isinstance(v, tuple) else tuple(v.shape) for name, v in found.items()}


@pytest.mark.parametrize("asked", ASKED, ids=["plain", "states", "attentions"])
@pytest.mark.parametrize("name", MODELS)
def test_books_are_left_in_order(name: str, asked: Mapping[str, bool]) -> None:
    transformers = pytest.importorskip("transformers")
    purpose, settings, size = MODELS[name]

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**settings)
        made: torch.nn.Module = getattr(transformers, f"{name}{purpose}")(config)
        return made.eval()

    inputs = {"pixel_values": torch.randn(2, 3, size, size), **asked}
    expected = kinds(build(), inputs)
    fresh, used = build(), build()
    kinds(used, inputs)
    graphs = [sc.trace(model, inputs) for model in (fresh, used)]
    first, second = ([(g.name, g.size, g.exact) for g in graph.groups] for graph in graphs)
    assert first == second
    assert first
    assert kinds(fresh, inputs) == kinds(used, inputs) == expected
    plan = sc.plan(graphs[0], sc.score(fresh, graphs[0], "l1"), sc.Target(channels=0.2))
    small = sc.apply(fresh, plan)
    assert sc.verify(fresh, small, plan, inputs).exact
    assert kinds(small, inputs).keys() == expected.keys()
    states = {key: value for key, value in expected.items() if isinstance(value, int)}
    assert {key: kinds(small, inputs)[key] for key in states} == states
