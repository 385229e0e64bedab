import itertools
import math
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from secateur.errors import DataError
from secateur.report import read_run
from secateur.report.charts import charts, comparison, pareto_front, total_memory
from secateur.report.correlation import absolute_correlation, heat_maps
from secateur.report.figures import Figure, Series, Tone, write
from secateur.report.plotly import specification
from secateur.report.reading import Layer
from tests.report.synthetic import write_run

FIGURES = ["history", "macs", "filters", "sensitivity", "predictions", "throughput", "memory", "correlation"]


def test_total_memory_is_the_papers_sum() -> None:
    layers = [(6, 3, 4, 5, 7), (8, 3, 2, 7, 9)]  # output side, kernel, inputs ignored by eq. 4, c_in, c_out
    records, expected = [], 0
    for side, kernel, _, c_in, c_out in layers:
        records.append(
            Layer(
                module="c", macs=0, parameters=kernel * kernel * c_in * c_out, out_channels=c_out, positions=side * side
            )
        )
        expected += 4 * side * side * c_out * 16 + 4 * kernel * kernel * c_in * c_out
    assert total_memory(records, 16) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_pareto_front_is_what_no_point_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)
    for i, (cost, metric) in enumerate(points):
        beaten = False
        for c, m in points:
            if (c < cost and m >= metric) or (c <= cost and m > metric):
                beaten = True
        assert (i in front) != beaten
    assert front


def test_correlation_equals_a_slow_loop_and_a_constant_filter_has_none() -> None:
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.25
    rho = absolute_correlation(weight)
    for i, j in itertools.product(range(5), repeat=2):
        a, b = weight[i].flatten().double().numpy(), weight[j].flatten().double().numpy()
        a, b = a - a.mean(), b - b.mean()
        scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
        expected = 1.0 if i == j else abs(float((a * b).sum())) / scale if scale else 0.0
        assert float(rho[i, j]) == pytest.approx(expected, abs=1e-12)


def test_a_wide_layer_is_shown_by_the_largest_correlation_of_each_block(tmp_path: Path) -> None:
    weight = torch.randn(300, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    weight[250] = -weight[7]
    save_file({"deep.conv.weight": weight, "fc.weight": torch.zeros(3, 4)}, tmp_path / "w.safetensors")
    (shown,) = heat_maps(tmp_path / "w.safetensors")
    rho = np.abs(np.corrcoef(weight.flatten(1).numpy()))
    np.fill_diagonal(rho, 0)
    assert shown.module == "deep.conv"
    assert shown.cell == 4
    assert len(shown.before) == 75
    assert shown.before[62][1] == pytest.approx(1.0, abs=0.005)
    assert shown.before[3][9] == pytest.approx(rho[12:16, 36:40].max(), abs=0.006)
    assert shown.max_before == pytest.approx(rho.max())


def test_heat_maps_are_capped_or_named(tmp_path: Path) -> None:
    save_file({f"c{i}.weight": torch.randn(3, 2, 3, 3) for i in range(9)}, tmp_path / "w.safetensors")
    assert [m.module for m in heat_maps(tmp_path / "w.safetensors", limit=3)] == ["c0", "c4", "c8"]
    assert [m.module for m in heat_maps(tmp_path / "w.safetensors", layers=["c5"])] == ["c5"]
    with pytest.raises(DataError, match="no convolution 'c9'"):
        heat_maps(tmp_path / "w.safetensors", layers=["c9"])


def test_every_figure_is_valid_plotly_and_its_table_holds_every_number(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, seed=i, lost=0.003 * (i + 1))) for i, name in enumerate("ab")]
    figures = [*charts(runs[0]), *comparison(runs)]
    assert [f.id for f in figures] == [*FIGURES, "pareto", "kept"]
    for figure in figures:
        go.Figure(_named_colours(specification(figure)))
        cells = [cell for row in figure.table().rows for cell in row]
        assert all(y in cells for series in figure.series for y in series.y)
        assert figure.summary.endswith(".")


def test_the_history_tells_reverted_rounds_from_accepted_ones(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=8))
    history = charts(run)[0]
    reverted = next(s for s in history.series if s.tone is Tone.REVERTED)
    assert reverted.labels == ["round 4, reverted", "round 8, reverted"]
    floor = next(s for s in history.series if s.tone is Tone.LIMIT)
    assert floor.y[0] == pytest.approx(run.result.baseline.validation - 0.005)


def test_no_least_accuracy_is_drawn_where_a_target_rules(tmp_path: Path) -> None:
    history = charts(read_run(write_run(tmp_path / "run", latency=0.4)))[0]
    assert [s.name for s in history.series if s.tone is Tone.LIMIT] == []


def test_the_axis_of_accuracy_shows_tenths_of_a_point(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", lost=0.0005))
    far = run.history[0].model_copy(update={"metric_dropped": 0.31})
    history = charts(run.model_copy(update={"history": [far, *run.history[1:]]}))[0]
    axis = specification(history)["layout"]["yaxis"]
    assert axis["tickformat"] == ",.1%"
    low, high = axis["range"]
    assert 0.01 <= high - low < 0.06
    kept = [s.y for s in history.series if s.tone in (Tone.AFTER, Tone.LIMIT)]
    assert all(low < y < high for values in kept for y in values)
    assert history.summary.endswith("Below the axis: 3 before fine-tuning, the lowest 31.0%.")


def test_sensitivity_is_marked_where_the_run_has_cut(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    drawn = next(f for f in charts(run) if f.id == "sensitivity")
    assert [s.name for s in drawn.series] == ["conv3", "conv2", "conv1", "chosen"]
    cut = {label.partition(":")[0]: x for label, x in zip(drawn.series[-1].labels, drawn.series[-1].x, strict=True)}
    before, after = run.result.baseline.widths, run.result.final.widths
    assert cut == {name: pytest.approx(1 - after[name] / before[name]) for name in before}


def test_predictions_stand_against_what_was_measured_at_the_same_setting(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", latency=0.4))
    drawn = next(f for f in charts(run) if f.id == "predictions")
    asked, by_macs, by_sum, line = drawn.series
    assert (list(asked.x), list(asked.y), asked.labels) == ([0.62], [0.66], ["onnxruntime, batch 8, 1 thread"])
    assert set(by_macs.x) == {run.result.final.macs / run.result.baseline.macs}
    assert list(by_macs.y) == [pytest.approx(0.55)] * 12
    before, after = (total_memory(s.layers, 32) for s in (run.result.baseline, run.result.final))
    assert by_sum.x[by_sum.labels.index("cpu, eager, 1 thread, batch 32")] == after / before
    assert list(line.x) == list(line.y)
    assert "60.0% was to be left at onnxruntime, batch 8, 1 thread" in drawn.summary


def test_a_point_given_twice_keeps_its_own_row() -> None:
    figure = Figure("f", "t", "s.", "x", "y", [Series("a", [1, 1, 2], [3.0, 4.0, 5.0], "points", Tone.AFTER)])
    assert [row[-1] for row in figure.table().rows] == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (12_345_678, "quantity", "12.3 M"),
        (999, "quantity", "999"),
        (0.91731, "percent", "91.73%"),
        (1_092_664, "bytes", "1.09 MB"),
        (None, "percent", "–"),
        (float("nan"), "decimal", "–"),
        (0.00123456, "decimal", "0.00123"),
        (1234567, "decimal", "1,234,567"),
        (True, "text", "yes"),
        (0, "quantity", "0"),
    ],
)
def test_numbers_are_written_for_people(value: float, form: str, text: str) -> None:
    assert write(value, form) == text


def _named_colours(value):
    if isinstance(value, dict):
        return {key: _named_colours(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_named_colours(inner) for inner in value]
    return "#123456" if isinstance(value, str) and value.startswith("$") else value
