"""A sweep's trials: how many, with which values, by which worker, and what becomes of those that end otherwise."""

import os
import re
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from sqlalchemy import Engine, event

from secateur.cli.commands import main
from secateur.engine import Event
from secateur.errors import DataError, RunError, SecateurError, UsageError
from secateur.runfile import configured_run, space, trials
from secateur.runfile.config import RunConfig
from secateur.runfile.search import SearchConfig
from secateur.runfile.sweep import Sweep, _Judge
from secateur.runfile.trials import Trial, Trials

HEAD = "model: lenet5\ndata: digits\n"
SPACE = """search:
  space:
    settings.lr: {low: 0.001, high: 0.1, log: true}
    settings.final_epochs: {low: 1, high: 4}
    method: [l1, l2]
  sampler: random
  trials: 3
"""


class Steps:
    """Shows nothing."""

    def __call__(self, *_: Any) -> None:
        """Show nothing."""

    @contextmanager
    def step(self, _: str) -> Iterator[None]:
        yield


@dataclass
class Runs:
    """Stands for runs: their accuracy hangs on the learning rate, and their MACs on the epochs."""

    asked: list[RunConfig] = field(default_factory=list)
    before: Callable[[int], None] = lambda _: None

    def start(self, run: RunConfig, _: Any, **__: Any) -> Any:
        self.asked.append(run)
        self.before(len(self.asked))
        final = {"validation": run.settings.lr, "macs": run.settings.final_epochs, "parameters": 7}
        return SimpleNamespace(report={"final": final})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave out what makes files survive a power cut."""

    def off(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF") if isinstance(connection, sqlite3.Connection) else None

    monkeypatch.setattr(os, "fsync", lambda _: None)
    event.listen(Engine, "connect", off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        yield
    event.remove(Engine, "connect", off)


def forget_signs_of_life(folder: Path) -> None:
    with sqlite3.connect(folder / "sweep/sweep.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00'")
    database.close()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(configured_run, "start", found.start)
    return found


def worker(folder: Path, text: str = SPACE, **options: Any) -> Sweep:
    file = folder / "run.yaml"
    file.write_text(HEAD + text)
    return Sweep(space.load(file), folder / "sweep", heartbeat=1, **options)


def drawn(found: Trials) -> list[dict[str, Any]]:
    return [trial.parameters for trial in found.trials]


@pytest.mark.slow
def test_workers_share_the_total_and_draw_what_one_would_have_drawn(runs: Runs, tmp_path: Path) -> None:
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    alone = worker(tmp_path / "one", total=4).work(Steps())
    shared: Any = None
    for total in (1, 3, 4, 4):
        shared = worker(tmp_path / "several", total=total).work(Steps())
    assert [trial.state for trial in shared.trials] == ["complete"] * 4
    assert drawn(shared) == drawn(alone)
    assert len({trial.parameters["settings.lr"] for trial in alone.trials}) == 4
    assert len(runs.asked) == 8
    folders = [Path(run.run_dir or "") for run in runs.asked[4:]]
    assert folders == [tmp_path / f"several/sweep/runs/{number:04d}" for number in range(4)]
    for run, trial in zip(runs.asked[:4], alone.trials, strict=True):
        of = trial.parameters
        assert (run.settings.lr, run.settings.final_epochs, run.method) == tuple(
            of[key] for key in ("settings.lr", "settings.final_epochs", "method")
        )
        assert trial.values == [run.settings.lr, run.settings.final_epochs]
        assert run.search is None
    assert trials.read(tmp_path / "one/sweep") == alone


@pytest.mark.slow
def test_an_interrupted_trial_is_given_back_with_its_values_and_its_folder(runs: Runs, tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    runs.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        worker(tmp_path).work(Steps())
    assert [trial.state for trial in trials.read(tmp_path / "sweep").trials] == ["complete", "waiting"]
    found = worker(tmp_path).work(Steps())
    assert [(trial.state, trial.attempts) for trial in found.trials] == [("complete", 1)] * 3
    interrupted, again = runs.asked[1:3]
    assert interrupted == again


@pytest.mark.slow
def test_a_dead_workers_trial_is_retried_until_it_has_killed_four(runs: Runs, tmp_path: Path) -> None:
    for _ in range(4):
        died = worker(tmp_path, total=1)
        attempt, _ = died._next()  # and nothing is ever heard of it again
        assert attempt is not None
        assert worker(tmp_path, total=1).work(Steps(), wait=False).of("running")
        forget_signs_of_life(tmp_path)
        died.storage.close()
    assert runs.asked == []
    found = worker(tmp_path, total=1).work(Steps())
    (trial,) = found.trials
    assert (trial.state, trial.attempts, trial.error) == ("failed", 4, "its worker died, 4 times in all")
    found = worker(tmp_path, total=1).work(Steps(), retry=True)
    (again,) = found.trials
    assert (again.state, again.attempts, again.parameters) == ("complete", 5, trial.parameters)
    assert runs.asked[0].run_dir == str(tmp_path / "sweep/runs/0000")


@pytest.mark.slow
def test_what_is_told_of_a_trial_that_was_taken_over_counts_once(runs: Runs, tmp_path: Path) -> None:
    slow = worker(tmp_path, total=1)
    attempt, _ = slow._next()
    assert attempt is not None
    forget_signs_of_life(tmp_path)
    found = worker(tmp_path, total=1).work(Steps())
    slow._tell(attempt, "COMPLETE", [0.9, 1.0])
    slow.storage.close()
    assert trials.read(tmp_path / "sweep") == found
    assert [(trial.state, trial.attempts) for trial in found.trials] == [("complete", 2)]


@pytest.mark.slow
def test_a_failed_trial_says_why_and_others_go_on(runs: Runs, tmp_path: Path) -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise RunError("out of\nreach.")

    runs.before = fail
    found = worker(tmp_path).work(Steps())
    assert [(t.state, t.error) for t in found.trials] == [
        ("complete", None),
        ("failed", "out of reach."),
        ("complete", None),
    ]
    again = worker(tmp_path).work(Steps(), retry=True)
    assert [trial.state for trial in again.trials] == ["complete"] * 3
    assert runs.asked[1] == runs.asked[3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DataError, RunError])
def test_a_worker_gives_up_where_nothing_works(kind: type[SecateurError], runs: Runs, tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise kind("no such data.")

    runs.before = fail
    with pytest.raises(kind, match=r"^sweep: 3 trials failed in a row.*no such data\. Put the cause right"):
        worker(tmp_path, total=9).work(Steps())
    assert len(runs.asked) == 3


@pytest.mark.slow
def test_an_error_of_the_program_is_not_swallowed(runs: Runs, tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise KeyError("typo")

    runs.before = fail
    with pytest.raises(KeyError, match="typo"):
        worker(tmp_path).work(Steps())
    assert [(t.state, t.error) for t in trials.read(tmp_path / "sweep").trials] == [("failed", "KeyError: 'typo'")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (SPACE.replace("0.1", "0.2"), "search.space.settings.lr.high 0.1, and 0.2"),
        (SPACE + "  objectives: accuracy\n", "search.objectives .*'macs'.*, and .*'accuracy'"),
        ("tolerance: 2\n" + SPACE, "tolerance 0.5, and 2.0"),
    ],
)
def test_another_space_or_other_objectives_are_refused(other: str, said: str, runs: Runs, tmp_path: Path) -> None:
    worker(tmp_path).work(Steps())
    with pytest.raises(UsageError, match=said):
        worker(tmp_path, other)
    (tmp_path / "sweep/sweep.yaml").unlink()  # the study knows it, too
    with pytest.raises(UsageError, match=said):
        worker(tmp_path, other)
    free = SPACE.replace("random", "tpe").replace("trials: 3", "trials: 4")
    assert len(worker(tmp_path, free).work(Steps()).trials) == 4


@pytest.mark.slow
def test_a_grid_takes_every_combination_once(runs: Runs, tmp_path: Path) -> None:
    text = SPACE.replace("{low: 0.001, high: 0.1, log: true}", "{low: 0.1, high: 0.3, step: 0.1}").replace(
        "random", "grid"
    )
    found = worker(tmp_path, text.replace("high: 4", "high: 2"), total=100).work(Steps())
    assert len(found.trials) == found.total == 3 * 2 * 2
    expected = [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2), (0.3, 1), (0.3, 2)]
    seen = sorted((round(t.parameters["settings.lr"], 9), t.parameters["settings.final_epochs"]) for t in found.trials)
    assert seen == sorted(expected * 2)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "qmc", "nsga2", "gp"])
def test_every_sampler_draws_within_the_space(sampler: str, runs: Runs, tmp_path: Path) -> None:
    found = worker(tmp_path, SPACE.replace("random", sampler), total=12).work(Steps())
    assert len({trial.parameters["settings.lr"] for trial in found.of("complete")}) > 8
    assert all(0.001 <= trial.parameters["settings.lr"] <= 0.1 for trial in found.trials)


def test_a_list_is_a_choice_and_keys_go_where_their_dots_say() -> None:
    base = RunConfig(model="lenet5", data="digits")
    search = SearchConfig(space={"settings.compensate": [["bn"], ["merge", "bn"]], "target": [{"macs": 0.5}]})
    (of,) = [cell for cell in space.cells(search) if "merge" in cell["settings.compensate"]]
    run = space.configured(base, space.drawn(search, of))
    assert run.settings.compensate == ("merge", "bn")
    assert run.target is not None
    assert run.target.macs == 0.5
    base = RunConfig(model="lenet5", data="digits", settings={"pairs": {"layer2": 1}})
    run = space.configured(base, {"settings.pairs.layer1.0": 2, "ratios.layer2.0.conv": 0.5, "settings.lr": 0.5})
    assert (run.settings.pairs, run.ratios, run.settings.lr) == (
        {"layer2": 1, "layer1.0": 2}, {"layer2.0.conv": 0.5}, 0.5,
    )  # fmt: skip
    kinds = space.distributions(
        SearchConfig(
            space={key: {"low": 1, "high": 3} for key in ("settings.strength", "settings.final_epochs", "seed")}
        )
    )
    assert [type(kind).__name__ for kind in kinds.values()] == ["FloatDistribution", *["IntDistribution"] * 2]


@pytest.mark.parametrize(
    ("objective", "told"), [("accuracy", [(2, 0.5), (3, 0.7), (4, 0.4), (5, 0.6)]), ("macs", [(3, 90.0)])]
)
def test_a_pruner_hears_what_is_measured_after_cuts_and_rounds(objective: str, told: list[tuple[int, float]]) -> None:
    heard: list[tuple[int, float]] = []
    attempt: Any = SimpleNamespace(
        report=lambda v, step: heard.append((step, v)), should_prune=lambda: len(heard) == len(told)
    )
    judge = _Judge(attempt, SearchConfig(space={"seed": [1]}, objectives=(objective,), pruner="median"))
    events = [
        Event("epoch", "finetune", 1, 1, record={"metric": 0.1, "macs": 100}),
        Event("cut", "drop", 1, 1, record={"metric": 0.5, "macs": 90}),
        Event("episode", "judge", 1, 1, record={"metric_tuned": 0.7, "macs": 90, "accepted": True}),
        Event("cut", "drop", 2, 1, record={"metric": 0.4, "macs": 80}),
        Event("episode", "judge", 2, 1, record={"metric_tuned": 0.6, "macs": 80, "accepted": False}),
    ]
    *first, last = events if objective == "accuracy" else events[:3]
    for each in first:
        judge(each)
    with pytest.raises(optuna.TrialPruned):
        judge(last)
    assert heard == told


def test_a_pruned_trial_is_no_failure(runs: Runs, tmp_path: Path) -> None:
    def prune(number: int) -> None:
        if number == 2:
            raise optuna.TrialPruned

    runs.before = prune
    found = worker(tmp_path, SPACE + "  objectives: accuracy\n  pruner: median\n").work(Steps())
    assert [trial.state for trial in found.trials] == ["complete", "pruned", "complete"]


def test_the_front_is_what_a_comparison_of_all_with_all_leaves() -> None:
    values = [[0.9, 5.0], [0.8, 4.0], [0.9, 6.0], [0.7, 4.0], [0.9, 5.0], [0.1, 1.0]]
    made = [Trial(number=n, state="complete", parameters={}, values=v, attempts=1) for n, v in enumerate(values)]
    found = Trials(study="s", storage="", objectives=["accuracy", "macs"], total=6, trials=made)
    beaten = {i for i, (a, m) in enumerate(values) for b, n in values if b >= a and n <= m and (b > a or n < m)}
    assert [trial.number for trial in found.front] == [0, 4, 1, 5]
    assert {trial.number for trial in found.front} == set(range(6)) - beaten


BAD = [
    ("", "missing; say what to vary"),
    ("search: {space: {}}\n", "search.space: dictionary should have at least 1 item"),
    ("search:\n  space: {settings.lr: 3}\n", "run.yaml:4: search.space: settings.lr is a list of choices or a range"),
    ("search:\n  space:\n    settings.lrr: [1]\n", "run.yaml:5: search.space.settings.lrr: settings.lrr: no such"),
    ("search:\n  space:\n    settings.lr: {low: 1, hihg: 2}\n", "run.yaml:5: .*range.hihg: no such key; did you mean"),
    ("search:\n  space:\n    settings.lr: {low: 2, high: 1}\n", "run.yaml:5: .*low is below high, found 2 and 1"),
    ("search:\n  space:\n    settings.lr: {low: 0, high: 1, log: true}\n", "a logarithmic range begins above 0"),
    ("search:\n  space:\n    settings.lr: {low: -1, high: 1}\n", "run.yaml:5: .*must be above 0, found -1.0"),
    ("search:\n  space:\n    method: [l1, l33]\n", "run.yaml:5: search.space.method: method: unknown method 'l33'"),
    ("search:\n  space:\n    data: [digits]\n", "data is the same in every trial"),
    ("search:\n  space: {seed: [1]}\n  objectives: speed\n", "run.yaml:5: search.objectives.0: should be 'accuracy', "),
    ("search:\n  space: {seed: [1]}\n  pruner: median\n", "run.yaml:5: search.pruner: Optuna prunes trials of"),
    ("search:\n  space: {settings.lr: {low: 0.1, high: 1}}\n  sampler: grid\n", "a grid takes choices, or a range"),
    ("search:\n  space:\n    method: [l1, mine.py:score]\n", "names code, which was not run: method: mine.py:score"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_wrong_file_is_one_line_and_nothing_is_begun(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(HEAD + text)
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')\n")
    assert main(["sweep", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://me:secret@host/x", "--storage mysql://…: is postgresql://USER@HOST/DATABASE, or sqlite:///FILE"),
        ("sqlite://", "is postgresql://"),
        ("no url", "is postgresql://"),
        ("postgresql://me:secret@localhost:1/x", r"storage postgresql://me:\*\*\*@localhost:1/x: can't be used: conn"),
        ("sqlite:////dev/null/x.db", "storage sqlite:////dev/null/x.db: can't be used"),
    ],
)
def test_a_wrong_storage_is_one_line_without_its_password(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(HEAD + SPACE)
    monkeypatch.setenv("SECATEUR_STORAGE", url)
    assert main(["sweep", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert "secret" not in error


@pytest.mark.slow
def test_a_command_shows_the_front_and_fails_where_nothing_was_completed(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(HEAD + SPACE)
    assert main(["sweep", "run.yaml", "-q"]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 trials: 3 complete" in said
    assert "secateur report sweeps/run" in said
    assert main(["compress", "--config", "run.yaml"]) == 2
    assert "search: is for 'secateur sweep'" in capsys.readouterr().err

    def stop(number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt
        raise RunError("out of reach.")

    runs.before = stop
    assert main(["sweep", "run.yaml", "-q", "--trials", "4"]) == 130
    assert "the same command goes on with it" in capsys.readouterr().err
    assert main(["sweep", "run.yaml", "-q", "--sweep-dir", "other", "--trials", "2"]) == 1
    assert "no trial was completed; 2 failed, the last: out of reach." in capsys.readouterr().err
