"""The GPU's tables, in miniature on a CPU: rows resume, begin with one baseline, and stand beside others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_tables
from bench.gpu_tables import JOBS, Bench, Clock, Job
from bench.rows import Store
from secateur.runfile import config

TINY: dict[str, Any] = {
    "model": "lenet5", "model_options": {"widths": [4, 6], "hidden": 8}, "baseline": {"epochs": 1}, "batch_size": 64,
    "data_options": {"size": 16, "train_size": 100, "validation": 0.25},
    "settings": {"optimise_epochs": 1, "finetune_epochs": 1, "final_epochs": 1, "fraction": 0.25},
}  # fmt: skip


def test_every_row_of_tables_2_and_3_is_a_run_on_as_many_images(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tmp_path / "work", "cuda")
    assert [(job.table, job.paper) for job in JOBS if job.method == "cfp"] == [
        (2, 6.77), (2, 7.02), (3, 6.68), (3, 6.93), (3, 7.37),
    ]  # fmt: skip
    for job in JOBS:
        run, recipe = bench.run_of(job), config.load(gpu_tables.ROOT / "recipes" / f"{job.recipe}.yaml")
        assert (run.model, run.model_options, run.baseline) == (recipe.model, recipe.model_options, recipe.baseline)
        assert (run.settings.precision, run.settings.channels_last) == ("bf16", True)
        assert run.data_options["device"] == "cuda"
        if job.auto:
            assert run.method == "auto"
            assert run.target is not None
            assert run.target.macs == pytest.approx(float(job.auto["target"]["macs"]))
        else:
            assert replace(run.settings, precision="auto", channels_last="auto") == recipe.settings
            assert (run.target, run.skip) == (recipe.target, recipe.skip)
    assert len({bench.run_of(job).run_dir for job in JOBS}) == len(JOBS)


def test_a_call_ends_when_its_time_is_over() -> None:
    with pytest.raises(gpu_tables.OutOfTime), Clock(0.0).step("loading"):
        pass


@pytest.mark.slow
def test_rows_resume_and_share_a_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tables, "BATCHES", (1, 2))
    jobs = (
        Job(2, "half", "vgg16_cifar10_noopt_80", "cfp", 1.0, figures=True),
        Job(2, "half", "vgg16_cifar10_noopt_80", "auto", 1.0, gpu_tables._auto(0.3, 1)),
    )
    bench = Bench(Path(), tmp_path / "work", "cpu", kind="digits", given=TINY | {"target": {"macs": 0.3}})
    monkeypatch.setattr(Bench, "draw", lambda self, job: original(self, job, (1, 2)))
    stores = Store("t.jsonl", gpu_tables.TABLES.names, tmp_path), Store("f.jsonl", gpu_tables.FIGURES.names, tmp_path)
    assert gpu_tables.go_on(bench, jobs, -1, *stores) == gpu_tables.AGAIN
    assert stores[0].read() == []
    calls = iter(range(100))
    late = Clock.__call__

    def stopped(self: Clock, step: str, *rest: Any, **more: Any) -> None:
        if step == "compressing" and next(calls) == 6:
            raise gpu_tables.OutOfTime
        late(self, step, *rest, **more)

    monkeypatch.setattr(Clock, "__call__", stopped)
    assert gpu_tables.go_on(bench, jobs, 600, *stores) == gpu_tables.AGAIN, "in the middle of a row"
    assert gpu_tables.go_on(bench, jobs, 600, *stores) == 0
    rows = stores[0].read()
    assert [row["method"] for row in rows] == ["auto", "cfp"]
    assert rows[0]["before"] == rows[1]["before"], "one baseline"
    assert all(row["removed"] >= 30 and row["exact"] and not row["graphed"] for row in rows)
    assert {(row["network"], row["batch"]) for row in stores[1].read()} == {
        (network, batch) for network in ("original", "pruned") for batch in (1, 2)
    }
    assert gpu_tables.go_on(bench, jobs, 600, *stores) == 0, "nothing is left"


original = Bench.draw
