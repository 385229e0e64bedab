"""A run in several processes: ``torchrun --nproc-per-node 2 -m tests.engine.several FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from secateur.engine import compress, resume
from secateur.training import evaluation, stages
from tests.engine.nets import Small, digits, trained


def main(folder: Path) -> None:
    """Run, go on with the finished run, and print what each process has in the end."""
    torch.set_num_threads(1)
    train, validation, test = digits(200)
    validation.size = 30
    runtime = stages.accelerator("cpu")
    torch.manual_seed(0)
    model = trained(epochs=1)
    result = compress(
        model, "cfp", train=train, validation=validation, test=test, run_dir=folder, widths={"conv1": 6, "conv2": 9},
        pairs=2, device="cpu",
    )  # fmt: skip
    runtime.wait_for_everyone()
    again = resume(folder, Small(), train=train, validation=validation, test=test)
    total = sum(float(p.detach().double().sum()) for p in result.model.parameters())
    alone = evaluation.evaluate(result.model, test)
    line = {
        "rank": runtime.process_index, "sum": total,
        "again": sum(float(p.detach().double().sum()) for p in again.model.parameters()),
        "images": result.report["images"], "test": result.report["final"]["test"], "alone": alone,
    }  # fmt: skip
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    runtime.end_training()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
