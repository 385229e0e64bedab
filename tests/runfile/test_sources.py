"""Models and inputs are found by one word, and every other word is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.errors import UsageError
from secateur.runfile import sources

NETWORK = """
import torch
from torch import nn
from beside import WIDTH

CONSTANT = 3

class Network(nn.Sequential):
    def __init__(self, width=WIDTH):
        super().__init__(nn.Conv2d(1, width, 3), nn.ReLU())

def build(width=WIDTH):
    return Network(width)

def with_inputs():
    return Network(), torch.zeros(1, 1, 5, 5)

def number():
    return 3

def fails():
    raise ValueError("no\\nluck")
"""


@pytest.fixture
def network_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def test_a_function_of_a_file_builds_the_model(network_file: Path) -> None:
    found = sources.model(f"{network_file}:build", {"width": 6})
    assert isinstance(found.model[0], nn.Conv2d)  # type: ignore[index]
    assert found.model[0].out_channels == 6  # type: ignore[index]
    assert found.example_inputs is None
    assert sources.model(f"{network_file}:Network").model[0].out_channels == 4  # type: ignore[index]


def test_a_function_may_bring_its_example_inputs(network_file: Path) -> None:
    found = sources.model(f"{network_file}:with_inputs")
    assert found.example_inputs.shape == (1, 1, 5, 5)


def test_a_function_of_a_module_builds_the_model(network_file: Path) -> None:
    assert type(sources.model("network:build").model).__name__ == "Network"


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        ("lenet6", {}, ["no such model; did you mean lenet5", "Known are faster_rcnn, lenet5"]),
        ("torchvision:resnet19", {}, ["no such model; did you mean", "resnet18"]),
        ("timm:resnet19", {}, ["no such model; did you mean", "resnet18"]),
        ("absent.py:build", {}, ["no such file: absent.py"]),
        ("{file}:bild", {}, ["has no function 'bild'; did you mean build?"]),
        ("{file}:CONSTANT", {}, ["has no function 'CONSTANT'"]),
        ("{file}:number", {}, ["returned int", "torch.nn.Module"]),
        ("{file}:fails", {}, ["ValueError at {file}:22: no luck"]),
        ("{file}:build", {"wide": 3}, ["TypeError", "unexpected keyword argument 'wide'", "--model-option NAME=VALUE"]),
        ("no.such.package:build", {}, ["no module 'no.such.package' to import"]),
        ("lenet5", {"num_classes": -1}, ["lenet5", "-1"]),
        ("torchvision:resnet18", {"depth": 3}, ["'depth'", "--model-option NAME=VALUE"]),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    network_file: Path, spec: str, options: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        sources.model(spec.format(file=network_file), options)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part.format(file=network_file) in message


def test_a_file_that_does_not_compile_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def build(:\n")
    with pytest.raises(UsageError, match=r"SyntaxError.*broken\.py"):
        sources.model(f"{tmp_path / 'broken.py'}:build")


def test_published_weights_exist_only_where_a_library_publishes(network_file: Path) -> None:
    for spec in ("lenet5", f"{network_file}:build"):
        with pytest.raises(UsageError, match="no published weights"):
            sources.model(spec, pretrained="")


def test_published_weights_are_read_without_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    state = {k: v + 1 for k, v in torchvision.models.squeezenet1_1().state_dict().items()}
    calls: list[dict[str, Any]] = []

    def fetch(url: str, **options: Any) -> dict[str, torch.Tensor]:
        calls.append({"url": url, **options})
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    found = sources.model("torchvision:squeezenet1_1", pretrained="")
    assert all(torch.equal(v, state[k]) for k, v in found.model.state_dict().items())
    assert calls[0]["weights_only"] is True
    assert calls[0]["check_hash"] is True
    with pytest.raises(UsageError, match="don't fit"):
        sources.model("torchvision:squeezenet1_1", {"num_classes": 3}, pretrained="")


def test_a_version_of_published_weights_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    urls: list[str] = []

    def fetch(url: str, **_: Any) -> dict[str, torch.Tensor]:
        urls.append(url)
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    published = torchvision.models.get_model_weights("mobilenet_v3_large")
    for version, entry in (("IMAGENET1K_V1", "IMAGENET1K_V1"), ("IMAGENET1K_V2", "IMAGENET1K_V2"), ("", "DEFAULT")):
        with pytest.raises(UsageError, match="can't be fetched: offline"):
            sources.model("torchvision:mobilenet_v3_large", pretrained=version)
        assert urls[-1] == published[entry].url
    with pytest.raises(UsageError, match="publishes mobilenet_v3_large as IMAGENET1K_V1, IMAGENET1K_V2; name one of"):
        sources.model("torchvision:mobilenet_v3_large", pretrained="V3")
    with pytest.raises(UsageError, match=r"timm names versions in the model, timm:NAME\.TAG"):
        sources.model("timm:resnet18", pretrained="a1_in1k")
    assert sources.pinned("lenet5", "pretrained") == "pretrained"
    assert sources.pinned("torchvision:resnet50", "mine.pth") == "mine.pth"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([*sources.DTYPES]))
def test_an_input_has_the_shape_and_type_it_was_given(shape: list[int], dtype: str) -> None:
    text = "x".join(map(str, shape))
    for value in (sources.inputs([f"{text}:{dtype}"]), sources.inputs([f"a={text}:{dtype}"])["a"]):
        assert list(value.shape) == shape
        assert value.dtype is sources.DTYPES[dtype]


def test_several_inputs_are_positional_and_named_ones_keywords() -> None:
    assert [tuple(t.shape) for t in sources.inputs(["1x3", "2"])] == [(1, 3), (2,)]
    assert {k: tuple(t.shape) for k, t in sources.inputs(["a=1x3", "b=2"]).items()} == {"a": (1, 3), "b": (2,)}


def test_inputs_are_the_same_again_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(sources.inputs(["2x3"]), sources.inputs(["2x3"]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "shapes", [["3,224"], ["x"], [""], ["1x0x3"], ["1x3:complex"], ["1x-3"], ["1x3", "b=2"], ["2a=1x3"]]
)
def test_a_shape_that_is_none_is_refused(shapes: list[str]) -> None:
    with pytest.raises(UsageError, match="--input"):
        sources.inputs(shapes)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("mnist:data", "mnist:{here}/data"),
        ("imagefolder:/data", "imagefolder:/data"),
        ("net.py:build", "{here}/net.py:build"),
        ("timm:resnet18", "timm:resnet18"),
        ("lenet5", "lenet5"),
        ("package.module:function", "package.module:function"),
        ("digits", "digits"),
    ],
)
def test_paths_in_specs_become_absolute(spec: str, expected: str) -> None:
    assert sources.absolute(spec) == expected.format(here=Path.cwd())


class Asks(nn.Module):
    """Runs on images of one size alone."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * side * side, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1))


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (4, 224)])
def test_an_input_is_guessed_from_the_first_layer_and_said(
    channels: int, side: int, caplog: pytest.LogCaptureFixture
) -> None:
    network = Asks(channels, side)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    guess = sources.SourceModel(network, None, "net.py:build").inputs
    assert guess.shape == (1, channels, side, side)
    assert f"net.py:build: run on 1x{channels}x{side}x{side}: channels as its first layer has them" in caplog.text
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_input_that_can_not_be_guessed_is_asked_for() -> None:
    with pytest.raises(UsageError, match="what it takes is not known; give --input"):
        _ = sources.SourceModel(Asks(3, 37), None, "net.py:build").inputs
    assert sources.SourceModel(nn.Sequential(nn.Linear(7, 2)), None, "n").inputs.shape == (1, 7)


class Late(nn.Module):
    """Its first layer by name runs last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 2, 1)
        self.stem = nn.Conv2d(channels, 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.stem(images)).mean((2, 3))
        return made


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    from PIL import Image

    for name in ("ape", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGBA", (9, 9), (number, 50, 90, 128)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def opened(image_folder: Path, taken: int, **options: Any) -> Any:
    bundle = sources.data(f"imagefolder:{image_folder}", {"size": 8, **options})
    file = image_folder.parent / "late.py"
    file.write_text("from tests.runfile.test_sources import Late as build")
    return sources.open_model(f"{file}:build", {"channels": taken}, bundle=bundle)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_folders_of_images_have_the_channels_of_the_first_layer_that_runs(image_folder: Path, channels: int) -> None:
    found = opened(image_folder, channels)
    assert found.inputs.shape == (1, channels, 8, 8)
    for part in (found.data.train, found.data.validation, found.data.test):
        assert part[0][0].shape == found.data.input_shape == (channels, 8, 8)
    assert len(found.data.normalise.mean) == channels
    assert not found.model.stem._forward_pre_hooks
    again = opened(image_folder, channels, channels=channels).data  # the same said by the option
    assert torch.equal(again.test[0][0], found.data.test[0][0])


def test_the_option_of_channels_rules_over_the_network(image_folder: Path) -> None:
    for option in ({"channels": 3}, {"mean": [0.1, 0.2, 0.3]}):
        with pytest.raises(UsageError, match=r"fails on inputs of shape \(1, 3, 8, 8\), of DataBundle.input_shape"):
            opened(image_folder, 1, **option)


def test_a_network_of_other_channels_than_images_have_is_refused(image_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"late\.py:build: stem takes 6 channels, and imagefolder reads images of 1"):
        opened(image_folder, 6)
