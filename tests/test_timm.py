"""Networks of timm whose branches merge into one convolution: what is pruned and then merged computes the same."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model

import secateur as sc

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["repvgg_a0", "repghostnet_050", "repvit_m1", "mobileone_s0", "fastvit_t8"])
def test_branches_merge_after_pruning_or_what_they_count_is_listed(name: str) -> None:
    torch.manual_seed(0)
    size = 256 if name == "fastvit_t8" else 64
    model, x = timm.create_model(name, num_classes=5).eval(), torch.randn(1, 3, size, size)
    graph = sc.trace(model, x)
    plan = sc.plan(graph, sc.score(model, graph, "l2"), sc.Target(channels=0.3), allocation="uniform")
    small = sc.apply(model, plan)
    check = sc.verify(model, small, plan, x)
    assert check.exact
    if name in ("mobileone_s0", "fastvit_t8"):  # its blocks build the merged layer by numbers of their own
        assert any("keeps groups = 48, which equalled the width of conv_kxk.0" in text for text in check.kept)
        return
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(copy.deepcopy(small))(x), small(x), rtol=1e-4, atol=1e-5)
