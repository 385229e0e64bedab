"""Names of runs: model, method and goal of one; of several, the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

QUANTITIES = {"macs": "MACs", "params": "parameters", "channels": "channels", "memory": "memory", "latency": "latency"}
MOST = 4
"""So many settings beside model, method, data and goal stand in a name."""
LONGEST = 28
"""Characters of one value in a name."""

_LEADING = ("model", "method", "data", "goal")
_OF_RUN_FILE = ("model_options", "data_options", "baseline", "batch_size", "input", "weights")


def name_of(config: Mapping[str, Any], folder: str) -> str:
    """Name one run by its model, its method and its goal; by its folder where it has written none of them down."""
    own = _settings(config)
    words = [own[key] for key in ("model", "method") if key in own]
    return " · ".join([*words, own["goal"]] if own.get("goal") else words) if len(words) == 2 else folder


def names_of(configs: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """Name several runs by the settings in which they differ; those that differ in none are numbered.

    Args:
        configs: What each run has written down of its settings.
        folders: Name of each run's folder, for one that has written down nothing.
    """
    own = [_settings(config) for config in configs]
    keys = list(dict.fromkeys([*_LEADING, *(key for settings in own for key in settings)]))
    differing = [key for key in keys if len({settings.get(key) for settings in own}) > 1]
    leading = [key for key in differing if key in _LEADING]
    others = [key for key in differing if key not in _LEADING]
    names = []
    for settings, config, folder in zip(own, configs, folders, strict=True):
        words = [settings[key] for key in leading if settings.get(key)]
        given = [key for key in others if settings.get(key, "none") != "none"]
        words += [f"{key.replace('_', ' ')} {settings[key]}" for key in given[:MOST]]
        words += [f"{len(given) - MOST} more settings"] if len(given) > MOST else []
        names.append(" · ".join(words) or ("defaults" if differing else name_of(config, folder)))
    counted, seen = Counter(names), Counter[str]()
    for place, name in enumerate(names):
        seen[name] += 1
        names[place] = f"{name} ({seen[name]})" if counted[name] > 1 else name
    return names


def drawn(values: Mapping[str, Any]) -> str:
    """Say what a sweep has drawn for a trial."""
    return ", ".join(f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in values.items())


def goal_of(config: Mapping[str, Any]) -> str:
    """Say where a run was to stop: at a target, at given widths or ratios, or where its tolerance ends."""
    target = config.get("target")
    if isinstance(target, Mapping):
        what = next((key for key in QUANTITIES if target.get(key) is not None), None)
        if what is not None:
            setting = [str(target["runtime"])] if target.get("runtime") else []
            setting += [f"{key} {target[key]}" for key in ("batch", "threads") if target.get(key)]
            return f"{QUANTITIES[what]} −{100 * target[what]:g}%" + (f" ({', '.join(setting)})" if setting else "")
    for key, section in (("widths", "settings"), ("ratios", "options")):
        if isinstance(config.get(section), Mapping) and config[section].get(key):
            return f"given {key}"
    tolerance = config.get("tolerance")
    return f"{tolerance:g} points" if isinstance(tolerance, int | float) and not isinstance(tolerance, bool) else ""


def bounded(config: Mapping[str, Any]) -> bool:
    """Tell whether the tolerance decides where a run stops."""
    return goal_of(config).endswith(" points")


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what was asked of a run as words; what its method has filled in follows from them."""
    words = {key: _word(config[key]) for key in ("model", "method", "data", "seed") if config.get(key) is not None}
    words["goal"] = goal_of(config)
    asked = config.get("asked") or config.get("settings") or {}
    of_file = {key: value for key, value in (config.get("run") or {}).items() if key in _OF_RUN_FILE}
    for section in (config.get("options") or {}, asked, of_file):
        words |= {key: _word(value) for key, value in section.items() if key not in words}
    return words


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_word(inner)}" for key, inner in value.items()) or "none"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(_word, value)) or "none"
    elif isinstance(value, float):
        text = f"{value:g}"
    elif value is None or isinstance(value, bool):
        text = {None: "none", True: "yes", False: "no"}[value]
    else:
        text = str(value)
        text = PurePath(text).name if "/" in text else text
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
