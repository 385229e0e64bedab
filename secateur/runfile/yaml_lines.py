"""A YAML file as values, and the line on which each of its keys stands, so that a message can name it.

A file is looked through before anything is made of it, so that none takes more time or memory than a configuration
can need: an anchor's node counts as often as it is referred to, and is visited once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from secateur.errors import UsageError

BYTES = 1 << 20
"""The longest file that is read."""
VALUES = 100_000
"""The most keys and values that a file may hold, those behind references counted each time."""
DEPTH = 50
"""How deep mappings and lists may be nested."""
DIGITS = 40
"""The longest number."""

_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


def parsed(path: Path) -> tuple[yaml.Node | None, dict[str, Any]]:
    """Return the nodes of a YAML file, for line numbers, and the mapping that it holds.

    Raises:
        UsageError: If the file can't be read, is no YAML, gives a key twice, holds more than a configuration can need
            (:data:`BYTES`, :data:`VALUES`, :data:`DEPTH`, :data:`DIGITS`), or is no mapping.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > BYTES:
        raise UsageError(f"{path}: holds {len(content)} bytes; a configuration holds {BYTES} at most.")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            _Look(path).at(tree)
        values = yaml.safe_load(text)
    except RecursionError:
        raise UsageError(f"{path}: is nested more than {DEPTH} deep.") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # the last two of explicit tags, as in !!int x
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{where}: not YAML: {what}") from error
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


class _Look:
    """A walk through the nodes of a file, each once, that refuses what a configuration can't need."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[int, tuple[int, int] | None] = {}
        """Of each node that was visited, the values in and below it, and how many levels these are; None while it is
        visited."""

    def at(self, node: yaml.Node) -> tuple[int, int]:
        """Return the number of values in and below a node, and how many levels these are."""
        if id(node) in self.seen:
            known = self.seen[id(node)]
            if known is None:
                raise self._refusal(node, "refers to itself; write it out.")
            return known
        self.seen[id(node)] = None
        below: list[yaml.Node] = []
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
        elif node.tag not in _PLAIN:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise self._refusal(node, f"not YAML of a configuration: a {kind}; write a mapping or a list.")
        elif isinstance(node, yaml.MappingNode):
            self._refuse_doubled(node)
            below = [inner for pair in node.value for inner in pair]
        else:
            below = list(node.value)
        found = [self.at(inner) for inner in below]
        size, depth = 1 + sum(s for s, _ in found), 1 + max((d for _, d in found), default=0)
        if size > VALUES:
            raise self._refusal(node, f"holds more than {VALUES} values, those behind references counted each time.")
        if depth > DEPTH:
            raise self._refusal(node, f"is nested more than {DEPTH} deep.")
        self.seen[id(node)] = size, depth
        return size, depth

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        kind = node.tag.rpartition(":")[2]
        if node.tag not in _PLAIN:
            raise self._refusal(node, f"not YAML of a configuration: a {kind}; put it in quotes if a text is meant.")
        if kind in ("int", "float") and len(node.value) > DIGITS:
            raise self._refusal(node, f"is a number of {len(node.value)} characters; {DIGITS} are the most.")

    def _refuse_doubled(self, node: yaml.MappingNode) -> None:
        """Refuse a key that stands twice in one mapping: YAML readers keep the last and say nothing."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._refusal(key, "is a key, and no name; keys are names.")
            name, line = key.value, key.start_mark.line + 1
            if name in seen:
                raise self._refusal(key, f"already given in line {seen[name]}; remove one.")
            seen[name] = line

    def _refusal(self, node: yaml.Node, what: str) -> UsageError:
        name = f"{node.value[:DIGITS]}: " if isinstance(node, yaml.ScalarNode) else ""
        return UsageError(f"{self.path}:{node.start_mark.line + 1}: {name}{what}")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
