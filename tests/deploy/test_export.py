import builtins
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.deploy.export import export
from secateur.deploy.onnx_file import OnnxModel
from secateur.errors import DataError, ExportError, UsageError

onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
pytest.importorskip("onnxscript", reason="the onnx extra is not installed")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # branches here
            return super().forward(x)
        return x


class FixedBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)).view(2, 8))


class NoOnnxOperator(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return torch.linalg.lu_factor(y.T @ y + torch.eye(8))[0]  # has no ONNX form


class Several(Net):
    def forward(self, x: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        return {"y": super().forward(x) * mask[:, None], "x": x + 1}


def _line(cls: type, words: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(i for i, text in enumerate(lines, 1) if words in text)}"


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [1, 4])
def test_an_exported_file_computes_the_network_at_any_batch_size(suffix: str, batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net().train()
    model.norm.eval()
    report = export(model, tmp_path / f"net{suffix}", torch.randn(batch, 3, 8, 8))
    assert report.file_bytes == (tmp_path / f"net{suffix}").stat().st_size
    assert report.relative_error <= 1e-5
    assert len(report.batch_sizes) >= 2
    assert model.training
    assert not model.norm.training
    assert [p.name for p in tmp_path.iterdir()] == [f"net{suffix}"]
    x = torch.randn(7, 3, 8, 8)
    if suffix == ".pt2":
        found = torch.export.load(tmp_path / "net.pt2").module()(x)
    else:
        found = OnnxModel(tmp_path / "net.onnx", threads=1)(x)
    torch.testing.assert_close(found, model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_keyword_arguments_and_nested_outputs(suffix: str, tmp_path: Path) -> None:
    report = export(Several(), tmp_path / f"net{suffix}", {"x": torch.randn(2, 3, 8, 8), "mask": torch.ones(2)})
    assert report.batch_sizes == (1, 2, 3)


@pytest.mark.slow
def test_a_smaller_network_is_a_smaller_file(tmp_path: Path) -> None:
    sizes = {}
    for width in (16, 64):
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        sizes[width] = [
            export(model, tmp_path / f"n{s}", torch.randn(2, 3, 8, 8)).file_bytes for s in (".pt2", ".onnx")
        ]
    saved = 4 * (27 * 48 + 48 + 48 * 9 * 64)
    for small, large in zip(sizes[16], sizes[64], strict=True):
        assert large - small == pytest.approx(saved, rel=0.02)


CASES = {
    "branching": (
        Branching,
        ".pt2",
        lambda: f"{_line(Branching, '# branches here')}: aten.item can't be exported: .*branches",
    ),
    "no onnx operator": (
        NoOnnxOperator,
        ".onnx",
        lambda: f"{_line(NoOnnxOperator, '# has no ONNX form')}: aten.linalg_lu_factor.* ONNX",
    ),
    "fixed batch": (FixedBatch, ".onnx", lambda: r"fixes its batch size .*constant 2.*--fixed-batch"),
}


@pytest.mark.parametrize("case", ["branching", pytest.param("no onnx operator", marks=pytest.mark.slow), "fixed batch"])
def test_what_cannot_be_exported_names_operator_and_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    cls, suffix, words = CASES[case]
    target = tmp_path / f"net{suffix}"
    target.write_bytes(b"an older file")
    with pytest.raises(ExportError) as caught:
        export(cls(), target, torch.randn(2, 3, 8, 8))
    assert re.search(words(), str(caught.value))
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"an older file"
    assert list(tmp_path.iterdir()) == [target]


def test_a_fixed_batch_exports_when_asked(tmp_path: Path) -> None:
    report = export(FixedBatch(), tmp_path / "net.pt2", torch.randn(2, 3, 8, 8), dynamic_batch=False)
    assert report.batch_sizes == (2,)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    class Drifting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x) * (1 + 0.001 * type(self).calls)

    with pytest.raises(ExportError, match="computes something else: output 0 differs"):
        export(Drifting(), tmp_path / "net.pt2", torch.randn(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    export(Net(), tmp_path / "missing" / "deep" / "net.pt2", torch.randn(2, 3, 8, 8))
    assert [p.name for p in (tmp_path / "missing" / "deep").iterdir()] == ["net.pt2"]


@pytest.mark.slow
def test_what_onnx_runtime_lacks_is_named_by_its_operator(tmp_path: Path) -> None:
    resized = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3)).double()
    with pytest.raises(ExportError, match=r"^aten\.upsample_nearest2d: the exported file can't be loaded again: ") as e:
        export(resized, tmp_path / "net.onnx", torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert str(tmp_path) not in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["net.tflite", "net", "file/net.pt2"])
def test_a_wrong_target_is_a_usage_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
        export(Net(), tmp_path / name, torch.randn(2, 3, 8, 8))


def test_a_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    monkeypatch.setattr(
        "secateur.deploy.failures.importlib.import_module",
        lambda name: (_ for _ in ()).throw(ImportError(name)) if name == "onnxscript" else real(name),
    )
    with pytest.raises(UsageError, match=r"onnxscript is not installed.*pip install '\.\[onnx\]'"):
        export(Net(), tmp_path / "net.onnx", torch.randn(2, 3, 8, 8))


def test_a_pt2_file_does_not_hold_the_images_it_was_made_from(tmp_path: Path) -> None:
    images = torch.randn(500, 3, 8, 8)
    assert export(Net(), tmp_path / "net.pt2", images[:2]).file_bytes < images.nbytes / 4


@pytest.mark.slow
def test_a_file_that_is_no_onnx_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(DataError, match=r"bad.onnx: ONNX Runtime can't load"):
        OnnxModel(tmp_path / "bad.onnx")
