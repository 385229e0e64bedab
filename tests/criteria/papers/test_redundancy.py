"""Redundancy: greedy elimination against refitting every candidate from scratch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.criteria.moments import Moments
from secateur.criteria.papers.redundancy import eliminate, redundancy
from secateur.errors import CriterionError, UsageError

seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rows: torch.Tensor) -> Moments:
    result = Moments.empty(rows.shape[1])
    result.update(rows)
    return result


def error_without(weight: torch.Tensor, second: torch.Tensor, gone: list[int]) -> float:
    """Least error of W' x against W x when W' is refitted with the channels gone."""
    kept = [i for i in range(len(second)) if i not in gone]
    fitted = torch.zeros_like(weight)
    if kept:
        fitted[:, kept] = torch.linalg.solve(second[kept][:, kept], (weight @ second[:, kept]).T).T
    difference = weight - fitted
    return float((difference @ second @ difference.T).trace())


@settings(max_examples=15)
@given(seeds, st.sampled_from([1, 3, 64]))
def test_elimination_takes_the_cheapest_of_all_refits(seed: int, block: int) -> None:
    second = moments(drawn(seed, 40, 6) @ drawn(seed + 1, 6, 6)).second
    weight = drawn(seed + 2, 4, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.criteria.papers.redundancy.BLOCK", block)
        costs, order = eliminate(second, weight.T @ weight, ridge=0.0)
    gone: list[int] = []
    for channel in order.tolist():
        refits = {c: error_without(weight, second, [*gone, c]) for c in range(6) if c not in gone}
        assert refits[channel] == pytest.approx(min(refits.values()), rel=1e-6, abs=1e-9)
        gone.append(channel)
        assert float(costs[gone].sum()) == pytest.approx(refits[channel], rel=1e-6, abs=1e-8)


def test_scores_accumulate_the_error_as_a_fraction_of_the_outputs() -> None:
    found, weight = moments(drawn(0, 40, 5)), drawn(1, 3, 5)
    scores = redundancy(found, (weight[..., None],), ridge=0.0)
    gone: list[int] = []
    for channel in scores.argsort().tolist():
        gone.append(channel)
        whole = float((weight @ found.second @ weight.T).trace())
        assert float(scores[channel]) == pytest.approx(error_without(weight, found.second, gone) / whole, rel=1e-6)
    assert float(scores.max()) == pytest.approx(1.0)


def test_a_sum_of_two_others_goes_although_it_has_no_close_partner() -> None:
    rows = drawn(0, 500, 4)
    rows[:, 3] = (rows[:, 0] + rows[:, 1] + rows[:, 2]) / 3**0.5
    scores = redundancy(moments(rows), (drawn(1, 6, 4, 1),))
    assert float(scores.min()) < 1e-3 < float(scores.sort().values[1])


def test_consumers_weigh() -> None:
    rows = drawn(0, 400, 3)
    weight = torch.tensor([[1.0, 0.01, 1.0]]).double()[..., None]
    assert int(redundancy(moments(rows), (weight,)).argmin()) == 1
    together = redundancy(moments(rows), (weight, 100 * weight.flip(1)))
    torch.testing.assert_close(together, redundancy(moments(rows), (100 * weight.flip(1), weight)))


def test_relative_gives_every_output_the_same_say() -> None:
    found, weight = moments(drawn(0, 100, 4)), drawn(1, 3, 4, 2)
    scaled = weight * torch.tensor([1.0, 50.0, 0.02]).double()[:, None, None]
    torch.testing.assert_close(redundancy(found, (scaled,), relative=True), redundancy(found, (weight,), relative=True))


def test_dead_channels_and_too_few_samples_are_ranked_all_the_same() -> None:
    rows = drawn(0, 3, 8)  # fewer samples than channels: M is singular
    rows[:, 5] = 0.0
    scores = redundancy(moments(rows), (drawn(1, 4, 8, 1),))
    assert bool(torch.isfinite(scores).all())
    assert int(scores.argmin()) == 5
    assert int((scores < 1e-2).sum()) >= 5, "three samples span three dimensions: five channels cost nothing"


@given(seeds)
def test_permuting_channels_permutes_scores(seed: int) -> None:
    rows, weight = drawn(seed, 60, 6), drawn(seed + 1, 3, 6, 2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain = redundancy(moments(rows), (weight,))
    torch.testing.assert_close(redundancy(moments(rows[:, order]), (weight[:, order],)), plain[order])


def test_centred_moments_ignore_the_mean() -> None:
    rows, weight = drawn(0, 50, 4), (drawn(1, 3, 4, 1),)
    plain = redundancy(moments(rows - rows.mean(0)), weight)
    torch.testing.assert_close(redundancy(moments(rows + 5), weight, centred=True), plain)


def test_bad_requests_are_refused() -> None:
    found = moments(drawn(0, 9, 3))
    with pytest.raises(CriterionError, match="no consumer"):
        redundancy(found, ())
    with pytest.raises(UsageError, match="ridge"):
        redundancy(found, (drawn(0, 2, 3, 1),), ridge=-1.0)
