"""Weights are read into a model from every usual file; one that doesn't fit is refused, and nothing changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur.errors import CheckpointError, UsageError
from secateur.runfile.weight_files import load_weights


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def write_safetensors(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({k: v.clone() for k, v in state.items()}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_torch(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module.model."])
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_weights_are_found_under_every_usual_wrapping(
    tmp_path: Path, prefix: str, nest: str | None, write: Any
) -> None:
    trained, fresh = small(), small()
    nn.init.constant_(trained[1].running_mean, 3.0)  # type: ignore[index]
    state: Any = {prefix + key: value for key, value in trained.state_dict().items()}
    if nest is not None and write is write_torch:
        state = {nest: state, "epoch": 7}
    load_weights(fresh, write(state, tmp_path / "weights.pth"))
    for key, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_a_prefix_of_the_model_itself_stays(tmp_path: Path) -> None:
    trained = nn.ModuleDict({"module": nn.Linear(2, 2)})
    fresh = nn.ModuleDict({"module": nn.Linear(2, 2)})
    load_weights(fresh, write_torch(trained.state_dict(), tmp_path / "w.pth"))
    assert torch.equal(fresh["module"].weight, trained["module"].weight)


class Foreign:
    """Anything but tensors: must never be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a foreign object was unpickled",))


def damaged(path: Path) -> Path:
    write_torch(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:200])
    return path


def text(path: Path) -> Path:
    path.write_text("no weights")
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p, ["no such file"]),
        (lambda p: p.parent, ["can't be read"]),
        (lambda p: write_torch(Foreign(), p), ["never unpickled", "torch.save(model.state_dict()"]),
        (lambda p: write_torch({"epoch": 3}, p), ["expected a state dict"]),
        (lambda p: write_torch([1, 2], p), ["expected a state dict"]),
        (lambda p: write_torch({}, p), ["expected a state dict"]),
        (damaged, []),
        (text, []),
        (lambda p: text(p.with_suffix(".safetensors")), []),
        (
            lambda p: write_torch({"0.weight": torch.zeros(2, 1, 3, 3), "fc": torch.zeros(1)}, p),
            ["missing (0.bias, …)", "1 unexpected (fc)"],
        ),
        (
            lambda p: write_torch({**small().state_dict(), "0.weight": torch.zeros(4, 1, 3, 3)}, p),
            ["0.weight has shape (4, 1, 3, 3) in the file and (2, 1, 3, 3)"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(
    tmp_path: Path, make: Any, expected: list[str]
) -> None:
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = make(tmp_path / "weights.pth")
    with pytest.raises((UsageError, CheckpointError)) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in expected:
        assert part in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_from_before_batches_were_counted_are_read(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))

    model = build()
    model(torch.randn(2, 1, 5, 5))
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "old.safetensors")
    fresh = build()
    load_weights(fresh, tmp_path / "old.safetensors")
    for key, value in state.items():
        assert torch.equal(fresh.state_dict()[key], value)
    assert int(fresh[1].num_batches_tracked) == 0
