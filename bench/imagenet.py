"""A dry run of an ImageNet recipe on generated photographs: images a second, what bounds them, what the row would take.

    python -m bench.imagenet --recipe resnet50_imagenet_cfp --images 2048

Writes a folder of JPEG files of 224×224 pixels in ImageNet's layout, then times what ``secateur compress --estimate``
times: reading, decoding and augmenting them by as many processes as there are cores, training steps and measuring. The
hours are those of the whole recipe on ImageNet itself, whose photographs are larger, 500×400 or so, and slower to
decode: ``--side 450`` shows by how much. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from secateur.cli.console import Steps
from secateur.models import MODELS
from secateur.runfile import config, sources
from secateur.runfile.estimate import Estimate, estimate, rounds_of, schedule

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TRAIN, TEST = 1_281_167, 50_000
"""Images of ImageNet (ILSVRC 2012)."""

CLASSES = 8
"""Folders that are written; how many there are changes nothing that is timed."""


def write(root: Path, images: int, side: int) -> None:
    """Write photographs of smooth noise, whose files are about as large as a photograph's of that size."""
    draw = np.random.default_rng(0)
    for part, count in (("train", images), ("val", max(images // 8, 2 * CLASSES))):
        for number in range(count):
            folder = root / part / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
            fine = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = (fine + draw.normal(0, 8, fine.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)


def whole(recipe: str, found: Estimate) -> Estimate:
    """Return the estimate with the images of ImageNet in place of the generated ones."""
    run = config.load(RECIPES / f"{recipe}.yaml")
    held = round(TRAIN * run.data_options["validation"])
    sizes: Any = SimpleNamespace(train=range(TRAIN - held), validation=range(held), test=range(TEST))
    network = MODELS[run.model]() if run.model in MODELS else sources.model(run.model).model
    rounds = rounds_of(run, network)
    trained, measured = schedule(run, sizes, rounds or 1)
    seconds = trained / min(found.reading, found.training) + measured / min(found.reading, found.measuring)
    return replace(
        found, rounds=rounds, training_images=trained, measured_images=measured, hours=round(seconds / 3600, 1)
    )


def dry_run(recipe: str, images: int, side: int, batch_size: int | None = None) -> Estimate:
    """Write photographs, time a recipe's first steps on them, and return what the recipe takes on ImageNet."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), images, side)
        given: dict[str, Any] = {"data": f"imagefolder:{folder}"}
        if batch_size is not None:
            given["batch_size"] = batch_size
        run = config.load(RECIPES / f"{recipe}.yaml", given)
        run = run.model_copy(update={"data_options": {"validation": 0.25}})
        with Steps(quiet=True) as steps:
            return whole(recipe, estimate(run, steps))


def main() -> None:
    """Run dry, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="resnet50_imagenet_cfp")
    parser.add_argument("--images", type=int, default=2048, help="training photographs to write")
    parser.add_argument("--side", type=int, default=224, help="height and width of the photographs")
    parser.add_argument("--batch-size", type=int, help="the recipe's own unless given")
    given = parser.parse_args()
    found = dry_run(given.recipe, given.images, given.side, given.batch_size)
    print(json.dumps(found.plain() | {"recipe": given.recipe, "said": str(found)}, indent=2))


if __name__ == "__main__":
    main()
