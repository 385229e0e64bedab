"""The table of small networks, one for each pattern that people's networks have, each with its expectation."""

from typing import Any

import pytest

from tests.cases import attention, convolutions, joins, norms, programs, reductions, reordering, widths
from tests.cases.table import CASES, Case, Net

__all__ = [
    "CASES",
    "Case",
    "Net",
    "attention",
    "convolutions",
    "joins",
    "norms",
    "one_in",
    "programs",
    "reductions",
    "reordering",
    "widths",
]


def one_in(number: int) -> list[Any]:
    """Return all cases to parametrise a test over, of which the fast run takes one in so many."""
    return [pytest.param(c, marks=[pytest.mark.slow] if i % number else []) for i, c in enumerate(CASES.values())]
