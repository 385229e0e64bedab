import statistics
import time

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from secateur.deploy.timing import BACKENDS, _speed_up, benchmark, choose_round_to, cpu_peak_bytes, environment
from secateur.errors import PlanError, UsageError


def _net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3, padding=1))


X = torch.randn(2, 3, 16, 16)


def test_every_setting_is_measured_in_pairs_and_macs_are_counted() -> None:
    models = _net(8), _net(16)
    result = benchmark(
        *models,
        example_inputs=X,
        batch_sizes=(1, 3),
        backends=("eager",),
        precisions=("fp32", "bf16"),
        memory_formats=("contiguous", "channels_last"),
        rounds=3,
        min_seconds=1e-4,
        memory=False,
    )
    assert len(result.rows) == 2 * 2 * 2 * 2
    assert not result.skipped
    assert len({(row.variant, row.setting) for row in result.rows}) == 16
    assert all(row.seconds > 0 and row.iqr >= 0 for row in result.rows)
    for width, name in ((8, "model"), (16, "against")):
        assert result.macs[name] == 16 * 16 * (27 * width + 9 * width * 8)
    assert all(s.theoretical == 2.0 and s.low <= s.measured <= s.high for s in result.speed_ups)
    assert next(p for p in models[0].parameters()).dtype == torch.float32
    halves = {row.precision: row.weight_bytes for row in result.rows if row.variant == "model"}
    assert halves["fp32"] == 2 * halves["bf16"] == 4 * sum(p.numel() for p in models[0].parameters())


def test_a_speed_up_is_the_median_of_the_rounds_ratios() -> None:
    before, after = [4.0, 8.0, 6.0, 100.0, 5.0], [2.0, 2.0, 2.0, 20.0, 5.0]
    spec = TaskSpec("call()", "pass")
    found = _speed_up(
        Measurement(1, before, spec), Measurement(1, after, spec), 2.0, ("eager", "cpu", "fp32", "contiguous", 1, 8)
    )
    assert found.measured == statistics.median([2, 4, 3, 5, 1])
    assert (found.low, found.high) == (1.5, 4.5)


@pytest.mark.slow
def test_onnx_runtime_says_what_it_does_not_run() -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    result = benchmark(
        _net(4),
        example_inputs=X,
        batch_sizes=(2,),
        backends=("onnxruntime",),
        precisions=("fp32", "bf16"),
        macs=(1, 1),
        rounds=2,
        min_seconds=1e-4,
    )
    assert [row.backend for row in result.rows] == ["onnxruntime"]
    assert [s.reason for s in result.skipped] == ["ONNX Runtime is measured on the CPU, in fp32, contiguous."]


def test_a_network_that_fails_at_a_batch_size_is_listed_not_lost() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, -1)

    result = benchmark(
        Fixed(),
        example_inputs=torch.randn(2, 3),
        batch_sizes=(2, 5),
        macs=(1, 1),
        rounds=2,
        min_seconds=1e-4,
        memory=False,
    )
    assert [row.batch_size for row in result.rows] == [2]
    assert "batch 5" in result.skipped[0].setting
    assert "shape" in result.skipped[0].reason


@pytest.mark.slow
def test_peak_memory_grows_with_the_feature_maps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    small, large = cpu_peak_bytes(model, torch.randn(2, 3, 64, 64), (4, 16))
    one_map = 4 * 64 * 64 * 64
    assert 4 * one_map * 0.9 < small < 4 * one_map * 4
    assert 16 * one_map * 0.9 < large < 16 * one_map * 4


def test_round_to_auto_takes_the_smallest_multiple_that_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    seconds = {
        (1, "contiguous"): 9.0,
        (1, "channels_last"): 8.0,
        (4, "contiguous"): 7.0,
        (4, "channels_last"): 5.1,
        (8, "contiguous"): 6.0,
        (8, "channels_last"): 5.0,
        (16, "contiguous"): 5.2,
        (16, "channels_last"): 5.3,
    }

    def prune(multiple: int) -> nn.Module:
        built.append(multiple)
        if multiple == 32:
            raise PlanError("target: cannot remove 50% of the macs.")
        return _net(multiple)

    def measured(calls: dict, *_: object) -> tuple[dict, dict]:
        assert [call().shape for call in calls.values()] == [(2, 8, 16, 16)] * 8
        return {key: Measurement(1, [seconds[key]] * 3, TaskSpec("call()", "pass")) for key in calls}, {}

    monkeypatch.setattr("secateur.deploy.timing.interleaved", measured)
    choice = choose_round_to(prune, X, threads=1)
    assert built == [1, 4, 8, 16, 32]
    assert (choice.round_to, choice.memory_format) == (4, "channels_last")
    assert choice.seconds == seconds
    assert set(choice.infeasible) == {32}
    with pytest.raises(PlanError, match="no candidate"):
        choose_round_to(prune, X, candidates=(32,))
    with pytest.raises(UsageError, match="positive"):
        choose_round_to(prune, X, candidates=(0,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": ("tensorrt",)}, "unknown backend 'tensorrt'"),
        ({"precisions": ("int4",)}, "unknown precision"),
        ({"memory_formats": ("blocked",)}, "unknown memory format"),
        ({"batch_sizes": (0,)}, "batch size is at least 1"),
        ({"threads": ()}, "number of threads is at least 1"),
        ({"devices": ("quantum",)}, "unknown device"),
        ({"clock": "sundial"}, "unknown clock"),
        ({"clock": "cpu", "threads": (2,)}, "with one thread"),
    ],
)
def test_bad_requests_are_usage_errors(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        benchmark(_net(4), example_inputs=X, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        benchmark(_net(4), example_inputs=X, devices=("cuda",))


def test_the_environment_names_what_a_time_depends_on() -> None:
    assert {"processor", "cores", "torch", "threads", "cpu_capability"} <= set(environment())
    assert BACKENDS == ("eager", "compile", "onnxruntime")


def test_the_cpu_clock_does_not_count_waiting() -> None:
    class Waiting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return x

    rows = {
        clock: benchmark(
            Waiting(),
            example_inputs=X,
            batch_sizes=(2,),
            macs=(1, 1),
            rounds=2,
            min_seconds=1e-4,
            memory=False,
            clock=clock,
        )
        .rows[0]
        .seconds
        for clock in ("wall", "cpu")
    }
    assert rows["cpu"] < rows["wall"] / 2
