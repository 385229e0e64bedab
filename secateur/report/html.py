"""The parts of every page: templates, assets and data inside one file that loads nothing from the internet."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def page(template: str, **values: Any) -> str:
    """Fill a template of this package; text is escaped, and a name that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("secateur.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written: str = environment.get_template(template).render(version=_version(), **values)
    return written


def asset(*names: str) -> Markup:
    """Return style sheets or scripts of this package, one after another."""
    folder = resources.files("secateur.report")
    return Markup("\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names))


def script_json(value: Any) -> Markup:
    """Write JSON that can stand inside a script element whatever names it holds."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON can't hold, by null, which a chart leaves out."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("secateur")
    except PackageNotFoundError:
        return ""
