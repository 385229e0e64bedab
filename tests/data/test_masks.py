"""Images with a mask each: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.data import Batches, load
from secateur.data.masks import IGNORED
from secateur.errors import DataError, UsageError


def squares(root: Path, counts: dict[str, int], side: int = 24, names: str = "ground\nsquare\ndisc\n") -> Path:
    """Write noise with a bright square or a dark disc, and their masks, of which a strip doesn't count."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    for part, count in counts.items():
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True)
        for i in range(count):
            cy, cx, r = *rng.integers(6, side - 6, 2).tolist(), int(rng.integers(3, 6))
            shape = (abs(y - cy) <= r) & (abs(x - cx) <= r) if i % 2 else (y - cy) ** 2 + (x - cx) ** 2 <= r * r
            image = rng.integers(90, 130, (side, side, 3))
            image[shape] = 230 if i % 2 else 10
            mask = np.where(shape, 1 if i % 2 else 2, 0)
            mask[0] = IGNORED
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / part / f"{i:03d}.png")
            palette = Image.fromarray(mask.astype(np.uint8), "P")
            palette.putpalette([value for i in range(256) for value in (i, 255 - i, 0)])
            palette.save(root / "masks" / part / f"{i:03d}.png")
    if names:
        (root / "classes.txt").write_text(names)
    return root


def test_masks_are_the_palettes_indices_and_images_are_normalised(tmp_path: Path) -> None:
    bundle = load(f"masks:{squares(tmp_path, {'train': 10, 'test': 3})}", validation=0.2)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (8, 2, 3)  # type: ignore[arg-type]
    assert (bundle.task, bundle.classes, bundle.input_shape) == ("dense", ("ground", "square", "disc"), (3, 24, 24))
    image, mask = bundle.test[1]
    stored = np.array(Image.open(tmp_path / "masks" / "test" / "001.png"))
    assert torch.equal(mask, torch.from_numpy(stored.astype(np.int64)))
    assert set(mask.unique().tolist()) == {0, 1, IGNORED}
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "images" / "test" / "001.png"))).permute(2, 0, 1) / 255
    assert bundle.normalise is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (bundle.normalise.mean, bundle.normalise.std))
    torch.testing.assert_close(image, (pixels - mean) / std)


def test_the_parts_are_apart_and_the_test_set_does_not_depend_on_the_seed(tmp_path: Path) -> None:
    root = squares(tmp_path, {"train": 10, "val": 4})
    first, second = (load(f"masks:{root}", seed=seed) for seed in (0, 1))
    assert {p.name for p, _ in first.train.pairs} & {p.name for p, _ in first.validation.pairs} == set()  # type: ignore[union-attr]
    assert first.test.pairs == second.test.pairs  # type: ignore[union-attr]
    assert first.validation.pairs != second.validation.pairs or first.train.pairs != second.train.pairs  # type: ignore[union-attr]


def test_resized_masks_hold_no_class_that_was_not_there_and_mirroring_goes_with_the_image(tmp_path: Path) -> None:
    bundle = load(f"masks:{squares(tmp_path, {'train': 10, 'test': 2})}", size=15)
    for image, mask in (bundle.train[i] for i in range(9)):
        assert image.shape == (3, 15, 15)
        assert set(mask.unique().tolist()) <= {0, 1, 2, IGNORED}
    plain = dict(enumerate(bundle.train[i] for i in range(9)))
    seen = set()
    for epoch in range(4):
        batches = Batches(bundle.train, 9, augment=True)
        batches.set_epoch(epoch)
        ((images, found),) = batches
        for i in range(9):
            mirrored = torch.equal(images[i], plain[i][0].flip(-1))
            assert mirrored or torch.equal(images[i], plain[i][0])
            assert torch.equal(found[i], plain[i][1].flip(-1) if mirrored else plain[i][1])
            seen.add(mirrored)
    assert seen == {True, False}


def _other_size(root: Path) -> None:
    Image.new("L", (5, 5)).save(root / "masks" / "test" / "000.png")


def _colours(root: Path) -> None:
    Image.new("RGB", (24, 24)).save(root / "masks" / "test" / "000.png")


def _class_nine(root: Path) -> None:
    Image.new("L", (24, 24), 9).save(root / "masks" / "test" / "000.png")


def _no_mask(root: Path) -> None:
    (root / "masks" / "test" / "000.png").unlink()


def _no_names(root: Path) -> None:
    (root / "classes.txt").unlink()


@pytest.mark.parametrize(
    ("damage", "options", "error", "text"),
    [
        (_other_size, {}, DataError, "is 5x5, and its image 24x24"),
        (_colours, {}, DataError, "found colours"),
        (_class_nine, {}, DataError, "holds class 9; there are 3"),
        (_no_mask, {}, DataError, "000.png: is missing, the mask of an image; 1 of 2 of test are"),
        (_no_names, {}, DataError, "how many classes are there"),
        (None, {"classes": 1}, UsageError, "classes are 2 to 255, found 1"),
        (None, {"size": 0}, UsageError, "size is at least 1"),
        (None, {"mean": [0.5], "std": [0.5]}, UsageError, "three means"),
        (None, {"train_size": 99}, UsageError, "between 1 and 3"),
        (None, {"validation": 0.01}, DataError, "can't be split at 0.01"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, damage: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    root = squares(tmp_path, {"train": 4, "test": 2})
    if damage is not None:
        damage(root)

    def read() -> None:
        list(Batches(load(f"masks:{root}", **{"validation": 0.25, **options}).test, 2))

    with pytest.raises(error, match=text) as found:
        read()
    assert "\n" not in str(found.value)


def test_images_of_several_sizes_need_one(tmp_path: Path) -> None:
    root = squares(tmp_path, {"train": 4, "test": 1})
    for kind in ("images", "masks"):
        Image.open(root / kind / "test" / "000.png").resize((9, 12)).save(root / kind / "test" / "001.png")
    with pytest.raises(DataError, match="a batch holds images of one size, found 9x12 and 24x24"):
        list(Batches(load(f"masks:{root}", validation=0.25).test, 2))
    ((images, _),) = Batches(load(f"masks:{root}", validation=0.25, size=8).test, 2)
    assert images.shape == (2, 3, 8, 8)
