"""Public functions called with the wrong things: each refuses them in one line of the project's errors."""

import inspect
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.network.kinds import are_batches, fits

NETWORK = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
INPUTS = torch.randn(2, 1, 8, 8)
GRAPH = sc.trace(NETWORK, INPUTS)
PLAN = sc.plan_removal(GRAPH, {"0": [1]})
RESULT = sc.PruneResult(NETWORK, PLAN, sc.verify(NETWORK, sc.apply(NETWORK, PLAN), PLAN, INPUTS), GRAPH, {})
DATASET = TensorDataset(INPUTS, torch.tensor([0, 1]))
BATCHES = [(INPUTS, torch.tensor([0, 1]))]

LAWFUL: dict[str, Any] = {
    "model": NETWORK,
    "small": NETWORK,
    "graph": GRAPH,
    "plan": PLAN,
    "target": sc.Target(macs=0.5),
    "example_inputs": INPUTS,
    "scores": sc.score(NETWORK, GRAPH, "l1"),
    "costs": None,
    "removed": {"0": [1]},
    "remove": {"0": 1},
    "criterion": "l1",
    "method": "l1",
    "data": BATCHES,
    "train": BATCHES,
    "validation": BATCHES,
    "test": BATCHES,
    "optimizer": torch.optim.SGD(NETWORK.parameters(), lr=0.1),
    "path": "nowhere/small.safetensors",
    "folder": "nowhere",
    "run_dir": "nowhere",
    "name": "some",
    "needs": ["filters"],
    "cls": nn.Module,
    "flow": print,
    "resize": print,
}
WRONG: dict[str, Any] = {
    "network": NETWORK,
    "graph": GRAPH,
    "plan": PLAN,
    "result": RESULT,
    "target": sc.Target(macs=0.5),
    "tensor": INPUTS,
    "data set": DATASET,
    "loader": DataLoader(DATASET),
    "number": 0.5,
    "text": "some",
    "names": {"0": "text"},
    "function": print,
}
ALSO_LAWFUL = {
    *((name, "tensor") for name in ("example_inputs",)),
    *((name, "loader") for name in ("data", "train", "validation", "test")),
    *((name, "text") for name in ("path", "folder", "run_dir", "name", "criterion", "method")),
    *((name, "function") for name in ("criterion", "method", "flow", "resize")),
    *((name, "number") for name in ("remove",)),
    *((name, of) for name, of in (("model", "network"), ("small", "network"), ("graph", "graph"), ("plan", "plan"))),
    ("target", "target"),
    ("model", "result"),  # of push
    ("needs", "names"),
    *((name, "network") for name in ("flow", "resize")),  # which can be called, as losses are
}
FUNCTIONS = sorted(name for name in sc.__all__ if not inspect.isclass(getattr(sc, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_of_another_kind_is_refused_in_one_line(name: str) -> None:
    function = getattr(sc, name)
    parameters: Mapping[str, Any] = inspect.signature(function).parameters
    required = {p: LAWFUL[p] for p, of in parameters.items() if p in LAWFUL and (of.default is of.empty or p == "path")}
    if name == "criterion":
        parameters = {p: parameters[p] for p in ("name", "needs")}  # its scores are a function
    tried = [(p, kind) for p in parameters if p in LAWFUL for kind in WRONG if (p, kind) not in ALSO_LAWFUL]
    assert len(tried) >= 2 * len(WRONG) - 3
    for argument, kind in tried:
        if argument == "example_inputs" and kind in ("number", "text", "names", "function"):
            continue  # a network may be called on anything
        with pytest.raises(sc.SecateurError) as refused:
            function(**required | {argument: WRONG[kind]})
        assert isinstance(refused.value, sc.UsageError), (argument, kind)
        assert str(refused.value).startswith(f"{name}: {argument}: expected "), refused.value
        assert "; found " in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_misspelt_or_a_missing_argument_is_named(name: str) -> None:
    function = getattr(sc, name)
    parameters = inspect.signature(function).parameters
    first = next(iter(parameters))
    with pytest.raises(sc.UsageError, match=f"{name}: missing a required argument: '{first}'"):
        function()
    with pytest.raises(sc.UsageError, match=f"Did you mean {first}, not {first}s?"):
        function(**{f"{first}s": 1})


@pytest.mark.parametrize("made", [sc.Target, sc.Settings, sc.Criterion, sc.Options])
def test_a_misspelt_field_is_named(made: Callable[..., Any]) -> None:
    field = list(inspect.signature(made.__init__).parameters)[1]  # type: ignore[misc]
    with pytest.raises(sc.UsageError, match=f"(?i)did you mean {field}"):
        made(**{f"{field}e": 0.5})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sc.macs(NETWORK, INPUTS), "a channel graph, graph = sc.trace(model, example_inputs); found a network"),
        (lambda: sc.prune(NETWORK, INPUTS, 0.25), "sc.Target(macs=0.25) removes 25% of the MACs."),
        (lambda: sc.Target(mac=0.5), "Did you mean macs, not mac?"),
        (lambda: sc.Target(macs="0.5"), "found '0.5'"),
        (lambda: sc.prune(NETWORK, INPUTS, tagret=0.5), "Did you mean target, not tagret?"),
        (lambda: sc.compress(NETWORK, train=BATCHES, validation=BATCHES, tolerence=1), "Did you mean tolerance"),
        (lambda: sc.save(RESULT, path="x"), "found a PruneResult. It has one: pass its .model."),
        (lambda: sc.apply(NETWORK, RESULT), "It has one: pass its .plan."),
        (lambda: sc.prune(NETWORK, INPUTS, data=DATASET), "DataLoader(dataset, batch_size=64) makes batches of it."),
        (lambda: sc.trace(NETWORK, DataLoader(DATASET)), "next(iter(loader))[0]"),
        (lambda: sc.trace(NETWORK, (2, 1, 8, 8)), "For a shape, give torch.randn(2, 1, 8, 8)."),
        (lambda: sc.score(NETWORK, GRAPH, "l1", groups="0"), "found '0'"),
        (lambda: sc.plan(GRAPH, {"0": [1.0]}, sc.Target(macs=0.5)), "found a dict of '0' -> a list"),
    ],
)
def test_the_line_says_what_to_do(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(sc.SecateurError) as refused:
        call()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "hint", "taken"),
    [
        (np.int64(3), int, True),
        (np.float32(0.5), float, True),
        (torch.tensor(0.5), float, True),
        (torch.ones(2), float, False),
        (1, float, True),
        (0.5, int, False),
        ("3", int, False),
        ("no", bool, True),
        (None, int | None, True),
        (None, int, False),
        (print, Callable[[int], str] | None, True),
        (3, Callable[..., Any], False),
        (range(3), Sequence[int], True),
        (np.arange(3), Sequence[int], True),
        ("abc", Iterable[str], False),
        ({"a": [1]}, Mapping[str, Sequence[int]], True),
        ({"a": 1}, Mapping[str, Sequence[int]], False),
        ("x", Literal["a", "b"], True),
        (nn.ReLU, type[nn.Module], True),
        (object(), Any, True),
    ],
)
def test_what_fits_an_annotation(value: Any, hint: Any, taken: bool) -> None:
    assert fits(value, hint) is taken


def test_batches_are_what_can_be_walked_through_batch_by_batch() -> None:
    class Walked:
        def __getitem__(self, index: int) -> Any:
            return BATCHES[index]

    for lawful in (BATCHES, iter(BATCHES), DataLoader(DATASET), (b for b in BATCHES), Walked()):
        assert are_batches(lawful)
    for wrong in (INPUTS, DATASET, INPUTS.numpy(), "text", {"x": INPUTS}, NETWORK, 3):
        assert not are_batches(wrong)


@pytest.mark.parametrize("name", [name for name in sc.__all__ if inspect.isfunction(getattr(sc, name))])
def test_another_process_can_be_sent_a_public_function(name: str) -> None:
    assert pickle.loads(pickle.dumps(getattr(sc, name))) is getattr(sc, name)
