from pathlib import Path

import pytest

import secateur as sc
from bench.runs import Run, curve, main, table
from secateur.engine import compress
from tests.engine.nets import digits, trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    train, validation, test = digits(200)
    model = trained(epochs=2)
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name, method, settings in (
        ("cpu-small_digits_cfp--merge=true", "cfp", {"merge": True, "signed": True, "pairs": 2}),
        ("small_digits_l1", "l1", {"optimise": "none"}),
    ):
        compress(
            model, method, train=train, validation=validation, test=test, target=sc.Target(macs=0.3),
            run_dir=folder / name, correlation_target=None, finetune_epochs=1, **settings,
        )  # fmt: skip
        found.append(Run(folder / name))
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_run_is_named_by_its_recipe_and_options(runs: list[Run]) -> None:
    assert runs[0].command == "secateur compress --config recipes/cpu/small_digits_cfp.yaml --set merge=true"
    assert runs[1].command == "secateur compress --config recipes/small_digits_l1.yaml"


def test_every_figure_is_that_of_the_files(runs: list[Run]) -> None:
    lines = [line.replace("\\|", "") for line in curve(runs)]
    for run in runs:
        before, after = run.result["baseline"], run.result["final"]
        row = next(cells(line) for line in lines if line.startswith(f"| {run.label} |"))
        assert row[2] == f"{1 - after['macs'] / before['macs']:.2%}"
        assert [row[4], row[5].strip("*")] == [f"{part['test']:.2%}" for part in (before, after)]
        assert row[8] == f"{run.result['images']:,}"
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{run.label}, episode"))
        for record, line in zip(run.history, lines[start + 4 :], strict=False):
            assert cells(line)[:6] == [
                str(record["round"]), f"{1 - record['macs'] / before['macs']:.2%}",
                str(sum(map(len, record["removed"].values()))),
                *(f"{record[f'metric_{when}']:.2%}" for when in ("before", "dropped", "tuned")),
            ]  # fmt: skip
            if record["pairs"]:
                largest = [max(p[f"abs_rho_{when}"] for p in record["pairs"]) for when in ("before", "after")]
                assert cells(line)[7] == " → ".join(f"{rho:.3f}" for rho in largest)
            else:
                assert cells(line)[6:] == ["no pairs", "no pairs"]
    short = table(runs)
    assert [cells(line)[0] for line in short[2:]] == [run.label for run in runs]
    assert all("yes" in line for line in short[2:])


def test_a_section_is_written(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, note = tmp_path / "results.md", tmp_path / "note.md"
    note.write_text("What it means.")
    folders = [str(run.folder) for run in runs]
    options = ["--title", "Small", "--note", str(note), "--out", str(document)]
    monkeypatch.setattr("sys.argv", ["runs", "curve", "small", *folders, *options])
    main()
    text = document.read_text()
    assert text.startswith("<!-- begin: small -->\n## Small\n")
    assert "What it means." in text
    assert all(f"    {run.command}\n" in text for run in runs)
