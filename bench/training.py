"""Images a second in training beside a bare loop: what the default arithmetic gains, and what a stage costs.

    python -m bench.training --networks resnet20,resnet56 --steps 4

The bare loop is forward, cross entropy, backward and SGD in fp32 and contiguous memory on one batch of noise. Both are
timed in turns, by processor time, as other work may run beside it; shown is the median ratio of a stage of
secateur.training to it, in the same arithmetic and in what ``auto`` decides on this machine. Prints a table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.models import MODELS
from secateur.training.arithmetic import Arithmetic, decide
from secateur.training.stages import Stage, TrainingSettings

BATCH = 128
SETTINGS = TrainingSettings(lr=1e-3)


def bare(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Return one pass of the bare loop."""
    optimizer = SETTINGS.build(model.parameters())
    model.train()

    def run() -> None:
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def staged(model: nn.Module, batches: list[tuple[Tensor, Tensor]], way: Arithmetic) -> Callable[[], None]:
    """Return one epoch of a stage."""
    stage = Stage(model, SETTINGS, epochs=1, arithmetic=way)

    def run() -> None:
        stage.run_epoch(batches, 0)

    return run


def measure(name: str, steps: int, rounds: int) -> tuple[Arithmetic, float, dict[str, float]]:
    """Return what is decided for a network, the bare loop's images a second, and its median ratio for each way."""
    torch.manual_seed(0)
    model = MODELS[name]()
    x = torch.randn(BATCH, 1, 28, 28) if name == "lenet5" else torch.randn(BATCH, 3, 32, 32)
    batches = [(x, torch.randint(0, 10, (BATCH,)))] * steps
    decided = decide(model, x, torch.device("cpu"))
    ways = {"bare": bare(copy.deepcopy(model), batches)}
    for label, way in (("plain", Arithmetic()), ("default", decided)):
        ways[label] = staged(copy.deepcopy(model), batches, way)
    times: dict[str, list[float]] = {label: [] for label in ways}
    for number in range(rounds + 1):
        for label, run in ways.items():
            start = time.process_time()
            run()
            if number:  # the first round warms up
                times[label].append(time.process_time() - start)
    pace = BATCH * steps / statistics.median(times["bare"])
    ratios = {
        label: statistics.median(b / t for b, t in zip(times["bare"], times[label], strict=True))
        for label in ("plain", "default")
    }
    return decided, pace, ratios


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="lenet5,resnet20,resnet56,vgg16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | bare loop, images a CPU second | stage, the same | stage, `auto` | decided |")
    print("|---|---|---|---|---|")
    for name in given.networks.split(","):
        decided, pace, ratios = measure(name, given.steps, given.rounds)
        way = f"{decided.precision}, {'channels-last' if decided.channels_last else 'contiguous'}; {decided.reason}"
        print(f"| {name} | {pace:.0f} | {ratios['plain']:.2f}× | {ratios['default']:.2f}× | {way} |", flush=True)


if __name__ == "__main__":
    main()
