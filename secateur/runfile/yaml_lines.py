"""A YAML file as values, and the line on which each of its keys stands, so that a message can name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from secateur.errors import UsageError


def parsed(path: Path) -> tuple[yaml.Node | None, dict[str, Any]]:
    """Return the nodes of a YAML file, for line numbers, and the mapping that it holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_doubled(tree, path)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UsageError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a configuration is a mapping such as 'model: lenet5', found {_kind(values)}.")
    return tree, values


def line_of(tree: yaml.Node | None, location: list[str]) -> int | None:
    """Line, counted from 1, of the key at ``location``, or of the last mapping on the way to it."""
    line = None
    for part in location:
        if not isinstance(tree, yaml.MappingNode):
            break
        found = next(((k, v) for k, v in tree.value if k.value == part), None)
        if found is None:
            break
        line, tree = found[0].start_mark.line + 1, found[1]
    return line


def _refuse_doubled(node: yaml.Node | None, path: Path) -> None:
    """Refuse a key that stands twice in one mapping: YAML readers keep the last and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise UsageError(f"{path}:{line}: {name}: already given in line {seen[name]}; remove one.")
            seen[name] = line
            _refuse_doubled(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_doubled(value, path)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
