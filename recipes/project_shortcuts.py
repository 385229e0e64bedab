"""Write weights of a CIFAR ResNet with 1×1 projections that computes what one with padded shortcuts computes.

    python recipes/project_shortcuts.py resnet56 weights/cifar10-resnet56.safetensors data/cifar10 \
        weights/cifar10-resnet56-projected.safetensors

The rows of CFP's table are of a ResNet-56 with projections, in its first block too; the published weights have none.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save

from secateur.checkpoint import load_weights, write_atomic
from secateur.data import Batches, load
from secateur.models import MODELS, CifarResNet, projected


def main() -> None:
    """Read the weights, measure the shortcuts' channels on 5,000 augmented training images, and write the network's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "weights", "data", "out"):
        parser.add_argument(name)
    given = parser.parse_args()
    model = MODELS[given.model]()
    assert isinstance(model, CifarResNet)
    model.load_state_dict(load_weights(given.weights))
    bundle = load(f"cifar10:{given.data}")
    batches = iter(Batches(bundle.train, 250, shuffle=True, augment=True))
    with torch.no_grad():
        result = projected(model, [next(batches)[0] for _ in range(20)])
    write_atomic(given.out, save(result.state_dict()))


if __name__ == "__main__":
    main()
