"""What a recurrent layer reads can be pruned, in every precision and arrangement; its state stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import secateur as sc


class Reader(nn.Module):
    """Convolutions, whose columns a recurrent layer reads: text recognition."""

    def __init__(self, kind: type[nn.RNNBase], packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
        self.layer = kind(12, 5, **options)
        self.packed = packed
        size = options.get("proj_size", 0) or 5
        self.head = nn.Linear(size * (2 if self.layer.bidirectional else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean(2).permute(2, 0, 1)
        x = x.transpose(0, 1) if self.layer.batch_first else x
        if self.packed:
            held = pack_padded_sequence(x, torch.tensor([7, 4]), enforce_sorted=False)
            made = self.layer(held)[0]
            assert isinstance(made, PackedSequence)
            x = pad_packed_sequence(made)[0]
        else:
            x = self.layer(x)[0]
        out: Tensor = self.head(x)
        return out


class Cells(nn.Module):
    """A recurrent cell in a loop over the columns."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
        self.layer = kind(12, 5)  # type: ignore[call-arg]
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for column in self.features(x).mean(2).unbind(2):
            state = self.layer(column, state)
        assert state is not None
        out: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return out


NETWORKS = {
    "lstm": lambda: Reader(nn.LSTM),
    "lstm, two layers, both directions": lambda: Reader(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    "lstm, without biases": lambda: Reader(nn.LSTM, bias=False),
    "lstm, projected": lambda: Reader(nn.LSTM, proj_size=3),
    "lstm, packed": lambda: Reader(nn.LSTM, packed=True),
    "gru": lambda: Reader(nn.GRU, num_layers=2, bidirectional=True),
    "rnn": lambda: Reader(nn.RNN, nonlinearity="relu"),
    "lstm cell": lambda: Cells(nn.LSTMCell),
    "gru cell": lambda: Cells(nn.GRUCell),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_go_and_the_layer_follows(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = NETWORKS[name]().to(dtype).eval(), torch.randn(2, 1, 5, 7, dtype=dtype)
    graph = sc.trace(model, images)
    assert {g.name: int(g.removable.sum()) for g in graph.groups} == {"features.0": 8, "features.2": 12}
    kept = {m for r in graph.refused for m in r.tensors}
    assert {n for n, p in model.layer.named_parameters() if p.ndim == 2} <= {t.removeprefix("layer.") for t in kept}
    plan = sc.plan_removal(graph, {"features.0": [0, 3], "features.2": [1, 2, 8, 9, 11]})
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, images).exact
    assert small.layer.input_size == 7
    assert model.layer.input_size == 12
    sc.save(small, plan, tmp_path / "small.safetensors")
    loaded = sc.load(NETWORKS[name]().to(dtype), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(images), small(images))
    small.train()
    small(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
