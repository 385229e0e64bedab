"""Labels through reshapes, by laying every element's label out in full."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from secateur.tracing.geometry import merged, pieces, rows_along, varying


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=6))

    def grouped() -> tuple[int, ...]:
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(1)
            shape[-1] *= factor
        return tuple(shape)

    return grouped(), grouped()


@given(reshapes())
def test_runs_have_equal_products_and_cover_every_dimension(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    found = pieces(old, new)
    for left, right in found:
        assert np.prod([old[d] for d in left]) == np.prod([new[d] for d in right])
    assert [d for left, _ in found for d in left] == [d for d, n in enumerate(old) if n > 1]
    assert [d for _, right in found for d in right] == [d for d, n in enumerate(new) if n > 1]


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_merged_is_the_reshape_of_the_laid_out_labels(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    vector = np.arange(shape[dim])
    full = np.empty(shape, dtype=np.int64)
    for index in np.ndindex(*shape):
        full[index] = vector[index[dim]]
    assert merged(vector, range(len(shape)), dim, shape).tolist() == full.reshape(-1).tolist()


def test_varying_names_the_axes_along_which_labels_differ() -> None:
    assert varying(np.array([[0, 0], [1, 1]])) == [0]
    assert varying(np.array([[0, 1], [0, 1]])) == [1]
    assert varying(np.array([[0, 1], [2, 3]])) == [0, 1]
    assert varying(np.zeros((2, 3), dtype=np.int64)) == []


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_a_row_holds_all_elements_at_one_index_along_an_axis(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    vector = np.arange(int(np.prod(shape)))
    rows = rows_along(vector, shape, axis)
    for element, index in zip(vector, np.ndindex(*shape), strict=True):
        assert element in rows[index[axis]]
    assert rows.size == vector.size
