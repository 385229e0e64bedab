"""Photographs with boxes in COCO's format and as the traffic signs come: what is read, left out and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from secateur.data import load
from secateur.errors import DataError, UsageError
from secateur.runfile import sources

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 1, "name": "ape"}, {"id": 4, "name": "dog"}]
BOXES: list[dict[str, Any]] = [
    {"category_id": 1, "bbox": [5, 6, 15, 24], "area": 200.5, "iscrowd": 0},
    {"category_id": 4, "bbox": [0, 0, 40, 32], "area": 900, "iscrowd": 1},
    {"category_id": 3, "bbox": [-2, 30, 12.5, 5], "iscrowd": 0},
    {"category_id": 3, "bbox": [40, 3, 5, 5], "area": 25},
    {"category_id": 3, "bbox": [7, 7, 0, 5], "area": 0},
]


def write_coco(
    root: Path, counts: dict[str, int] | None = None, boxes: Any = None, scale: int = 1, **tables: Any
) -> Path:
    """Write images of 40x32, or larger ones with larger boxes; the second and each third after it are empty."""
    boxes = [
        {
            **box,
            "bbox": [scale * edge for edge in box["bbox"]],
            **({"area": scale**2 * box["area"]} if "area" in box else {}),
        }
        for box in boxes or BOXES
    ]
    size = (40 * scale, 32 * scale)
    (root / "annotations").mkdir(parents=True)
    for number, (part, count) in enumerate((counts or {"train2017": 5, "val2017": 2}).items()):
        (root / part).mkdir()
        images, annotations = [], []
        for i in range(count):
            key = 100 * number + 7 * i + 1
            images.append({"id": key, "file_name": f"{key:012}.jpg", "width": size[0], "height": size[1]})
            Image.new("RGB", size, (200, 10 * i, 30)).save(root / part / f"{key:012}.jpg")
            if i % 3 != 1:
                annotations += [{"id": 10 * key + k, "image_id": key, **box} for k, box in enumerate(boxes)]
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **tables}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


def test_coco_gives_what_detectors_take(tmp_path):
    bundle = load(f"coco:{write_coco(tmp_path)}")
    assert bundle.task == "detection"
    assert bundle.classes == ("ape", "N/A", "cat", "dog")
    assert bundle.input_shape == (3, 32, 40)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [4, 1, 2]
    image, target = bundle.test[0]
    assert image.shape == (3, 32, 40)
    assert target["boxes"].tolist() == [[5, 6, 20, 30], [0, 0, 40, 32], [-2, 30, 10.5, 35]], "as in the file"
    assert target["labels"].tolist() == [1, 4, 3], "ids are the labels"
    assert target["iscrowd"].tolist() == [0, 1, 0]
    assert target["area"].tolist() == [200.5, 900, 62.5], "that of the box where none is given"
    assert bundle.test.degenerate == 2, "without area, or wholly outside"
    _, empty = bundle.test[1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].dtype == torch.long
    taught = next(target["boxes"].tolist() for _, target in (bundle.train[i] for i in range(4)) if len(target["boxes"]))
    assert taught == [[5, 6, 20, 30], [0, 30, 10.5, 32]], "clipped, and no crowd"
    crowds = [int(part[i][1]["iscrowd"].sum()) for part in (bundle.train, bundle.validation) for i in range(len(part))]
    assert sum(crowds[:4]) == 0, "a crowd teaches nothing"
    assert load(f"coco:{tmp_path}", contiguous=True).classes == ("ape", "cat", "dog")


def test_coco_splits_by_its_seed_or_as_published(tmp_path):
    def names(part: Any) -> list[str]:
        return [a.image.name for a in part._annotations]

    root = write_coco(tmp_path / "a", {"train": 10, "val": 2})
    one, other = load("coco", root=root, validation=0.3), load("coco", root=root, validation=0.3, seed=1)
    assert [len(one.train), len(one.validation)] == [7, 3]
    assert sorted(names(one.train) + names(one.validation)) == [f"{7 * i + 1:012}.jpg" for i in range(10)]
    assert names(one.validation) != names(other.validation)
    assert names(one.test) == names(other.test)
    assert len(load("coco", root=root, train_size=3).train) == 3
    root = write_coco(tmp_path / "b", {"train": 4, "val": 3, "test": 2})
    bundle = load("coco", root=root)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [4, 3, 2]
    with pytest.raises(UsageError, match=r"validation=0.5 contradicts instances_test.json"):
        load("coco", root=root, validation=0.5)


def test_images_lie_beside_their_file_or_in_one_folder(tmp_path):
    root = write_coco(tmp_path)
    (root / "images").mkdir()
    (root / "train2017").rename(root / "images" / "train2017")
    for image in (root / "val2017").iterdir():
        image.rename(root / "images" / image.name)
    bundle = load("coco", root=root)
    assert bundle.train[0][0].shape == bundle.test[0][0].shape == (3, 32, 40)


def _edited(change: Callable[[dict[str, Any]], Any], part: str = "train2017") -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "annotations" / f"instances_{part}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def _captions(content: dict[str, Any]) -> None:
    content["annotations"] = [{"image_id": 1, "id": 3, "caption": "an ape"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r / "annotations/instances_val2017.json").unlink(), r"no instances_val\*.json; expected COCO's"),
        (lambda r: (r / "annotations/instances_trainx.json").touch(), r"train2017.json and instances_trainx.json; "),
        (lambda r: (r / "annotations/instances_val2017.json").write_text("{"), r"val2017.json: not JSON: "),
        (lambda r: (r / "train2017/000000000008.jpg").unlink(), r"000000000008.jpg: is missing, and instances_t"),
        (_edited(_captions), r"annotation 0 has no bbox, as captions .* It has image_id, id, caption"),
        (_edited(lambda c: c.pop("categories")), r"is no file of instances, .* found images, annotations"),
        (_edited(lambda c: c.update(images=[])), r"train2017.json: names no photograph"),
        (_edited(lambda c: c.update(annotations=[])), r"train2017.json: not one box in 5 photographs"),
        (_edited(lambda c: c.update(categories=[])), r"annotation 0 is of category 1, and categories has no such id"),
        (_edited(lambda c: c["annotations"][2].update(category_id=2)), r"annotation 2 is of category 2, and cate"),
        (_edited(lambda c: c["annotations"][0].update(image_id=9)), r"annotation 0 is in image 9, and images has"),
        (_edited(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), r"annotation 0: expected image_id, category"),
        (_edited(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 1e999])), r"its bbox .1, 2, 3, inf. isn't finite"),
        (_edited(lambda c: c["images"][1].pop("width")), r"expected COCO's entries of images and categories: KeyError"),
        (_edited(lambda c: c["images"][1].update(id=1)), r"two images have one id"),
        (_edited(lambda c: c["categories"][1].update(name="cat")), r"two categories are called cat"),
        (_edited(lambda c: c["categories"][1].update(name="fox"), "val2017"), r"aren't those of instances_train2017"),
    ],
)  # fmt: skip
def test_damaged_coco_is_refused_in_one_line(tmp_path, change, message):
    change(write_coco(tmp_path))
    with pytest.raises(DataError, match=message) as found:
        load("coco", root=tmp_path)
    assert "\n" not in str(found.value)


def test_results_of_a_detector_and_other_lists_are_no_instances(tmp_path):
    path = write_coco(tmp_path / "c") / "annotations/instances_train2017.json"
    path.write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]))
    with pytest.raises(DataError, match=r"train2017.json: is no file of instances, .*; found list"):
        load("coco", root=tmp_path / "c")


def test_boxes_wholly_outside_are_none_to_find(tmp_path):
    outside = [{"category_id": 1, "bbox": [50, 3, 5, 5]}]
    with pytest.raises(DataError, match=r"not one box in 5 photographs"):
        load("coco", root=write_coco(tmp_path / "a", boxes=outside))
    root = write_coco(tmp_path / "b", {"train2017": 12, "val2017": 2})
    _edited(lambda c: c.update(annotations=[]), "val2017")(root)
    assert load("coco", root=root).test.boxes == 0
    with pytest.raises(DataError, match=r"not one box to find in the 2 photographs of the test set; split it"):
        sources.data(f"coco:{root}", {"validation": 0.5})
    _edited(lambda c: c.update(annotations=[{"image_id": 101, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1}]),
            "val2017")(root)  # fmt: skip
    with pytest.raises(DataError, match="not one box to find in the 2 photographs of the test set"):
        sources.data(f"coco:{root}", {"validation": 0.5})


def test_ids_that_are_no_labels_are_numbered_anew_on_request(tmp_path):
    shifted = [{"id": c["id"] - 1, "name": c["name"]} for c in CATEGORIES]
    boxes = [{**box, "category_id": box["category_id"] - 1} for box in BOXES]
    root = write_coco(tmp_path, boxes=boxes, categories=shifted)
    with pytest.raises(DataError, match=r"3 categories have ids from 0 to 3, .* contiguous=true"):
        load("coco", root=root)
    bundle = load("coco", root=root, contiguous=True)
    assert bundle.classes == ("ape", "cat", "dog")
    assert bundle.test[0][1]["labels"].tolist() == [1, 3, 2]
    with pytest.raises(DataError, match=r"1 training photographs can't be split"):
        load("coco", root=write_coco(tmp_path / "one", {"train": 1, "val": 1}))


def test_an_image_of_another_size_is_told_when_it_is_read(tmp_path):
    bundle = load("coco", root=write_coco(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "val2017" / "000000000101.jpg")
    with pytest.raises(DataError, match=r"000000000101.jpg: is 8x8, and its annotation says 40x32"):
        bundle.test[0]


# Traffic signs

SIGNS = ["00000.ppm;5;6;20;30;11", "00000.ppm;0;0;8;8;33", "00001.ppm;1;2;9;9;16", "00002.ppm;3;3;9;9;13",
         "00600.ppm;3;3;9;10;0", "00601.ppm;3;3;3;9;1"]  # fmt: skip


def write_gtsdb(root: Path, lines: list[str] = SIGNS, numbers: tuple[int, ...] = (0, 1, 2, 3, 600, 601)) -> Path:
    root.mkdir(exist_ok=True)
    for number in numbers:
        Image.new("RGB", (40, 32), (0, number % 250, 0)).save(root / f"{number:05}.ppm")
    (root / "gt.txt").write_text("\n".join(lines) + "\n")
    return root


def test_traffic_signs_are_of_three_classes(tmp_path):
    bundle = load(f"gtsdb:{write_gtsdb(tmp_path)}")
    assert bundle.classes == ("prohibitory", "mandatory", "danger")
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [3, 1, 2]
    found = {a.image.name: a.boxes for part in (bundle.train, bundle.validation) for a in part._annotations}
    assert [box.name for box in found["00000.ppm"]] == ["danger", "mandatory"]
    assert found["00002.ppm"] == [], "yield is of none of the three"
    assert found["00003.ppm"] == [], "no sign at all"
    image, target = bundle.test[0]
    assert image.shape == (3, 32, 40)
    assert target["boxes"].tolist() == [[3, 3, 9, 10]]
    assert target["labels"].tolist() == [1]
    assert bundle.test.degenerate == 1
    assert len(load("gtsdb", root=tmp_path, train_size=2).train) == 2


def test_every_sign_has_the_benchmarks_class():
    from secateur.data.gtsdb import SIGNS as CLASSES

    assert [len(signs) for signs in CLASSES.values()] == [12, 8, 15]
    assert len(frozenset.union(*CLASSES.values())) == 35
    assert set(range(43)) - frozenset.union(*CLASSES.values()) == {6, 12, 13, 14, 17, 32, 41, 42}


@pytest.mark.parametrize(
    ("lines", "numbers", "message"),
    [
        (["00000.ppm;5;6;20;30"], (0, 600), r"gt.txt:1: expected 00000.ppm;x1;y1;x2;y2;sign, found '00000.ppm"),
        (["", "00000.ppm;5;6;20;30;43"], (0, 600), r"gt.txt:2: sign 43 is none of the 43"),
        (["00007.ppm;5;6;20;30;1"], (0, 600), r"00007.ppm: is missing, and gt.txt:1 names it"),
        (["00000.ppm;5;6;41;30;1"], (0, 600), r"box \(5, 6, 41, 30\) lies outside the photograph of 40x32"),
        (["00000.ppm;5;6;20;30;13"], (0, 600), r"not one sign of prohibitory, mandatory, danger in 2 photographs"),
        (["00000.ppm;5;6;20;30;1"], (0, 1), r"2 photographs before 00600.ppm, to train on, and 0 from it on"),
        (["00000.ppm;5;6;20;30;1"], (0, 600), r"gtsdb: 1 training photographs can't be split"),
    ],
)  # fmt: skip
def test_damaged_traffic_signs_are_refused(tmp_path, lines, numbers, message):
    with pytest.raises(DataError, match=message):
        load("gtsdb", root=write_gtsdb(tmp_path, lines, numbers))


def test_missing_traffic_signs_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"gt.txt: can't be read; expected gt.txt beside 00000.ppm"):
        load("gtsdb", root=tmp_path)
    write_gtsdb(tmp_path)
    (tmp_path / "00001.ppm").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"00001.ppm: can't be decoded as an image"):
        load("gtsdb", root=tmp_path)
