"""A round's channels, on their way out: how their pairs are trained, and how the network is cut and compensated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from secateur.compensation import compensate, parse
from secateur.engine import pairing
from secateur.engine.choosing import Some
from secateur.engine.state import State
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.pruning.applied import note
from secateur.pruning.surgery import cut
from secateur.training import passes

if TYPE_CHECKING:
    from secateur.engine.loop import Engine


def local_pairs(engine: Engine, state: State) -> pairing.Pairs:
    """Return the episode's pairs, numbered as in the present network."""
    found: pairing.Pairs = {}
    for name, chosen in state.pairs.items():
        place = {channel: i for i, channel in enumerate(engine.selection.alive(state, name))}
        found[name] = [(place[d], place[k]) for d, k in chosen]
    return found


def regulariser(engine: Engine, state: State, graph: ChannelGraph) -> pairing.CorrelationRegulariser:
    """Return what trains the episode's pairs towards |ρ| = 1."""
    chosen = engine.settings
    return pairing.CorrelationRegulariser(
        state.network, graph, local_pairs(engine, state),
        form=chosen.form, strength=chosen.strength, share=chosen.share, signed=chosen.signed,
    )  # fmt: skip


def compensated(engine: Engine, state: State, graph: ChannelGraph, plan: PruningPlan, whole: PruningPlan) -> nn.Module:
    """Return the present network cut by the plan, compensated as the settings say.

    Args:
        engine: Of the run.
        state: Where the run stands.
        graph: The present network's channel graph.
        plan: From the present network.
        whole: From the unpruned network, which the result knows.
    """
    chosen = engine.settings
    small = cut(state.network, plan)
    note(small, engine.original, whole)
    methods = parse(chosen.compensate or ())
    if chosen.merge and state.pairs and "merge" not in methods:
        methods.insert(0, "merge")
    if not methods:
        return small
    partners = {name: dict(own) for name, own in local_pairs(engine, state).items()}
    with passes.seeded(engine.seed, state.round, 2) as seed:
        report = compensate(
            state.network, small, plan, methods, Some(engine.train, chosen.criterion_batches, seed),
            graph=graph, example_inputs=engine.example_inputs, pairs=partners or None,
            **chosen.compensate_options,
        )  # fmt: skip
    done: dict[str, dict[str, str]] = {}
    for layer in report:
        done.setdefault(layer.method, {})[layer.module] = "" if layer.applied else layer.reason
    state.episode["compensated"] = done
    return small
