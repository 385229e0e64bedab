"""The table of small networks, one for each pattern that people's networks have, each with its expectation."""

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
    "programs",
    "reductions",
    "reordering",
    "widths",
]
