"""A run configuration is typed: what it accepts it gives back, what it refuses it explains in one line."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import secateur as sc
from secateur.cli.commands import app
from secateur.engine import Settings
from secateur.errors import UsageError
from secateur.runfile import config

MINIMAL = "model: lenet5\ndata: digits\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, MINIMAL))
    assert (loaded.model, loaded.data) == ("lenet5", "digits")
    for name, field in config.RunConfig.model_fields.items():
        if not field.is_required():
            assert getattr(loaded, name) == field.get_default(call_default_factory=True)


@given(
    st.fixed_dictionaries(
        {"model": st.text(min_size=1), "data": st.text(min_size=1), "tolerance": st.floats(0, 100)},
        optional={
            "seed": st.integers(0, 2**32),
            "model_options": st.dictionaries(st.text(), st.integers() | st.booleans() | st.text()),
            "target": st.fixed_dictionaries({"macs": st.floats(0.01, 0.99)}),
            "input": st.lists(st.sampled_from(["1x3x8x8", "x=1x2"])),
            "settings": st.fixed_dictionaries({}, optional={"widths": st.just([{"conv1": 4}]), "merge": st.booleans()}),
            "baseline": st.fixed_dictionaries({"epochs": st.integers(1, 9), "lr": st.floats(1e-6, 1)}),
        },
    )
)
def test_saved_and_loaded_is_the_same(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> None:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    original = config.build(values)
    config.save(original, path)
    assert config.load(path) == original
    assert [p.name for p in path.parent.iterdir()] == ["run.yaml"], "a partial file was left"


def test_the_command_line_goes_before_the_file_and_merges_mappings(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "tolerance: 1\nsettings: {pairs: 3, lr: 0.1}\n")
    loaded = config.load(path, {"tolerance": 0.25, "settings": {"lr": 0.5}, "data": "mnist:there"})
    assert loaded.tolerance == 0.25
    assert loaded.data == "mnist:there"
    assert (loaded.settings.pairs, loaded.settings.lr) == (3, 0.5)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (MINIMAL + "tolerence: 1\n", 3, ["tolerence: no such key", "did you mean tolerance?"]),
        (MINIMAL + "zzz: 1\n", 3, ["zzz: no such key", "known are round_to, min_channels"]),
        (MINIMAL + "baseline:\n  epocs: 3\n", 4, ["baseline.epocs: no such key", "did you mean epochs?"]),
        (MINIMAL + "target:\n  mac: 0.5\n", 4, ["target.mac: no such key", "did you mean macs?"]),
        (MINIMAL + "target: {}\n", 3, ["give exactly one of macs, params, channels, memory and latency; found none"]),
        (MINIMAL + "target: {macs: 1.5}\n", 3, ["target.macs", "less than 1", "1.5"]),
        (MINIMAL + "tolerance: -1\n", 3, ["tolerance", "greater than or equal to 0", "-1"]),
        (MINIMAL + "seed: often\n", 3, ["seed", "valid integer", "'often'"]),
        (MINIMAL + "target: {macs: 0.5, params: 0.5}\n", 3, ["found macs, params"]),
        (MINIMAL + "settings:\n  form: pear\n", 4, ["settings.form", "'pair'", "found 'pear'"]),
        (MINIMAL + "settings:\n  fraktion: 1\n", 4, ["settings.fraktion: no such key; did you mean fraction?"]),
        (MINIMAL + "settings: {skip: conv1}\n", 3, [":3: settings.skip: no such key; it is an option", "--skip, or"]),
        (MINIMAL + "settings: {min_width: 2}\n", 3, ["settings.min_width: no such key; it is min_channels"]),
        (MINIMAL + "settings: {allocaton: global}\n", 3, ["did you mean allocation?"]),
        (MINIMAL + "min_width: 2\n", 3, ["min_width: no such key"]),
        (MINIMAL + "round_to: 0\n", 3, [":3: round_to"]),
        (MINIMAL + "allocation: loudest\n", 3, [":3: allocation: ", "found 'loudest'"]),
        (MINIMAL + "settings: {fraction: 2}\n", 3, [":3: settings.fraction: is in (0, 1), found 2."]),
        (MINIMAL + "settings:\n  lr: 0.1\n  fraction: 2\n", 5, [":5: settings.fraction: is in (0, 1), found 2."]),
        (MINIMAL + "baseline: {epochs: 0}\n", 3, [":3: baseline.epochs: must be at least 1, found 0."]),
        (MINIMAL + "baseline:\n  lr: -1\n", 4, [":4: baseline.lr: must be above 0, found -1.0."]),
        ("model: lenet5\n", None, ["data: missing", "add 'data: …'"]),
        ("modle: lenet5\ndata: digits\n", 1, ["modle: no such key", "did you mean model?"]),
        (MINIMAL + "model: vgg16\n", 3, ["model: already given in line 1"]),
        (MINIMAL + "baseline: {lr: 1, lr: 2}\n", 3, ["lr: already given in line 3"]),
        ("- lenet5\n", None, ["mapping", "found a list"]),
        ("", None, ["mapping", "found nothing"]),
        ("lenet5\n", None, ["mapping", "found a str"]),
        ("model: [unclosed\n", 2, ["not YAML"]),
        ("model: !!python/object/apply:os.getcwd []\n", 1, ["not YAML"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, line: int | None, expected: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        config.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    for part in expected:
        assert part in message


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        config.load(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="can't be read"):
        config.load(binary)


def test_what_the_command_line_overrides_is_not_laid_to_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "baseline: {epochs: 3}\nseed: -1\n")
    with pytest.raises(UsageError, match=r"^baseline\.epochs: must be at least 1, found 0\."):
        config.load(path, {"baseline": {"epochs": 0}, "seed": 1})
    with pytest.raises(UsageError, match=r"^tolerance: .*found -3"):
        config.load(path, {"tolerance": -3, "seed": 1})
    with pytest.raises(UsageError, match=rf"^{re.escape(str(path))}:4: seed: .*found -1"):
        config.load(path, {"baseline": {"epochs": 2}})
    with pytest.raises(UsageError, match=r"^baseline\.epocs: no such key; did you mean epochs"):
        config.load(path, {"baseline": {"epocs": 2}, "seed": 1})


def test_values_of_the_command_line_are_checked_too() -> None:
    with pytest.raises(UsageError, match=r"^baseline\.epochs: must be at least 1, found 0\.$"):
        config.build({"model": "lenet5", "data": "digits", "baseline": {"epochs": 0}})
    with pytest.raises(UsageError, match=r"^data: missing; give --data or a --config file that has it\.$"):
        config.build({"model": "lenet5"})
    with pytest.raises(UsageError, match=r"^tolerance: .*found -3"):
        config.build({"model": "lenet5", "data": "digits", "tolerance": -3})


def test_several_findings_are_counted() -> None:
    with pytest.raises(UsageError, match=r"\(2 more like this\.\)$"):
        config.build({"model": "lenet5", "data": "digits", "tolerance": -3, "seed": -1, "batch_size": 0})


def test_a_configuration_cannot_be_changed_after_it_was_checked() -> None:
    built = config.build({"model": "lenet5", "data": "digits"})
    with pytest.raises(ValidationError, match="frozen"):
        built.seed = 3  # type: ignore[misc]


def test_the_schema_names_every_key_with_its_description() -> None:
    schema = json.loads(config.schema())
    assert set(schema["properties"]) == set(config.RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["round_to"]["description"].startswith("Kept channels are a multiple of this")
    for section in (schema, schema["$defs"]["TargetConfig"]):
        for name, field in section["properties"].items():
            assert field.get("description"), f"{name} has no description"


def test_written_yaml_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    config.save(config.build({"model": "lenet5", "data": "digits", "input": ["1x1x28x28"]}), path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["input"] == ["1x1x28x28"]
    assert "weights" not in content


def test_numbers_that_yaml_takes_for_words_are_numbers(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, MINIMAL + "settings: {lr: 1e-3}\nbaseline: {weight_decay: 5e-4}\n"))
    assert (loaded.settings.lr, loaded.baseline.weight_decay) == (1e-3, 5e-4)


def test_a_lone_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, MINIMAL + "settings: {widths: {conv1: 4}, rounds: 2}\nskip: fc\n"))
    assert loaded.settings.widths == ({"conv1": 4},)
    assert (loaded.skip, loaded.settings.rounds) == (("fc",), (2,))


def test_both_files_take_the_options_of_a_plan_alike(tmp_path: Path) -> None:
    text = "round_to: 8\nmin_channels: 2\nmax_ratio: {conv1: 0.5}\nratios: {conv2: 0.25}\nskip: fc1\n"
    path = written(tmp_path, MINIMAL + text + "allocation: global\ninexact: true\n")
    run, once = config.load(path), config.load_prune(path)
    assert run.options == once.options
    assert run.options == sc.Options(8, 2, {"conv1": 0.5}, {"conv2": 0.25}, ("fc1",), "global", True)
    assert config.load(path, run.options.plain()) == run


def test_a_file_for_prune_reaches_every_option_of_the_command(tmp_path: Path) -> None:
    command = typer.main.get_command(app).commands["prune"]  # type: ignore[attr-defined]
    parameters = {p.name: p for p in command.params}
    given = {
        "model": "lenet5", "model_options": {"hidden": 8}, "weights": "w", "data": "digits", "data_options": {"a": [1]},
        "input": ["1x1x28x28"], "method": "l1", "method_options": {"p": 2},
        "target": {"latency": 0.5, "batch": 8, "runtime": "eager", "threads": 2},
        "ratios": {"conv*": 0.5}, "max_ratio": {"*": 0.5, "Linear": 0}, "skip": ["conv1", "Linear"], "round_to": 8,
        "min_channels": 2, "allocation": "global", "inexact": True, "compensate": ["merge", "bn"],
        "batches": 2, "seed": 3, "out": "o",
    }  # fmt: skip
    assert set(given) == set(config.PruneConfig.model_fields)
    words = config.load_prune(written(tmp_path, yaml.safe_dump(given))).words()
    apart = {"model_flag", "config_file", "trust", "as_json", "macs", "params", "channels", "memory"}
    assert set(words) == set(parameters) - apart
    assert words["max_ratio"] == ["*=0.5", "Linear=0.0"]
    assert (words["data_option"], words["compensate"]) == (["a=[1]"], "merge,bn")
    for name, value in words.items():
        assert parameters[name].multiple == isinstance(value, list), name
    alone = config.load_prune(written(tmp_path, "max_ratio: 0.5\nskip: conv1\nround_to: auto\n")).words()
    assert alone == {"max_ratio": ["0.5"], "skip": ["conv1"], "round_to": "auto"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: lenet5\nratio: {conv1: 0.5}\n", ":2: ratio: no such key; did you mean ratios?"),
        ("ratios: {conv1: 1.5}\n", ":1: ratios.conv1: "),
        ("allocation: loudest\n", ":1: allocation: "),
        ("target: {macs: 0.5, params: 0.5}\n", ":1: target: give exactly one"),
        ("round_to: 0\n", ":1: round_to"),
        ("- conv1\n", "a configuration is a mapping"),
    ],
)
def test_a_bad_file_for_prune_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.load_prune(written(tmp_path, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_schema_knows_every_setting_of_the_engine() -> None:
    definitions = json.loads(config.schema())["$defs"]
    assert set(definitions["Settings"]["properties"]) == {f.name for f in fields(Settings)}
    assert set(definitions["Baseline"]["properties"]) == {f.name for f in fields(config.Baseline)}
    assert "share of a group" in definitions["Settings"]["properties"]["fraction"]["description"]


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join(['*' + before] * 9)}]\n" for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine anchors, each of nine times the one before: 387 million values where each is looked at whenever it is named."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "holds more than 100000 values, those behind references counted each time"),
        ("model_options: {a: &x [*x]}", "refers to itself"),
        ("model_options: " + "[" * 900, "nested more than 50 deep"),
        ("k0: &k0 [1]\n" + "".join(f"k{i}: &k{i} [*k{i - 1}]\n" for i in range(1, 60)), "more than 50 deep"),
        ("seed: " + "9" * 5000, "is a number of 5000 characters; 40 are the most"),
        ("seed: 0x" + "f" * 5000, "is a number of 5002 characters"),
        ("seed: " + ":".join(["59"] * 3000), "is a number of 8999 characters"),
        ("run_dir: 2026-99-99", "a timestamp; put it in quotes if a text is meant"),
        ("seed: !!int abc", "not YAML: invalid literal"),
        ("seed: !!bool maybe", "not YAML: 'maybe'"),
        ("seed: !!binary gICA", "a binary; put"),
        ("seed: !!python/object/apply:os.system [id]", "not YAML of a configuration: a python/object/apply:os.system"),
        ("model_options: {[1]: 2}", "is a key, and no name"),
        ("seed: " + "[" + "1, " * 400_000 + "1]", "a configuration holds 1048576 at most"),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_a_file_that_would_keep_its_reader_busy_is_refused_at_once(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for read in (config.load, config.load_prune):
        with pytest.raises(UsageError) as error:
            read(path)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000


def test_an_anchor_may_be_used(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: lenet5\ndata: digits\nmodel_options: &o {a: 1}\ndata_options: {<<: *o, b: 2}\n")
    assert config.load(path).data_options == {"a": 1, "b": 2}


def test_what_is_none_by_choice_is_none_when_read_back(tmp_path: Path) -> None:
    run = config.build({"model": "lenet5", "data": "digits", "settings": {"correlation_target": None}})
    config.save(run, tmp_path / "run.yaml")
    assert config.load(tmp_path / "run.yaml") == run
    assert config.build(config.plain(run)) == run
