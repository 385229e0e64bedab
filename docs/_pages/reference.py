"""The reference of commands and of run files, made from the program itself.

``python -m docs._pages.reference`` writes the pages; ``tests/test_docs.py`` refuses pages that say something else.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import typer

from secateur import criteria
from secateur.cli import options
from secateur.cli.commands import app
from secateur.compensation.least_squares import refit
from secateur.data import DATASETS
from secateur.models import MODELS
from secateur.pruning.options import Options
from secateur.runfile import config

FOLDER = Path(__file__).parents[1] / "reference"
MADE = (
    "<!-- Made from the program by `python -m docs._pages.reference`; edit the help texts and docstrings instead. -->\n"
)

COMMANDS_HEAD = """# Commands

`secateur COMMAND --help`, or `-h`, prints the same, and `python -m secateur` is the same program where the script is
not on the path. Every option can be written `--name value` or `--name=value`; one that is called repeatable may be
given several times.

| to see | type |
|---|---|
| the version | `secateur --version` |
| the commands | `secateur --help` |
| the options of one | `secateur prune --help` |

An error is one line on standard error. The exit status is 0 for success, 1 for a request that failed on the way, 2 for
one that is wrong in itself, 130 after Ctrl-C. With the environment variable `SECATEUR_DEBUG=1` an unexpected error
shows its traceback, and warnings of other libraries are shown.
"""

FILE_HEAD = """# Run files

A run is a YAML file. `secateur compress --config run.yaml` reads one, and every run directory of the command keeps the
one that it was made by, as `run.yaml`; options beside `--config` go before the file's keys. `secateur prune
--config prune.yaml` reads a file of [its own keys](#a-file-for-prune).

```yaml
model: lenet5
data: digits
data_options: {train_size: 500}
target: {macs: 0.5}
settings: {finetune_epochs: 1, final_epochs: 4}
baseline: {epochs: 10}
```

A key that is misspelt is refused, with its line and the nearest key that there is. `secateur config run.yaml` checks a
file and prints it with every default filled in; `secateur config --schema` prints its JSON schema, for an editor that
completes YAML.
"""

SETTINGS = (
    "How `compress` prunes and trains; on the command line, `--set NAME=VALUE`; in Python, keywords of "
    "`secateur.compress`."
)
BASELINE = "How the network is trained first, where no weights are given; on the command line, `--baseline NAME=VALUE`."
SEARCH = (
    "What `secateur sweep` varies over its runs, and what it looks for: [Search over runs](../how-to/sweep.md). "
    "`secateur compress` refuses a file that has it."
)
DATA = (
    "On the command line, `--data-option NAME=VALUE`; in Python, keywords of `secateur.data.load`. A function of yours "
    "takes what its own parameters name."
)
MODEL = (
    "On the command line, `--model-option NAME=VALUE`. Classes, channels and size of the images follow the data unless "
    "they are given. Options of `torchvision:NAME` and `timm:NAME` are those of their own functions, e.g. "
    "`num_classes`."
)
CRITERION = (
    "Options of a method that is a criterion: the key `criterion` in `settings` of a run, `method_options` in a file "
    "for `prune`, `--method-option NAME=VALUE`, and keywords of `secateur.score` and `secateur.select`. Other criteria "
    "take none."
)
COMPENSATION = (
    "Options of `least_squares`, in `settings` beside `compensate`; keywords of `secateur.compensation.compensate` in "
    "Python."
)
PRUNE = "What `secateur prune --config FILE` reads. Keys with the same name mean the same."


def commands_page() -> str:
    """Return the page of all commands and options."""
    parts = [MADE, COMMANDS_HEAD]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        parts.append(_command(name, command))
    return "\n".join(parts)


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(
        ["secateur", name, "[OPTIONS]", *(f"[{p.metavar}]" if not p.required else p.metavar for p in arguments)]
    )
    rows = [(f"`{_cell(p.metavar)}`", _text(p.help)) for p in arguments]
    for p in command.params:
        if p.param_type_name == "option" and not p.hidden:
            rows.append((_flags(p), _text(p.help) + _default(p)))
    return f"## secateur {name}\n\n{_text(command.help)}\n\n```text\n{usage}\n```\n\n" + _table(
        "option", "meaning", rows
    )


def _flags(option: Any) -> str:
    names = " / ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else option.metavar or _kind(option.type_descriptor.annotation)
    return f"`{_cell(f'{names} {value}'.strip())}`"


def _kind(of: Any) -> str:
    return "|".join(map(str, get_args(of))) or {int: "N"}.get(of, of.__name__.upper())


def _default(option: Any) -> str:
    value = option.default
    if option.is_flag or value is None or value == [] or not option.show_default:
        return ""
    return f" Default: `{getattr(value, 'value', value)}`."


def file_page() -> str:
    """Return the page of all keys of a run's file and of a file for prune."""
    schema = json.loads(config.schema())
    sections = schema["$defs"]
    prune = config.PruneConfig.model_json_schema()
    for key, value in prune["properties"].items():
        if "description" not in value:
            value["description"] = schema["properties"][key]["description"]
    parts = [MADE, FILE_HEAD]

    def section(head: str, *said: str) -> None:
        parts.append("\n\n".join([f"## {head}", *said]))

    section("Keys of a run", _keys(schema))
    section("target", sections["TargetConfig"]["description"], _keys(sections["TargetConfig"]))
    section("settings", SETTINGS, _keys(sections["Settings"]))
    section("baseline", BASELINE, _keys(sections["Baseline"]))
    section("search", SEARCH, _keys(sections["SearchConfig"]))
    section("A range", sections["Range"]["description"], _keys(sections["Range"]))
    section("data_options", DATA, *(_called(f"data: {name}", of, skip=("root",)) for name, of in DATASETS.items()))
    section("model_options", MODEL, *_models())
    section("criterion", CRITERION, *_criteria())
    refitted = _called("compensate: least_squares", refit, skip=("original", "pruned", "plan", "data"))
    section("compensate_options", COMPENSATION, refitted)
    section("A file for prune", PRUNE, _keys(prune))
    return "\n".join(parts)


def _keys(section: Mapping[str, Any]) -> str:
    required = section.get("required", ())
    rows = []
    # Options of every plan stand in a base class, and come last here.
    own = sorted(section["properties"].items(), key=lambda item: item[0] in Options.__dataclass_fields__)
    for name, value in own:
        default = "required" if name in required else _shown(value.get("default", ...))
        rows.append((f"`{name}`", _type(value), default, _text(value.get("description", ""))))
    return _table("key", "value", "default", "meaning", rows)


def _shown(value: Any) -> str:
    if value is ... or value in (None, [], {}):
        return "–"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(value: Mapping[str, Any]) -> str:
    forms = value.get("anyOf") or value.get("oneOf")
    if forms:
        return " or ".join(dict.fromkeys(_type(v) for v in forms if v.get("type") != "null"))
    if "$ref" in value or "allOf" in value:
        return "mapping"
    if "enum" in value:
        return ", ".join(f"`{v}`" for v in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    kind = value.get("type", "")
    inner = value.get("items") or value.get("additionalProperties")
    if kind in ("array", "object") and isinstance(inner, Mapping):
        return f"{'list' if kind == 'array' else 'mapping'} of {_type(inner)}" if inner else "list"
    words = {
        "integer": "whole number",
        "string": "text",
        "boolean": "true, false",
        "array": "list",
        "object": "mapping",
    }
    return words.get(kind, kind) + _range(value)


def _range(value: Mapping[str, Any]) -> str:
    low = value.get("minimum", value.get("exclusiveMinimum"))
    high = value.get("maximum", value.get("exclusiveMaximum"))
    if low is None:
        return ""
    if high is None:
        return f" from {low:g} up" if "minimum" in value else f" above {low:g}"
    return f" in {'[' if 'minimum' in value else '('}{low:g}, {high:g}{']' if 'maximum' in value else ')'}"


def _called(title: str, function: Callable[..., Any], skip: Iterable[str] = (), documented: Any = None) -> str:
    """Return a table of a function's keywords, with what its docstring, or that of another, says of each."""
    said = arguments_said(inspect.getdoc(documented or function) or "")
    rows = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in skip:
            default = parameter.default
            shown = (
                "required"
                if default is parameter.empty
                else _shown(list(default) if isinstance(default, tuple) else default)
            )
            rows.append((f"`{name}`", shown, _text(said.get(name, ""))))
    return f"### {title}\n\n" + _table("option", "default", "meaning", rows)


def _models() -> list[str]:
    """Return a table for each class of the package's networks: the factories of one class take the same options."""
    by_class: dict[Any, list[str]] = {}
    for name, factory in MODELS.items():
        made = vars(inspect.getmodule(factory))[inspect.signature(factory).return_annotation]
        by_class.setdefault(made, []).append(name)
    return [_called(f"model: {', '.join(names)}", MODELS[names[0]], documented=of) for of, names in by_class.items()]


def own_criteria() -> list[str]:
    """Return the names of the criteria that the package itself defines."""
    return [name for name in criteria.names() if criteria.get(name).function.__module__.startswith("secateur.")]


def _criteria() -> list[str]:
    found = []
    for name in own_criteria():
        criterion = criteria.get(name)
        options_taken = sorted(criterion.takes(True) | criterion.takes(False))
        if not options_taken:
            continue
        functions = [f for f in (criterion.function, criterion.scores, criterion.per_batch) if f is not None]
        rows = []
        for option in options_taken:
            holder = next(f for f in functions if option in inspect.signature(f).parameters)
            texts = [arguments_said(inspect.getdoc(f) or "").get(option, "") for f in functions]
            rows.append(
                (
                    f"`{option}`",
                    _shown(inspect.signature(holder).parameters[option].default),
                    _text(next(filter(None, texts), "")),
                )
            )
        found.append(f"### method: {name}\n\n" + _table("option", "default", "meaning", rows))
    return found


def arguments_said(doc: str) -> dict[str, str]:
    """Return what the section ``Args:`` of a docstring says of each argument."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", doc, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else ():
        head = re.match(r"    \**(\w+): (.*)", line)
        if head:
            name = head[1]
            found[name] = head[2]
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def _text(text: str | None) -> str:
    """Turn a help text or a docstring into a cell of Markdown."""
    flat = " ".join((text or "").replace(options.CRITERIA, ", ".join(own_criteria())).split())
    flat = re.sub(r":\w+:`~?\.?([^`]+)`", r"``\1``", flat)
    pieces = re.split(r"(``.+?``|`[^`]+`)", flat)
    plain = (re.sub(r"([*_<>\[\]])", r"\\\1", piece) for piece in pieces[::2])
    code = [f"`{piece.strip('`')}`" for piece in pieces[1::2]]
    return _cell("".join(a + b for a, b in zip(plain, [*code, ""], strict=True)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(*given: Any) -> str:
    *head, rows = given
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES: Mapping[str, Callable[[], str]] = {"commands.md": commands_page, "run-file.md": file_page}
"""File -> what makes it."""


def main() -> None:
    """Write the pages."""
    for name, made in PAGES.items():
        (FOLDER / name).write_text(made(), encoding="utf-8")


if __name__ == "__main__":
    main()
