"""What a recurrent layer reads can be pruned, in every precision and arrangement; its state stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import secateur as sc
from tests.cases.table import Net, conv
from tests.surroundings import pruned


def plain(layer: nn.RNNBase, x: Tensor) -> Any:
    return layer(x.transpose(0, 1) if layer.batch_first else x)[0]


def packed(layer: nn.Module, x: Tensor) -> Any:
    return pad_packed_sequence(layer(pack_padded_sequence(x, torch.tensor([7, 4]), enforce_sorted=False))[0])[0]


def by_cells(layer: nn.Module, x: Iterable[Tensor]) -> Any:
    state = None
    for column in x:
        state = layer(column, state)
    return state[0] if isinstance(state, tuple) else state


def reader(layer: Callable[..., nn.Module], run: Callable[..., Any] = plain, size: int = 5, **options: Any) -> Net:
    """Return convolutions, whose columns a recurrent layer reads: text recognition."""
    return Net(
        lambda m, x: m.head(run(m.layer, m.features(x).mean(2).permute(2, 0, 1))),
        features=nn.Sequential(conv(1, 8), nn.ReLU(), conv(8, 12)), layer=layer(12, 5, **options),
        head=nn.Linear(size, 4),
    )  # fmt: skip


NETWORKS = {
    "lstm": lambda: reader(nn.LSTM),
    "lstm, both directions": lambda: reader(nn.LSTM, size=10, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, without biases": lambda: reader(nn.LSTM, bias=False),
    "lstm, projected": lambda: reader(nn.LSTM, size=3, proj_size=3),
    "lstm, packed": lambda: reader(nn.LSTM, packed),
    "gru": lambda: reader(nn.GRU, size=10, num_layers=2, bidirectional=True),
    "rnn": lambda: reader(nn.RNN, nonlinearity="relu"),
    "lstm cell": lambda: reader(nn.LSTMCell, by_cells),
    "gru cell": lambda: reader(nn.GRUCell, by_cells),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_go_and_the_layer_follows(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = NETWORKS[name]().to(dtype), torch.randn(2, 1, 5, 7, dtype=dtype)
    graph, plan, small = pruned(model, images, {"features.0": [0, 3], "features.2": [1, 2, 8, 9, 11]})
    assert {g.name: int(g.removable.sum()) for g in graph.groups} == {"features.0": 8, "features.2": 12}
    kept = {m for r in graph.refused for m in r.tensors}
    assert {n for n, p in model.layer.named_parameters() if p.ndim == 2} <= {t.removeprefix("layer.") for t in kept}
    assert (small.layer.input_size, model.layer.input_size) == (7, 12)
    sc.save(small, plan, tmp_path / "small.safetensors")
    loaded = sc.load(NETWORKS[name]().to(dtype), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(images), small(images))
    small.train()
    small(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
