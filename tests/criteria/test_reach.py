"""Whatever can be traced can be scored, compensated and pruned in rounds, or ends in one clean line that is true."""

from __future__ import annotations

import pytest

from tests.cases import CASES
from tests.criteria.networks import NETWORKS
from tests.criteria.reach import DTYPES, reach, untrue

# Some networks do on purpose what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore")

FAST = {
    *("c2f", "halves_at_two_scales", "masked", "grouped_transposed", "one_channel_a_block"),
    *("mixed_depthwise", "takes_a_deep_dict", "no_grad_inside"),
}
"""A network or two of each kind, in fp64; the others are slow together."""


def test_names_are_of_one_network() -> None:
    assert not CASES.keys() & NETWORKS.keys()
    assert not FAST - {*CASES, *NETWORKS}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, p, marks=() if name in FAST and (p == "fp64" or name == "c2f") else pytest.mark.slow)
        for name in dict.fromkeys((*CASES, *NETWORKS))
        for p in DTYPES
    ],
)
def test_a_result_or_one_clean_line(name: str, precision: str) -> None:
    found = reach(name, DTYPES[precision])
    assert not untrue(found)
    assert found.results["trace"] == 1
