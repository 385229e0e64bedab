from pathlib import Path

import pytest

from bench import side_by_side


def test_both_tools_prune_and_are_timed() -> None:
    ours = side_by_side.work("secateur", "squeezenet1_1")
    assert set(ours) == {*side_by_side.PARTS, "all but score", "all", "removed"}
    assert all(seconds >= 0 for seconds in ours.values())
    assert sum(ours[part] for part in side_by_side.PARTS) == pytest.approx(ours["all"])
    theirs = side_by_side.work("torch-pruning", "squeezenet1_1")
    assert theirs["all"] > 0
    assert theirs["removed"] == pytest.approx(ours["removed"], abs=0.02)


def test_a_ratio_is_the_median_of_pairs_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    seconds = {"secateur": iter((1.0, 4.0, 2.0)), "torch-pruning": iter((3.0, 4.0, 10.0))}

    def run(tool: str, checkout: Path, network: str, limit: float) -> dict[str, float]:
        asked.append(tool)
        return {"all": next(seconds[tool]), "removed": 0.5}

    monkeypatch.setattr(side_by_side, "run", run)
    lines, ratios = side_by_side.compare("net", "torch-pruning", Path(), rounds=3, limit=1)
    assert asked == ["secateur", "torch-pruning", "torch-pruning", "secateur", "secateur", "torch-pruning"]
    assert ratios == {"all": 3.0}
    assert lines == ["| net | all | 2.000 | 4.000 | 3.00 | 50.0 | 50.0 |"]


def test_another_checkout_is_the_one_that_runs_or_the_row_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "secateur").mkdir()
    (tmp_path / "secateur" / "__init__.py").write_text("raise ImportError('the other one')\n")
    found = side_by_side.run("secateur", tmp_path, "squeezenet1_1", limit=120)
    assert found == "ImportError: the other one"
