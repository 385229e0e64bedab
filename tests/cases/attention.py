"""Attention, transformers and recurrent layers, alone and after convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Net, case, conv, image, pooled


def tokens(x: Tensor) -> Tensor:
    """Turn a map ``(N, C, H, W)`` into tokens ``(N, H·W, C)``."""
    return x.flatten(2).transpose(1, 2)


@case(inputs=image(3, 4, 3))
def multihead_attention() -> Net:
    """nn.MultiheadAttention over the positions of a map, residual."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = tokens(m.conv1(x))
        y, _ = m.attention(x, x, x, need_weights=False)
        return m.head((x + y).mean(1))

    return Net(
        forward,
        conv1=conv(3, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 4),
    )


@case(inputs=image(3, 4, 3), prunable={"feed": 12}, normalising=True)
def transformer_layer() -> Net:
    """nn.TransformerEncoderLayer over the positions of a map: its hidden layer is free."""
    return Net(
        lambda m, x: m.head(m.out(m.feed(m.norm(m.layer(tokens(m.conv1(x))))).relu()).mean(1)),
        conv1=conv(3, 8),
        layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
        norm=nn.LayerNorm(8),
        feed=nn.Linear(8, 12),
        out=nn.Linear(12, 8),
        head=nn.Linear(8, 4),
    )


class Attention(nn.Module):
    """Attention as timm writes it: one linear layer for query, key and value."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, dim // heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend between tokens ``(N, L, C)``."""
        n, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, length, dim))


@case(inputs=image(3, 4, 3), prunable={"hidden": 16}, normalising=True)
def timm_attention() -> Net:
    """Vision transformer block, attention by matrix products."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = tokens(m.patches(x)) + m.position
        x = x + m.attention(m.norm1(x))
        x = x + m.back(F.gelu(m.hidden(m.norm2(x))))
        return m.head(x.mean(1))

    return Net(
        forward,
        patches=conv(3, 8, 1),
        position=nn.Parameter(torch.randn(1, 12, 8)),
        norm1=nn.LayerNorm(8),
        attention=Attention(8, 2, fused=False),
        norm2=nn.LayerNorm(8),
        hidden=nn.Linear(8, 16),
        back=nn.Linear(16, 8),
        head=nn.Linear(8, 4),
    )


@case(inputs=image(3, 4, 3), prunable={"hidden": 12}, normalising=True)
def timm_attention_fused() -> Net:
    """The same with scaled dot product attention and a class token."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = tokens(m.patches(x))
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        x = x + m.attention(m.norm1(x))
        x = x + m.back(F.gelu(m.hidden(m.norm2(x))))
        return m.head(x[:, 0])

    return Net(
        forward,
        patches=conv(3, 8, 1),
        token=nn.Parameter(torch.randn(1, 1, 8)),
        position=nn.Parameter(torch.randn(1, 13, 8)),
        norm1=nn.LayerNorm(8),
        attention=Attention(8, 4, fused=True),
        norm2=nn.LayerNorm(8),
        hidden=nn.Linear(8, 12),
        back=nn.Linear(12, 8),
        head=nn.Linear(8, 4),
    )


@case(inputs=image(3, 4, 3), prunable={"stem": 6})
def attention_of_separate_projections() -> Net:
    """Query, key and value by three linear layers, heads by the width of the shape."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = tokens(m.stem(x))
        n, length, _ = x.shape
        q, k, v = (layer(x).view(n, length, 2, -1).transpose(1, 2) for layer in (m.query, m.key, m.value))
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return m.head((weights @ v).transpose(1, 2).flatten(2).mean(1))

    return Net(
        forward,
        stem=conv(3, 6),
        query=nn.Linear(6, 8),
        key=nn.Linear(6, 8),
        value=nn.Linear(6, 8),
        head=nn.Linear(8, 4),
    )


@case(
    inputs=image(3, 4, 3),
    refused={"value": "is given the number of other channels", "stem": "gives the number of these channels"},
    prunable={"hidden": 5},
)
def attention_by_the_inputs_width() -> Net:
    """Heads as wide as the input's width tells, which the projections need not follow (Segformer, PVT)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = tokens(m.stem(x))
        n, length, width = x.shape
        q, k, v = (p(x).reshape(n, length, 2, width // 2).transpose(1, 2) for p in (m.query, m.key, m.value))
        x = ((q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
        return m.head(m.hidden(x).relu().mean(1))

    return Net(
        forward,
        stem=conv(3, 8),
        query=nn.Linear(8, 8),
        key=nn.Linear(8, 8),
        value=nn.Linear(8, 8),
        hidden=nn.Linear(8, 6),
        head=nn.Linear(6, 4),
    )


class HeadsAttention(nn.Module):
    """Attention whose heads are counted by the module, and as many as it has laid side by side at the end."""

    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.n_head, self.head_dim, self.scale = heads, width, width**-0.5
        self.qkv = nn.Linear(dim, 3 * heads * width)
        self.proj = nn.Linear(heads * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend between tokens ``(N, L, C)``."""
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.n_head, self.head_dim).permute(2, 0, 3, 1, 4)
        x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, length, self.n_head * self.head_dim))


@case(inputs=image(3, 4, 3), prunable={"stem": 7, "attention.qkv": 36})
def attention_with_as_many_heads_in_the_batch() -> Net:
    """The batch's heads are as many as a head is wide: of what products view, no number of the code's is the size."""
    return Net(
        lambda m, x: m.head(m.attention(tokens(m.stem(x))).mean(1)),
        stem=conv(3, 8),
        attention=HeadsAttention(8, 4, 8),
        head=nn.Linear(8, 4),
    )


@case(inputs=image(3, 4, 3), prunable={"stem": 7, "attention.qkv": 36})
def attention_of_as_many_heads_as_they_are_wide() -> Net:
    """The heads' number and width are one: where a view is given both, each place tells which it is."""
    return Net(
        lambda m, x: m.head(m.attention(tokens(m.stem(x))).mean(1)),
        stem=conv(3, 8),
        attention=HeadsAttention(8, 4, 4),
        head=nn.Linear(8, 4),
    )


class CausalAttention(nn.Module):
    """Attention as nanoGPT writes it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, dim
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend between tokens ``(N, L, C)``."""
        n, length, dim = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(n, length, self.n_head, dim // self.n_head).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(x.transpose(1, 2).contiguous().view(n, length, dim))


@case(
    inputs=image(3, 4, 3),
    refused={
        "attention.c_attn": "is given the number of other channels",
        "stem": "gives the number of these channels",
    },
    prunable={"hidden": 5},
)
def attention_of_equal_thirds() -> Net:
    """Query, key and value are thirds of one layer, and cut into heads by the input's width (nanoGPT)."""
    return Net(
        lambda m, x: m.head(m.hidden(m.attention(tokens(m.stem(x)))).relu().mean(1)),
        stem=conv(3, 8),
        attention=CausalAttention(8, 2),
        hidden=nn.Linear(8, 6),
        head=nn.Linear(6, 4),
    )


@case(prunable={"conv1": 3, "conv2": 3})
def view_by_the_other_halfs_width() -> Net:
    """One half of the channels is viewed at the other's width: both lose as many, so it holds."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.conv1(x).relu().chunk(2, 1)
        n, width, height, _ = a.shape
        return m.head(m.conv2(b.view(n, width, height, -1)).relu())

    return Net(forward, conv1=conv(3, 8), conv2=conv(4, 6), head=conv(6, 4))


@case(inputs=image(3, 4, 3))
def channel_attention() -> Net:
    """Attention between channels, as XCiT and DaViT have it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = tokens(m.stem(x))
        q, k, v = m.qkv(x).chunk(3, -1)
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return m.head((weights @ v.transpose(1, 2)).transpose(1, 2))

    return Net(forward, stem=conv(3, 6), qkv=nn.Linear(6, 24), head=nn.Linear(8, 4))


@case(inputs=image(3, 4, 4), prunable={"hidden": 10})
def windows() -> Net:
    """Windows of the map rolled, partitioned, mixed within themselves and put back (Swin)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        x = torch.roll(x, (-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, 4, c)
        x = m.back(m.hidden(x).relu()) + (x @ x.transpose(1, 2)).softmax(-1) @ x
        x = x.view(n, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        return m.head(torch.roll(x, (1, 1), (1, 2)))

    return Net(forward, stem=conv(3, 6), hidden=nn.Linear(6, 10), back=nn.Linear(10, 6), head=nn.Linear(6, 4))


@case(inputs=image(3, 4, 3), prunable={"tokens1": 9, "channels1": 10})
def mixer() -> Net:
    """MLP-Mixer: linear layers over the positions and over the channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = tokens(m.stem(x))
        x = x + m.tokens2(F.gelu(m.tokens1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + m.channels2(F.gelu(m.channels1(x)))
        return m.head(x.mean(1))

    return Net(
        forward,
        stem=conv(3, 6),
        tokens1=nn.Linear(12, 9),
        tokens2=nn.Linear(9, 12),
        channels1=nn.Linear(6, 10),
        channels2=nn.Linear(10, 6),
        head=nn.Linear(6, 4),
    )


@case(prunable={"conv1": 8})
def lstm_after_cnn() -> Net:
    """LSTM over the columns of a map (text recognition)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu().mean(2).permute(2, 0, 1)
        x, _ = m.rnn(x)
        return m.head(x[-1])

    return Net(forward, conv1=conv(3, 8), rnn=nn.LSTM(8, 6, num_layers=2, bidirectional=True), head=nn.Linear(12, 4))


@case(prunable={"conv1": 4, "fc": 8})
def gru_after_cnn() -> Net:
    """GRU over the columns of a map, then a linear layer that can be pruned."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu().flatten(1, 2).transpose(1, 2)
        x, state = m.rnn(x)
        return m.head(m.fc(x.mean(1) + state[0]).relu())

    return Net(forward, conv1=conv(3, 4), rnn=nn.GRU(32, 6, batch_first=True), fc=nn.Linear(6, 8), head=nn.Linear(8, 4))


@case(prunable={"conv1": 8})
def lstm_by_cells() -> Net:
    """LSTM cell in a Python loop over the map's columns: the features are free, the state is not."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu().mean(2)
        h = c = torch.zeros(x.shape[0], 6, dtype=x.dtype)
        for t in range(x.shape[-1]):
            gates = m.read(x[..., t]) + m.recur(h)
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return m.head(h)

    return Net(forward, conv1=conv(3, 8), read=nn.Linear(8, 24), recur=nn.Linear(6, 24), head=nn.Linear(6, 4))


@case(prunable={"update": 8, "read": 8})
def recurrent_convolution() -> Net:
    """A convolution applied to its own output in a loop, with a hidden state that starts at zero."""

    def forward(m: Net, x: Tensor) -> Tensor:
        read = m.read(x)
        state = torch.zeros_like(read)
        for _ in range(3):
            state = (read + m.update(state)).tanh()
        return m.head(state)

    return Net(forward, read=conv(3, 8), update=conv(8, 8), head=conv(8, 4))


@case(inputs=lambda: torch.randint(0, 20, (2, 9)), prunable={"conv1": 8})
def embedding_front() -> Net:
    """Text CNN: embedding, 1-d convolutions of several widths, maximum over time."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.embedding(x).transpose(1, 2)
        return m.head(torch.cat([m.conv1(x).relu().amax(2), m.conv2(x).relu().max(2).values], 1))

    return Net(
        forward,
        embedding=nn.Embedding(20, 6),
        conv1=nn.Conv1d(6, 8, 3),
        conv2=nn.Conv1d(6, 8, 2),
        head=nn.Linear(16, 4),
    )


@case(prunable={"generator": 6}, refused={"conv1": "computed kernel"})
def dynamic_convolution() -> Net:
    """Convolution whose kernel mixes several, by weights computed of the input (CondConv)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        mix = m.route(m.generator(pooled(x)).relu()).softmax(-1).mean(0)
        weight = (mix[:, None, None, None, None] * m.experts).sum(0)
        return m.head(F.conv2d(x, weight, padding=1))

    return Net(
        forward,
        conv1=conv(3, 8),
        generator=nn.Linear(8, 6),
        route=nn.Linear(6, 3),
        experts=nn.Parameter(torch.randn(3, 6, 8, 3, 3) * 0.2),
        head=conv(6, 4),
    )
