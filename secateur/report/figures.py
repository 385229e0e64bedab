"""A figure's content as plain data: the one source of its chart on a page, its print for a paper, and its table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

Number = float | int
Cell = str | Number | bool | None
Format = Literal["text", "integer", "decimal", "percent", "metric", "quantity", "bytes"]
"""How a number is written: as it is, to three digits, as a percentage, likewise with tenths on an axis, with an SI
prefix, as a size."""


class Tone(StrEnum):
    """What a series stands for; each rendering gives it its own colour and marker."""

    BEFORE = "before"
    AFTER = "after"
    BEFORE_COMPUTED = "before-computed"
    AFTER_COMPUTED = "after-computed"
    REVERTED = "reverted"
    LIMIT = "limit"
    RUN = "run"
    """One of several runs; coloured by its place."""
    TRIAL = "trial"
    """Trials of a sweep; coloured by its place, their markers open and small."""


@dataclass(frozen=True)
class Series:
    """Points of one kind."""

    name: str
    x: Sequence[Number] | Sequence[str]
    y: Sequence[Number | None]
    kind: Literal["bar", "line", "points", "rule"]
    tone: Tone
    labels: list[str] = field(default_factory=list)
    """Names of the points, where ``x`` alone does not name them."""
    error: Sequence[Number] = field(default_factory=list)
    """Half the interquartile range of each ``y``."""
    place: int = 0
    """Index among runs or settings, for telling series of one tone apart."""


@dataclass(frozen=True)
class Figure:
    """A chart with its text alternative."""

    id: str
    title: str
    summary: str
    """What a reader should take from it, in a sentence: the text alternative."""
    x_label: str
    y_label: str
    series: list[Series]
    x_scale: Literal["category", "linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"
    source: str = ""
    """The figure or the equations of a paper that it follows."""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_format: Format = "text"
    y_format: Format = "decimal"

    def table(self) -> Table:
        """The same numbers as a table: one row a category, or one row a point."""
        if self.x_scale == "category" or _shares_x(self.series):
            keys: list[Number | str] = list(dict.fromkeys(x for s in self.series for x in s.x))
            lookup = [dict(zip(s.x, s.y, strict=True)) for s in self.series]
            rows: list[list[Cell]] = [[key, *(points.get(key) for points in lookup)] for key in keys]
            formats: dict[str, Format] = {s.name: self.y_format for s in self.series}
            return Table(
                [self.x_label, *(s.name for s in self.series)],
                rows,
                self.title,
                {self.x_label: self.x_format, **formats},
            )
        rows = []
        for s in self.series:
            names = s.labels or [""] * len(s.x)
            rows += [[s.name, name, x, y] for name, x, y in zip(names, s.x, s.y, strict=True)]
        return Table(
            ["Series", "Point", self.x_label, self.y_label],
            rows,
            self.title,
            {self.x_label: self.x_format, self.y_label: self.y_format},
        )


@dataclass(frozen=True)
class HeatMap:
    """|ρ| of every pair of filters of one layer, before or after."""

    module: str
    before: list[list[float]]
    after: list[list[float]] | None
    filters_before: int
    filters_after: int | None
    max_before: float
    max_after: float | None
    cell: int = 1
    """Filters a side of one cell: 1, or more where a wide layer is shown by the largest |ρ| of each block."""

    @property
    def summary(self) -> str:
        """The text alternative."""
        text = f"{self.module}: {self.filters_before} filters, largest |ρ| {self.max_before:.2f} before"
        if self.filters_after is not None and self.max_after is not None:
            text += f"; {self.filters_after} filters, largest |ρ| {self.max_after:.2f} after"
        return text + "."


@dataclass(frozen=True)
class Table:
    """Columns and rows; numbers stay numbers so that they can be sorted."""

    columns: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    formats: dict[str, Format] = field(default_factory=dict)
    """Column -> how its numbers are written; default as they are, to three digits where they have decimals."""

    def text(self, row: list[Cell], column: int) -> str:
        """Write one cell."""
        return write(row[column], self.formats.get(self.columns[column], "decimal"))


def write(value: Cell, form: Format) -> str:
    """Write a value in a format; an absent one as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    match form:
        case "percent" | "metric":
            return percent(value, 2)
        case "quantity":
            return quantity(value)
        case "bytes":
            return byte_size(value)
        case "integer":
            return f"{value:,.0f}"
        case "decimal" if isinstance(value, float):
            return significant(value)
        case _:
            return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _shares_x(series: list[Series]) -> bool:
    """Whether one row a value of ``x`` loses nothing: no series has a value twice, or names for its points."""
    return all(not s.labels and len(set(s.x)) == len(s.x) for s in series)


def quantity(value: Number, unit: str = "", digits: int = 3) -> str:
    """Write a count with an SI prefix: 12,345,678 as ``12.3 M``."""
    magnitude = abs(value)
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if magnitude >= size:
            return f"{significant(value / size, digits)} {prefix}{unit}"
    return f"{significant(value, digits)} {unit}".rstrip()


def byte_size(value: Number, digits: int = 3) -> str:
    """Write a number of bytes with a decimal prefix: 1,092,664 as ``1.09 MB``."""
    return quantity(value, "B", digits)


def significant(value: Number, digits: int = 3) -> str:
    """Round to significant digits without an exponent, keeping whole numbers whole."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if isinstance(value, int) and abs(value) < 10**digits:
        return str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def percent(fraction: Number, decimals: int = 1) -> str:
    """Write a fraction as a percentage."""
    return f"{100 * fraction:.{decimals}f}%"
