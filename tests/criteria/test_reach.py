"""Every criterion, compensation and round of pruning over every small network: a result, or one clean line that is true.

``python -m tests.criteria.test_reach`` runs all of it and prints how many results and which clean errors there are.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import secateur as sc
from secateur.compensation import METHODS, compensate
from secateur.criteria import feature_maps, names
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from tests import oracle
from tests.cases import CASES
from tests.criteria.networks import NETWORKS

# Some networks do on purpose what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
ROUNDS = ("cfp", "l1", "redundancy")
"""Methods of the two rounds of compress."""


def loss(outputs: Any, _: Any) -> Tensor:
    """Turn whatever a network returns into a number that depends on all of it."""
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.float().square().mean() for leaf in found]).sum()


def constant(_model: nn.Module, _batches: Any) -> float:
    return 0.5


@dataclass
class Reach:
    """What was tried on one network, and what came of it."""

    name: str
    results: Counter[str] = field(default_factory=Counter)
    """Kind of attempt -> number of results."""
    errors: dict[str, str] = field(default_factory=dict)
    """Attempt -> its clean error."""

    def attempt(self, kind: str, what: str, run: Callable[[], Any]) -> Any:
        """Return a result, or None where there was a clean error; whatever else is raised goes on."""
        try:
            result = run()
        except sc.SecateurError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            self.errors[f"{kind} {what}".strip()] = str(error)
            return None
        self.results[kind] += 1
        return result


def built(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return a network with random values and its example inputs, in a precision."""
    torch.manual_seed(0)
    source = CASES[name] if name in CASES else NETWORKS[name]
    model = oracle.randomise(source.build()).to(dtype).eval()
    inputs = source.inputs() if callable(source.inputs) else source.inputs
    return model, feature_maps.moved(oracle.doubled(inputs), "cpu") if dtype is torch.float64 else inputs


def finite(model: nn.Module, inputs: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in oracle.run(model, inputs) if isinstance(leaf, Tensor))


def removed(selections: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(selection.removed) for name, selection in selections.items() if selection.removed}


def reach(name: str, dtype: torch.dtype) -> Reach:
    """Try every criterion, compensation and two rounds of compress on a network."""
    model, inputs = built(name, dtype)
    found = Reach(name)
    graph = found.attempt("trace", "", lambda: sc.trace(model, inputs))
    if graph is None or not any(group.exact for group in graph.groups):
        return found
    count = feature_maps.examples(inputs) or 1
    batch = (inputs, torch.arange(count) % 3)
    plans: dict[str, PruningPlan] = {}
    for criterion in names():
        scores = found.attempt("score", criterion, lambda: sc.score(model, graph, criterion, [batch], loss=loss))
        if scores is not None:
            assert scores.keys() <= {group.name for group in graph.groups if group.exact}
            assert all(bool(values.isfinite().all()) for values in scores.values()), criterion
        chosen = found.attempt("select", criterion, lambda: sc.select(model, graph, criterion, 0.5, [batch], loss=loss))
        if chosen is not None:
            plan = sc.plan_removal(graph, removed(chosen))  # not attempted: what is selected can be planned
            plans.setdefault(str(plan.removed), plan)
    if finite(model, inputs):
        for plan in plans.values():
            small = exactly_cut(name, model, graph, plan, inputs, dtype)
            found.attempt("trace again", "", lambda: sc.trace(small, inputs))
    _compensate(found, model, graph, plans, batch)
    for method in ROUNDS:
        found.attempt("compress", method, lambda: compressed(model, method, batch, inputs))
    return found


def exactly_cut(
    name: str, model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Any, dtype: torch.dtype
) -> nn.Module:
    """Cut a network, and see that it computes what the original with the channels zeroed does."""
    small = sc.apply(model, plan)
    if dtype is torch.float64 and plan.removed:
        modes = CASES[name].modes if name in CASES else ("eval",)
        verdict = oracle.judge(model, small, plan, inputs, modes=modes)
        assert verdict.exact or oracle.ties(model, small, plan, inputs), f"{verdict}; removed {plan.removed}"
    return small


def _compensate(found: Reach, model: nn.Module, graph: ChannelGraph, plans: dict[str, PruningPlan], batch: Any) -> None:
    whole = finite(model, batch[0])
    for plan in itertools.islice((plan for plan in plans.values() if plan.removed), 2):
        for method in METHODS:
            small = sc.apply(model, plan)

            def run(method: str = method, small: nn.Module = small, plan: PruningPlan = plan) -> nn.Module:
                report = compensate(model, small, plan, method, [batch], graph=graph, example_inputs=batch[0])
                assert all(entry.applied or entry.reason for entry in report)
                return small

            done = found.attempt("compensate", method, run)
            assert done is None or not whole or finite(done, batch[0]), method


def compressed(model: nn.Module, method: str, batch: Any, inputs: Any) -> Any:
    """Run two rounds; the finished network computes what its plan says, whatever its weights are."""
    with tempfile.TemporaryDirectory() as folder:
        result = sc.compress(
            model, method, train=[batch], validation=[batch], example_inputs=inputs, phases=(1,), max_rounds=2, fraction=0.3, loss=loss, metric=constant, run_dir=folder, lr=1e-9, optimise_epochs=1,
            finetune_epochs=1, linear=True, criterion_batches=1, clip_norm=1.0,
        )  # fmt: skip
    assert result.plan.removed
    assert {n: t.shape for n, t in result.model.state_dict().items()} == {
        n: t.shape for n, t in sc.apply(model, result.plan).state_dict().items()
    }
    assert result.report["verification"]["mismatched"] in ((), [])
    return result


if __name__ == "__main__":
    import sys
    import time
    import traceback

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import logging

    logging.disable(logging.WARNING)
    chosen = [n for n in (*CASES, *NETWORKS) if not sys.argv[1:] or any(a in n for a in sys.argv[1:])]
    for name in chosen:
        for label, dtype in DTYPES.items():
            started = time.process_time()
            try:
                found = reach(name, dtype)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)
                own = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in where][-3:]
                print(
                    f"RAW {name} {label} {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} {own}",
                    flush=True,
                )
                continue
            for what, error in found.errors.items():
                print(f"CLEAN {name} {label} {what}: {error}", flush=True)
            print(f"OK {name} {label} {dict(found.results)} {time.process_time() - started:.1f}s", flush=True)
