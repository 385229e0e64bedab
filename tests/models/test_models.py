"""The papers' networks: published weights load, MACs agree to the digit, shortcuts follow an index map."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from secateur.checkpoint import load, save
from secateur.errors import UsageError
from secateur.graph.plan import PruningPlan
from secateur.models import MODELS, CifarResNet, PadShortcut, lenet5, projected, resnet20, resnet56, resnet110, vgg16
from secateur.models.pad_shortcut import centred
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace
from secateur.training.stages import fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")


def macs(model: nn.Module, *shape: int) -> dict[str, int]:
    """Count multiply-accumulates by kind, from CFP eqs. 1-3, through forward hooks."""
    count = {"conv": 0, "linear": 0}

    def conv(module: nn.Conv2d, _: object, out: Tensor) -> None:
        kernel = module.kernel_size[0] * module.kernel_size[1]
        count["conv"] += module.in_channels // module.groups * kernel * out[0].numel()

    def linear(module: nn.Linear, _: object, out: Tensor) -> None:
        count["linear"] += module.in_features * out[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(conv)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return count


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (lenet5, (1, 28, 28), 2_293_000),
        (resnet56, (3, 32, 32), 125_485_696),
        (lambda: resnet56("B", streams=(10, 20, 38)), (3, 32, 32), 48_553_596),
        (lambda: resnet56("B", streams=(9, 18, 36)), (3, 32, 32), 40_818_024),
        (lambda: resnet56("B", streams=(8, 16, 27)), (3, 32, 32), 29_549_902),
        # A padded shortcut multiplies nothing: the same widths without their three projections.
        (
            lambda: resnet56("A", streams=(10, 20, 38)),
            (3, 32, 32),
            48_553_596 - 16 * 10 * 32**2 - 10 * 20 * 16**2 - 20 * 38 * 8**2,
        ),
        (
            lambda: resnet56("A", streams=(9, 18, 36)),
            (3, 32, 32),
            40_818_024 - 16 * 9 * 32**2 - 9 * 18 * 16**2 - 18 * 36 * 8**2,
        ),
        (
            lambda: resnet56("A", streams=(8, 16, 27)),
            (3, 32, 32),
            29_549_902 - 16 * 8 * 32**2 - 8 * 16 * 16**2 - 16 * 27 * 8**2,
        ),
    ],
)
def test_macs_are_the_published_ones(model, shape, expected):
    assert sum(macs(model(), *shape).values()) == expected


@pytest.mark.parametrize(("streams", "reduction"), [((10, 20, 38), 61.51), ((9, 18, 36), 67.62), ((8, 16, 27), 76.59)])
def test_cfps_resnet56_projects_its_first_block_too(streams, reduction):
    before = sum(macs(resnet56("B", free_stem=True), 3, 32, 32).values())
    after = sum(macs(resnet56("B", streams=streams, free_stem=True), 3, 32, 32).values())
    assert before == 126_009_984
    # The paper counts in tenths of a million, the smaller rounded down.
    assert 100 * (1 - after // 10**5 / (before // 10**5)) == pytest.approx(reduction, abs=0.005)


def test_a_free_stem_computes_the_same_network():
    torch.manual_seed(0)
    plain, free = resnet20().eval(), resnet20(free_stem=True).eval()
    free.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(free.layer1[0].shortcut, PadShortcut)
    assert torch.equal(plain(x), free(x))


@pytest.mark.parametrize("build", [resnet20, lambda: resnet20(free_stem=True), lambda: resnet20(streams=(5, 12, 20))])
def test_projections_in_place_of_padding_compute_the_same_in_either_mode(build):
    torch.manual_seed(0)
    padded = build().double()
    x = torch.randn(20, 3, 16, 16, dtype=torch.float64)
    for _ in range(3):
        padded(x)  # batch norms with moments of their own
    before = copy.deepcopy(padded.state_dict())
    # The moments of the whole batch are those of its parts together.
    small = projected(padded, [x[:7], x[7:]])
    assert not any(isinstance(m, PadShortcut) for m in small.modules())
    assert isinstance(small.layer1[0].shortcut[0], nn.Conv2d)
    assert padded.training
    assert all(torch.equal(value, before[name]) for name, value in padded.state_dict().items())
    padded.eval()
    assert torch.allclose(small(x), padded(x), atol=1e-10)
    # In train mode the layers before a shortcut normalise by the batch; let them keep to their moments in both.
    for net in (small, padded):
        for name, module in net.named_modules():
            module.training = "shortcut" in name
    assert torch.allclose(small(x), padded(x), atol=1e-10)


def test_what_the_padding_fills_with_zeros_stays_zero_in_training():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    small = projected(resnet20(), [x])
    assert fit(small, [(x, torch.arange(8))], epochs=3)[-1].images == 8
    conv, norm = small.layer2[0].shortcut
    zeros = [o for o, source in enumerate(centred(16, 32)) if source < 0]
    assert len(zeros) == 16
    assert not conv.weight[zeros].any()
    assert not norm.weight[zeros].any()
    assert conv.weight[8, 1] != 0
    assert small.eval()(x).isfinite().all()


def test_projections_are_not_projected_again():
    with pytest.raises(UsageError, match="a shortcut is a 1x1 projection already"):
        projected(resnet20("B"), [torch.zeros(1, 3, 8, 8)])
    with pytest.raises(UsageError, match="no image"):
        projected(resnet20(), [])


def test_vgg16_convolutions_take_the_published_macs():
    assert macs(vgg16(), 3, 32, 32) == {"conv": 313_196_544, "linear": 512 * 512 + 512 * 10}
    assert macs(vgg16(hidden=0), 3, 32, 32) == {"conv": 313_196_544, "linear": 512 * 10}


def test_lenet5_is_20_50_800_500():
    assert {n: tuple(p.shape) for n, p in lenet5().named_parameters()} == {
        "conv1.weight": (20, 1, 5, 5),
        "conv1.bias": (20,),
        "conv2.weight": (50, 20, 5, 5),
        "conv2.bias": (50,),
        "fc1.weight": (500, 800),
        "fc1.bias": (500,),
        "fc2.weight": (10, 500),
        "fc2.bias": (10,),
    }


@needs_shared
@pytest.mark.parametrize(("depth", "model"), [(20, resnet20), (56, resnet56)])
def test_published_weights_load_strictly(depth, model):
    weights = load_file(SHARED / "weights" / f"cifar10-resnet{depth}.safetensors")
    net = model()
    net.load_state_dict(weights, strict=True)
    state = net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


def reference_option_a(net: CifarResNet, x: Tensor) -> Tensor:
    """Compute the forward from the weights alone: He et al. 2016, with the padding written as slices and cat."""
    state = net.state_dict()

    def norm(name: str, y: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    x = F.relu(norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)))
            y = norm(f"{name}.bn2", F.conv2d(y, state[f"{name}.conv2.weight"], padding=1))
            if stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2])
                x = torch.cat([zeros, x, zeros], dim=1)
            x = F.relu(x + y)
    return x.mean(dim=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@needs_shared
def test_resnet20_computes_the_published_network():
    net = resnet20().eval().double()
    net.load_state_dict(load_file(SHARED / "weights" / "cifar10-resnet20.safetensors"))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net(x), reference_option_a(net, x), rtol=1e-12, atol=1e-12)


@st.composite
def shortcuts(draw: st.DrawFn) -> PadShortcut:
    inputs = draw(st.integers(1, 6))
    source = draw(st.lists(st.integers(-1, inputs - 1), min_size=1, max_size=8))
    return PadShortcut(inputs, source, draw(st.integers(1, 3)))


def slow_shortcut(layer: PadShortcut, x: Tensor) -> Tensor:
    small = x[:, :, :: layer.stride, :: layer.stride]
    return torch.stack([small[:, i] if i >= 0 else torch.zeros_like(small[:, 0]) for i in layer.source], dim=1)


@settings(max_examples=60, deadline=None)
@given(shortcuts(), st.integers(1, 7), st.data())
def test_shortcut_is_its_index_map_and_pruning_it_is_zeroing(layer, size, data):
    x = torch.randn(2, layer.in_channels, size, size + 1)
    y = layer(x)
    assert torch.equal(y, slow_shortcut(layer, x))
    kept_in = sorted(data.draw(st.sets(st.integers(0, layer.in_channels - 1), min_size=1)))
    kept_out = sorted(data.draw(st.sets(st.integers(0, layer.out_channels - 1), min_size=1)))
    zeroed = torch.zeros_like(x)
    zeroed[:, kept_in] = x[:, kept_in]
    small = copy.deepcopy(layer)
    small.in_channels, small.source = layer.pruned(kept_in, kept_out)
    assert torch.equal(small(x[:, kept_in]), layer(zeroed)[:, kept_out])
    assert torch.equal(layer(x), y), "the copy's attributes are its own"


def test_shortcut_zeros_are_zeros_even_beside_infinities():
    assert torch.equal(
        PadShortcut(1, (-1, 0))(torch.full((1, 1, 1, 1), torch.inf)).flatten(), torch.tensor([0, torch.inf])
    )


def test_shortcut_survives_materialising_from_the_meta_device():
    with torch.device("meta"):
        layer = PadShortcut(2, (-1, 1, 0))
    layer = layer.to_empty(device="cpu")
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(layer(x), slow_shortcut(layer, x))


def test_shortcut_keeps_out_of_the_state_dict():
    assert PadShortcut(2, (0, -1)).state_dict() == {}


def test_centred_map_by_hand():
    assert centred(2, 4) == (-1, 0, 1, -1)
    assert centred(2, 5) == (-1, 0, 1, -1, -1)
    assert centred(4, 2) == (1, 2)
    assert centred(3, 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PadShortcut(2, (0, -2)), "source holds input channels and -1"),
        (lambda: PadShortcut(2, ()), "at least one"),
        (lambda: PadShortcut(2, (0, 2))(torch.zeros(1, 2, 4, 4)), "built for 2 input channels"),
        (lambda: PadShortcut(2, (0, 1))(torch.zeros(1, 3, 4, 4)), "found an input of 3"),
        (lambda: lenet5(widths=(20,)), "two widths"),
        (lambda: lenet5(widths=(0, 5)), "at least 1"),
        (lambda: lenet5(in_size=15), "16x16, found 15"),
        (lambda: vgg16(widths=(64,)), "13 widths"),
        (lambda: vgg16(in_size=48), "multiple of 32, found 48"),
        (lambda: vgg16(hidden=-1), "hidden=-1"),
        (lambda: CifarResNet(21), "found depth=21"),
        (lambda: resnet20("C"), "found 'C'"),
        (lambda: resnet20(streams=(16, 32)), "three streams"),
        (lambda: resnet20(internal=(16, 32, [64, 64])), "3 of them"),
        (lambda: resnet20(stem=0), "stem=0"),
    ],
)
def test_sizes_that_make_no_network_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_widths_are_the_layers_widths():
    net = resnet20("B", stem=5, streams=(6, 7, 8), internal=(1, [2, 3, 4], 9), num_classes=3)
    assert net.layer1[0].conv1.weight.shape[:2] == (1, 5)
    assert [b.conv1.out_channels for b in net.layer2] == [2, 3, 4]
    assert [b.conv2.out_channels for stage in (net.layer1, net.layer2, net.layer3) for b in stage] == [6] * 3 + [
        7
    ] * 3 + [8] * 3
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert len(resnet110().layer3) == 18


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("resnet56", "vgg16") else []) for n in sorted(MODELS)]
)
def test_every_named_model_trains_a_step(name):
    torch.manual_seed(0)
    shape = (1, 28, 28) if name == "lenet5" else (3, 32, 32)
    net = MODELS[name]()
    x = torch.randn(4, *shape)
    logits = net(x)
    assert logits.shape == (4, 10)
    # Kaiming's draws keep the signal's size: neither dead nor exploded after a hundred layers.
    assert 1e-3 < logits.std() < 1e2
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_weights_are_drawn_with_the_papers_variance():
    torch.manual_seed(0)
    fc1 = lenet5().fc1.weight
    assert fc1.abs().max() <= (3 / 800) ** 0.5
    assert fc1.std().item() == pytest.approx(800**-0.5, rel=0.02)
    assert vgg16().features[10].weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert resnet20().layer3[1].conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def removed_from_streams(net: nn.Module, widths: dict[str, int]) -> PruningPlan:
    """Plan to keep every second channel or so of the groups that produce these modules' outputs."""
    graph = trace(net, torch.zeros(1, 3, 32, 32))
    removed = {}
    for module, width in widths.items():
        group = next(g for g in graph.groups if any(m.module == module for m in g.producers))
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(width)).tolist()
        removed[group.name] = order[width:]
    return plan_removal(graph, removed)


STREAM_OUTPUTS = {"layer1.0.conv2": 11, "layer2.0.conv2": 19, "layer3.0.conv2": 40}


@pytest.mark.parametrize("free_stem", [False, True])
def test_padded_streams_are_pruned_exactly_and_come_back_from_a_file(tmp_path, free_stem):
    torch.manual_seed(0)
    net = resnet20(free_stem=free_stem).eval()
    plan = removed_from_streams(net, STREAM_OUTPUTS)
    small = cut(net.double(), plan)
    assert small.conv1.out_channels == (16 if free_stem else 11)
    assert [small.get_submodule(name).out_channels for name in STREAM_OUTPUTS] == list(STREAM_OUTPUTS.values())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    zeroed = copy.deepcopy(net)

    def only(kept: list[int]) -> Callable[..., tuple[Tensor]]:
        def zero_the_rest(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            mask = torch.zeros(args[0].shape[1], dtype=torch.float64)
            mask[kept] = 1
            return (args[0] * mask.reshape(-1, *[1] * (args[0].ndim - 2)),)

        return zero_the_rest

    for name, kept in plan.kept_inputs.items():
        zeroed.get_submodule(name).register_forward_pre_hook(only(kept))
    for stage, name in ((2, "layer1.0.conv2"), (3, "layer2.0.conv2")):
        # The padded shortcut reads the stream before it.
        zeroed.get_submodule(f"layer{stage}.0.shortcut").register_forward_pre_hook(only(plan.kept_outputs[name]))
    with torch.no_grad():
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-10, atol=1e-10)
    save(small, plan, tmp_path / "small.safetensors")
    loaded = load(resnet20(free_stem=free_stem).eval(), tmp_path / "small.safetensors")
    assert loaded.layer2[0].shortcut.source == small.layer2[0].shortcut.source != net.layer2[0].shortcut.source
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize("kind", ["A", pytest.param("B", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("streams", "published"), [((10, 20, 38), 48_553_596), ((9, 18, 36), 40_818_024), ((8, 16, 27), 29_549_902)]
)
def test_pruning_resnet56_arrives_at_the_published_macs(kind, streams, published):
    net = resnet56(kind, free_stem=True)
    widths = {f"layer{s}.{b}.conv1": n for s, n in enumerate(streams, 1) for b in range(9)}
    widths |= {f"layer{s}.0.conv2": n for s, n in enumerate(streams, 1)}
    small = cut(net, removed_from_streams(net, widths))
    a, b, c = streams
    projections = 16 * a * 32**2 + a * b * 16**2 + b * c * 8**2
    assert sum(macs(small, 3, 32, 32).values()) == published - (projections if kind == "A" else 0)
