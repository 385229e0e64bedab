"""Criteria: which channels of a group matter least. One file a paper, named by its citation key.

Importing this package registers the built-in criteria; see :mod:`secateur.criteria.registry` for how to add one.
"""

from secateur.criteria import (
    he2019fpgm,
    kumar2022corrnet,
    li2017l1,
    lin2020hrank,
    molchanov2019taylor,
    redundancy,
    shao2022cshe,
    singh2020cfp,
    sui2021chip,
)
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
    "he2019fpgm",
    "kumar2022corrnet",
    "li2017l1",
    "lin2020hrank",
    "molchanov2019taylor",
    "names",
    "redundancy",
    "register",
    "shao2022cshe",
    "singh2020cfp",
    "sui2021chip",
    "unregister",
]
