"""Criteria: which channels of a group matter least. One file a paper, named by its citation key.

Importing this package registers the built-in criteria; see :mod:`secateur.criteria.registry` for how to add one.
"""

from secateur.criteria import papers
from secateur.criteria.registry import (
    Criterion,
    Need,
    Pair,
    Returns,
    Selection,
    criterion,
    get,
    names,
    register,
    unregister,
)

__all__ = [
    "Criterion",
    "Need",
    "Pair",
    "Returns",
    "Selection",
    "criterion",
    "get",
    "names",
    "papers",
    "register",
    "unregister",
]
