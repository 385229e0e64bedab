"""Pruned networks run the same elsewhere: OpenVINO and ExecuTorch, where their wheels are installed."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.models import CifarResNet

pytestmark = pytest.mark.slow


def needed(name: str) -> Any:
    """Import an optional runtime, whose own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name.split('.')[0]} is not installed or does not load: {error}")


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(8).eval()
    return sc.prune(model, torch.randn(2, 3, 32, 32), sc.Target(macs=0.5)).model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_openvino_runs_the_onnx_file(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    openvino = needed("openvino")
    sc.export(small, tmp_path / "net.onnx", images)
    found = openvino.compile_model(tmp_path / "net.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())
    torch.testing.assert_close(torch.from_numpy(found[0]), small(images), rtol=1e-4, atol=1e-5)


def test_openvino_runs_the_int8_onnx_file(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    openvino = needed("openvino")
    from secateur.deploy.onnx_file import OnnxModel

    data = list(torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(2)).split(16))
    sc.export(small, tmp_path / "net.onnx", int8=True, data=data, calibration=48)
    found = torch.from_numpy(openvino.compile_model(tmp_path / "net.onnx", "CPU")(images.numpy())[0])
    expected = OnnxModel(tmp_path / "net.onnx")(images)
    # The two round at other places, between layers.
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_executorch_runs_the_pt2_file(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    edge = needed("executorch.exir")
    xnnpack = needed("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    runtime = needed("executorch.runtime")
    sc.export(small, tmp_path / "net.pt2", images, dynamic_batch=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(tmp_path / "net.pt2")
        lowered = edge.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()]).to_executorch()
        loaded = runtime.Runtime.get().load_program(lowered.buffer)
        (found,) = loaded.load_method("forward").execute([images])
    torch.testing.assert_close(found, small(images), rtol=1e-3, atol=1e-4)
