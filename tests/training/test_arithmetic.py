"""Channels-last and half precision: what is decided where, and that the results are those of plain fp32."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.engine import Engine, Settings, compress, resume
from secateur.errors import UsageError
from secateur.models import resnet20
from secateur.training import arithmetic
from secateur.training.arithmetic import Arithmetic, decide, lay_back, lay_out, overruns
from secateur.training.stages import TrainingSettings, fit
from tests.engine.nets import Residual, Small, digits, trained

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes the CPU look like another."""

    def pretend(capability: str, bf16: bool = False) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return pretend


def images() -> Tensor:
    return torch.rand(2, 1, 8, 8)


def decided(model: nn.Module, inputs: Any, **asked: Any) -> tuple[str, bool]:
    found = decide(model, inputs, CPU, **asked)
    return found.precision, found.channels_last


@pytest.mark.parametrize(
    ("capability", "bf16", "expected"),
    [
        ("AVX2", False, ("fp32", True)),
        ("AVX512", False, ("fp32", True)),
        ("AVX512", True, ("bf16", True)),
        # The variable ATEN_CPU_CAPABILITY holds PyTorch to less than the CPU can do.
        ("AVX2", True, ("fp32", True)),
        ("DEFAULT", False, ("fp32", False)),
    ],
)
def test_the_machine_decides(machine: Any, capability: str, bf16: bool, expected: tuple[str, bool]) -> None:
    machine(capability, bf16)
    found = decide(Residual(), images(), CPU)
    assert (found.precision, found.channels_last) == expected
    assert found.reason.startswith(f"CPU with {capability}")


def test_this_machine_decides_as_its_flags_say() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no x86 CPU with AVX2")
    assert decided(Residual(), images()) == ("bf16" if "avx512_bf16" in flags else "fp32", True)


def test_what_is_asked_for_goes_before_the_machine(machine: Any) -> None:
    machine("AVX512", True)
    assert decided(Residual(), images(), precision="fp32") == ("fp32", True)
    assert decided(Residual(), images(), channels_last=False) == ("bf16", False)
    assert decided(Residual(), images(), precision="fp16", channels_last=True) == ("fp16", True)
    with pytest.raises(UsageError, match=r"precision: is one of fp32, bf16, fp16, found 'no'\."):
        decide(Residual(), images(), CPU, precision="no")


class Volumes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv3d(1, 3, 3), nn.ReLU(), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.rand(5, 4)),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten()), torch.rand(5, 2, 9)),
        (Volumes(), torch.rand(2, 1, 4, 4, 4)),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), images()),
        # One image without a batch around it.
        (nn.Conv2d(1, 3, 3), torch.rand(1, 8, 8)),
    ],
)
def test_networks_without_batches_of_images_are_trained_plainly(machine: Any, model: nn.Module, inputs: Tensor) -> None:
    machine("AVX512", True)
    assert decided(model, inputs) == ("fp32", False)
    # Asked for all the same, it does no harm.
    before = [p.stride() for p in model.parameters() if p.ndim != 4]
    lay_out(model, channels_last=True)
    assert [p.stride() for p in model.parameters() if p.ndim != 4] == before
    model(inputs)


class Viewing(Small):
    """Takes the batch's memory for contiguous, as many a first network does."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv2(self.bn1(self.conv1(x))), 2)
        out: Tensor = self.fc2(self.fc1(x.view(len(x), -1)))
        return out


class Striding(Small):
    """Reads its maps by their place in memory, and so gets others without failing."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return torch.as_strided(x, (len(x), 36), (192, 1))


class NotInHalf(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return (x * 1e30 if x.dtype == torch.float32 else x / 0).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "expected", "reason"),
    [
        (Viewing, ("bf16", False), r"contiguous, as in channels-last the network fails: view size"),
        (Striding, ("bf16", False), r"contiguous, as in channels-last the network computes something else"),
        (NotInHalf, ("fp32", True), r"fp32, as in bf16 the network overflows"),
    ],
)
def test_a_network_that_can_not_is_trained_plainly(
    machine: Any, network: type[nn.Module], expected: tuple[str, bool], reason: str
) -> None:
    machine("AVX512", True)
    model, inputs = network(), images()
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = decide(model, inputs, CPU)
    assert (found.precision, found.channels_last) == expected
    assert reason in found.reason
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(torch.equal(v, before[0][k]) and v.is_contiguous() for k, v in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("build", [Small, Residual, resnet20])
def test_channels_last_is_the_same_to_rounding(build: Any) -> None:
    torch.manual_seed(0)
    plain = build().double()
    fast = copy.deepcopy(plain)
    x, y = torch.rand(6, 3 if build is resnet20 else 1, 8, 8).double(), torch.arange(6)
    for model, way in ((plain, Arithmetic()), (fast, Arithmetic(channels_last=True))):
        fit(model, [(x, y)] * 2, epochs=2, settings=TrainingSettings(lr=0.05, momentum=0.9), arithmetic=way)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, fast.state_dict()[name], atol=1e-11), name


def test_only_weights_of_2d_convolutions_move_and_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3), nn.Conv3d(1, 2, 3), nn.LazyConv2d(2, 3))
    model.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    before = model[0].weight.detach().clone()
    changed = lay_out(model, channels_last=True)
    assert [id(w) for w, _ in changed] == [id(model[0].weight)]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    lay_back(changed)
    assert model[0].weight.is_contiguous()
    assert torch.equal(model[0].weight, before)


class Shortcut(nn.Module):
    """A residual block whose shortcut is a strided 1×1 convolution of few channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(channels, 16, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return (self.conv(x) + self.shortcut(x)).mean((2, 3))


@pytest.mark.parametrize(("capability", "fewest"), [("AVX2", 8), ("AVX512", 16)])
@pytest.mark.parametrize("asked", [True, False])
def test_a_stage_is_contiguous_where_onednn_would_write_past_its_memory(
    machine: Any, capability: str, fewest: int, asked: bool
) -> None:
    machine(capability, False)
    for channels in (1, fewest - 1, fewest, fewest + 1):
        model = Shortcut(channels)
        assert [overruns(m) for m in model.modules()] == [False, False, False, channels < fewest]
        # The network may come with its channels last, and is handed back so.
        model.to(memory_format=torch.channels_last)
        came = [p.stride() for p in model.parameters()]
        changed = lay_out(model, channels_last=asked)
        if channels < fewest:
            assert all(p.stride() == torch.empty(p.shape).stride() for p in model.parameters())
        else:
            assert not changed
        lay_back(changed)
        assert [p.stride() for p in model.parameters()] == came


OVERRUN = """
import sys, torch
from secateur.training.arithmetic import Arithmetic
from secateur.training.stages import fit
from tests.training.test_arithmetic import Shortcut
torch.set_num_threads(1)
x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
for channels in (1, 2, 3, 4, 5, 7):
    model = Shortcut(channels).to(memory_format=torch.channels_last)
    fit(model, [(x, y)] * 3, epochs=1, arithmetic=Arithmetic(channels_last=True))
"""


@pytest.mark.slow
def test_training_never_writes_past_its_memory() -> None:
    """In a process whose allocator checks, where there is one that does (glibc's); it dies at the first free."""
    debug = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
    if not debug.exists():
        pytest.skip("needs glibc's checking allocator")
    environment = {**os.environ, "LD_PRELOAD": str(debug), "GLIBC_TUNABLES": "glibc.malloc.check=3", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", OVERRUN], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_records_what_it_decided_and_keeps_to_it(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun where bf16 pays, killed, and taken up again on a machine where it does not."""
    train, validation, _ = digits(80)
    data = {"train": train, "validation": validation}
    options: dict[str, Any] = {
        "method": "cfp", "pairs": 3, "finetune_epochs": 2, "max_rounds": 1, "optimise_epochs": 1, "lr": 0.02,
    }  # fmt: skip
    machine("AVX512", True)
    compress(trained(epochs=2), run_dir=tmp_path / "whole", seed=3, tolerance=100, **data, **options)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["settings"]["precision"], config["settings"]["channels_last"]) == ("bf16", True)
    assert config["arithmetic"] == "CPU with AVX512, with AVX512-BF16"
    assert config["machine"]["capability"] == "AVX512"

    class Killed(BaseException):
        pass

    def killing(event: Any) -> None:
        if event.kind == "stage" and event.stage == "finetune" and event.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        compress(
            trained(epochs=2), run_dir=tmp_path / "cut", seed=3, tolerance=100, progress=killing, **data, **options
        )
    machine("DEFAULT")
    monkeypatch.setattr(arithmetic, "_rule", lambda *_: pytest.fail("decided a second time"))
    resume(tmp_path / "cut", Small(), **data)
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_one_setting_turns_each_off(machine: Any) -> None:
    machine("AVX512", True)
    train, validation, _ = digits(80)
    for given, expected in (
        ({}, ("bf16", True)),
        ({"precision": "fp32"}, ("fp32", True)),
        ({"channels_last": False}, ("bf16", False)),
    ):
        engine = Engine(Small(), "cfp", train=train, validation=validation, settings=Settings.of(given))
        assert (engine.settings.precision, engine.settings.channels_last) == expected
    with pytest.raises(UsageError, match="precision: is one of auto, fp32, bf16, fp16, found 'no'"):
        Settings.of({"precision": "no"})
    with pytest.raises(UsageError, match="channels_last: is true, false or auto, found 'yes'"):
        Settings.of({"channels_last": "yes"})
