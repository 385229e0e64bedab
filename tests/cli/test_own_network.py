"""A small network of one's own, with its data in a file, on the command line: what a newcomer stumbles over."""

import importlib
import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.cli.commands import main
from secateur.deploy import timing
from secateur.engine import summary
from secateur.runfile import config, configured_run, sources, weight_files

NETWORK = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from secateur.data import DataBundle

def build(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3),
    )

class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(*build(width))

class Bare(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return self.images[index]

def digits():
    images, labels = load_digits(n_class=3, return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)

def load():
    images, labels = digits()
    parts = [TensorDataset(images[a:b], labels[a:b]) for a, b in ((0, 300), (300, 400), (400, None))]
    return DataBundle("own", *parts, (1, 8, 8), ("0", "1", "2"))

def bare():
    images, _ = digits()
    return DataBundle("bare", *(Bare(images[a:b]) for a, b in ((0, 300), (300, 400), (400, None))), (1, 8, 8), ())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network's file and trained weights."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "net.py").write_text(NETWORK)
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    images, labels = scope["digits"]()  # type: ignore[operator]
    torch.manual_seed(0)
    network: nn.Module = scope["build"]()  # type: ignore[operator]
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[:300]), labels[:300]).backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "trained.pth")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as the working directory, for one test alone."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAINED = ["net.py:build", "--weights", "trained.pth"]
DATA = ["--data", "net.py:load"]


def test_accuracy_that_falls_by_much_is_warned_of(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *TRAINED, *DATA, "--macs", "0.9", "--method", "l2", "--json"]) == 0
    shown = capsys.readouterr()
    values = json.loads(shown.out)
    fall = 100 * (values["before"]["test"] - values["after"]["test"])
    assert values["before"]["test"] > 0.9
    assert fall > 5
    said = f"prune: accuracy falls by {fall:.1f} points: 'secateur compress' prunes and trains it back; or let less go."
    assert values["warnings"] == [said]
    assert shown.err == f"warning: {said}\n"
    assert main(["prune", *TRAINED, *DATA, "--macs", "0.05", "--method", "l2", "-o", "small.safetensors"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "nothing was saved" not in shown.out


def test_weights_that_nobody_gave_are_said_to_be_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["prune", "net.py:Net", *DATA, "--macs", "0.2", "--method", "l2"], ["evaluate", "net.py:Net", *DATA]):
        assert main(words) == 0
        assert capsys.readouterr().err.startswith(
            f"warning: {words[0]}: no --weights, so that the weights are those that net.py:Net makes, random ones"
        )


def test_prune_without_a_file_to_write_says_that_nothing_is_saved(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *TRAINED, "--input", "1x1x8x8", "--macs", "0.2"]) == 0
    assert "nothing was saved; --out FILE" in capsys.readouterr().out


def test_the_command_to_go_on_with_trusts_what_the_first_one_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(run: config.RunConfig, *_: object, **__: object) -> None:
        config.save(run, Path(run.run_dir or "") / "run.yaml")
        raise KeyboardInterrupt

    monkeypatch.setattr(configured_run, "start", stopped)
    assert main(["compress", *TRAINED, *DATA, "--run-dir", "own run"]) == 130
    assert f"go on with: secateur resume '{here}/own run' --trust\n" in capsys.readouterr().err
    assert main(["compress", "lenet5", "--data", "digits", "--run-dir", "known"]) == 130
    assert capsys.readouterr().err.endswith(f"go on with: secateur resume {here}/known\n")


@pytest.mark.slow
def test_times_before_and_after_are_taken_in_turns_and_noise_is_called_noise(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio = [1.0]

    def in_turns(calls: dict[int, object], threads: int, *_: object) -> tuple[dict[int, object], dict[int, str]]:
        assert list(calls) == [0, 1]
        before = [1.0, 2.0, 1.5, 1.2]
        times = before, [ratio[0] * b + 0.05 * (-1) ** i for i, b in enumerate(before)]
        return {n: SimpleNamespace(raw_times=t, median=statistics.median(t)) for n, t in enumerate(times)}, {}

    monkeypatch.setattr(summary, "interleaved", in_turns)
    words = [*TRAINED, *DATA, "--method", "l2", "--macs", "0.1", "--epochs", "0", "--device", "cpu"]
    for name, value, said in (("noise", 0.98, "within noise"), ("faster", 0.5, "−")):
        ratio[0] = value
        assert main(["compress", *words, "--run-dir", name]) == 0
        (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CPU latency")]
        assert row.rpartition("│")[2].strip().startswith(said)
        report = json.loads((here / name / "result.json").read_text())
        assert report["final"]["latency_within_noise"] is (value > 0.9)
    assert main(["trace", "net.py:build", "--weights", "faster/model.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == report["final"]["macs"]


def test_prune_takes_data_without_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = ["--data", "net.py:bare", "--macs", "0.2", "--method", "l2", "--compensate", "bn"]
    assert main(["prune", *TRAINED, *bare]) == 0
    shown = capsys.readouterr()
    assert "note: accuracy was not measured, as bare holds no labels" in shown.out
    assert "next: the same with --data" not in shown.out
    known = sources.open_model("resnet20", bundle=sources.data("net.py:bare")).model
    assert known(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_what_the_network_takes_is_kept_in_its_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time of a forward pass at 224x224 says nothing of a network for images of 8x8."""
    once = ["prune", *TRAINED, *DATA, "--macs", "0.1", "--method", "l2", "-o", "small.safetensors", "--json"]
    assert main(once) == 0
    macs = json.loads(capsys.readouterr().out)["after"]["macs"]
    assert main(["trace", "net.py:build", "--weights", "small.safetensors", "--json"]) == 0
    shown = capsys.readouterr()
    assert (json.loads(shown.out)["macs"], shown.err) == (macs, "")
    assert main(["trace", "net.py:build", "--weights", "small.safetensors", "--input", "1x1x16x16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] > 3 * macs
    # A file without that, such as one of an earlier version, is read; what is not known is said to be a guess.
    network, plans = weight_files.filled(sources.model("net.py:build").model, "net.py:build", {}, "small.safetensors")
    sc.save(network, plans, "plain.safetensors")
    assert main(["trace", "net.py:build", "--weights", "plain.safetensors"]) == 0
    assert capsys.readouterr().err == (
        "warning: net.py:build: run on 1x1x224x224: channels as its first layer has them, height and width guessed; "
        "give --input SHAPE for another.\n"
    )
    sc.save(network, plans, "large.safetensors", extra={"input": ["1x1x99999x99999"]})
    assert main(["trace", "net.py:build", "--weights", "large.safetensors"]) == 1
    assert "which is too large; give --input" in capsys.readouterr().err


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a package be as if it were not installed."""
    real = importlib.import_module

    def imported(name: str) -> object:
        if name == package:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr("secateur.deploy.failures.importlib.import_module", imported)


def test_what_needs_onnx_names_the_extra_and_what_does_without(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without("onnx", monkeypatch)
    small = [*TRAINED, "--input", "1x1x8x8"]
    for words, more in (
        (["prune", *small, "--latency", "0.3"], ", or measure in PyTorch (--runtime eager)"),
        (["benchmark", *small, "--backend", "onnxruntime", "-o", "times.json"], ""),
    ):
        assert main(words) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"needs it: pip install '.[onnx]' in Secateur's checkout{more}.\n" in shown.err
        assert shown.err.count("\n") == 1
    assert not (here / "times.json").exists()


def test_benchmark_runs_the_batch_of_its_input(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "cpu_peak_bytes", lambda _, __, sizes: [1 for _ in sizes])
    words = ["benchmark", *TRAINED, "--rounds", "2", "--json", "--input"]
    for given, sizes in ((["64x1x8x8"], [64]), (["1x1x8x8"], [1, 8]), (["64x1x8x8", "--batch-size", "2"], [2])):
        assert main([*words, *given]) == 0
        assert [row["batch_size"] for row in json.loads(capsys.readouterr().out)["rows"]] == sizes


@pytest.mark.slow
def test_the_log_of_one_round_counts_one_round(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "l2", "--macs", "0.1", "--set", "final_epochs=1", "--set", "finetune_epochs=0"]
    words += ["--set", "fraction=0.9", "--device", "cpu", "--run-dir", "run"]
    assert main(["compress", *TRAINED, *DATA, *words]) == 0
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    for line, begin, end in zip(
        lines,
        ("unpruned network: ", "round 1: ", "round 1: accepted", "fine-tuning at the end, epoch 1/1: ", "result: "),
        ("round 1", "accept the round", "fine-tune at the end", "measure the result", "write the result"),
        strict=True,
    ):
        assert line.startswith(begin)
        assert line.endswith(f"; next: {end}")


def test_export_needs_the_shape_that_the_file_is_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *TRAINED, "--out", "whole.pt2"]) == 2
    assert "nothing tells the shape of what net.py:build takes" in capsys.readouterr().err
    assert not (here / "whole.pt2").exists()
