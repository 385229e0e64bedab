"""A bundle holds data sets, a shape and names, and nothing else: what it is given is told from them in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.data import Batches, DataBundle, DetectionBatches
from secateur.runfile import sources

IMAGES, LABELS = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
SET = TensorDataset(IMAGES, LABELS)
WRONG = {
    "None": None,
    "tensor": IMAGES,
    "array": IMAGES.numpy(),
    "list of tensors": list(IMAGES),
    "list of arrays": [np.zeros(3)],
    "mapping": {"images": IMAGES},
    "text": "digits",
    "loader": DataLoader(SET),
    "iterator": iter([(IMAGES, LABELS)]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_part_that_is_no_data_set_is_named(kind: str) -> None:
    for at, part in enumerate(("train", "validation", "test")):
        parts: list[Any] = [SET, SET, SET]
        parts[at] = WRONG[kind]
        with pytest.raises(sc.DataError, match=f"data own: {part}: expected a data set of pairs.*found") as refused:
            DataBundle("own", *parts, (1, 8, 8), ("a", "b"))
        assert "\n" not in str(refused.value)
    for batches in (Batches, DetectionBatches):
        with pytest.raises(sc.DataError, match="batches: expected a data set of pairs"):
            batches(WRONG[kind], 4)


def test_a_loader_is_told_where_its_data_set_is() -> None:
    with pytest.raises(sc.DataError, match=r"found DataLoader: give its \.dataset; batches are made of it\."):
        DataBundle("own", DataLoader(SET), SET, SET, (1, 8, 8), ("a", "b"))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [8, "1x8x8", (), (1, 0, 8), None])
def test_a_shape_is_one(shape: Any) -> None:
    with pytest.raises(sc.DataError, match="data own: input_shape: expected that of one input"):
        DataBundle("own", SET, SET, SET, shape, ("a", "b"))


@pytest.mark.parametrize("classes", [2, "ab", (0, 1), None])
def test_classes_are_names(classes: Any) -> None:
    with pytest.raises(sc.DataError, match="data own: classes: expected their names"):
        DataBundle("own", SET, SET, SET, (1, 8, 8), classes)


CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from secateur.data import DataBundle

def net(channels=1):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

def data(channels=1, said=1, side=8):
    part = TensorDataset(torch.rand(4, channels, side, side), torch.tensor([0, 1, 0, 1]))
    return DataBundle("grey", part, part, part, (said, side, side), ("a", "b"))

def unpaired():
    part = TensorDataset(torch.rand(4, 1, 8, 8))
    return DataBundle("grey", part, part, part, (1, 8, 8), ("a", "b"))
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return str(path)


def test_data_of_another_shape_than_they_are_said_to_be_are_refused(file: str) -> None:
    said = r"train: the first input is of shape \(1, 8, 8\), and DataBundle.input_shape says \(3, 8, 8\)"
    with pytest.raises(sc.DataError, match=said):
        sources.data(f"{file}:data", {"said": 3})
    with pytest.raises(sc.DataError, match="train: expected pairs"):
        sources.data(f"{file}:unpaired")


@pytest.mark.parametrize("options", [{"channels": 3, "said": 3}, {"side": 9}])
def test_a_network_that_fails_on_the_datas_shape_is_refused_by_that_shape(file: str, options: dict[str, int]) -> None:
    bundle = sources.data(f"{file}:data", options)
    shape = f"({bundle.input_shape[0]}, {bundle.input_shape[1]}, {bundle.input_shape[2]})"
    with pytest.raises(sc.UsageError) as refused:
        sources.open_model(f"{file}:net", bundle=bundle)
    assert f"fails on inputs of shape (1, {shape[1:]}, of DataBundle.input_shape of grey: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_compress_names_the_shape_that_its_network_fails_on() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    batches = [(IMAGES, LABELS)]
    with pytest.raises(sc.TraceError, match=r"fails on the example inputs of shape \(1, 1, 8, 8\): .*Given groups=1"):
        sc.compress(network, train=batches, validation=batches, target=sc.Target(macs=0.3))
    with pytest.raises(sc.TraceError, match=r"fails on the example inputs of shape \(8, 1, 8, 8\): RuntimeError"):
        sc.trace(network, IMAGES)
