"""The prune-and-fine-tune loop as init, step and finished over an explicit state.

A step is at most one epoch of training, and the state between two steps can be stored and taken up again: a run killed
anywhere goes on from its last whole step and, on a CPU with the same seed, ends in the same bits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.compensation.sensitivity import Share
from secateur.engine import cutting, ending, log, request
from secateur.engine.by_scores import Scores
from secateur.engine.events import Event, Progress
from secateur.engine.present import difference, remaining
from secateur.engine.selection import Selection, union
from secateur.engine.settings import Settings
from secateur.engine.state import Removed, State
from secateur.errors import DivergedError, SecateurError
from secateur.graph import cost
from secateur.graph.channels import ChannelGraph
from secateur.graph.plan import PruningPlan
from secateur.network.copies import replica
from secateur.network.inputs import unwrapped
from secateur.pruning.options import AUTO, SENSITIVITY, Options
from secateur.pruning.planning import Target
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace
from secateur.training import evaluation, processes, stages
from secateur.training.arithmetic import decide
from secateur.training.evaluation import Metric
from secateur.training.passes import Batches
from secateur.training.stages import Distillation, Loss, Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

HALVINGS = 4
"""``auto`` tries steps down to this part of the usual one, where a larger one costs more than the tolerance."""


class Engine:
    """Everything of a run that does not change: the unpruned network, the data, the settings.

    Args:
        model: The unpruned, trained network; copied, never changed.
        method: ``auto``, ``cfp``, or the name of a criterion (or the criterion itself).
        train: Training batches.
        validation: Held-out batches of the training data: what every decision is taken on.
        test: Test batches, only ever reported.
        example_inputs: What the network is traced on; the first validation example when None.
        tolerance: Points (hundredths) of the metric that may be lost on the validation data; unused with a target.
        target: Fraction to remove, in place of the tolerance.
        seed: Seed of everything that is drawn.
        options: Limits of each group's loss, and the allocation.
        settings: The rest.
        loss: ``loss(output, target)``; cross entropy when None.
        metric: See :func:`secateur.training.evaluation.evaluate`.
        progress: Called with an :class:`Event` now and then.
    """

    @torch.inference_mode(False)  # what is copied in inference mode can never be trained
    def __init__(
        self,
        model: nn.Module,
        method: Any,
        *,
        train: Batches,
        validation: Batches,
        test: Batches | None = None,
        example_inputs: Any = None,
        tolerance: float = 0.5,
        target: Target | None = None,
        seed: int = 0,
        options: Options | None = None,
        settings: Settings | None = None,
        loss: Loss | None = None,
        metric: Metric | Any = None,
        progress: Progress | None = None,
    ) -> None:
        self.options, self.settings = options or Options(), settings or Settings()
        self.method, self.seed, self.tolerance, self.target = method, seed, tolerance, target
        self.train, self.validation, self.test = train, validation, test
        self.loss, self.metric = loss, evaluation.chosen(metric)
        self.progress: Progress = log.Log(progress, metric)
        request.check_batches(train=train, validation=validation, test=test)
        request.check_end(target, self.options, self.settings, tolerance)
        self.runtime: Accelerator = stages.accelerator(self.settings.device)
        self.original = replica(unwrapped(model)).to(self.runtime.device)
        self.example_inputs = request.example(example_inputs, validation, self.runtime.device)
        # First of all that runs the network: its error names the shape that the network fails on.
        self.graph: ChannelGraph = trace(self.original, self.example_inputs)
        asked = self.settings
        self.arithmetic = self._agreed(
            lambda: decide(
                self.original, self.example_inputs, self.runtime.device, asked.precision, asked.channels_last
            )
        )
        filled, self.notes = request.filled(
            asked, self.original, self.example_inputs, loss, auto=self.auto, bounded=self.bounded
        )
        computed = self.arithmetic
        self.settings = replace(filled, precision=computed.precision, channels_last=computed.channels_last)
        self.selection: Selection = request.selection(
            self.original, self.graph, method, self.options, self.settings, target,
            train=train, loss=loss, seed=seed, example_inputs=self.example_inputs, runtime=self.runtime,
        )  # fmt: skip
        self.groups, self.goals = self.selection.groups, self.selection.goals
        self.share: Share | None = None
        """Where this run finds tables of sensitivity that others have measured."""
        self._stage: Stage | None = None

    @property
    def auto(self) -> bool:
        """Whether the method is ``auto``."""
        return isinstance(self.method, str) and self.method == AUTO

    @property
    def bounded(self) -> bool:
        """Whether the tolerance decides when to stop, rather than a target, ratios or widths."""
        return self.target is None and not self.settings.widths and not self.options.ratios

    @property
    def limit(self) -> float:
        """The tolerance as a fraction of the metric."""
        return self.tolerance / 100

    # The loop

    @torch.inference_mode(False)
    def init(self) -> State:
        """Return the state before the first round: the unpruned network, measured."""
        state = State(model=replica(self.original))
        state.metric = self._measure(state.network)
        if isinstance(self.metric, evaluation.Accuracy):
            request.warn_at_chance(state.network, self.example_inputs, state.metric)
        state.notes = list(self.notes)
        tested = None if self.test is None else self._measure(state.network, self.test)
        state.baseline = {"validation": state.metric, "test": tested, "details": evaluation.details(self.metric)}
        if isinstance(self.metric, evaluation.Accuracy):
            request.warn_if_seen(state.metric, tested, self.validation, self.test)
        given = self.options.allocation
        if isinstance(self.selection, Scores) and given is not None and not isinstance(given, str):
            self.selection.store_table(state, given)
        state.accepted = _copied(state.network)
        if self.bounded:
            state.phase = 1 if self.auto or 1 in self.settings.phases else 2
        return state

    def finished(self, state: State) -> bool:
        """Tell whether the run is over."""
        return state.stage == "done"

    def step(self, state: State) -> State:
        """Take one step, in place, and return the state: at most one epoch of training."""
        started = time.perf_counter()
        with torch.inference_mode(False), torch.enable_grad():
            try:
                {
                    "select": self._select, "measure": self._sense, "optimise": self._optimise, "drop": self._drop,
                    "finetune": self._finetune, "judge": self._judge, "final": self._final, "settle": self._settle,
                }[state.stage](state)  # fmt: skip
            except DivergedError as error:
                ending.diverged(self, state, error)
        spent = time.perf_counter() - started
        state.seconds += spent
        if state.episode:
            state.episode["seconds"] = state.episode.get("seconds", 0.0) + spent
        return state

    def begin_round(self, state: State) -> None:
        """Go back to the last accepted network, where the round that is under way began."""
        self.end_stage()
        self._revert(state)
        state.stage, state.epoch, state.training = "select", 0, None
        state.episode, state.pairs, state.going = {}, {}, {}

    def end_stage(self) -> None:
        """Take the network off a stage of training that ends before its time."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    @torch.inference_mode(False)
    def resume(self, state: State, tensors: Mapping[str, Tensor]) -> State:
        """Build the network of a stored state, and load its weights."""
        state.model = self.network(state.removed)
        state.model.load_state_dict(tensors)
        return state

    def network(self, removed: Removed) -> nn.Module:
        """Return a copy of the unpruned network without these channels."""
        return cut(self.original, self.plan(removed)) if removed else replica(self.original)

    def plan(self, removed: Removed) -> PruningPlan:
        """Return the plan, for the unpruned network, that removes these channels."""
        return self.selection.plan(removed)

    def present(self, state: State) -> ChannelGraph:
        """Return the channel graph of the network as it is now."""
        return remaining(self.graph, self.plan(state.removed))

    # Select

    def _select(self, state: State) -> None:
        if self.arrived(state):
            state.stage, state.epoch = "final", 0
            return
        if isinstance(self.selection, Scores) and self.selection.needs_measuring(state):
            state.stage = "measure"
            return
        graph = self.present(state)
        state.pairs, state.going = self._agreed(lambda: self.selection.choose(state, graph))
        if not state.going:
            self._nothing_left(state)
            return
        before = self._scores(state, graph)
        state.episode = {
            "round": state.round,
            "phase": state.phase,
            "group": self.groups[state.position].name if state.phase == 2 else None,
            "removed": {name: sorted(chosen) for name, chosen in state.going.items()},
            "pairs": [
                {"group": name, "dropped": d, "kept": k, "abs_rho_before": round(rho, 6)}
                for name, chosen in state.pairs.items()
                for (d, k), rho in zip(chosen, before[name], strict=True)
            ],
            "abs_rho_before": {name: max(values) for name, values in before.items()},
            "abs_rho_after": {},
            "metric_before": state.metric,
        }
        optimises = self.settings.optimise_epochs > 0 and bool(state.pairs or self.settings.optimise == "none")
        state.stage, state.epoch = ("optimise" if optimises else "drop"), 0

    def _sense(self, state: State) -> None:
        """Measure what the next choice counts by."""
        assert isinstance(self.selection, Scores)

        def progress(done: int, of: int) -> None:
            self.progress(Event("batch", SENSITIVITY, state.round, state.phase, 1, 1, batch=done, batches=of))

        # Of what is left after a round hardly another run measures the same.
        self.selection.measure(state, self.present(state), progress, None if state.removed else self.share)
        state.stage = "select"

    def arrived(self, state: State) -> bool:
        """Tell whether no round is left to be done."""
        if self.settings.max_rounds is not None and state.round > self.settings.max_rounds:
            state.goal = max(state.goal, len(self.goals) - 1)
            return True
        if self.target is not None or self.options.ratios:
            return self.selection.reached(state.removed)
        if self.goals:
            return all(
                len(self.selection.alive(state, name)) <= width for name, width in self.goals[state.goal].items()
            )
        return False

    def _nothing_left(self, state: State) -> None:
        if self.selection.selective and not self.bounded:
            state.stage, state.epoch, state.goal = "final", 0, max(state.goal, len(self.goals) - 1)
            return
        ending.out_of_reach(self, state)
        self._next_place(state)

    def _next_place(self, state: State) -> None:
        """Go from phase 1 to phase 2, from a group of phase 2 to the next, from the last group to the final stage."""
        if self.auto:
            # All groups lose channels at once in every round, so that there is no phase 2.
            state.stage, state.epoch = "final", 0
            return
        if state.phase == 1:
            state.phase, state.position = 2, 0
        else:
            state.position += 1
        over = 2 not in self.settings.phases or state.position >= len(self.groups)
        state.stage, state.epoch = ("final" if over else "select"), 0

    # Optimise

    def _scores(self, state: State, graph: ChannelGraph) -> dict[str, list[float]]:
        return cutting.regulariser(self, state, graph).by_group() if state.pairs else {}

    def _optimise(self, state: State) -> None:
        chosen, graph = self.settings, self.present(state)
        regulariser = (
            cutting.regulariser(self, state, graph) if state.pairs and chosen.optimise == "correlation" else None
        )
        reached: Callable[[], bool] | None = None
        if regulariser is not None and chosen.correlation_target is not None:
            goal, made = chosen.correlation_target, regulariser
            reached = lambda: made.minimum >= goal  # noqa: E731
        over = self._train(
            state,
            "optimise",
            chosen.optimise_epochs,
            chosen.training(chosen.optimise_lr),
            regulariser=regulariser,
            stop=reached,
        )
        if over:
            after = self._scores(state, graph)
            flat = [rho for values in after.values() for rho in values]
            for pair, rho in zip(state.episode["pairs"], flat, strict=True):
                pair["abs_rho_after"] = round(rho, 6)
            state.episode["abs_rho_after"] = {name: max(values) for name, values in after.items()}
            state.stage = "drop"

    # Drop, fine-tune, judge

    def _drop(self, state: State) -> None:
        removed, graph = union(state.removed, state.going), self.present(state)
        plan = difference(graph, self.plan(state.removed), self.plan(removed))
        state.model = cutting.compensated(self, state, graph, plan, self.plan(removed))
        processes.equalise(self.runtime, state.model)
        state.removed = removed
        state.episode["metric_dropped"] = self._measure(state.network)
        # The learning rate of auto decays once over all that follows its last cut.
        last = self.auto and not self.bounded and bool(self.settings.final_epochs) and self.arrived(state)
        tunes = self.settings.finetune_epochs > 0 and not last
        if not tunes:
            state.episode["metric_tuned"] = state.episode["metric_dropped"]
        state.stage, state.epoch = ("finetune" if tunes else "judge"), 0
        coming = log.following(self, state)
        self.progress(Event("cut", "drop", state.round, state.phase, record=log.cut(self, state), next=coming))

    def _finetune(self, state: State) -> None:
        if self._train(state, "finetune", self.settings.finetune_epochs, self.settings.training()):
            state.episode["metric_tuned"] = self._measure(state.network)
            if found := evaluation.details(self.metric):
                state.episode["details"] = found
            state.stage = "judge"

    def _judge(self, state: State) -> None:
        plan = self.plan(state.removed)
        tuned = state.episode["metric_tuned"]  # None where the training diverged
        least = state.baseline["validation"] - self.limit - 1e-12
        accepted = tuned is not None and (not self.bounded or tuned >= least)
        state.episode |= {
            "macs": cost.macs(self.graph, plan),
            "parameters": cost.parameters(self.graph, plan),
            "widths": self.widths(plan),
            "accepted": accepted,
            "images": state.images,
        }
        state.history.append(state.episode)
        event = Event("episode", "judge", state.round, state.phase, record=state.episode)
        state.episode, state.pairs, state.going = {}, {}, {}
        state.round += 1
        state.goal_round += 1
        state.stage = "select"
        if accepted:
            state.metric = tuned
            state.accepted_removed = copy.deepcopy(state.removed)
            state.accepted = _copied(state.network)
        else:
            self._revert(state)
            self._after_a_miss(state)
        self.progress(replace(event, next=log.following(self, state)))

    def _after_a_miss(self, state: State) -> None:
        """Go to the next place; ``auto`` tries smaller steps first."""
        usual = self.settings.fraction
        state.step = (state.step or usual) / 2
        if not self.auto or state.step < usual / HALVINGS:
            self._next_place(state)

    def _revert(self, state: State) -> None:
        assert state.accepted is not None
        state.removed = copy.deepcopy(state.accepted_removed)
        self.resume(state, state.accepted)

    # The end of a run, or of one goal of a chain

    def _final(self, state: State) -> None:
        chosen = self.settings
        if chosen.final_epochs and not self._train(
            state, "final", chosen.final_epochs, chosen.training(chosen.final_lr, "cosine")
        ):
            return
        state.stage = "settle"

    def _settle(self, state: State) -> None:
        measured = self._measure(state.network)
        if self.bounded and measured < state.baseline["validation"] - self.limit - 1e-12:
            self._revert(state)
            measured = self._measure(state.network)
        state.metric = measured
        milestone = self.milestone(state)
        state.milestones.append(milestone)
        event = Event("milestone", "final", state.round, state.phase, record=milestone)
        state.goal, state.goal_round = state.goal + 1, 0
        state.stage, state.epoch = ("select" if state.goal < len(self.goals) else "done"), 0
        self.progress(replace(event, next=log.following(self, state)))

    def milestone(self, state: State) -> dict[str, Any]:
        """Return the record of the network as it is now, measured."""
        plan = self.plan(state.removed)
        return {
            "goal": state.goal,
            "round": state.round - 1,
            "validation": state.metric,
            "test": None if self.test is None else self._measure(state.network, self.test),
            "details": evaluation.details(self.metric),
            "macs": cost.macs(self.graph, plan),
            "parameters": cost.parameters(self.graph, plan),
            "widths": self.widths(plan),
            "images": state.images,
        }

    # Training and measuring

    def _train(self, state: State, name: str, epochs: int, settings: stages.TrainingSettings, **options: Any) -> bool:
        """Run the next epoch of a stage; True when it was the stage's last."""
        if state.epoch == 0:
            state.stages += 1
            self._stage = None
        if self._stage is None:
            listens = Distillation(self.settings.distillation or 0.0, self.settings.temperature)
            self._stage = Stage(
                state.network, settings, epochs=epochs, seed=self.seed, number=state.stages, runtime=self.runtime,
                loss=self.loss, teacher=self.original if listens.weight else None, distillation=listens,
                arithmetic=self.arithmetic, **options,
            )  # fmt: skip
            if state.training is not None:
                self._stage.restore(state.training)
        event = Event("stage", name, state.round, state.phase, state.epoch + 1, epochs)
        self.progress(event)

        def on_batch(batch: int, batches: int | None, loss: float) -> None:
            of_stage = (name, event.round, event.phase, event.epoch, epochs)
            self.progress(Event("batch", *of_stage, batch=batch, batches=batches, loss=loss))

        started = time.perf_counter()
        record = self._stage.run_epoch(self.train, state.epoch, on_batch)
        seconds = time.perf_counter() - started
        state.epoch += 1
        state.images += record.images
        over = record.stopped or state.epoch >= epochs
        rate = settings.rate(event.epoch / epochs)
        self.progress(log.epoch(self, state, event, record, seconds, rate, over, self._stage))
        state.training = None if over else self._stage.state()
        if over:
            state.model = self._stage.close()
            self._stage = None
            state.epoch = 0
        return over

    def _measure(self, model: nn.Module, batches: Batches | None = None) -> float:
        on = self.validation if batches is None else batches
        return self._agreed(lambda: evaluation.evaluate(model, on, self.metric, runtime=self.runtime), DivergedError)

    def _agreed(self, find: Callable[[], T], carried: type[SecateurError] = SecateurError) -> T:
        return processes.agreed(self.runtime, find, carried)

    def widths(self, plan: PruningPlan) -> dict[str, int]:
        """Return the output channels of every convolution and linear layer under a plan."""
        return {layer.module: layer.out_channels for layer in cost.layer_costs(self.graph, plan)}


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
