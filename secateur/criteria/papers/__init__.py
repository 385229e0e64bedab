"""One file a paper, named by its citation key: importing them registers the criteria that they give."""

from secateur.criteria.papers import (
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

__all__ = [
    "he2019fpgm",
    "kumar2022corrnet",
    "li2017l1",
    "lin2020hrank",
    "molchanov2019taylor",
    "redundancy",
    "shao2022cshe",
    "singh2020cfp",
    "sui2021chip",
]
