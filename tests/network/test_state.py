"""Tracing leaves the model, the random state and torch's switches as it found them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.cases import Case, Net, one_in
from tests.cases.table import conv

# Some networks do on purpose what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a trace could leave changed, tensors by identity, version and value."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[f"{name}/module"] = (module.training, type(module))
        if isinstance(module, torch.jit.ScriptModule):
            continue
        state[f"{name}/attributes"] = sorted(module.__dict__)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            state[f"{name}/{kind}"] = list(module.__dict__.get(kind, {}).items())
        for kind in ("_parameters", "_buffers", "_modules"):
            state[f"{name}/{kind}"] = list(module.__dict__.get(kind, ()))
        state[f"{name}/forward"] = module.__dict__.get("forward")
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        state[f"{name}/identity"] = (id(tensor), tensor.data_ptr(), type(tensor), tensor.dtype, tensor.stride())
        state[f"{name}/flags"] = (tensor.requires_grad, tensor.grad is None, len(tensor._backward_hooks or {}))
        state[f"{name}/value"] = tensor.detach().clone()
        state[f"{name}/gradient"] = None if tensor.grad is None else tensor.grad.clone()
    return state


def surroundings() -> dict[str, Any]:
    """The process's random state and torch's switches."""
    return {
        "rng": torch.get_rng_state(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "mkldnn": torch.backends.mkldnn.enabled,  # type: ignore[attr-defined]
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "warnings": list(warnings.filters),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs."""
    changed = sorted(set(before) ^ set(after))
    for name in set(before) & set(after):
        a, b = before[name], after[name]
        equal = torch.equal(a, b) if isinstance(a, Tensor) else a == b
        if isinstance(a, Tensor) and a.is_floating_point() and not equal:
            equal = torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        if not equal:
            changed.append(name)
    return sorted(changed)


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True], ids=["eval", "train"])
@pytest.mark.parametrize("case", one_in(3), ids=lambda c: c.name)
def test_trace_and_apply_leave_the_model_as_found(case: Case, train: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.build().train(train)
    inputs = case.inputs()
    before, around = fingerprint(model), surroundings()
    graph = sc.trace(model, inputs)
    assert same(before, fingerprint(model)) == []
    assert same(around, surroundings()) == []
    groups = [g for g in graph.groups if g.exact and not g.constraint and g.size > 2]
    small = sc.apply(model, sc.plan_removal(graph, {g.name: [0, g.size - 1] for g in groups}))
    assert same(before, fingerprint(model)) == []
    mine = {p.data_ptr() for p in model.parameters() if p.numel()}
    assert not any(p.data_ptr() in mine for p in small.parameters() if p.numel())
    ours, theirs = ({n: p.requires_grad for n, p in m.named_parameters()} for m in (model, small))
    assert theirs == {name: ours[name] for name in theirs}
    assert [m.training for m in model.modules()] == [m.training for m in small.modules()]


def test_modes_gradients_and_hooks_survive_and_hooks_run() -> None:
    calls: list[str] = []
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), conv(8, 4)).train()
    model[1].eval()
    model[0].requires_grad_(False)
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[4].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[4].weight.register_hook(lambda gradient: gradient)
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    before = fingerprint(model)
    calls.clear()
    with torch.no_grad():
        sc.trace(model, x)
        assert not torch.is_grad_enabled()
    assert same(before, fingerprint(model)) == []
    assert set(calls) == {"forward", "pre"}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("error", [RuntimeError("no sensor is connected"), KeyError("scale")], ids=str)
def test_state_and_inputs_are_restored_when_the_forward_raises(error: Exception, train: bool) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        m.bn(m.conv1(x.mul_(2)))
        m.count += 1
        torch.rand(3)
        raise error

    model = Net(forward, conv1=conv(3, 8), bn=nn.BatchNorm2d(8), count=nn.Buffer(torch.zeros(()))).train(train)
    model.conv1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 6, 6)
    whole, before, around = x.clone(), fingerprint(model), surroundings()
    with pytest.raises(sc.TraceError, match=str(error.args[0])):
        sc.trace(model, x)
    assert same(before, fingerprint(model)) == []
    assert same(around, surroundings()) == []
    assert torch.equal(x, whole)


def test_example_inputs_are_left_alone() -> None:
    x = torch.randn(1, 3, 6, 6)
    whole = x.clone()
    sc.trace(Net(lambda m, x: m.head(m.conv1(x.mul_(2)).relu()), conv1=conv(3, 8), head=conv(8, 4)), x)
    assert torch.equal(x, whole)
