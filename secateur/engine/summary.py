"""The figures of a finished run, before and after."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.compensation import parse
from secateur.deploy.turns import bound, interleaved, quartiles, within_noise
from secateur.engine.pairing import largest_correlations
from secateur.engine.request import warn_if_fallen
from secateur.engine.result import CompressResult
from secateur.engine.rundir import RunDirectory
from secateur.engine.state import State
from secateur.errors import RunError
from secateur.graph import cost
from secateur.graph.plan import PruningPlan
from secateur.network.copies import replica
from secateur.network.inputs import arguments, shapes_of, unwrapped
from secateur.pruning.surgery import cut
from secateur.pruning.verification import verify
from secateur.training import evaluation, processes

if TYPE_CHECKING:
    from secateur.engine.loop import Engine

_ROUNDS, _SECONDS = 15, 0.001
"""Both networks are timed in so many rounds, in turns, each for so long at least."""


def summarise(
    engine: Engine, state: State, directory: RunDirectory | None, last: dict[str, Any] | None = None
) -> CompressResult:
    """Measure the finished network beside the unpruned one.

    Args:
        engine: Of the run.
        state: At its end.
        directory: Of its files.
        last: The record of the network; that of the last milestone when None.
    """
    plan, small = engine.plan(state.removed), state.network
    before = largest_correlations(engine.original, engine.graph)
    after = largest_correlations(small, engine.present(state))
    # Fine-tuning changes what is computed on purpose; what is verified is that the cuts removed nothing else.
    check = verify(engine.original, cut(engine.original, plan), plan, engine.example_inputs)
    last = state.milestones[-1] if last is None else last
    was, now, noisy = processes.told(engine.runtime, lambda: _times(engine, small))
    report: dict[str, Any] = {
        "parts": _parts(engine, state),
        "notes": state.notes,
        "metric": evaluation.metric_name(engine.metric),
        "baseline": {
            **state.baseline,
            **_figures(engine, engine.original, PruningPlan(), was),
        },
        "final": {
            **{key: last.get(key) for key in ("validation", "test", "details")},
            **_figures(engine, small, plan, now),
            "latency_within_noise": noisy,
        },
        "refused": [
            {"operator": r.operator, "module": r.module, "source": r.source, "reason": r.reason}
            for r in engine.graph.refused
        ],
        "verification": asdict(check),
        "latency": state.latency,
        "input": shapes_of(engine.example_inputs),
        "max_abs_rho": {"before": before, "after": after},
        "milestones": state.milestones if last in state.milestones else [*state.milestones, last],
        "rounds": len(state.history),
        "images": state.images,
        "seconds": state.seconds,
    }
    told = "test" if last.get("test") is not None else "validation"
    warn_if_fallen(
        "compress",
        f"{report['metric']}, {told} set,",
        (state.baseline.get(told), last.get(told)),
        "train longer (--epochs), or let less go",
    )
    return CompressResult(
        small, plan, state.history, report["milestones"], report, None if directory is None else directory.path
    )


def _parts(engine: Engine, state: State) -> dict[str, str]:
    """Say what each part of the method was."""
    chosen = engine.settings
    methods = parse(chosen.compensate or ())
    if chosen.merge and "merge" not in methods:
        methods.insert(0, "merge")
    everywhere = chosen.compensate_options.get("everywhere")
    named = [f"{name} everywhere" if name == "least_squares" and everywhere else name for name in methods]
    training = f"{chosen.optimizer}, learning rate {chosen.lr:g}, {chosen.schedule}"
    if chosen.distillation:
        training += f", distillation with weight {chosen.distillation:g} at temperature {chosen.temperature:g}"
    return {**engine.selection.parts(state), "compensation": ", ".join(named) or "none", "training": training}


def _figures(engine: Engine, model: nn.Module, plan: PruningPlan, milliseconds: float) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = {}
    modules, own_parameters = dict(model.named_modules()), dict(model.named_parameters())
    for layer in cost.layer_costs(engine.graph, plan):
        own = layers.setdefault(
            layer.module,
            {"module": layer.module, "macs": 0, "parameters": 0, "out_channels": layer.out_channels, "positions": 0},
        )
        own["macs"] += layer.macs
        own["positions"] += layer.feature_bytes // (4 * layer.out_channels)
    for name, own in layers.items():
        held = modules[name].parameters(recurse=False) if name in modules else [own_parameters.get(name)]
        own["parameters"] = sum(p.numel() for p in held if p is not None)  # a fixed kernel is a buffer
    return {
        "macs": cost.macs(engine.graph, plan),
        "parameters": cost.parameters(engine.graph, plan),
        "file_bytes": None,
        "latency_ms": milliseconds,
        "widths": engine.widths(plan),
        "layers": list(layers.values()),
    }


def _times(engine: Engine, small: nn.Module) -> tuple[float, float, bool]:
    """Return the median milliseconds of a forward pass before and after, and whether they differ by noise alone."""
    call = arguments(engine.example_inputs)
    calls = {name: bound(replica(unwrapped(net)).eval(), call) for name, net in enumerate((engine.original, small))}
    timed, failed = interleaved(calls, torch.get_num_threads(), _ROUNDS, _SECONDS, "wall")
    if failed:
        raise RunError(f"timing: the network does not run: {next(iter(failed.values()))}.")
    noisy = within_noise(*quartiles(timed[0].raw_times, timed[1].raw_times))
    return 1000 * timed[0].median, 1000 * timed[1].median, noisy
