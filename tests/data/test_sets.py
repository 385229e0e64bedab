"""Every data set comes in three parts that share nothing; what is missing or damaged is named."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.data import DATASETS, Batches, cifar, cifar_files, load
from secateur.data.image import decode, most_pixels, opened
from secateur.errors import DataError, UsageError

SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[3] / "shared"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")


def rows(part) -> set[int]:
    return set(part.indices.tolist())


def counts(part) -> list[int]:
    return torch.bincount(part.labels[part.indices]).tolist()


# Digits


def test_digits_are_split_60_20_20_by_class():
    bundle = load("digits")
    parts = [rows(part) for part in (bundle.train, bundle.validation, bundle.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    everything = torch.bincount(bundle.train.labels).tolist()
    for part, share in ((bundle.train, 0.6), (bundle.validation, 0.2), (bundle.test, 0.2)):
        assert all(abs(n - share * total) <= 1.5 for n, total in zip(counts(part), everything, strict=True))
    image, label = bundle.train[0]
    assert image.shape == bundle.input_shape == (1, 28, 28)
    assert bundle.classes[label] == str(label)
    pixels = bundle.train.normalise(bundle.train.images)
    assert pixels.mean().abs() < 1e-3
    assert abs(pixels.std() - 1) < 1e-3


def test_digits_are_enlarged_bilinearly():
    from sklearn.datasets import load_digits

    small = load_digits().images[5] / 16 * 255
    large = load("digits").train.images[5, 0]
    for y in (0, 3, 14, 27):
        for x in (0, 8, 20, 27):
            v, u = ((c + 0.5) * 8 / 28 - 0.5 for c in (y, x))
            v, u = (min(max(c, 0), 7) for c in (v, u))
            i, j = min(int(v), 6), min(int(u), 6)
            a, b = v - i, u - j
            expected = (1 - a) * ((1 - b) * small[i, j] + b * small[i, j + 1]) + a * (
                (1 - b) * small[i + 1, j] + b * small[i + 1, j + 1]
            )
            assert abs(float(large[y, x]) - expected) <= 0.5 + 1e-6


def test_the_seed_moves_validation_but_never_the_test_set():
    one, two = load("digits"), load("digits", validation=0.1, seed=5)
    assert rows(one.test) == rows(two.test)
    assert len(two.validation) == 144
    assert rows(two.validation).isdisjoint(rows(two.train) | rows(two.test))
    assert rows(load("digits", seed=1).validation) != rows(one.validation)
    assert rows(load("digits", seed=1).validation) == rows(load("digits", seed=1).validation)


def test_a_smaller_training_set_keeps_the_proportions_and_the_other_parts():
    full, small = load("digits"), load("digits", train_size=100)
    assert len(small.train) == 100
    assert rows(small.train) < rows(full.train)
    assert rows(small.validation) == rows(full.validation)
    assert all(abs(n - m * 100 / 1077) <= 1 for n, m in zip(counts(small.train), counts(full.train), strict=True))
    assert load("digits", size=32).input_shape == (1, 32, 32)


# MNIST


def write_mnist(root: Path, count: int = 40) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, n in (("train", count), ("t10k", 20)):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())
    return root


def test_mnist_keeps_its_published_test_set(tmp_path):
    bundle = load(f"mnist:{write_mnist(tmp_path, 200)}")
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [180, 20, 20]
    assert rows(bundle.train).isdisjoint(rows(bundle.validation))
    raw = np.frombuffer((tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:], dtype=np.uint8)
    assert np.array_equal(bundle.test.images.numpy().ravel(), raw)
    assert bundle.test[7][1] == 7
    same = load("mnist", root=tmp_path)
    assert torch.equal(same.train.images, bundle.train.images)


@needs_shared
def test_mnist_is_mnist():
    bundle = load("mnist", root=SHARED / "data", validation=1 / 6)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [50_000, 10_000, 10_000]
    assert counts(bundle.test) == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels = bundle.train.images / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((0.1307, 0.3081), abs=1e-4)


def break_mnist(raw: Path, how: str) -> None:
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    if how == "missing":
        images.unlink()
    elif how == "truncated":
        images.write_bytes(images.read_bytes()[:-5])
    elif how == "empty":
        images.write_bytes(b"")
    elif how == "packed":
        images.write_bytes(gzip.compress(images.read_bytes()))
    elif how == "fewer labels":
        labels.write_bytes(struct.pack(">2i", 2049, 39) + bytes(39))
    elif how == "labels beyond 9":
        labels.write_bytes(struct.pack(">2i", 2049, 40) + bytes([10] * 40))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"MNIST/raw/train-images-idx3-ubyte is missing; expected the four unpacked IDX files"),
        ("truncated", "train-images-idx3-ubyte and .*not readable as IDX"),
        ("empty", "not readable as IDX"),
        ("packed", "not readable as IDX"),
        ("fewer labels", r"as many images as labels.*\(40, 28, 28\) and \(39,\)"),
        ("labels beyond 9", "labels are digits, 0 to 9; found 10"),
    ],
)
def test_damaged_mnist_is_refused(tmp_path, how, message):
    write_mnist(tmp_path)
    break_mnist(tmp_path / "MNIST" / "raw", how)
    with pytest.raises(DataError, match=message):
        load("mnist", root=tmp_path)


# CIFAR-10


def png(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    import io

    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_cifar(root: Path, images=None, labels=None, column: str = "img", train: int = 40) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    root.mkdir(exist_ok=True)
    for name, n, start in (
        ("train-00000-of-00002", train // 2, 0),
        ("train-00001-of-00002", train // 2, train // 2),
        ("test-00000-of-00001", 20, 1000),
    ):
        contents = images or [{"bytes": png(start + i), "path": f"{i}.png"} for i in range(n)]
        classes = labels or [(start + i) % 10 for i in range(n)]
        parquet.write_table(pa.table({column: contents, "label": classes[: len(contents)]}), root / f"{name}.parquet")
    return root


def test_cifar10_is_decoded_from_parquet(tmp_path):
    bundle = load(f"cifar10:{write_cifar(tmp_path)}", validation=0.25)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [30, 10, 20]
    for row, label in ((3, 3), (25, 5)):
        expected = np.random.default_rng(row).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        assert np.array_equal(bundle.train.images[row].permute(1, 2, 0).numpy(), expected)
        assert bundle.train.labels[row] == label
    assert bundle.train.augmentation is not None
    assert bundle.validation.augmentation is None
    assert bundle.test.augmentation is None
    assert load("cifar10", root=tmp_path, validation=0.5, augment=False).train.augmentation is None
    assert load("cifar10", root=tmp_path, validation=0.5, mean=[0.5] * 3, std=[1] * 3).normalise.mean == (0.5, 0.5, 0.5)


def test_cifar10_is_cached_on_disk_until_its_files_change(tmp_path, monkeypatch):
    root, cache = write_cifar(tmp_path / "data"), tmp_path / "cache"
    calls = []
    original = cifar_files.Kind.read
    monkeypatch.setattr(cifar_files.Kind, "read", lambda kind, path: calls.append(path.name) or original(kind, path))
    first = load("cifar10", root=root, validation=0.5, cache=str(cache))
    assert len(calls) == 3
    load("cifar10", root=root, validation=0.5, cache=str(cache))
    assert len(calls) == 3, "within the process"
    cifar._decoded.cache_clear()
    again = load("cifar10", root=root, validation=0.5, cache=str(cache))
    assert len(calls) == 3, "from the disk"
    assert torch.equal(again.train.images, first.train.images)
    assert torch.equal(again.test.labels, first.test.labels)
    os.utime(root / "test-00000-of-00001.parquet", ns=(1, 1))
    load("cifar10", root=root, validation=0.5, cache=str(cache))
    assert calls[3:] == ["test-00000-of-00001.parquet"]
    (cache / "cifar10-test.safetensors").write_bytes(b"damaged")
    cifar._decoded.cache_clear()
    assert torch.equal(load("cifar10", root=root, validation=0.5, cache=str(cache)).test.images, first.test.images)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: shutil.rmtree(root),
            r"no train-\*.parquet, nor cifar-10-batches-py; get cifar10 by python -c .*CIFAR10.*download=True.*uoft",
        ),
        (lambda root: (root / "train-00001-of-00002.parquet").unlink(), "1 train files of 2 announced"),
        (lambda root: (root / "test-00000-of-00001.parquet").unlink(), r"no test-\*.parquet"),
        (
            lambda root: (root / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and more"),
            "test-00000-of-00001.parquet: not a readable Parquet file",
        ),
        (lambda root: write_cifar(root, column="picture"), "columns img .* found picture, label"),
        (lambda root: write_cifar(root, labels=[11] * 20), "row 0: expected image bytes and a class from 0 to 9.*11"),
        (
            lambda root: write_cifar(root, images=[{"bytes": b"nothing", "path": ""}] * 20),
            "row 0: can't be decoded as an image",
        ),
        (lambda root: write_cifar(root, images=[{"bytes": png(0, (8, 9)), "path": ""}] * 20), "32x32, found 9x8"),
        (lambda root: write_cifar(root, train=0), "holds no image"),
    ],
)
def test_damaged_cifar10_is_refused(tmp_path, change, message):
    change(write_cifar(tmp_path / "data"))
    with pytest.raises(DataError, match=message):
        load("cifar10", root=tmp_path / "data")


def write_batches(
    folder: Path, key: str, classes: int, names=("train", "test"), count: int = 20, numpy_of="numpy.core"
):
    """Write files as the first release has them: pickled by Python 2, rows of red, green and blue."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(names), count, 3072), dtype=np.uint8)
    for name, rows in zip(names, pixels, strict=True):
        content = {b"data": rows, key.encode(): [i % classes for i in range(count)], b"batch_label": name.encode()}
        written = pickle.dumps(content, protocol=2)
        # numpy 2 calls the module by another name than the numpy that wrote the files.
        (folder / name).write_bytes(written.replace(b"numpy._core", numpy_of.encode()))
    return pixels


def test_cifar10_is_read_as_torchvision_lays_it_out(tmp_path):
    names = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")
    pixels = write_batches(tmp_path / "cifar-10-batches-py", "labels", 10, names)
    bundle = load("cifar10", root=tmp_path, validation=0.5)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [50, 50, 20]
    assert np.array_equal(bundle.train.images.numpy().reshape(100, 3072), pixels[:5].reshape(100, 3072))
    assert np.array_equal(bundle.test.images.numpy().reshape(20, 3072), pixels[5])
    assert bundle.train.labels.tolist() == [i % 10 for i in range(20)] * 5
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3: is missing; unpack cifar10's archive anew"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "plain_text"), ("cifar10", "data"), ("cifar100", "cifar100")])
def test_cifar_is_read_as_the_hub_lays_it_out(tmp_path, name, folder):
    write_cifar(tmp_path / folder)
    if name == "cifar100":
        from pyarrow import parquet

        for file in (tmp_path / folder).iterdir():
            table = parquet.read_table(file)
            table = table.append_column("coarse_label", table["label"]).rename_columns(
                ["img", "fine_label", "coarse_label"]
            )
            parquet.write_table(table, file)
    bundle = load(name, root=tmp_path, validation=0.25)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [30, 10, 20]
    assert bundle.train.labels[25] == 5


def test_cifar100_has_its_hundred_fine_classes(tmp_path):
    write_batches(tmp_path / "cifar-100-python", "fine_labels", 100, count=200)
    bundle = load("cifar100", root=tmp_path, validation=0.5)
    assert len(bundle.classes) == len(set(bundle.classes)) == 100
    assert list(bundle.classes) == sorted(bundle.classes)
    assert int(bundle.test.labels.max()) == 99
    with pytest.raises(DataError, match="nor cifar-10-batches-py"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(os.getcwd), r"it names posix.getcwd, which no file of CIFAR does; unpack its archive anew"),
        (b"\x80\x02}q", "not readable as a batch of CIFAR"),
        (pickle.dumps([1], protocol=2), "expected CIFAR's data and labels, found list"),
        (pickle.dumps({b"data": [0] * 3072, b"labels": [0]}, protocol=2), "expected rows of 3072 bytes under data"),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [0]}, protocol=2),
            "expected rows of 3072 bytes under data",
        ),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, protocol=2), "classes are 0 to 9"),
    ],
)
def test_pickled_batches_build_nothing_and_are_checked(tmp_path, content, message):
    names = (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")
    write_batches(tmp_path / "cifar-10-batches-py", "labels", 10, names, numpy_of="numpy._core")
    (tmp_path / "cifar-10-batches-py/data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("cifar10", root=tmp_path)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("resnet20", 9173), ("resnet56", 9339)])
def test_published_weights_reach_their_accuracy_on_cifar10(name, expected):
    from safetensors.torch import load_file

    from secateur.models import MODELS

    bundle = load("cifar10", root=SHARED / "data" / "cifar10")
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [45_000, 5_000, 10_000]
    assert counts(bundle.train) == [4500] * 10
    net = MODELS[name]().eval()
    net.load_state_dict(load_file(SHARED / "weights" / f"cifar10-{name}.safetensors"))
    with torch.inference_mode():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in Batches(bundle.test, 500))
    assert right == expected


# Folders of images


def write_folder(root: Path, classes=("ape", "bee"), count: int = 10) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 30), (i * 10, number * 100, 50)).save(root / name / f"{root.name}{i}.png")
    return root


def names(part) -> set[str]:
    return {Path(path).name for path, _ in part.samples}


def test_one_folder_is_split_into_three_parts(tmp_path):
    bundle = load(f"imagefolder:{write_folder(tmp_path / 'all')}", size=16)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [14, 2, 4]
    assert len({path for p in (bundle.train, bundle.validation, bundle.test) for path, _ in p.samples}) == 20
    other = load("imagefolder", root=tmp_path / "all", size=16, seed=9)
    assert other.test.samples == bundle.test.samples
    assert bundle.classes == ("ape", "bee")
    image, label = bundle.test[0]
    assert image.shape == bundle.input_shape == (3, 16, 16)
    colour = Image.open(bundle.test.samples[0][0]).getpixel((0, 0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((torch.tensor(colour) / 255 - mean) / std)[:, None, None].expand_as(image)
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
    assert label == ["ape", "bee"].index(Path(bundle.test.samples[0][0]).parent.name)


@pytest.mark.parametrize(
    ("folders", "sizes", "test_from"),
    [
        (("train", "val", "test"), [20, 20, 20], "test"),
        (("train", "test"), [18, 2, 20], "test"),
        (("train", "validation"), [18, 2, 20], "validation"),
    ],
)
def test_published_folders_are_kept(tmp_path, folders, sizes, test_from):
    for folder in folders:
        write_folder(tmp_path / folder)
    bundle = load("imagefolder", root=tmp_path, size=16)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == sizes
    assert names(bundle.test) == {f"{test_from}{i}.png" for i in range(10)}


def test_training_images_are_augmented_by_seed_and_others_never(tmp_path):
    root = write_folder(tmp_path / "all")
    for path in root.rglob("*.png"):
        Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    bundle = load("imagefolder", root=root, size=16)
    batches = Batches(bundle.train, 4, augment=True)
    one, two = (torch.cat([x for x, _ in batches]) for _ in range(2))
    plain = torch.cat([x for x, _ in Batches(bundle.train, 4)])
    assert torch.equal(one, two)
    assert not torch.equal(one, plain)
    batches.set_epoch(1)
    assert not torch.equal(one, torch.cat([x for x, _ in batches]))
    held = Batches(bundle.validation, 4, augment=True)
    assert torch.equal(next(iter(held))[0], torch.stack([bundle.validation[i][0] for i in range(2)]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_have_the_channels_that_the_network_takes(tmp_path, channels):
    bundle = load("imagefolder", root=write_folder(tmp_path), size=16, channels=channels)
    image, _ = bundle.test[0]
    assert image.shape == bundle.input_shape == (channels, 16, 16)
    if channels == 4:
        assert torch.allclose(image[3], torch.tensor(1.0))  # opaque: (1 - 0.5) / 0.5
    with pytest.raises(UsageError, match="channels are 1, 3 or 4, with a mean for each; found 2"):
        load("imagefolder", root=tmp_path, channels=2)
    with pytest.raises(UsageError, match="with a mean for each"):
        load("imagefolder", root=tmp_path, channels=channels, mean=[0.1, 0.2], std=[1, 1])
    assert load("imagefolder", root=tmp_path, size=16, std=[0.2]).input_shape == (1, 16, 16)


def test_capitals_of_the_parts_make_no_difference(tmp_path):
    for folder in ("Train", "VAL", "Test"):
        write_folder(tmp_path / folder)
    bundle = load("imagefolder", root=tmp_path, size=16)
    assert bundle.classes == ("ape", "bee")
    for part, folder in (("train", "Train"), ("validation", "VAL"), ("test", "Test")):
        assert {Path(path).parent.parent.name for path, _ in getattr(bundle, part).samples} == {folder}


def test_unreadable_images_are_skipped_where_that_is_asked_for_and_counted(tmp_path, caplog):
    root = write_folder(tmp_path / "all")
    odd = [root / "ape" / "all3.png", root / "bee" / "all7.png"]
    for path in odd:
        path.write_bytes(b"no image")
    bundle = load("imagefolder", root=root, size=16, skip_unreadable=True)
    parts = [bundle.train, bundle.validation, bundle.test]
    left = {path for part in parts for path, _ in part.samples}
    assert left == {str(path) for path in root.rglob("*.png")} - set(map(str, odd))
    assert all(part[i][0].shape == (3, 16, 16) for part in parts for i in range(len(part)))
    assert "2 of 20 images can't be read and are left out" in caplog.text


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone: no such folder; expected train, val and test"):
        load("imagefolder", root=tmp_path / "gone")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: expected a folder of images for each class"):
        load("imagefolder", root=tmp_path / "none")
    write_folder(tmp_path / "a" / "train")
    with pytest.raises(DataError, match="beside train, expected a folder test or val"):
        load("imagefolder", root=tmp_path / "a")
    write_folder(tmp_path / "a" / "test", ("ape", "cat"))
    with pytest.raises(DataError, match=r"test: its classes aren't those of .*train: bee is in one of them only"):
        load("imagefolder", root=tmp_path / "a")
    (tmp_path / "b" / "ape").mkdir(parents=True)
    write_folder(tmp_path / "b", ("bee",))
    with pytest.raises(DataError, match=r"class.* ape"):
        load("imagefolder", root=tmp_path / "b")
    one = write_folder(tmp_path / "c", count=1)
    with pytest.raises(DataError, match="can't be split"):
        load("imagefolder", root=one)
    for folder in ("train", "val", "test"):
        write_folder(tmp_path / "d" / folder)
    with pytest.raises(UsageError, match=r"validation=0.2 contradicts the folder val"):
        load("imagefolder", root=tmp_path / "d", validation=0.2)
    bundle = load("imagefolder", root=tmp_path / "d")
    Path(bundle.train.samples[3][0]).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"\.png: can't be decoded as an image"):
        bundle.train[3]
    with pytest.raises(UsageError, match="1 <= size <= resize"):
        load("imagefolder", root=tmp_path / "d", size=64, resize=32)


# Boxes


def write_voc(root: Path, boxes=((5, 6, 20, 30),), size=(40, 32)) -> Path:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test")):
        members = [f"im{number}{i}" for i in range(3 - number)]
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(members) + "\n")
        for i, name in enumerate(members):
            Image.new("RGB", size, (200, 10 * i, 30)).save(root / "JPEGImages" / f"{name}.jpg")
            objects = "".join(
                f"<object><name>{'cell' if k % 2 else 'blob'}</name><difficult>{k % 2}</difficult><bndbox>"
                f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for k, (x1, y1, x2, y2) in enumerate(boxes)
            )
            (root / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"
            )
    return root


def test_voc_gives_what_detectors_take(tmp_path):
    bundle = load(f"voc:{write_voc(tmp_path / 'v', [(5, 6, 20, 30), (0, 0, 40, 32), (7, 7, 7, 9)])}")
    assert bundle.task == "detection"
    assert bundle.classes == ("blob", "cell")
    assert bundle.input_shape == (3, 32, 40)
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [3, 2, 1]
    image, target = bundle.train[1]
    assert image.shape == (3, 32, 40)
    assert 0 <= image.min() <= image.max() <= 1
    assert target["boxes"].tolist() == [[5, 6, 20, 30], [0, 0, 40, 32]]
    assert target["labels"].tolist() == [1, 2]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["image_id"] == 1
    assert bundle.train.degenerate == 3, "boxes without area are left out and counted"


def test_voc_mirrors_boxes_with_the_photograph(tmp_path):
    bundle = load("voc", root=write_voc(tmp_path / "v"))
    plain = bundle.train[0]
    seen = set()
    batches = Batches(bundle.train, 3, augment=True)
    for epoch in range(8):
        batches.set_epoch(epoch)
        images, targets = next(iter(batches))
        mirrored = targets[0]["boxes"].tolist() == [[20, 6, 35, 30]]
        seen.add(mirrored)
        assert torch.equal(images[0], plain[0].flip(2) if mirrored else plain[0])
        assert mirrored or targets[0]["boxes"].tolist() == [[5, 6, 20, 30]]
    assert seen == {True, False}
    assert [t["image_id"].item() for t in targets] == [0, 1, 2]


@needs_shared
def test_bccd_has_its_published_split_and_a_detector_takes_it():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    bundle = load("voc", root=SHARED / "data" / "BCCD")
    assert [len(p) for p in (bundle.train, bundle.validation, bundle.test)] == [205, 87, 72]
    assert bundle.classes == ("Platelets", "RBC", "WBC")
    parts = (bundle.train, bundle.validation, bundle.test)
    assert sum(len(t) for p in parts for a in p._annotations for t in [a.boxes]) == 361 + 4155 + 372 - 2
    assert sum(p.degenerate for p in parts) == 2
    images, targets = next(iter(Batches(bundle.train, 2)))
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(bundle.classes) + 1)
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: shutil.rmtree(r), r"ImageSets/Main/train.txt: can't be read; expected JPEGImages"),
        (lambda r: (r / "ImageSets/Main/val.txt").write_text("\n"), r"val.txt: names no photograph"),
        (lambda r: (r / "ImageSets/Main/val.txt").write_text("im00\n"), r"im00 is in train.txt and in val.txt"),
        (lambda r: (r / "Annotations/im01.xml").unlink(), r"im01.xml: is missing, and ImageSets/Main names it"),
        (lambda r: (r / "JPEGImages/im01.jpg").unlink(), r"im01.jpg: is missing, and ImageSets/Main names it"),
        (lambda r: (r / "Annotations/im01.xml").write_text("<annotation>"), r"im01.xml: not readable as XML"),
        (lambda r: (r / "Annotations/im01.xml").write_text("<annotation/>"), r"expected VOC's size and bndbox entries"),
    ],
)
def test_damaged_voc_is_refused(tmp_path, change, message):
    change(write_voc(tmp_path / "v"))
    with pytest.raises(DataError, match=message):
        load("voc", root=tmp_path / "v")


@pytest.mark.parametrize("name", ["../JPEGImages/im00", "/etc/passwd", "./im00", "a//b", "..", "a\\..\\b", "im\0"])
def test_voc_names_lead_nowhere_else(tmp_path, name):
    root = write_voc(tmp_path / "v")
    (root / "ImageSets/Main/val.txt").write_text(f"{name}\n")
    with pytest.raises(DataError, match=r"val.txt: .* is no name of a photograph"):
        load("voc", root=root)


def test_a_voc_photograph_is_listed_once_under_whatever_name(tmp_path):
    root = write_voc(tmp_path / "v")
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (root / kind / f"twin.{suffix}").symlink_to(root / kind / f"im00.{suffix}")
    (root / "ImageSets/Main/test.txt").write_text("twin\n")
    with pytest.raises(DataError, match=r"im00.jpg and twin.jpg are one file; a photograph is listed once"):
        load("voc", root=root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<width>40<", "<width>0<", "a photograph of 0x32"),
        ("<width>40<", f"<width>{'9' * 5000}<", "expected VOC's size"),
        ("<xmin>5<", "<xmin>nan<", "a box of nan, 6.0"),
        ("<annotation>", "<?xml version='1.0' encoding='moo'?><annotation>", "not readable as XML"),
    ],
)
def test_odd_numbers_in_voc_are_refused(tmp_path, old, new, message):
    root = write_voc(tmp_path / "v")
    path = root / "Annotations/im00.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load("voc", root=root)


def test_images_over_the_limit_are_refused_with_the_setting_that_raises_it(tmp_path, monkeypatch):
    file = tmp_path / "wide.png"
    Image.new("RGB", (20, 6)).save(file)
    assert most_pixels() == 100_000_000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # PIL's own limit, which no setting raises
    assert opened(file, str(file)).size == (20, 6)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setenv("SECATEUR_MAX_PIXELS", "99")
    with pytest.raises(DataError, match=r"wide.png: holds 20x6 pixels, more than 99; .* SECATEUR_MAX_PIX"):
        decode(file, str(file))
    small = write_folder(tmp_path / "f")
    with pytest.raises(DataError, match="more than 99"):
        load("imagefolder", root=small).train[0]
    with pytest.raises(DataError, match="more than 99"):
        load("voc", root=write_voc(tmp_path / "v")).train[0]
    monkeypatch.setenv("SECATEUR_MAX_PIXELS", "many")
    with pytest.raises(UsageError, match="SECATEUR_MAX_PIXELS: is a whole number from 1 up, found 'many'"):
        decode(file, str(file))


def test_a_file_of_another_kind_is_no_image(tmp_path):
    file = tmp_path / "drawing.jpg"
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(DataError, match="can't be decoded as an image"):
        decode(file, str(file))


def test_voc_boxes_and_photographs_are_checked(tmp_path):
    with pytest.raises(DataError, match="lies outside the photograph of 40x32"):
        load("voc", root=write_voc(tmp_path / "a", [(5, 6, 41, 30)]))
    with pytest.raises(DataError, match="not one box in 6 files"):
        load("voc", root=write_voc(tmp_path / "b", []))
    bundle = load("voc", root=write_voc(tmp_path / "c"))
    photograph = tmp_path / "c" / "JPEGImages" / "im00.jpg"
    Image.new("RGB", (8, 8)).save(photograph)
    with pytest.raises(DataError, match=r"im00.jpg: is 8x8, and its annotation says 40x32"):
        bundle.train[0]
    photograph.write_bytes(b"\xff\xd8 no more")
    with pytest.raises(DataError, match=r"im00.jpg: can't be decoded"):
        bundle.train[0]
    with pytest.raises(UsageError, match="the validation set is published"):
        load("voc", root=tmp_path / "c", validation=0.1)


# Names and options


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("minst:x"), "minst:x: no such data set; did you mean mnist"),
        (lambda: load("zzz"), f"known are {', '.join(DATASETS)}"),
        (lambda: load("mnist"), "the folder of the files is missing; write mnist:FOLDER"),
        (lambda: load("mnist:"), "the folder of the files is missing"),
        (lambda: load("mnist:a", root="b"), "given twice"),
        (lambda: load("digits:a"), "take no folder"),
        (lambda: load("digits", colour=1), "no option 'colour'; known are validation, seed, size, train_size"),
        (lambda: load("digits", validation=0), r"in \(0, 1\), found 0"),
        (lambda: load("digits", validation=1.0), r"in \(0, 1\), found 1.0"),
        (lambda: load("digits", size=7), "found 7"),
        (lambda: load("digits", train_size=5000), "between 1 and the 1077 training images, found 5000"),
        (lambda: load("digits", train_size=0), "found 0"),
    ],
)
def test_wrong_requests_are_usage_errors(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_too_small_a_training_set_is_a_data_error():
    with pytest.raises(DataError, match="digits: 1077 images can't be split"):
        load("digits", train_size=5)


def test_loading_moves_no_generator(tmp_path):
    root = write_cifar(tmp_path)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    load("cifar10", root=root, validation=0.5)
    load("digits", train_size=500)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
