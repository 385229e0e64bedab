"""Two processes against one on two cores: images a second of ResNet-20's training, measured in turns.

``python -m bench.processes [--steps 40] [--turns 5] [--batch-size 128]``: each turn trains an epoch on random images of
CIFAR-10's size in one process of one thread, then in two of one thread each, or the other way round. Both sides stand
ready all the time; whose turn it isn't waits for a line. Prints the images a second of every turn, and the median of
the turns' ratios. Of use on a machine with two cores to spare.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import IO, cast

import torch


def work(steps: int, batch_size: int) -> None:
    """Train an epoch for every line of the standard input, and write how many images a second it was."""
    from secateur.models import resnet20
    from secateur.training import stages
    from secateur.training.processes import writes
    from secateur.training.stages import Stage, TrainingSettings

    torch.set_num_threads(1)
    torch.manual_seed(0)
    runtime = stages.accelerator("cpu")
    images, classes = torch.randn(batch_size, 3, 32, 32), torch.arange(batch_size) % 10
    batches = [(images, classes)] * steps
    stage = Stage(resnet20(), TrainingSettings(lr=0.01), epochs=1000, runtime=runtime)
    stage.run_epoch(batches[: 4 * runtime.num_processes], 0)
    for epoch, _ in enumerate(sys.stdin, 1):
        runtime.wait_for_everyone()
        started = time.perf_counter()
        record = stage.run_epoch(batches, epoch)
        if writes():
            sys.stdout.write(json.dumps(record.images / (time.perf_counter() - started)) + "\n")
            sys.stdout.flush()


def started(number: int, steps: int, batch_size: int) -> list[subprocess.Popen[str]]:
    """Start the processes of one side."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if number > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"LOCAL_WORLD_SIZE": str(number)}
    words = [sys.executable, "-m", "bench.processes", "--work", "--steps", str(steps), "--batch-size", str(batch_size)]
    return [
        subprocess.Popen(
            words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment if number == 1 else {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(number)
    ]  # fmt: skip


def turn(side: list[subprocess.Popen[str]]) -> float:
    """Let one side train an epoch; return its images a second."""
    for each in side:
        told = cast("IO[str]", each.stdin)
        told.write("\n")
        told.flush()
    line = cast("IO[str]", side[0].stdout).readline()
    return float(json.loads(line))


def main() -> None:
    """Measure both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="batches an epoch, over all processes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128, help="images a batch, of each process")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work(chosen.steps, chosen.batch_size)
        return
    one, two = (started(number, chosen.steps, chosen.batch_size) for number in (1, 2))
    ratios = []
    try:
        for number in range(chosen.turns):
            sides = [one, two] if number % 2 == 0 else [two, one]
            speeds = {len(side): turn(side) for side in sides}
            ratios.append(speeds[2] / speeds[1])
            sys.stdout.write(f"one {speeds[1]:.1f} images/s, two {speeds[2]:.1f} images/s, ratio {ratios[-1]:.2f}\n")
    finally:
        for each in (*one, *two):
            cast("IO[str]", each.stdin).close()
            each.wait()
    sys.stdout.write(f"median ratio {statistics.median(ratios):.2f}\n")


if __name__ == "__main__":
    main()
