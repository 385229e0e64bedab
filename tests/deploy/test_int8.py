import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.deploy import int8
from secateur.deploy.int8 import Int8Report

torchao = pytest.importorskip("torchao", reason="the int8 extra is not installed")
pytest.importorskip("onnxscript", reason="the onnx extra is not installed")


class Net(nn.Module):
    """A shortcut whose channels lie apart in memory, as those of CIFAR's ResNets do, and maps that are flattened.

    One ReLU is called at two places, as in torchvision's ResNets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 4, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        z = self.second(y)
        z += y[:, :, ::2, ::2]
        return self.head(self.act(z)[:, :, ::2, ::2].flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def labelled(net: nn.Module, count: int = 96) -> list[tuple[Tensor, Tensor]]:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = net(images).argmax(1)
    return list(zip(images.split(16), labels.split(16), strict=True))


def quantised_by_hand(weight: Tensor, most: int) -> Tensor:
    """Round each filter to whole multiples of its largest weight over ``most``."""
    rounded = torch.empty_like(weight)
    for i, one in enumerate(weight):
        scale = one.abs().max() / most
        rounded[i] = (one / scale).round() * scale
    return rounded


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_an_int8_file_is_measured_beside_its_fp32_file_and_the_unpruned_network(
    net: Net, kind: str, tmp_path: Path
) -> None:
    small = sc.prune(net, torch.randn(2, 3, 8, 8), sc.Target(macs=0.3)).model
    data = labelled(net)
    path = tmp_path / f"net.{kind}"
    report = sc.export(small, path, int8=True, data=data, calibration=40, against=net)
    assert (report.calibrated_on, report.measured_on, report.batch_size) == (40, 56, 8)
    assert [row.network for row in report.files] == ["fp32", "unpruned fp32", "int8"]
    assert report["int8"].file_bytes == path.stat().st_size
    rest = torch.cat([x for x, _ in data])[40:]
    labels = torch.cat([y for _, y in data])[40:]
    with torch.no_grad():
        expected = small.eval()(rest)
    outputs = {"onnx": _onnx, "pt2": _pt2}[kind](path, rest)
    error = ((outputs - expected).square().sum() / expected.square().sum()).sqrt().item()
    assert report["int8"].error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 0.1
    assert report["int8"].accuracy == pytest.approx((outputs.argmax(1) == labels).float().mean().item())
    assert report["fp32"].accuracy == pytest.approx((expected.argmax(1) == labels).float().mean().item())
    assert report["unpruned fp32"].accuracy == 1.0
    assert report["fp32"].speed_up == 1.0
    assert not any("can't lower" in note for note in report.notes)


def _onnx(path: Path, images: Tensor) -> Tensor:
    from secateur.deploy.onnx_file import OnnxModel

    return OnnxModel(path)(images)


def _pt2(path: Path, images: Tensor) -> Tensor:
    return torch.export.load(path).module()(images)


@pytest.mark.slow
def test_a_pt2_file_holds_int8_weights_alone_and_runs_lowered(net: Net, tmp_path: Path) -> None:
    from secateur.deploy.int8_pt2 import lowered

    path, data = tmp_path / "net.pt2", labelled(net)
    sc.export(net, path, int8=True, data=data, calibration=32)
    program = torch.export.load(path)
    weights = [t for t in program.state_dict.values() if t.dim() > 1]
    assert {t.dtype for t in weights} == {torch.int8}
    assert len(weights) == 3
    images = data[0][0]
    fast, plain = lowered(path, (images,)), program.module()
    assert any("onednn" in str(node.target) for node in fast.graph.nodes)
    with torch.no_grad():
        scale = plain(images).abs().max()
        assert (fast(images) - plain(images)).abs().max() < 0.03 * scale


@pytest.mark.slow
def test_onnx_weights_take_seven_bits_a_channel(net: Net, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "net.onnx"
    sc.export(net, path, int8=True, data=labelled(net), calibration=32)
    stored = {i.name: torch.tensor(numpy_helper.to_array(i)) for i in onnx.load(path).graph.initializer}
    (name,) = [n for n, t in stored.items() if t.dtype == torch.int8 and t.shape == net.second.weight.shape]
    assert stored[name].abs().max() <= 64
    scale = stored[name.replace("_quantized", "_scale")]
    found = stored[name] * scale[:, None, None, None]
    torch.testing.assert_close(found, quantised_by_hand(net.second.weight.detach(), 63.5), rtol=0, atol=2e-3)


def test_calibration_takes_the_first_images_and_measuring_the_others() -> None:
    images = torch.arange(40.0)[:, None].expand(40, 3)
    seen = int8.read(list(images.split(10)), None, 17)
    assert [b.args[0][:, 0].tolist() for b in seen.calibration] == [[*range(10)], [*range(10, 17)]]
    assert [b.args[0][:, 0].tolist() for b in seen.rest] == [[*range(17, 20)], [*range(20, 30)], [*range(30, 40)]]
    seen = int8.read(list(images.split(10)), [images[:5]], 40).fixed(4)
    assert [b.size for b in seen.calibration] == [4] * 8
    assert [b.args[0][:, 0].tolist() for b in seen.rest] == [[0, 1, 2, 3]]


def test_a_stream_of_images_is_read_no_further_than_needed() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.zeros(8, 3)

    assert sum(b.size for b in int8.read(endless(), [torch.zeros(1, 3)], 20).calibration) == 20


IMAGES = [torch.zeros(8, 3, 8, 8)] * 4
WRONG: dict[str, tuple[dict[str, Any], type[sc.SecateurError], str]] = {
    "no data": ({"data": None}, sc.UsageError, "pass data"),
    "too few asked for": ({"data": IMAGES, "calibration": 4}, sc.UsageError, "calibrate on 16 images or more"),
    "too few there": ({"data": IMAGES, "calibration": 64}, sc.DataError, "64 images are .* the data hold 32"),
    "none left": ({"data": IMAGES, "calibration": 32}, sc.DataError, "no image is left"),
    "an empty test": ({"data": IMAGES, "calibration": 32, "test": []}, sc.DataError, "test holds no images"),
    "a format": ({"data": IMAGES, "format": "tflite"}, sc.UsageError, "unknown export format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_line_and_leaves_nothing(net: Net, case: str, tmp_path: Path) -> None:
    given, kind, words = WRONG[case]
    with pytest.raises(kind, match=words) as caught:
        sc.export(net, tmp_path / "net.pt2", int8=True, **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_data_without_int8_is_refused(net: Net, tmp_path: Path) -> None:
    with pytest.raises(sc.UsageError, match="pass int8=True"):
        sc.export(net, tmp_path / "net.pt2", IMAGES[0], data=IMAGES)
    with pytest.raises(sc.UsageError, match="example_inputs is missing"):
        sc.export(net, tmp_path / "net.pt2")


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime.quantization"), ("pt2", "torchao")])
def test_a_missing_package_says_what_to_install(
    net: Net, kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def without(name: str) -> Any:
        if name.startswith(package):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr("secateur.deploy.failures.importlib.import_module", without)
    extra = "onnx" if kind == "onnx" else "int8"
    seen = int8.read(IMAGES, None, 16)
    with pytest.raises(sc.UsageError, match=re.escape(f"pip install '.[{extra}]'")):
        int8.quantise(kind, tmp_path / "net", tmp_path / f"q.{kind}", seen, ((IMAGES[0],), {}), True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_network_without_layers_in_int8_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(sc.ExportError, match=r"net\.\w+: (nothing was quantised|can't be quantised)"):
        sc.export(nn.Tanh(), tmp_path / f"net.{kind}", int8=True, data=IMAGES, calibration=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_fixed_batch_is_calibrated_and_measured_at_its_size(net: Net, tmp_path: Path) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(4, 5)

    torch.manual_seed(0)
    report = sc.export(
        Fixed(), tmp_path / "net.pt2", torch.randn(4, 3, 8, 8), dynamic_batch=False, int8=True,
        data=[torch.randn(10, 3, 8, 8) for _ in range(4)], calibration=20,
    )  # fmt: skip
    assert (report.calibrated_on, report.measured_on, report.batch_size) == (16, 16, 4)


@pytest.mark.parametrize(
    ("before", "after", "said"), [(0.9, 0.85, ["int8 loses 5.0 points of accuracy"]), (0.9, 0.895, [])]
)
def test_lost_accuracy_is_said(before: float, after: float, said: list[str]) -> None:
    rows = [int8.FileFigures(n, 1, a, e, 1.0, 1.0) for n, a, e in (("fp32", before, None), ("int8", after, 0.5))]
    report = Int8Report(Path("x"), "onnx", tuple(rows), 16, 16, 8, ())
    assert int8._losses(report) == said


def test_lost_output_is_said_where_there_are_no_labels() -> None:
    rows = [int8.FileFigures(n, 1, None, e, 1.0, 1.0) for n, e in (("fp32", None), ("int8", 0.5))]
    assert int8._losses(Int8Report(Path("x"), "onnx", tuple(rows), 16, 16, 8, ())) == ["int8 changes the output by 50%"]
