"""Train a detector on a classifier that was pruned before, as in tables 6 and 7 of CFP.

SSD512 on a VGG-16 of CIFAR-10, cut behind conv4_3, and Faster R-CNN on a ResNet-50 of ImageNet:

    python recipes/pruned_base.py runs/vgg16_cifar10_cfp_82/model.safetensors gtsdb:data/GTSDB
    python recipes/pruned_base.py runs/resnet50_imagenet_cfp/model.safetensors coco:data/coco \
        --kind faster_rcnn --base torchvision:resnet50 --epochs 13

The paper leaves open the optimiser, its schedule and the augmentation: here SGD with momentum, warmed up, then decayed
to 0, and mirrored photographs: a mirrored sign may be another one, but it stays of its class of the three.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

import secateur as sc
from secateur.models.detectors import KINDS, on_base
from secateur.runfile import sources
from secateur.training import evaluation, stages, tasks


def main() -> None:
    """Build the detector, train it, measure it, and write it to one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="file of the pruned classifier; 'none' for an unpruned base of fresh weights")
    parser.add_argument("data", help="gtsdb:ROOT, voc:ROOT or coco:ROOT")
    parser.add_argument("--kind", default="ssd512", choices=list(KINDS))
    parser.add_argument("--base", default="vgg16", help="the classifier's name: vgg16, torchvision:resnet50")
    parser.add_argument("--last", help="the last source; 'all' for every one. Unless given: conv4_3 for SSD, else all")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--train-size", type=int, help="photographs to train on; all unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="detector.safetensors")
    given = parser.parse_args()

    torch.manual_seed(given.seed)
    options = {"train_size": given.train_size} if given.train_size else {}
    bundle = sources.data(given.data, options)
    last = given.last or ("conv4_3" if given.kind.startswith("ssd") else "all")
    detector = on_base(
        given.kind,
        len(bundle.classes) + 1,
        given.base,
        base_weights=None if given.weights == "none" else given.weights,
        last=None if last == "all" else last,
    )
    stages.fit(
        detector,
        tasks.training_batches(bundle, given.batch_size, given.seed),
        epochs=given.epochs,
        loss=tasks.loss(bundle),
        settings=stages.TrainingSettings(lr=given.lr, weight_decay=5e-4, schedule="cosine", warmup=0.05),
    )
    metric = tasks.metric(bundle)
    value = evaluation.evaluate(detector, tasks.evaluation_batches(bundle, "test"), metric)
    sc.save(detector, path=given.out)
    parameters = sum(p.numel() for p in detector.parameters())
    figures = {"mAP": value, **(evaluation.details(metric) or {}), "parameters": parameters, "MB": parameters * 4 / 1e6}
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
