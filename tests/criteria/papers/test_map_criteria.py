"""Criteria of single feature maps: rank, nuclear norms, spectral energy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.criteria.papers.lin2020hrank import as_matrices, hrank
from secateur.criteria.papers.shao2022cshe import spectral_energy
from secateur.criteria.papers.sui2021chip import chip
from secateur.errors import UsageError

seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int, height: int, width: int) -> torch.Tensor:
    return drawn(rank, height, rank) @ drawn(rank + 50, rank, width)


def test_hrank_is_the_rank_of_each_map() -> None:
    maps = torch.stack([torch.stack([of_rank(r, 5, 4) for r in (0, 1, 2, 3)]) for _ in range(2)])
    assert hrank(maps).tolist() == [[0, 1, 2, 3]] * 2
    assert hrank(maps.float()).tolist() == [[0, 1, 2, 3]] * 2
    expected = [[np.linalg.matrix_rank(m.numpy()) for m in sample] for sample in maps]
    assert hrank(maps).tolist() == expected


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_maps_of_any_number_of_dimensions_are_matrices(shape: tuple[int, ...]) -> None:
    maps = drawn(0, *shape)
    matrices = as_matrices(maps)
    assert matrices.dim() == 4
    assert torch.equal(matrices.flatten(), maps.flatten())
    assert hrank(maps).shape == spectral_energy(maps).shape == chip(maps).shape == (2, 3)


def test_chip_by_hand() -> None:
    # Two equal unit rows: the nuclear norm is √2, and 1 without either.
    equal = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, :, None]
    torch.testing.assert_close(chip(equal)[0], torch.full((2,), 2**0.5 - 1).double())
    # A row orthogonal to all others scores its norm.
    lone = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]])[None, :, None]
    assert chip(lone)[0, 0] == pytest.approx(3.0)


@pytest.mark.parametrize("positions", [(2, 2), (3, 4)])  # fewer and more positions than channels
@given(seed=seeds)
def test_chip_is_the_loss_of_nuclear_norm(positions: tuple[int, int], seed: int) -> None:
    maps = drawn(seed, 2, 5, *positions)
    scores = chip(maps)
    for n in range(2):
        rows = maps[n].flatten(1).numpy()
        whole = np.linalg.svd(rows, compute_uv=False).sum()
        for i in range(5):
            zeroed = rows.copy()
            zeroed[i] = 0
            assert scores[n, i] == pytest.approx(whole - np.linalg.svd(zeroed, compute_uv=False).sum(), abs=1e-9)


def test_chip_in_chunks_is_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = drawn(1, 3, 7, 2, 4)
    whole = chip(maps)
    monkeypatch.setattr("secateur.criteria.papers.sui2021chip.CHUNK", 1)
    torch.testing.assert_close(chip(maps), whole)


@given(seeds)
def test_energy_of_an_outer_product_is_its_only_singular_value(seed: int) -> None:
    u, v = drawn(seed, 4), drawn(seed + 1, 6)
    score = spectral_energy(torch.outer(u, v)[None, None])
    assert float(score) == pytest.approx(float(u.norm() * v.norm()))


@given(seeds, st.floats(0.05, 1.0))
def test_energy_sums_the_fewest_large_singular_values_that_hold_the_share(seed: int, share: float) -> None:
    a = drawn(seed, 4, 6)
    sigma = sorted(np.linalg.eigvalsh((a @ a.T).numpy()).clip(0) ** 0.5, reverse=True)
    assert sum(s * s for s in sigma) == pytest.approx(float((a * a).sum()))
    total, expected = 0.0, 0.0
    for s in sigma:
        if total >= share * float((a * a).sum()) * (1 - 1e-6):
            break
        total, expected = total + s * s, expected + s
    assert float(spectral_energy(a[None, None], energy=share)) == pytest.approx(expected)


@given(seeds, st.floats(-8, 8).filter(lambda c: abs(c) > 1e-3))
def test_energy_scales_with_the_map(seed: int, factor: float) -> None:
    a = drawn(seed, 1, 2, 5, 3)
    torch.testing.assert_close(spectral_energy(factor * a), abs(factor) * spectral_energy(a))


def test_energy_of_a_nilpotent_map_is_not_its_eigenvalues() -> None:
    assert float(spectral_energy(torch.tensor([[0.0, 1.0], [0.0, 0.0]])[None, None])) == 1.0


def test_energy_terms() -> None:
    a = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None, None]
    assert [float(spectral_energy(a, terms=t)) for t in (1, 2, "all")] == pytest.approx([3.0, 5.0, 6.0])
    assert float(spectral_energy(torch.zeros(1, 1, 3, 3))) == 0.0
    for bad in ({"energy": 0.0}, {"energy": 1.5}, {"terms": 0}, {"terms": "some"}):
        with pytest.raises(UsageError, match="cshe"):
            spectral_energy(a, **bad)  # type: ignore[arg-type]
